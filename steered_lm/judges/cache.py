"""A judge cache in one SQLite file: a verdict that was paid for once is not asked for again."""

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from steered_lm.config import Config
from steered_lm.errors import JudgeError
from steered_lm.judges.base import Verdict

_APPLICATION_ID = 0x736C6D6A  # "slmj", so that a foreign SQLite file is recognised
_SCHEMA_VERSION = 2
_BUSY_SECONDS = 60.0
_CHUNK = 500  # below SQLite's smallest limit on variables in one statement, 999
FACTS = ("model", "rubric", "rubric_version", "about")
"""What a judge's optional property ``facts`` may say of it, for people who look at the cache; its identity alone decides what is a hit."""
_COLUMNS = ("judge", *FACTS)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY,
    created INTEGER NOT NULL,
    {", ".join(f"{column} TEXT NOT NULL" for column in _COLUMNS)},
    verdict TEXT NOT NULL
) WITHOUT ROWID
"""
_INSERT = f"INSERT OR IGNORE INTO verdicts (key, created, {', '.join(_COLUMNS)}, verdict) VALUES (?, ?{', ?' * len(_COLUMNS)}, ?)"
_CACHED = '{"cached":true,'


class CacheGroup(NamedTuple):
    """What a cache holds of one judge and rubric; ``dollars`` is None where no price was known, ``first`` and ``last`` are UTC seconds."""

    judge: str
    model: str
    rubric: str
    rubric_version: str
    about: str
    verdicts: int
    first: int
    last: int
    input_tokens: int
    output_tokens: int
    dollars: float | None


class CacheFilter(Config):
    """Which verdicts are meant; what is None does not matter.

    Attributes:
        created_before: UTC seconds.
        judge, model, rubric, rubric_version, about: as ``steered-lm judge cache stats`` shows them.
    """

    created_before: float | None = None
    judge: str | None = None
    model: str | None = None
    rubric: str | None = None
    rubric_version: str | None = None
    about: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """Return an SQL condition and its values."""
        given = {column: value for column in _COLUMNS if (value := getattr(self, column)) is not None}
        terms = [f"{column} = ?" for column in given] + (["created < ?"] if self.created_before is not None else [])
        values = [*given.values(), *([self.created_before] if self.created_before is not None else [])]
        return " AND ".join(terms) or "1", values


class JudgeCache:
    """Verdicts by request and judge, in SQLite's WAL mode, safe for several processes. Missing verdicts are never kept.

    Connections live for a session: none is held between calls, so an instance may be used from any thread and after a fork.
    """

    def __init__(self, path: Path | str) -> None:
        """Open or create the file.

        Raises:
            JudgeError: when the file is damaged, is no SQLite file, or belongs to another program, or its folder cannot be made.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise JudgeError(f"judge cache {str(path)!r} cannot be written: {problem.strerror}. Name a file in another folder.") from problem
        with self.session():
            pass

    @classmethod
    def existing(cls, path: Path | str) -> Self:
        """Open a file that must be there already.

        Raises:
            JudgeError: when it is not, or is no judge cache.
        """
        if not Path(path).is_file():
            raise JudgeError(f"judge cache {str(path)!r} does not exist. Give the file that a run's --cache, --judge-cache or cache= named.")
        return cls(path)

    @contextmanager
    def session(self) -> Iterator["CacheSession"]:
        """Keep one connection open for several calls, which may come from several threads."""
        try:
            with closing(self._open()) as db:
                yield CacheSession(db, self.path)
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

    def put_many(self, verdicts: Mapping[str, Verdict], facts: Mapping[str, str] | None = None) -> None:
        """Keep the scores, in one transaction; missing verdicts are left out, and what is there already stays."""
        with self.session() as session:
            session.put_many(verdicts, facts)

    def stats(self) -> list[CacheGroup]:
        """Return what is kept, a row for each judge, model, rubric and subject, with the tokens and dollars that it took once."""
        group = ", ".join(_COLUMNS)
        usage = [f"json_extract(verdict, '$.usage.{name}')" for name in ("input_tokens", "output_tokens", "dollars")]
        totals = f"TOTAL({usage[0]}), TOTAL({usage[1]}), SUM({usage[2]})"
        with self.session() as session:
            rows = session.rows(f"SELECT {group}, COUNT(*), MIN(created), MAX(created), {totals} FROM verdicts GROUP BY {group} ORDER BY {group}")
            return [CacheGroup._make((*facts, int(read), int(written), dollars)) for *facts, read, written, dollars in rows]

    def count(self, chosen: CacheFilter) -> int:
        """Return how many verdicts a filter means."""
        condition, values = chosen.where()
        with self.session() as session:
            return int(next(session.rows(f"SELECT COUNT(*) FROM verdicts WHERE {condition}", values))[0])

    def prune(self, chosen: CacheFilter) -> int:
        """Remove the verdicts that a filter means, give their space back, and return how many there were."""
        condition, values = chosen.where()
        with self.session() as session:
            return session.delete(condition, values)

    def export(self) -> Iterator[dict[str, Any]]:
        """Yield each verdict with its key, its date and what is known of its judge, ready for JSON."""
        with self.session() as session:
            for key, created, *facts, text in session.rows(
                f"SELECT key, created, {', '.join(_COLUMNS)}, verdict FROM verdicts ORDER BY created, key"
            ):
                record = {name: value for name, value in session.verdict(key, text).record().items() if name != "cached"}
                yield {"key": key, "created": created, **dict(zip(_COLUMNS, facts, strict=True)), "verdict": record}

    def __len__(self) -> int:
        """How many verdicts are kept."""
        return self.count(CacheFilter())

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

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        """Use ``JudgeCache.session`` instead."""
        self._db = db
        self._path = path
        self._writing = threading.Lock()  # one transaction at a time: threads share the connection

    def get_many(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Do what ``JudgeCache.get_many`` does."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Verdict] = {}
        for start in range(0, len(wanted), _CHUNK):
            part = wanted[start : start + _CHUNK]
            rows = self.rows(f"SELECT key, verdict FROM verdicts WHERE key IN ({','.join('?' * len(part))})", part)
            found |= {key: self.verdict(key, text) for key, text in rows}
        return found

    def put_many(self, verdicts: Mapping[str, Verdict], facts: Mapping[str, str] | None = None) -> None:
        """Do what ``JudgeCache.put_many`` does."""
        now, known = int(time.time()), [str((facts or {}).get(name, "")) for name in FACTS]
        rows = [(key, now, v.judge, *known, _stored(v)) for key, v in verdicts.items() if v.score is not None]
        if rows:
            with self._writing, self._db:
                self._db.executemany(_INSERT, rows)

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[Any]:
        """Yield the rows of a query."""
        return self._db.execute(query, values)

    def delete(self, condition: str, values: Sequence[Any]) -> int:
        """Remove the verdicts that an SQL condition means and give their space back; return how many there were."""
        with self._writing:
            with self._db:
                removed = self._db.execute(f"DELETE FROM verdicts WHERE {condition}", values).rowcount
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def verdict(self, key: str, text: str) -> Verdict:
        """Return a stored verdict, checked like any other: the file may have been touched by others.

        Raises:
            JudgeError: when the row holds no verdict.
        """
        try:
            return Verdict.model_validate_json(_CACHED + text[1:])
        except ValidationError as problem:
            raise JudgeError(
                f"judge cache {str(self._path)!r} is damaged: row {key!r} holds no verdict ({problem.errors()[0]['msg']}). Move the file away."
            ) from problem


def _stored(verdict: Verdict) -> str:
    # defaults stay in: theirs may change, a verdict may not
    return verdict.model_dump_json(exclude={"cached"}, exclude_none=True)
