"""Whether a judge can be trusted for an effect: its noise, its biases, whether it tells good from bad, and the least difference it can show."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from steered_lm.config import content_hash
from steered_lm.errors import JudgeError
from steered_lm.judges import audit_parts as parts
from steered_lm.judges.audit_items import AuditItem
from steered_lm.judges.audit_parts import Judged
from steered_lm.judges.audit_report import AuditReport, Detectable, Part
from steered_lm.judges.base import Judge, JudgeRequest, Usage, Verdict
from steered_lm.judges.detectable import detectable_difference, prompts_needed
from steered_lm.judges.pairwise import BothOrders, both_orders
from steered_lm.judges.question import Question

VERSION = 1
"""Raised with every change of what an audit asks or concludes: stored audits of another version are not reused."""

_TABLE = (10, 25, 50, 100, 200)
_SHARE_OF_SCALE = 8.0  # 0.5 points of a scale from 1 to 5


def default_effect(question: Question) -> float:
    """Return an eighth of the scale: 0.5 points from 1 to 5, 12.5 from 0 to 100, 0.25 of a preference."""
    low, high = question.bounds
    return (high - low) / _SHARE_OF_SCALE


def audit_key(judge: Judge, question: Question, items: Sequence[AuditItem], **settings: Any) -> str:
    """Return the hash of everything that an audit depends on: judge, question, items, settings, and this code's version."""
    content = [item.model_dump(mode="json") for item in items]
    return content_hash({"audit": VERSION, "judge": judge.identity, "question": question.digest, "items": content, "settings": settings})


def audit(
    judge: Judge,
    question: Question,
    items: Sequence[AuditItem],
    *,
    repeats: int = 2,
    effect: float | None = None,
    prompts: int = 50,
    missing_limit: float = 0.2,
    seed: int = 0,
) -> AuditReport:
    """Judge items of known quality several times and return what that says about the judge.

    All items are judged once, and the anchors (of pairs also the close ones) again ``repeats - 1`` times beside any cache; a pairwise judge is asked
    in both orders. Two numbers say what the judge can show, both by :func:`~steered_lm.judges.detectable.detectable_difference` (paired t test, 5 %
    two-sided, power 80 %):

    - by its noise alone: the standard deviation of a prompt's difference is ``sqrt(2)`` times that of one judgement's error, from the test-retest, as
      two arms with the same replies to the same prompts would differ; a pairwise verdict is itself the difference, so its own one counts;
    - with the scatter between replies: ``sqrt(2)`` times the standard deviation of single scores over the high anchors, replies of one quality to
      different prompts (pairwise: that of preferences between two of them). It is cautious, for two replies to one prompt share that prompt;
      and it is never below the first, which it holds.

    The judge is trusted when no part fails. ``noise`` fails when the first number at ``prompts`` exceeds ``effect``, and warns when the upper end of
    its interval or the second number does.

    Args:
        judge: the judge, cached or not.
        question: what it is asked.
        items: from :func:`~steered_lm.judges.audit_items.audit_items`.
        repeats: how often each anchor is judged, at least 2.
        effect: the difference of two arms that is sought, in points; by default an eighth of the scale.
        prompts: on how many prompts the arms will be compared, at least 2.
        missing_limit: the largest share of missing verdicts that does not fail.
        seed: seeds the permutation test of the null arm.

    Raises:
        JudgeError: when a setting is out of its range, or the judge cannot go on.
    """
    wanted = default_effect(question) if effect is None else effect
    _check_settings(repeats, wanted, prompts)
    pair = question.kind == "pairwise"
    asked = BothOrders(judge) if pair and not _asks_both_orders(judge) else judge
    found = _ask(asked, question, items, repeats)
    noise = found.noise()
    difference = None if noise.value is None else noise.value * (1.0 if pair else 2**0.5)
    scatter = found.scatter(pair)
    if scatter is not None and difference is not None:
        scatter = max(scatter, difference)  # both are estimates; scores scatter by the judge's noise at least
    looked_at = (
        parts.missing_part(found, missing_limit),
        parts.retest_part(found, noise),
        parts.order_part(found, wanted) if pair else Part(name="order", outcome="n/a", sentence="One response at a time has no order."),
        parts.null_pairs_part(found, wanted) if pair else parts.null_scores_part(found, wanted, seed),
        parts.length_part(found, wanted, pair),
        parts.anchor_pairs_part(found, wanted) if pair else parts.anchors_part(found, wanted),
        parts.broken_part(found),
        parts.noise_part(noise, difference, scatter, wanted, prompts),
    )
    settings = {"repeats": repeats, "effect": wanted, "prompts": prompts, "missing_limit": missing_limit, "seed": seed}
    return AuditReport(
        key=audit_key(judge, question, items, **settings),
        judge=judge.name,
        identity=judge.identity,
        kind=question.kind,
        about=question.about,
        scale=question.bounds,
        effect=wanted,
        prompts=prompts,
        repeats=repeats,
        items=dict(Counter(item.sort for item in items)),
        judgements=len(found.verdicts),
        reasons=dict(Counter(v.missing for v in found.verdicts if v.missing is not None)),
        usage=sum(paid, Usage()) if (paid := list(_usages(found.verdicts))) else None,
        parts=looked_at,
        detectable=tuple(
            Detectable(prompts=n, noise=_detectable(difference, n), replies=_detectable(scatter, n)) for n in sorted({*_TABLE, prompts})
        ),
        needed_noise=None if difference is None else prompts_needed(difference, wanted),
        needed_replies=None if scatter is None else prompts_needed(scatter, wanted),
    )


