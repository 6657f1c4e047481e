"""A judge before which stands a cache: what was asked once is not asked again."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from steered_lm.judges.base import Judge, JudgeRequest, StreamingJudge, Usage, Verdict
from steered_lm.judges.cache import CacheSession, JudgeCache


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

    @property
    def facts(self) -> Mapping[str, str]:
        """What the wrapped judge says of itself, by the names in ``FACTS``; from one that says nothing, the model in its name."""
        facts: Mapping[str, str] = getattr(self._judge, "facts", {"model": self.name.partition(":")[2]})
        return facts

    @property
    def inner(self) -> Judge:
        """The judge that is asked for what the cache does not hold."""
        return self._judge

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict a request, in order.

        Requests that repeat are judged once, and their further verdicts are marked ``cached``, as they cost nothing. Finished scores are kept even
        when the batch fails or is interrupted, if the judge hands them over as they arrive.
        """
        identity = self.identity
        keys = [request_key(identity, r) for r in requests]
        with self._cache.session() as session:
            known = session.get_many(keys)
            if len(known) < len(keys):
                unknown = {key: r for key, r in zip(keys, requests, strict=True) if key not in known}
                return self._with_fresh(keys, known, self._ask(unknown, session))
        return [known[key] for key in keys]

    def estimate(self, requests: Sequence[JudgeRequest]) -> Usage | None:
        """Return what judging would take, for distinct requests that the cache does not hold; None when the wrapped judge gives no estimates."""
        estimate = getattr(self._judge, "estimate", None)
        if estimate is None:
            return None
        identity = self.identity
        distinct = {request_key(identity, r): r for r in requests}
        known = self._cache.get_many(distinct)
        usage: Usage = estimate([r for key, r in distinct.items() if key not in known])
        return usage

    @staticmethod
    def _with_fresh(keys: Sequence[str], known: Mapping[str, Verdict], fresh: dict[str, Verdict]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for key in keys:
            if (verdict := known.get(key)) is None:
                verdict = fresh[key]
                if not verdict.cached:
                    fresh[key] = verdict.model_copy(update={"cached": True})
            verdicts.append(verdict)
        return verdicts

    def _ask(self, requests: Mapping[str, JudgeRequest], session: CacheSession) -> dict[str, Verdict]:
        keys, facts = list(requests), self.facts
        if not isinstance(self._judge, StreamingJudge):
            fresh = dict(zip(keys, self._judge.judge(list(requests.values())), strict=True))
            session.put_many(fresh, facts)
            return fresh
        unsaved: dict[str, Verdict] = {}

        def keep(index: int, verdict: Verdict) -> None:
            unsaved[keys[index]] = verdict
            session.put_many({keys[index]: verdict}, facts)
            del unsaved[keys[index]]

        try:
            return dict(zip(keys, self._judge.judge_each(list(requests.values()), keep), strict=True))
        except BaseException:
            session.put_many(unsaved, facts)  # Ctrl-C can fall into a transaction and roll it back
            raise


def request_key(identity: str, request: JudgeRequest) -> str:
    """Return the cache key: SHA-256 of the judge's identity and the request's full content."""
    content = [identity, request.prompt, request.response, request.other, request.references, request.false_references]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
