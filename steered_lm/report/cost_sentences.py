"""Sentences of a cost page's verdict: what a measure gained or lost, and what several measures have in common."""

from collections.abc import Sequence
from typing import NamedTuple

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import CostArm, CostData, Measure, Role
from steered_lm.report.cost_difference import Change, unit_of
from steered_lm.report.cost_reach import Reach, limit_of, width
from steered_lm.report.cost_wording import (
    against_words,
    change_words,
    level_words,
    limit_words,
    loss_words,
    lost_items,
    noun,
    scale_words,
    side_words,
    some,
    why_words,
)
from steered_lm.report.headline import Sentence, Tone
from steered_lm.report.wording import count, setting

FEW = 4
"""So many measures of a role are told one by one; of more, only those with an established change, and the others share a sentence."""
MOST = 6
"""So many of those are told one by one at most."""
_OPEN = {
    "unclear": "too few items",
    "missing": "the worst assumed of missing items",
    "no interval": "no interval",
    "unmeasured": "nothing to compare",
}


def sentence(tone: Tone, text: str) -> Sentence:
    """Return a sentence that begins with a capital, but where a name is its first word."""
    start = next((start for start in ("at ", "no ", "of ", "taken ") if text.startswith(start)), "")
    return Sentence(tone=tone, text=start.capitalize() + text.removeprefix(start))


def verdict(measure: Measure, change: Change) -> Tone:
    """Return good or bad for a change that survives the correction, by the measure's own direction."""
    if not change.direction or measure.higher_is_better is None:
        return "unclear"
    return "good" if (change.direction > 0) == measure.higher_is_better else "bad"


def gains(data: CostData, analysis: CostAnalysis, arm: CostArm, where: str) -> list[Sentence]:
    """Tell what became of the benefits under one arm."""
    measures = data.of_role("benefit")
    if len(measures) <= FEW:
        return [_benefit(data, analysis, arm, measure, where) for measure in measures]
    found = _changed(analysis, measures, [arm.name])
    told = [_benefit(data, analysis, arm, one.measure, where) for one in found if one.moved]
    return told[:MOST] + _together(found, where, "benefit", told=MOST)


def kept(data: CostData, analysis: CostAnalysis, arm: CostArm, where: str) -> list[Sentence]:
    """Tell how much of the costs may be lost under an arm at which all of them are within their tolerances."""
    measures = data.of_role("cost")
    lost = [m for m in measures if (change := analysis.change(arm.name, m.name)) is not None and verdict(m, change) == "bad"]
    told = measures if len(measures) <= FEW else lost[:MOST]
    rest = [measure for measure in measures if measure not in told]
    found = [_kept(data, analysis, arm, measure, where) for measure in told]
    if not rest:
        return found
    near = max(rest, key=lambda m: _share_of_limit(data, analysis.change(arm.name, m.name), m))
    every = f"{where}{len(rest)} {'more costs stay' if told else 'costs stay'} within their tolerances. Nearest to its own: "
    return [*found, sentence("good", every + _kept(data, analysis, arm, near, "").text)]


def spreads(data: CostData, analysis: CostAnalysis, role: Role, series: str | None) -> list[Sentence]:
    """Tell a role's changes over many arms, of one series or of all."""
    measures = data.of_role(role)
    if len(measures) <= FEW:
        return [_spread(data, analysis, measure, series) for measure in measures]
    arms = [arm for arm in data.arms if arm.series is not None and series in (None, arm.series)]
    found = _changed(analysis, measures, [arm.name for arm in arms])
    told = [_spread(data, analysis, one.measure, series) for one in found if one.moved]
    return told[:MOST] + _together(found, "", role, told=MOST, under=f" under any of {counted(arms)}")


def stops(data: CostData, analysis: CostAnalysis, joint: Reach, own: Sequence[Reach], who: str) -> list[Sentence]:
    """Tell for the costs that end a sweep why they do: measured losses first, and what is only unknown together where there is much of it."""
    ending = [reach for reach in own if reach.measure in joint.blockers and reach.stopped_at == joint.stopped_at]
    if len(ending) <= FEW:
        return [_stop(data, analysis, reach, who) for reach in ending]
    lost = [reach for reach in ending if reach.why == "lost"]
    told = [_stop(data, analysis, reach, who) for reach in lost[:MOST]]
    if lost[MOST:]:
        names = some([reach.measure for reach in lost[MOST:]])
        told.append(
            sentence("bad", f"{who}at {setting(joint.stopped_at)}, a loss was also measured of {count(len(lost) - MOST, 'more cost')}: {names}.")
        )
    rest = [reach for reach in ending if reach.why != "lost"]
    return [*told, _open(data, analysis, joint, rest, who, more=bool(told))] if rest else told


