"""The parts of an audit: each looks at one thing about a judge, and says what it found with an interval and in a sentence."""

from collections.abc import Iterator, Sequence
from itertools import chain

from scipy.stats import binomtest

from steered_lm.judges import why_missing
from steered_lm.judges.audit_items import AuditItem, Sort
from steered_lm.judges.audit_report import Outcome, Part
from steered_lm.judges.base import Verdict
from steered_lm.judges.detectable import auc_interval, detectable_difference, noise_sd, prompts_needed
from steered_lm.persona.style import words
from steered_lm.stats import Estimate, mean_gap, mean_interval, paired_difference, share_interval, spearman_interval

_CHANCE, _GRAVE = 0.05, 0.01
"""P-values below which a bias is warned about, and below which it fails when it is as large as the effect: a sound judge is to be refused seldom."""
_SURE, _STEADY = 0.9, 0.7
"""Below this share of right answers, and this rank correlation of repeats, there is a warning."""


class Judged:
    """Items with their verdicts: one each, and several of those that are judged again."""

    def __init__(self, items: Sequence[AuditItem], tests: Sequence[Sequence[Verdict]]) -> None:
        """Take each item's verdicts, in the items' order."""
        self.items, self.tests = items, tests
        self.verdicts = list(chain.from_iterable(tests))
        self.first = [verdicts[0].score for verdicts in tests]

    def where(self, *sorts: Sort) -> list[int]:
        """Return the positions of the items of these sorts."""
        return [position for position, item in enumerate(self.items) if item.sort in sorts]

    @property
    def retested(self) -> list[Sequence[Verdict]]:
        """The verdicts of the items that were judged several times."""
        return [verdicts for item, verdicts in zip(self.items, self.tests, strict=True) if item.retested]

    def scores(self, *sorts: Sort) -> list[float | None]:
        """Return the first scores of the items of these sorts."""
        return [self.first[position] for position in self.where(*sorts)]

    def change(self, position: int) -> float | None:
        """Return what a longer item gains for twice the words; None where a score is missing."""
        item, score = self.items[position], self.first[position]
        assert item.doublings is not None
        # a pair is its own comparison; all scores of the shorter one are used, as each of them carries noise
        base = [0.0] if item.of is None else [v.score for v in self.tests[item.of] if v.score is not None]
        return None if score is None or not base else (score - sum(base) / len(base)) / item.doublings

    def noise(self) -> Estimate:
        """Return the standard deviation of one judgement's error."""
        return noise_sd([[v.score for v in verdicts if v.score is not None] for verdicts in self.retested])

    def scatter(self, pair: bool) -> float | None:
        """Return the standard deviation of a prompt's difference between two arms of equal quality."""
        values = [score for score in self.scores("longer" if pair else "high") if score is not None]
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return float((variance * (1.0 if pair else 2.0)) ** 0.5)


def missing_part(found: Judged, limit: float) -> Part:
    """Count what has no score."""
    total, lost = len(found.verdicts), [v.missing for v in found.verdicts if v.missing is not None]
    share = share_interval(len(lost), total)
    common = why_missing(found.verdicts)
    outcome: Outcome = "fail" if len(lost) > limit * total else "warn" if lost else "pass"
    return Part(
        name="missing", outcome=outcome, sentence=f"{len(lost)} of {total} verdicts are missing{f': {common}' if common else ''}.", estimate=share
    )


def retest_part(found: Judged, noise: Estimate) -> Part:
    """Judge the same again: how far do scores scatter, and do ranks repeat?"""
    tests = found.retested
    first, second = ([verdicts[number].score for verdicts in tests] for number in (0, 1))
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    rank, same = spearman_interval(first, second), share_interval(sum(a == b for a, b in both), len(both))
    further = {"Spearman": rank, "identical": same}
    if noise.value is None:
        return Part(name="retest", outcome="fail", sentence="No item was scored twice.", estimate=noise, further=further)
    spoken = f"none found in {len(tests[0])} repeats: {noise.reason}" if noise.value == 0 else f"one judgement errs with SD {_with_interval(noise)}"
    ranks = "ranks do not repeat as all scores are equal" if rank.value is None else f"Spearman {_with_interval(rank)}"
    outcome: Outcome = "pass" if rank.value is not None and rank.value >= _STEADY else "warn"
    return Part(name="retest", outcome=outcome, sentence=f"Noise: {spoken}; {_share(same)} identical, {ranks}.", estimate=noise, further=further)


