"""A judge cache in one SQLite file: a score that was paid for once is not asked for again."""

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges.base import Judge, JudgeRequest, StreamingJudge, Verdict

_APPLICATION_ID = 0x736C6D6A  # "slmj", so that a foreign SQLite file is recognised
_SCHEMA_VERSION = 1
_BUSY_SECONDS = 60.0
_CHUNK = 500  # below SQLite's smallest limit on variables in one statement, 999
_SCHEMA = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY,
    score REAL NOT NULL CHECK (score BETWEEN 1 AND 5),
    explanation TEXT NOT NULL,
    judge TEXT NOT NULL
) WITHOUT ROWID
"""


class JudgeCache:
    """Scores by request and judge, in SQLite's WAL mode, safe for several processes. Missing verdicts are never kept.

    Connections live for a session: none is held between calls, so an instance may be used from any thread and after a fork.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or create the file.

        Raises:
            JudgeError: when the file is damaged, is no SQLite file, or belongs to another program.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.session():
            pass

    @contextmanager
    def session(self) -> Iterator["CacheSession"]:
        """Keep one connection open for several calls, which may come from several threads, but one at a time."""
        try:
            with closing(self._open()) as db:
                yield CacheSession(db)
        except sqlite3.OperationalError as problem:
            raise JudgeError(
                f"judge cache {str(self.path)!r} cannot be used: {problem}. Check the path, its permissions and the free space."
            ) from problem
        except sqlite3.DatabaseError as problem:
            raise JudgeError(
                f"judge cache {str(self.path)!r} is damaged or no SQLite file: {problem}. Give another path, or move the file away."
            ) from problem

    def get_many(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Return the verdicts that are there, by key, marked ``cached``."""
        with self.session() as session:
            return session.get_many(keys)

    def put_many(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep the scores, in one transaction; missing verdicts are left out, and what is there already stays."""
        with self.session() as session:
            session.put_many(verdicts)

    def __len__(self) -> int:
        """How many verdicts are kept."""
        with self.session() as session:
            return len(session)

    def _open(self) -> sqlite3.Connection:
        """Return a checked connection; SQLite's own timeout does not cover turning WAL on, nor another connection's clean-up of it."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, check_same_thread=False)
            try:
                db.execute("PRAGMA synchronous = NORMAL")  # with WAL: a power cut may cost the last verdicts, never the file
                self._check_or_create(db)
                return db
            except sqlite3.OperationalError as problem:
                db.close()
                if problem.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except BaseException:
                db.close()
                raise

    def _check_or_create(self, db: sqlite3.Connection) -> None:
        # tables first: another process may create them and set both marks, in one transaction, between these reads
        tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if tables and owner == _APPLICATION_ID and version != _SCHEMA_VERSION:
            raise JudgeError(f"judge cache {str(self.path)!r} has version {version}, this library reads {_SCHEMA_VERSION}. Give another path.")
        if tables and owner != _APPLICATION_ID:
            raise JudgeError(f"judge cache {str(self.path)!r} is a SQLite file of another program. Give another path.")
        if not tables:
            db.execute("PRAGMA journal_mode = WAL")
            with db:
                # the marks and the table become visible together, so a second process never sees a half-made cache as foreign
                db.execute("BEGIN IMMEDIATE")
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                db.execute(_SCHEMA)


class CacheSession:
    """An open connection to a cache; made by ``JudgeCache.session``."""

    def __init__(self, db: sqlite3.Connection) -> None:
        """Use ``JudgeCache.session`` instead."""
        self._db = db

    def get_many(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Do what ``JudgeCache.get_many`` does."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Verdict] = {}
        for start in range(0, len(wanted), _CHUNK):
            part = wanted[start : start + _CHUNK]
            rows = self._db.execute(f"SELECT key, score, explanation, judge FROM verdicts WHERE key IN ({','.join('?' * len(part))})", part)
            found |= {key: Verdict(score=score, explanation=text, judge=judge, cached=True) for key, score, text, judge in rows}
        return found

    def put_many(self, verdicts: Mapping[str, Verdict]) -> None:
        """Do what ``JudgeCache.put_many`` does."""
        rows = [(key, v.score, v.explanation, v.judge) for key, v in verdicts.items() if v.score is not None]
        if rows:
            with self._db:
                self._db.executemany("INSERT OR IGNORE INTO verdicts (key, score, explanation, judge) VALUES (?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        """How many verdicts are kept."""
        return int(self._db.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])


class CachedJudge:
    """A judge that asks only for distinct requests that the cache does not hold."""

    def __init__(self, judge: Judge, cache: JudgeCache) -> None:
        """Wrap ``judge``; the cache may be shared with other judges, its keys hold the judge's identity."""
        self._judge = judge
        self._cache = cache

    @property
    def name(self) -> str:
        """The wrapped judge's name."""
        return self._judge.name

    @property
    def identity(self) -> str:
        """The wrapped judge's identity: a cache does not change a verdict."""
        return self._judge.identity

    @property
    def remote(self) -> bool:
        """Whether the wrapped judge waits for somebody else's answer."""
        return bool(getattr(self._judge, "remote", False))

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order; requests that repeat are judged once, finished scores are kept even when the batch fails."""
        keys = [request_key(self.identity, r) for r in requests]
        with self._cache.session() as session:
            known = session.get_many(keys)
            unknown = {key: r for key, r in zip(keys, requests, strict=True) if key not in known}
            if unknown:
                known |= self._ask(unknown, session)
        return [known[key] for key in keys]

    def _ask(self, requests: Mapping[str, JudgeRequest], session: CacheSession) -> dict[str, Verdict]:
        keys = list(requests)
        if isinstance(self._judge, StreamingJudge):
            verdicts = self._judge.judge_each(list(requests.values()), lambda index, verdict: session.put_many({keys[index]: verdict}))
            return dict(zip(keys, verdicts, strict=True))
        fresh = dict(zip(keys, self._judge.judge(list(requests.values())), strict=True))
        session.put_many(fresh)
        return fresh


def request_key(identity: str, request: JudgeRequest) -> str:
    """Return the cache key: SHA-256 of the judge's identity and the request's full content."""
    return content_hash({"judge": identity, "request": request.model_dump(mode="json")})