def losses(data: CostData, analysis: CostAnalysis, series: str, but: Sequence[str]) -> list[Sentence]:
    """Tell which costs have an established loss anywhere in a series, but for some that were told; each by its largest one."""
    arms = [arm.name for arm in data.arms if arm.series == series]
    found = []
    for one in _changed(analysis, [measure for measure in data.of_role("cost") if measure.name not in but], arms):
        lost = [change for change in one.changes if verdict(one.measure, change) == "bad"]
        if lost:
            worst = max(lost, key=lambda change: abs(change.difference.mean or 0.0))
            found.append(f"{one.measure.name} {change_words(worst)} under {worst.arm}")
    and_more = f"; and {len(found) - MOST} more costs" if len(found) > MOST else ""
    return (
        [sentence("bad", f"Over the whole sweep losses are established, the largest of each: {'; '.join(found[:MOST])}{and_more}.")] if found else []
    )


def costs_of(data: CostData, analysis: CostAnalysis, arm: CostArm, where: str) -> list[Sentence]:
    """Tell what became of the costs under one arm, in a sentence."""
    known = [(m, change) for m in data.of_role("cost") if (change := analysis.change(arm.name, m.name)) is not None]
    found = _changed(analysis, [m for m, _ in known], [arm.name])
    told = known if len(known) <= FEW else [(m, change) for m, change in known if change.direction][:MOST]
    tones = [verdict(m, change) for m, change in told]
    said = "; ".join(f"{m.name} {change_words(c)}{' (a loss)' if tone == 'bad' else ''}" for (m, c), tone in zip(told, tones, strict=True))
    first = [sentence("bad" if "bad" in tones else "unclear", f"{where}{said}.")] if told else []
    return first + (_together(found, where, "cost", told=MOST) if len(known) > FEW else [])


def counted(arms: Sequence[CostArm]) -> str:
    """Return ``3 steered arms``, or ``3 arms`` where one of them is not steered."""
    return count(len(arms), "steered arm" if all(arm.steered for arm in arms) else "arm")


class _Changed(NamedTuple):
    """A measure with its changes under some arms."""

    measure: Measure
    changes: list[Change]

    @property
    def moved(self) -> bool:
        """Whether a change is established under any of the arms."""
        return any(change.direction for change in self.changes)

    @property
    def size(self) -> float:
        """The largest change that is established, in widths of the scale."""
        scale = width(self.measure) or 1.0
        return max((abs(c.difference.mean or 0.0) / scale for c in self.changes if c.direction), default=0.0)


def _changed(analysis: CostAnalysis, measures: Sequence[Measure], arms: Sequence[str]) -> list[_Changed]:
    """Return measures with their changes, those that moved most first."""
    found = [_Changed(m, [c for arm in arms if (c := analysis.change(arm, m.name)) is not None and c.shown is not None]) for m in measures]
    return sorted(found, key=lambda one: one.size, reverse=True)


def _together(found: Sequence[_Changed], where: str, role: str, *, told: int, under: str = "") -> list[Sentence]:
    """Return a sentence on the measures that moved beyond the first ``told``, and one on those without an established change."""
    more = [one for one in found if one.moved][told:]
    rest = [one for one in found if not one.moved and one.changes]
    said = []
    if more:
        said.append(sentence("unclear", f"{where}an established change is also seen of {some([one.measure.name for one in more])}."))
    if rest:
        names = some([one.measure.name for one in rest])
        what = "trait" if all(one.measure.trait is not None for one in found) else role
        shows = f"{len(rest)} {'shows' if len(rest) == 1 else 'show'} no" if len(rest) < len(found) else "none shows an"
        one_of = f"{where}of {count(len(found), what)}, {shows} established change{under}"
        said.append(sentence("unclear", f"{one_of}: {names}{_widest(rest)}."))
    return said


def _widest(found: Sequence[_Changed]) -> str:
    """Return the widest interval among changes in words: how much may still be there unseen."""
    known = [(one.measure, c) for one in found for c in one.changes if c.difference.low is not None and c.difference.high is not None]
    if not known:
        return ""
    measure, change = max(known, key=lambda pair: ((pair[1].difference.high or 0.0) - (pair[1].difference.low or 0.0)) / (width(pair[0]) or 1.0))
    return f"; the widest interval is that of {measure.name} under {change.arm}, {change_words(change)} on {count(change.difference.n, 'item')}"


def _benefit(data: CostData, analysis: CostAnalysis, arm: CostArm, measure: Measure, where: str) -> Sentence:
    change = analysis.change(arm.name, measure.name)
    if change is None:
        return sentence("unclear", f"{where}{measure.name} was not measured.")
    if change.difference.mean is None:
        return sentence("unclear", f"{where}{measure.name} has no item with a value on both sides.")
    level = f"{where}{measure.name} is {level_words(data, analysis, arm.name, measure)}, {against_words(change)}"
    tone = verdict(measure, change)
    if measure.higher_is_better is None:
        # whether more or less of a trait is wanted, only the reader knows
        return sentence("good" if change.direction else "unclear", level + ("." if change.direction else ": no change is shown."))
    tail = {"good": ".", "bad": ": it went the wrong way.", "unclear": ": no gain is shown.", "warning": "."}[tone]
    return sentence(tone, level + tail)