def null_scores_part(found: Judged, effect: float, seed: int) -> Part:
    """Take the same replies, judged twice, as two arms: they may not differ beyond chance."""
    tests = found.retested
    gap = paired_difference([verdicts[0].score for verdicts in tests], [verdicts[1].score for verdicts in tests], seed=seed)
    estimate = Estimate(value=gap.mean, low=gap.low, high=gap.high, n=gap.n, missing=gap.missing, method=gap.method, reason=gap.reason)
    if gap.mean is None:
        return Part(name="null", outcome="fail", sentence="No reply was scored in both arms.", estimate=estimate)
    assert gap.p_value is not None
    moved = gap.p_value < _CHANCE
    outcome: Outcome = "pass" if not moved else "fail" if gap.p_value < _GRAVE and abs(gap.mean) >= effect else "warn"
    says = "differ beyond chance" if moved else "do not differ beyond chance"
    return Part(
        name="null",
        outcome=outcome,
        sentence=f"The same replies judged as two arms {says}: {_with_interval(estimate, signed=True)}.",
        estimate=estimate,
    )


def order_part(found: Judged, effect: float) -> Part:
    """Judge pairs in both orders: does a clear winner stay, and does a place win?"""
    pairs = [v for position in found.where("high", "longer") if (v := found.tests[position][0]).score is not None]
    clear = [v for position in found.where("high") if (v := found.tests[position][0]).score is not None]
    places = [_place(v) for v in pairs]
    bias, agreed = mean_interval(places, bounds=(-1.0, 1.0)), share_interval(sum(v.consistent is True for v in clear), len(clear))
    turned = [place for v, place in zip(pairs, places, strict=True) if not v.consistent]
    to_first, to_second = sum(place > 0 for place in turned), sum(place < 0 for place in turned)
    further = {
        "consistent": agreed,
        "consistent, close pairs too": share_interval(len(pairs) - len(turned), len(pairs)),
        "first place where inconsistent": share_interval(to_first, to_first + to_second),
    }
    if bias.value is None or agreed.value is None:
        return Part(name="order", outcome="fail", sentence="No pair was judged in both orders.", estimate=bias, further=further)
    p_value = _sign_test(to_first, to_second)
    biased = _bias_outcome(places, effect)
    doubtful = biased == "warn" or p_value < _CHANCE or agreed.value < _SURE
    outcome: Outcome = "fail" if biased == "fail" or agreed.value < 0.5 else "warn" if doubtful else "pass"
    sentence = (
        f"{_share(agreed)} of clear pairs keep their winner when swapped; over all pairs the first place gains {_with_interval(bias, signed=True)}; "
        f"where the winner changes, {to_first} favour the first place and {to_second} the second (exact binomial p = {p_value:.2g})."
    )
    return Part(name="order", outcome=outcome, sentence=sentence, estimate=bias, further=further)


def null_pairs_part(found: Judged, effect: float) -> Part:
    """Hold a response against itself: no place may win beyond chance, and no side may when both orders are taken together."""
    verdicts = [found.tests[position][0] for position in found.where("null")]
    scores = [v.score for v in verdicts]
    combined = mean_interval(scores, bounds=(-1.0, 1.0))
    single = [score for v in verdicts for pair in _orders(v) for score in pair]
    first, second = sum(score > 0 for score in single), sum(score < 0 for score in single)
    ties = len(single) - first - second
    further = {"ties": share_interval(ties, len(single)), "first place": share_interval(first, first + second)}
    if combined.value is None:
        return Part(name="null", outcome="fail", sentence="No response was judged against itself.", estimate=combined, further=further)
    p_value = _sign_test(first, second)
    moved = _bias_outcome(scores, effect)
    outcome: Outcome = "warn" if moved == "pass" and p_value < _CHANCE else moved
    sentence = (
        f"A response against itself: in single orders {first} wins of the first place, {second} of the second, {ties} ties (p = {p_value:.2g}); "
        f"in both orders together the preference is {_with_interval(combined, signed=True)}."
    )
    return Part(name="null", outcome=outcome, sentence=sentence, estimate=combined, further=further)


