"""What a reader of a cost page has to know before believing it: what was not measured, what is missing, and what few items cannot show."""

from collections.abc import Sequence
from itertools import combinations

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.report.cost_reach import ordered
from steered_lm.report.cost_wording import some
from steered_lm.report.headline import Sentence
from steered_lm.report.wording import count

MISSING_SHARE = 0.1
_TOLD = 4
_VARIED = 4  # with fewer different values two measures can agree by chance


def cautions(data: CostData, analysis: CostAnalysis, arms: Sequence[CostArm]) -> list[Sentence]:
    """Return the warnings that belong to a page's verdict."""
    found = []
    if data.axis is None and arms:
        found.append("Nothing was swept, so there is no largest value within the tolerance; specs are compared one by one.")
    elif arms and not ordered(data.axis):
        found.append(f"A larger {data.axis} is not more steering, so there is no largest one within the tolerance.")
    if arms and not data.of_role("benefit"):
        found.append("No benefit was measured, so this page says what steering costs and not what it buys.")
    if arms and not data.of_role("cost"):
        found.append("No cost was measured, so this page says what steering buys and not what it costs.")
    found += [_too_few(data, analysis, role) for role in ("benefit", "cost")]
    found += _missing(data)
    found += _alike(data)
    tested = [m for m in data.measures if m.role != "note" and in_table(data, m)]
    absent = [f"{m.name} under {arm.name}" for m in tested for arm in arms if arm.name not in m.values]
    if absent:
        found.append(f"Not measured: {some(absent).rstrip('.')}.")
    return [Sentence(tone="warning", text=text) for text in found if text]


def in_table(data: CostData, measure: Measure) -> bool:
    """Return whether a measure belongs to the arms that are compared, and not to the matrix of side effects alone."""
    main, side = ([arm.name for arm in data.arms[1:] if (arm.trait is None) == which] for which in (True, False))
    return any(name in measure.values for name in main) or not any(name in measure.values for name in side)


def _too_few(data: CostData, analysis: CostAnalysis, role: str) -> str:
    """Return a warning where no result could survive the correction, however clear it came out."""
    changes = [c for c in analysis.changes if data.measure(c.measure).role == role]
    possible = [2.0 / 2.0 ** min(c.difference.n, 1000) * len(changes) for c in changes if c.difference.n]
    if not possible or min(possible) <= 1.0 - data.confidence + 1e-12:
        return ""
    few = f"{count(max(c.difference.n for c in changes), 'item')} are too few for the {count(len(changes), 'comparison')} of the {role}s"
    return f"{few}: not even the clearest could survive the correction."


def _missing(data: CostData) -> list[str]:
    """Return what is missing of benefits and costs: each arm that misses much by itself with its reasons, the rest in one sentence."""
    side = {arm.name for arm in data.arms if arm.trait is not None}
    holes = [(m, arm, gone) for m in data.measures for arm, values in m.values.items() if (gone := sum(v is None for v in values))]
    main = [(m, arm, gone) for m, arm, gone in holes if arm not in side and m.role != "note"]
    much = [(m, arm, gone) for m, arm, gone in main if gone > MISSING_SHARE * len(m.items)]
    little = [(m, arm, gone) for m, arm, gone in main if gone <= MISSING_SHARE * len(m.items)]
    beside = [gone for m, arm, gone in holes if arm in side and m.trait is not None]
    found = [f"{gone} of {count(len(m.items), 'item')} of {m.name} are missing under {arm}{_reasons(m, arm)}." for m, arm, gone in much[:_TOLD]]
    if len(much) > _TOLD:
        found.append(f"In {count(len(much) - _TOLD, 'more cell')} of the table more than {MISSING_SHARE:.0%} of the items are missing.")
    if little:
        total = sum(gone for _, _, gone in little)
        by_measure = {m.name: sum(gone for other, _, gone in little if other is m) for m, _, _ in little}
        names = some([f"{name} {gone}" for name, gone in by_measure.items()])
        items = f"{count(total, 'more item' if much else 'item')} {'is' if total == 1 else 'are'} missing"
        found.append(f"{items} in {count(len(little), 'cell')} of the table: {names}.")
    if beside:
        verb = "is" if sum(beside) == 1 else "are"
        found.append(f"{count(sum(beside), 'item')} {verb} missing in {count(len(beside), 'cell')} of the matrix of side effects.")
    if found:
        found.append("An item that is missing drops out of differences; for the tolerance, the worst is assumed of what is missing under steering.")
    return [" ".join(found), *_responses(data)]


def _responses(data: CostData) -> list[str]:
    """Return how many responses have no value where an item has several of them."""
    judged = [one for m in data.measures if m.role != "note" for one in m.judged.values()]
    lost, asked = sum(one.missing for one in judged), sum(one.responses for one in judged)
    if not lost:
        return []
    verb = "is" if lost == 1 else "are"
    rule = "an item’s value is the mean of its others, and missing when it has none"
    return [f"{lost:,} of {asked:,} values of single responses {verb} missing; {rule}."]


def _reasons(measure: Measure, arm: str) -> str:
    reasons = measure.reasons.get(arm, {})
    return f" ({', '.join(f'{reason}: {times}' for reason, times in reasons.items())})" if reasons else ""


def _alike(data: CostData) -> list[str]:
    """Return which scores are the same numbers twice, as is coherence of traits that share their questions: it is judged of the same responses."""
    scores = [m for m in data.measures if m.role != "note" and m.kind == "score"]
    varied = [m for m in scores if len({value for values in m.values.values() for value in values}) > _VARIED]
    same = dict.fromkeys(name for a, b in combinations(varied, 2) if a.values == b.values for name in (a.name, b.name))
    if not same:
        return []
    return [
        f"These have the same values as another one, item by item, and are no further evidence: {some(list(same))}. Each counts in the correction."
    ]
