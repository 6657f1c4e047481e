"""What a reader of a cost page gets first: how far one can go, what moved, what it costs, and what is not known."""

from collections.abc import Sequence

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_cautions import cautions
from steered_lm.report.cost_data import CostArm, CostData
from steered_lm.report.cost_difference import Change
from steered_lm.report.cost_reach import ALL, Reach
from steered_lm.report.cost_sentences import costs_of, counted, gains, kept, losses, sentence, spreads, stops, verdict
from steered_lm.report.cost_wording import side_words, some
from steered_lm.report.headline import Headline, Sentence, Tone
from steered_lm.report.wording import setting

_ONE_BY_ONE = 4


def cost_headline(data: CostData, analysis: CostAnalysis) -> Headline:
    """Return the verdict that the numbers allow."""
    arms = [arm for arm in data.arms if arm.series is not None]
    joint = [reach for reach in analysis.reaches if reach.measure == ALL or len(data.of_role("cost")) == 1]
    if not any(arm.name in measure.values for arm in arms for measure in data.measures):
        tone, title = _nothing_compared(data)
        sentences: list[Sentence] = []
    elif joint:
        tone, title = _reach_title(data, joint)
        # both sides of zero tell the same of a benefit where neither side reaches anything
        sentences = list(dict.fromkeys(one for reach in joint for one in _at_reach(data, analysis, reach)))
        aside = [arm for arm in arms if arm.x is None]
        sentences += [one for arm in aside[:_ONE_BY_ONE] for one in _of_arm(data, analysis, arm)]
    else:
        tone, title = _plain_title(data, analysis, arms)
        if len(arms) > _ONE_BY_ONE:
            sentences = [*spreads(data, analysis, "benefit", None), *spreads(data, analysis, "cost", None)]
        else:
            sentences = [one for arm in arms for one in _of_arm(data, analysis, arm)]
    return Headline(tone=tone, title=title, sentences=(*sentences, *cautions(data, analysis, arms)))


def _nothing_compared(data: CostData) -> tuple[Tone, str]:
    side = any(arm.trait is not None for arm in data.arms)
    return "unclear", "Only side effects were measured, see the matrix." if side else "Nothing was compared with the unsteered model."


def _reach_title(data: CostData, joint: Sequence[Reach]) -> tuple[Tone, str]:
    axis, costs = data.axis or "", data.of_role("cost")
    what = "every cost" if len(costs) > 1 else costs[0].name
    reached = [reach for reach in joint if reach.arm is not None]
    tone: Tone = "good" if len(reached) == len(joint) else "bad" if any(r.measured for r in joint if r.arm is None) else "unclear"
    if len(joint) > 1:
        several = len(data.series) > 1
        parts = list(dict.fromkeys(f"{f'{r.series} ' if several else ''}{_how_far(r, joint, axis)}" for r in joint))
        return tone, f"Within the tolerance on {what}: {'; '.join(parts)}."
    if reached:
        return tone, f"Up to {axis} {setting(joint[0].x)}, {what} is shown to stay within its tolerance."
    return tone, f"No {axis} of the sweep is shown to keep {what} within its tolerance."


def _how_far(reach: Reach, joint: Sequence[Reach], axis: str) -> str:
    return f"up to {axis} {setting(reach.x)}" if reach.arm is not None else f"at no {side_words(reach, joint)}{axis}"


def _at_reach(data: CostData, analysis: CostAnalysis, joint: Reach) -> list[Sentence]:
    """Tell what is gained and what may be lost at the joint reach, and for each cost that ends the sweep why."""
    who, axis = f"{joint.series}: " if len(data.series) > 1 else "", data.axis or ""
    own = [r for r in analysis.reaches if r.series == joint.series and r.measure != ALL and _side(r) == _side(joint)]
    if joint.arm is None:
        found = spreads(data, analysis, "benefit", joint.series)
    else:
        arm = next(arm for arm in data.arms if arm.name == joint.arm)
        where = f"{who}at {axis} {setting(joint.x)}, "
        found = [*gains(data, analysis, arm, where), *kept(data, analysis, arm, where)]
    found += stops(data, analysis, joint, own, who)
    further = [f"{r.measure} up to {axis} {setting(r.x)}" for r in own if r.arm is not None and r.arm != joint.arm]
    if further:
        found.append(sentence("unclear", f"{who}taken alone, costs stay within their tolerances further: {some(further)}."))
    if joint.arm is None:
        # gains are told over the whole series here, and so losses are
        found += losses(data, analysis, joint.series, [r.measure for r in own if r.why == "lost" and r.stopped_at == joint.stopped_at])
    return found


def _side(reach: Reach) -> float:
    return -1.0 if reach.x < 0.0 or (reach.stopped_at or 0.0) < 0.0 else 1.0


def _plain_title(data: CostData, analysis: CostAnalysis, arms: Sequence[CostArm]) -> tuple[Tone, str]:
    lost = _lost(data, analysis)
    if not data.of_role("cost"):
        return "unclear", "What steering costs was not measured."
    if lost:
        which = len({change.arm for change in lost})
        return "bad", f"A loss was measured under {which} of {counted(arms)}."
    return "unclear", f"No loss is established under {counted(arms)}; how large a loss is still possible is in the intervals."


def _lost(data: CostData, analysis: CostAnalysis) -> list[Change]:
    costs = {measure.name: measure for measure in data.of_role("cost")}
    return [c for c in analysis.changes if c.measure in costs and verdict(costs[c.measure], c) == "bad"]


def _of_arm(data: CostData, analysis: CostAnalysis, arm: CostArm) -> list[Sentence]:
    here = data.model_copy(update={"measures": tuple(measure for measure in data.measures if arm.name in measure.values)})
    return [*gains(here, analysis, arm, f"{arm.name}: "), *costs_of(here, analysis, arm, f"{arm.name}: ")]