def length_part(found: Judged, effect: float, pair: bool) -> Part:
    """Say the same at greater length: does the score move?"""
    if not found.where("longer"):
        return Part(name="length", outcome="n/a", sentence="There are no items of equal quality and unequal length.")
    change = mean_interval(changes := [found.change(position) for position in found.where("longer")])
    lengths = [float(len(words(found.items[position].request.response))) for position in found.where("high")]
    rank = spearman_interval(found.scores("high"), lengths)
    further = {} if pair else {"Spearman with words": rank}
    if change.value is None:
        return Part(name="length", outcome="fail", sentence="No longer item was scored.", estimate=change, further=further)
    outcome = _bias_outcome(changes, effect)
    ranks = "" if pair or rank.value is None else f"; Spearman with words among high items {_with_interval(rank)}"
    what = "prefers the longer one by" if pair else "moves by"
    sentence = f"At equal quality and twice the words the verdict {what} {_with_interval(change, signed=True)}{ranks}."
    return Part(name="length", outcome=outcome, sentence=sentence, estimate=change, further=further)


def anchors_part(found: Judged, effect: float) -> Part:
    """Hold high anchors against low ones."""
    high, low = found.scores("high"), found.scores("low")
    gap, auc = mean_gap(high, low), _auc(high, low)
    if gap.value is None or auc.value is None or auc.low is None:
        return Part(name="anchors", outcome="fail", sentence="High or low anchors have no score.", estimate=auc, further={"gap": gap})
    outcome: Outcome = "fail" if auc.low <= 0.5 or gap.value < effect else "warn" if auc.value < _SURE else "pass"
    sentence = f"High anchors score above low ones in {_share(auc)} of pairs (AUC); the gap of means is {_with_interval(gap)} points."
    return Part(name="anchors", outcome=outcome, sentence=sentence, estimate=auc, further={"gap": gap})


def anchor_pairs_part(found: Judged, effect: float) -> Part:
    """Hold the persona's own replies against other personas'."""
    scores = [score for score in found.scores("high") if score is not None]
    right, wrong = sum(score > 0 for score in scores), sum(score < 0 for score in scores)
    share, mean = share_interval(right, len(scores)), mean_interval(found.scores("high"), bounds=(-1.0, 1.0))
    if share.value is None or mean.value is None:
        return Part(name="anchors", outcome="fail", sentence="No anchor pair has a verdict.", estimate=share, further={"preference": mean})
    chance = _sign_test(right, wrong) >= _CHANCE or right <= wrong
    outcome: Outcome = "fail" if chance or mean.value < effect else "warn" if share.value < _SURE else "pass"
    sentence = (
        f"The persona's own reply wins over another persona's in {_share(share)} of pairs; mean preference {_with_interval(mean, signed=True)}."
    )
    return Part(name="anchors", outcome=outcome, sentence=sentence, estimate=share, further={"preference": mean})


def broken_part(found: Judged) -> Part:
    """Hold sound replies against broken ones; never a failure, for fit and coherence are two questions, and a judge of one may not see the other."""
    further: dict[str, Estimate] = {}
    for sort in ("shuffled", "repeated"):
        if found.where(sort):
            further[sort] = _auc(found.scores("high"), found.scores(sort))
    if not further:
        return Part(name="broken", outcome="n/a", sentence="Broken text is no part of these anchors.")
    blind = [sort for sort, auc in further.items() if auc.value is None or auc.value < _SURE]
    shown = ", ".join(f"{sort} words in {_share(auc)} of pairs" for sort, auc in further.items())
    advice = f" Report coherence beside the score: it does not see {' and '.join(blind)} words." if blind else ""
    sentence = f"Sound replies score above broken ones: {shown} (AUC).{advice}"
    least = min(further.values(), key=lambda auc: -1.0 if auc.value is None else auc.value)
    return Part(name="broken", outcome="warn" if blind else "pass", sentence=sentence, estimate=least, further=further)