def audit_requests(items: Sequence[AuditItem], repeats: int) -> list[JudgeRequest]:
    """Return what an audit asks, repeats included; a pairwise judge is asked each in both orders."""
    return [item.request for item in items] + [item.request for item in items if item.retested] * (repeats - 1)


def estimate_usage(judge: Judge, requests: Sequence[JudgeRequest]) -> Usage | None:
    """Return what requests would take, by the judge's own ``estimate``, without asking; None when it has none (judges that compute)."""
    if isinstance(judge, BothOrders):
        return estimate_usage(judge.inner, both_orders(requests))
    estimate = getattr(judge, "estimate", None)
    if estimate is not None:
        usage: Usage | None = estimate(requests)
        return usage
    members = [usage for member in getattr(judge, "members", ()) if (usage := estimate_usage(member, requests)) is not None]
    return sum(members, Usage()) if members else None


def beside_cache(judge: Judge) -> Judge:
    """Return the judge without the caches that it, or each member of a panel, may be wrapped in, so that it is asked anew."""
    from steered_lm.judges.cached import CachedJudge
    from steered_lm.judges.panel import Panel

    if isinstance(judge, BothOrders):
        return BothOrders(beside_cache(judge.inner))
    if isinstance(judge, Panel):
        return judge.with_members([beside_cache(member) for member in judge.members])
    return judge.inner if isinstance(judge, CachedJudge) else judge


def _check_settings(repeats: int, effect: float, prompts: int) -> None:
    if repeats < 2:
        raise JudgeError(f"repeats={repeats} shows no noise. Allowed: 2 or more judgements of each anchor.")
    if not effect > 0:
        raise JudgeError(f"effect={effect} is no difference. Allowed: points above 0, such as 0.5 on a scale from 1 to 5.")
    if prompts < 2:
        raise JudgeError(f"prompts={prompts} are too few to compare two arms on. Allowed: 2 or more.")


def _ask(judge: Judge, question: Question, items: Sequence[AuditItem], repeats: int) -> Judged:
    anew = beside_cache(judge)
    # a response against itself is one request in both orders, which a cache would answer twice with the same verdict
    nulls = [position for position, item in enumerate(items) if item.sort == "null"]
    usual = [position for position, item in enumerate(items) if item.sort != "null"]
    again = [position for position in usual if items[position].retested]
    tests: list[list[Verdict]] = [[] for _ in items]
    for asked, positions in ((judge, usual), (anew, nulls), *[(anew, again)] * (repeats - 1)):
        verdicts = asked.judge([items[position].request for position in positions]) if positions else []
        for position, verdict in zip(positions, verdicts, strict=True):
            tests[position].append(_checked(verdict, question))
    return Judged(items, tests)


def _asks_both_orders(judge: Judge) -> bool:
    members = getattr(judge, "members", ())
    return isinstance(judge, BothOrders) or (bool(members) and all(isinstance(member, BothOrders) for member in members))


def _checked(verdict: Verdict, question: Question) -> Verdict:
    if verdict.score is not None and verdict.scale != question.bounds:
        raise JudgeError(f"judge {verdict.judge} scores on {verdict.scale}, and the question's scale is {question.bounds}. Give it this question.")
    return verdict


def _detectable(sd: float | None, prompts: int) -> float | None:
    return None if sd is None else detectable_difference(sd, prompts)


def _usages(verdicts: Sequence[Verdict]) -> Iterator[Usage]:
    """Yield what was paid for; a verdict that is made from others took what they took."""
    for verdict in verdicts:
        if verdict.parts:
            yield from _usages(verdict.parts)
        elif verdict.usage is not None and not verdict.cached:
            yield verdict.usage