def _kept(data: CostData, analysis: CostAnalysis, arm: CostArm, measure: Measure, where: str) -> Sentence:
    change = analysis.change(arm.name, measure.name)
    bound = "" if change is None or change.bound is None else f", {_at_most(measure, change.bound)}"
    if change is not None and (gone := lost_items(measure, arm.name)):
        bound += f" (with the worst assumed of {count(gone, 'missing item')})"
    return sentence("good", f"{where}{measure.name} stays within {limit_words(data, measure)}: {noun(measure)} {change_words(change)}{bound}.")


def _share_of_limit(data: CostData, change: Change | None, measure: Measure) -> float:
    return -1.0 if change is None or change.bound is None else change.bound / limit_of(data, measure)


def _at_most(measure: Measure, bound: float) -> str:
    if unit_of(measure) == "times":
        return f"so it grows by at most {loss_words(measure, max(0.0, bound)).removesuffix(' growth')}"
    most = loss_words(measure, max(0.0, bound))
    return f"so at most {most} {'are' if unit_of(measure) == 'points' else 'is'} lost"


def _stop(data: CostData, analysis: CostAnalysis, reach: Reach, who: str) -> Sentence:
    axis, limit = data.axis or "", limit_words(data, data.measure(reach.measure))
    start = f"{who}no {side_words(reach, analysis.reaches)}{axis}" if reach.arm is None else f"{who}no {axis} beyond {setting(reach.x)}"
    text = f"{start} is shown to keep {reach.measure} within {limit}; at {setting(reach.stopped_at)}, {why_words(data, analysis, reach)}."
    return sentence("bad" if reach.why == "lost" else "unclear", text)


def _open(data: CostData, analysis: CostAnalysis, joint: Reach, ending: Sequence[Reach], who: str, *, more: bool) -> Sentence:
    """Tell of costs of which no loss was measured, and none could be excluded either, what stands against them."""
    beyond = "" if joint.arm is None else f" beyond {setting(joint.x)}"
    side = side_words(joint, analysis.reaches) if joint.arm is None else ""
    those = count(len(ending), "more cost" if more else "cost")
    text = f"{who}no {side}{data.axis}{beyond} is shown to keep {those} within tolerance: {some([reach.measure for reach in ending])}."
    told = [(said, sum(reach.why == why for reach in ending)) for why, said in _OPEN.items()]
    why = ", ".join(f"{said} ({count(costs, 'cost')})" for said, costs in told if costs)
    changes = [(r.measure, analysis.change(r.stopped_arm or "", r.measure)) for r in ending if r.why == "unclear"]
    widest = _widest([_Changed(data.measure(name), [change]) for name, change in changes if change is not None])
    return sentence(
        "unclear", f"{text} At {setting(joint.stopped_at)} no loss was measured of them, but one beyond the tolerance is not excluded: {why}{widest}."
    )


def _spread(data: CostData, analysis: CostAnalysis, measure: Measure, series: str | None) -> Sentence:
    """Tell a measure's changes over many arms, of one series or of all, by their extremes and by how many are established."""
    own = {arm.name for arm in data.arms if arm.series is not None and series in (None, arm.series)}
    found = [(c, c.shown) for c in analysis.changes if c.measure == measure.name and c.arm in own and c.shown is not None]
    if not found:
        return sentence("unclear", f"{measure.name}: nothing to compare.")
    low, high = min(found, key=lambda one: one[1].value)[0], max(found, key=lambda one: one[1].value)[0]
    ways = [change.direction for change, _ in found]
    up, down = ("rise", "fall") if measure.higher_is_better is None else ("gain", "loss")
    better = -1 if measure.higher_is_better is False else 1
    told, those = ((up, better), (down, -better)), counted([arm for arm in data.arms if arm.name in {change.arm for change, _ in found}])
    established = "; ".join(f"a {word} is established under {ways.count(way)} of {those}" for word, way in told)
    same = f"{change_words(low)} under {low.arm}" + (f", and the same under every other one of {len(found)}" if len(found) > 1 else "")
    span = same if low is high else f"from {change_words(low)} under {low.arm} to {change_words(high)} under {high.arm}"
    # changes of shares and of scores of 0 to 100 are in points, and ratios carry their sign
    scale = scale_words(measure) if unit_of(measure) == "" else ""
    tone: Tone = "bad" if measure.higher_is_better is not None and -better in ways else "good" if any(ways) else "unclear"
    return sentence(tone, f"{measure.name}: {span}{scale}; {established}.")