def noise_part(noise: Estimate, difference: float | None, scatter: float | None, effect: float, prompts: int) -> Part:
    """Compare the smallest detectable difference with the one that is sought; ``difference`` and ``scatter`` are SDs of a prompt's difference."""
    if difference is None or noise.value is None:
        return Part(name="noise", outcome="fail", sentence="The judge's noise is not known.", estimate=noise)
    ratio = difference / noise.value if noise.value else 0.0
    ends = [None if end is None else detectable_difference(end * ratio, prompts) for end in (noise.low, noise.high)]
    least = Estimate(
        value=detectable_difference(difference, prompts),
        low=ends[0],
        high=ends[1],
        n=noise.n,
        missing=noise.missing,
        method=f"smallest detectable difference at {prompts} prompts, paired t test, 5 % two-sided, power 80 %",
        reason=noise.reason,
    )
    assert least.value is not None
    with_replies = None if scatter is None else detectable_difference(scatter, prompts)
    doubtful = (least.high is not None and least.high > effect) or (with_replies is not None and with_replies > effect)
    outcome: Outcome = "fail" if least.value > effect else "warn" if doubtful else "pass"
    shown = "no noise was found" if noise.value == 0 else f"the least detectable difference is {_with_interval(least)} by the judge's noise alone"
    more = "" if with_replies is None else f", and {with_replies:.2f} with the scatter between replies"
    needed = "" if outcome == "pass" else f"; {_needed(difference, effect)} by noise alone, {_needed(scatter, effect)} with replies"
    sentence = f"At {prompts} prompts {shown}{more}; sought is {effect:g}{needed}."
    return Part(name="noise", outcome=outcome, sentence=sentence, estimate=least)


def _needed(sd: float | None, effect: float) -> str:
    count = None if sd is None else prompts_needed(sd, effect)
    return "unknown" if sd is None else f"{count:,} prompts are needed" if count is not None else "over a million prompts are needed"


def _auc(high: Sequence[float | None], low: Sequence[float | None]) -> Estimate:
    above, below = ([score for score in side if score is not None] for side in (high, low))
    return auc_interval(above, below, missing=len(high) + len(low) - len(above) - len(below))


def _sign_test(first: int, second: int) -> float:
    return float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0


def _bias_outcome(values: Sequence[float | None], effect: float) -> Outcome:
    """Return what a mean that ought to be zero says: it fails when it is as large as the effect and beyond doubt, and warns when either holds."""
    mean = mean_interval(values)
    if mean.value is None:
        return "fail"
    large = abs(mean.value) >= effect
    if large and _excludes_zero(mean_interval(values, confidence=1.0 - _GRAVE)):
        return "fail"
    return "warn" if large or _excludes_zero(mean) else "pass"


def _excludes_zero(estimate: Estimate) -> bool:
    if estimate.low is None or estimate.high is None:
        return bool(estimate.value) and estimate.n > 1  # all values are equal, and not zero
    return estimate.low > 0.0 or estimate.high < 0.0


def _with_interval(estimate: Estimate, *, signed: bool = False) -> str:
    form = "+.2f" if signed else ".2f"
    value = "-" if estimate.value is None else f"{estimate.value:{form}}"
    return value if estimate.low is None or estimate.high is None else f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _share(estimate: Estimate) -> str:
    value = "-" if estimate.value is None else f"{estimate.value:.0%}"
    return value if estimate.low is None or estimate.high is None else f"{value} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _orders(verdict: Verdict) -> Iterator[tuple[float, float]]:
    """Yield the scores of both orders as they were given; several pairs for a panel."""
    if verdict.consistent is not None and len(verdict.parts) == 2 and all(part.consistent is None for part in verdict.parts):
        first, second = (part.score for part in verdict.parts)
        if first is not None and second is not None:
            yield first, second
    else:
        for part in verdict.parts:
            yield from _orders(part)


def _place(verdict: Verdict) -> float:
    """Return what the first place gains: 0 when the same response wins in both orders, 1 when the first one always does."""
    gains = [(first + second) / 2 for first, second in _orders(verdict)]
    assert gains, "a pair with a score has one in both orders"
    return sum(gains) / len(gains)
