"""What a reader of a cost page gets first: how far one can go, what is there, what it costs, and what is not known."""

from collections.abc import Sequence

from steered_lm.report.cost_analysis import CostAnalysis
from steered_lm.report.cost_data import CostArm, CostData, Measure
from steered_lm.report.cost_difference import Change, Shown, unit_of
from steered_lm.report.cost_reach import ALL, Reach, limit_of, ordered
from steered_lm.report.headline import Headline, Sentence, Tone
from steered_lm.report.wording import count, p_value, percent, plain, setting, signed

MISSING_SHARE = 0.1
_TOLD = 6
_ONE_BY_ONE = 4


def cost_headline(data: CostData, analysis: CostAnalysis) -> Headline:
    """Return the verdict that the numbers allow."""
    arms = [arm for arm in data.arms if arm.series is not None]
    joint = [reach for reach in analysis.reaches if reach.measure == ALL or len(_roles(data, "cost")) == 1]
    if not any(arm.name in measure.values for arm in arms for measure in data.measures):
        tone, title = _nothing_compared(data)
        sentences: list[Sentence] = []
    elif joint:
        tone, title = _reach_title(data, joint)
        # both sides of zero tell the same of a benefit where neither side reaches anything
        sentences = list(dict.fromkeys(sentence for reach in joint for sentence in _at_reach(data, analysis, reach, analysis.reaches)))
    else:
        tone, title = _plain_title(data, analysis, arms)
        if len(arms) > _ONE_BY_ONE:
            sentences = [_spread(data, analysis, measure, None) for measure in data.measures if measure.role != "note"]
        else:
            sentences = [sentence for arm in arms for sentence in _arm_sentences(data, analysis, arm)]
    return Headline(tone=tone, title=title, sentences=(*sentences, *_warnings(data, analysis, arms)))


def in_table(data: CostData, measure: Measure) -> bool:
    """Return whether a measure belongs to the arms that are compared, and not to the matrix of side effects alone."""
    main, side = ([arm.name for arm in data.arms[1:] if (arm.trait is None) == which] for which in (True, False))
    return any(name in measure.values for name in main) or not any(name in measure.values for name in side)


def limit_words(data: CostData, measure: Measure) -> str:
    """Return the loss that is accepted of a measure in words, ``2 points`` or ``5% of it``."""
    limit = limit_of(data, measure)
    if unit_of(measure) == "times":
        return f"{number(100.0 * limit)}% growth"
    if unit_of(measure) == "nats a token":
        return f"{number(limit)} nats a token"
    return f"{number(100.0 * limit)} points" if unit_of(measure) == "points" else f"{number(100.0 * limit)}% of the scale"


def loss_words(measure: Measure, loss: float | None) -> str:
    """Return a bound on a loss in the words of its tolerance; a dash for None."""
    if loss is None:
        return plain(None)
    unit = unit_of(measure)
    return f"{plain(loss, 3)} nats a token" if unit == "nats a token" else f"{plain(100.0 * loss, 1)}{' points' if unit == 'points' else '%'}"


def change_words(change: Change | Shown | None) -> str:
    """Return a change with its interval, ``+31.0 (+27.0 to +35.0)`` or ``×1.12 (×1.08 to ×1.16)``; the number alone when it has none."""
    shown = change.shown if isinstance(change, Change) else change
    if shown is None:
        return plain(None)
    digits = {"points": 1, "times": 3, "nats a token": 3, "": 2}[shown.unit]
    ends = [f"×{plain(v, digits)}" if shown.unit == "times" else signed(v, digits) for v in (shown.value, shown.low, shown.high)]
    return f"{ends[0]} (no interval)" if shown.low is None else f"{ends[0]} ({ends[1]} to {ends[2]})"


def level_words(data: CostData, analysis: CostAnalysis, arm: str, measure: Measure) -> str:
    """Return an arm's level without its interval: a share as ``61.3%``, a score as it is."""
    level = analysis.level(arm, measure.name)
    return write_level(measure, None if level is None else level.value)


def write_level(measure: Measure, value: float | None) -> str:
    """Return a level as a reader sees it: shares as per cent, scores of 0-100 with one digit, others with two or three."""
    if value is None:
        return plain(None)
    if measure.kind == "accuracy" or measure.scale == (0.0, 1.0):
        return percent(value, 1)
    if measure.kind == "tokens":
        return plain(value, 3 if value < 10.0 else 1)
    return plain(value, 1 if measure.scale == (0.0, 100.0) else 2)


def why_words(data: CostData, analysis: CostAnalysis, reach: Reach) -> str:
    """Return why a series goes no further for one measure, with the numbers that decided it."""
    if reach.stopped_at is None or reach.stopped_arm is None:
        return "the sweep ends there"
    if reach.measure == ALL:
        return f"because of {', '.join(reach.blockers)}"
    measure = _measure(data, reach.measure)
    change = analysis.change(reach.stopped_arm, measure.name)
    seen = "" if change is None else f"{_noun(measure)} {change_words(change)}"
    limit = limit_words(data, measure)
    if reach.why == "lost":
        return f"a loss was measured there: {seen}"
    if reach.why == "missing":
        missing = 0 if change is None else change.difference.missing
        worst = "" if reach.stopped_loss is None else f", up to {loss_words(measure, reach.stopped_loss)} may be lost"
        return f"{count(missing, 'item')} missing there, and with the worst assumed of them{worst} ({seen} without them)"
    if reach.why == "unmeasured":
        return "it was not measured there"
    if reach.why == "no interval":
        reason = "" if change is None else change.difference.reason or ""
        return f"there is no interval ({reason})"
    n = 0 if change is None else change.difference.n
    return f"{count(n, 'item')} are too few to exclude a loss beyond {limit}: {seen}"


def _roles(data: CostData, role: str) -> list[Measure]:
    return [measure for measure in data.measures if measure.role == role]


def _measure(data: CostData, name: str) -> Measure:
    return next(measure for measure in data.measures if measure.name == name)


def _noun(measure: Measure) -> str:
    return "perplexity" if measure.exponentiate else "change"


def _nothing_compared(data: CostData) -> tuple[Tone, str]:
    side = any(arm.trait is not None for arm in data.arms)
    return "unclear", "Only side effects were measured, see the matrix." if side else "Nothing was compared with the unsteered model."


def _reach_title(data: CostData, joint: Sequence[Reach]) -> tuple[Tone, str]:
    axis, costs = data.axis or "", _roles(data, "cost")
    what = "every cost" if len(costs) > 1 else costs[0].name
    reached = [reach for reach in joint if reach.arm is not None]
    tone: Tone = "good" if len(reached) == len(joint) else "bad" if any(r.measured for r in joint if r.arm is None) else "unclear"
    if len(joint) > 1:
        several = len(data.series) > 1
        parts = list(dict.fromkeys(f"{f'{r.series} ' if several else ''}{_how_far(r, joint, axis)}" for r in joint))
        return tone, f"Within the tolerance on {what}: {'; '.join(parts)}."
    if reached:
        return tone, f"Up to {axis} {setting(joint[0].x)}, {what} stays within its tolerance."
    return tone, f"No {axis} of the sweep is shown to keep {what} within its tolerance."


def _how_far(reach: Reach, joint: Sequence[Reach], axis: str) -> str:
    return f"up to {axis} {setting(reach.x)}" if reach.arm is not None else f"at no {_direction(reach, joint)}{axis}"


def _direction(reach: Reach, joint: Sequence[Reach]) -> str:
    both = any(other.series == reach.series and other is not reach for other in joint)
    return "" if not both or reach.stopped_at == 0.0 else "negative " if (reach.stopped_at or 0.0) < 0.0 else "positive "


def _at_reach(data: CostData, analysis: CostAnalysis, joint: Reach, every: Sequence[Reach]) -> list[Sentence]:
    """Tell what is gained and what may be lost at the joint reach, and for each cost that ends the sweep why."""
    who = f"{joint.series}: " if len(data.series) > 1 else ""
    axis = data.axis or ""
    found = []
    if joint.arm is not None:
        arm = next(arm for arm in data.arms if arm.name == joint.arm)
        where = f"{who}at {axis} {setting(joint.x)}, "
        found += [_benefit(data, analysis, arm, measure, where) for measure in _roles(data, "benefit")]
        found += [_kept(data, analysis, arm, measure, where) for measure in _roles(data, "cost")]
    own = [r for r in every if r.series == joint.series and r.measure != ALL and _side(r) == _side(joint)]
    if joint.arm is None:
        found += [_spread(data, analysis, measure, joint.series) for measure in _roles(data, "benefit")]
    found += [_stop(data, analysis, r, who) for r in own if r.measure in joint.blockers and r.stopped_at == joint.stopped_at]
    further = [f"{r.measure} up to {axis} {setting(r.x)}" for r in own if r.arm is not None and r.arm != joint.arm]
    return found + ([_sentence("unclear", f"{who}taken alone, costs stay within their tolerances further: {', '.join(further)}.")] if further else [])


def _side(reach: Reach) -> float:
    return -1.0 if reach.x < 0.0 or (reach.stopped_at or 0.0) < 0.0 else 1.0


def _benefit(data: CostData, analysis: CostAnalysis, arm: CostArm, measure: Measure, where: str) -> Sentence:
    change = analysis.change(arm.name, measure.name)
    if change is None:
        return _sentence("unclear", f"{where}{measure.name} was not measured.")
    if change.difference.mean is None:
        return _sentence("unclear", f"{where}{measure.name} has no item with a value on both sides.")
    scale = (
        ""
        if measure.scale is None or measure.scale == (0.0, 1.0)
        else f" on its scale of {plain(measure.scale[0], 0)} to {plain(measure.scale[1], 0)}"
    )
    level = f"{where}{measure.name} is {level_words(data, analysis, arm.name, measure)}{scale}, {_against(change)}"
    verdict = _verdict(measure, change)
    if measure.higher_is_better is None:
        # whether more or less of a trait is wanted, only the reader knows
        return _sentence("good" if _direction_of(change) else "unclear", level + ("." if _direction_of(change) else ": no change is shown."))
    tail = {"good": ".", "bad": ": it went the wrong way.", "unclear": ": no gain is shown.", "warning": "."}[verdict]
    return _sentence(verdict, level + tail)


def _against(change: Change) -> str:
    unit = {"points": " points", "nats a token": " nats a token"}.get(change.shown.unit if change.shown else "", "")
    return f"{change_words(change)}{unit} against unsteered on {count(change.difference.n, 'item')}, {_p(change)}"


def _p(change: Change) -> str:
    text = p_value(change.p_holm)
    return f"corrected p {text if text.startswith('<') else f'= {text}'}"


def _verdict(measure: Measure, change: Change) -> Tone:
    """Return good or bad for a change that survives the correction, by the measure's own direction."""
    direction = _direction_of(change)
    if not direction or measure.higher_is_better is None:
        return "unclear"
    return "good" if (direction > 0) == measure.higher_is_better else "bad"


def _direction_of(change: Change) -> int:
    """Return 1 for an established rise, -1 for an established fall, 0 where neither is established."""
    d = change.difference
    if not change.established or d.mean is None or d.low is None:
        return 0
    return 1 if d.mean > 0.0 else -1


def _kept(data: CostData, analysis: CostAnalysis, arm: CostArm, measure: Measure, where: str) -> Sentence:
    change = analysis.change(arm.name, measure.name)
    bound = "" if change is None or change.bound is None else f", {_at_most(measure, change.bound)}"
    if change is not None and change.difference.missing:
        bound += f" (with the worst assumed of {count(change.difference.missing, 'missing item')})"
    return _sentence("good", f"{where}{measure.name} stays within {limit_words(data, measure)}: {_noun(measure)} {change_words(change)}{bound}.")


def _at_most(measure: Measure, bound: float) -> str:
    most = loss_words(measure, max(0.0, bound))
    if unit_of(measure) == "times":
        return f"so it grows by at most {most}"
    return f"so at most {most} {'are' if unit_of(measure) == 'points' else 'is'} lost"


def _stop(data: CostData, analysis: CostAnalysis, reach: Reach, who: str) -> Sentence:
    axis, limit = data.axis or "", limit_words(data, _measure(data, reach.measure))
    start = f"{who}no {axis}" if reach.arm is None else f"{who}no {axis} beyond {setting(reach.x)}"
    text = f"{start} is shown to keep {reach.measure} within {limit}; at {setting(reach.stopped_at)}, {why_words(data, analysis, reach)}."
    return _sentence("bad" if reach.why == "lost" else "unclear", text)


def _plain_title(data: CostData, analysis: CostAnalysis, arms: Sequence[CostArm]) -> tuple[Tone, str]:
    steered = _counted(arms)
    lost = _lost(data, analysis)
    if not _roles(data, "cost"):
        return "unclear", "What steering costs was not measured."
    if lost:
        which = len({change.arm for change in lost})
        return "bad", f"A loss was measured under {which} of {steered}."
    return "unclear", f"No loss is established under {steered}; how large a loss is still possible is in the intervals."


def _counted(arms: Sequence[CostArm]) -> str:
    return count(len(arms), "steered arm" if all(arm.steered for arm in arms) else "arm")


def _lost(data: CostData, analysis: CostAnalysis) -> list[Change]:
    costs = {measure.name: measure for measure in _roles(data, "cost")}
    return [c for c in analysis.changes if c.measure in costs and _verdict(costs[c.measure], c) == "bad"]


def _arm_sentences(data: CostData, analysis: CostAnalysis, arm: CostArm) -> list[Sentence]:
    where = f"{arm.name}: "
    found = [_benefit(data, analysis, arm, m, where) for m in _roles(data, "benefit") if arm.name in m.values]
    costs = [(m, change) for m in _roles(data, "cost") if (change := analysis.change(arm.name, m.name)) is not None]
    if costs:
        tones = [_verdict(m, change) for m, change in costs]
        said = "; ".join(
            f"{m.name} {change_words(change)}{' (a loss)' if tone == 'bad' else ''}" for (m, change), tone in zip(costs, tones, strict=True)
        )
        found.append(_sentence("bad" if "bad" in tones else "unclear", f"{where}{said}."))
    return found


def _spread(data: CostData, analysis: CostAnalysis, measure: Measure, series: str | None) -> Sentence:
    """Tell a measure's changes over many arms, of one series or of all, by their extremes and by how many are established."""
    own = {arm.name for arm in data.arms if arm.series is not None and series in (None, arm.series)}
    found = [(c, c.shown) for c in analysis.changes if c.measure == measure.name and c.arm in own and c.shown is not None]
    if not found:
        return _sentence("unclear", f"{measure.name}: nothing to compare.")
    low, high = min(found, key=lambda one: one[1].value)[0], max(found, key=lambda one: one[1].value)[0]
    ways = [_direction_of(change) for change, _ in found]
    up, down = ("rise", "fall") if measure.higher_is_better is None else ("gain", "loss")
    better = -1 if measure.higher_is_better is False else 1
    told, those = ((up, better), (down, -better)), _counted([arm for arm in data.arms if arm.name in {change.arm for change, _ in found}])
    counted = "; ".join(f"a {word} is established under {ways.count(way)} of {those}" for word, way in told)
    same = f"{change_words(low)} under {low.arm}" + (f", and the same under every other one of {len(found)}" if len(found) > 1 else "")
    span = same if low is high else f"from {change_words(low)} under {low.arm} to {change_words(high)} under {high.arm}"
    tone: Tone = "bad" if measure.higher_is_better is not None and -better in ways else "good" if any(ways) else "unclear"
    return _sentence(tone, f"{measure.name}: {span}; {counted}.")


def _warnings(data: CostData, analysis: CostAnalysis, arms: Sequence[CostArm]) -> list[Sentence]:
    found = []
    if data.axis is None and arms:
        found.append("Nothing was swept, so there is no largest value within the tolerance; specs are compared one by one.")
    elif arms and not ordered(data.axis):
        found.append(f"A larger {data.axis} is not more steering, so there is no largest one within the tolerance.")
    if arms and not _roles(data, "benefit"):
        found.append("No benefit was measured, so this page says what steering costs and not what it buys.")
    if arms and not _roles(data, "cost"):
        found.append("No cost was measured, so this page says what steering buys and not what it costs.")
    found += [_too_few(data, analysis, role) for role in ("benefit", "cost")]
    found += _missing(data)
    absent = [f"{m.name} under {arm.name}" for m in data.measures if in_table(data, m) for arm in arms if arm.name not in m.values]
    if absent:
        found.append(f"Not measured: {_some(absent)}.")
    return [_sentence("warning", text) for text in found if text]


def _too_few(data: CostData, analysis: CostAnalysis, role: str) -> str:
    """Return a warning where no result could survive the correction, however clear it came out."""
    changes = [c for c in analysis.changes if _measure(data, c.measure).role == role]
    possible = [2.0 / 2.0 ** min(c.difference.n, 1000) * len(changes) for c in changes if c.difference.n]
    if not possible or min(possible) <= 1.0 - data.confidence + 1e-12:
        return ""
    few = f"{count(max(c.difference.n for c in changes), 'item')} are too few for the {count(len(changes), 'comparison')} of the {role}s"
    return f"{few}: not even the clearest could survive the correction."


def _missing(data: CostData) -> list[str]:
    """Return what is missing: each arm that misses much by itself with its reasons, the rest in one sentence."""
    holes = [(m, arm, sum(v is None for v in values)) for m in data.measures for arm, values in m.values.items()]
    side = {arm.name for arm in data.arms if arm.trait is not None}
    much = [(m, arm, gone) for m, arm, gone in holes if arm not in side and gone > MISSING_SHARE * len(m.items)]
    little = [(m, arm, gone) for m, arm, gone in holes if arm not in side and 0 < gone <= MISSING_SHARE * len(m.items)]
    beside = [gone for m, arm, gone in holes if arm in side and m.trait is not None and gone]
    found = [f"{gone} of {count(len(m.items), 'item')} of {m.name} are missing under {arm}{_reasons(m, arm)}." for m, arm, gone in much[:_TOLD]]
    if len(much) > _TOLD:
        found.append(f"In {count(len(much) - _TOLD, 'more cell')} of the table more than {MISSING_SHARE:.0%} of the items are missing.")
    if little:
        total = sum(gone for _, _, gone in little)
        found.append(
            f"{count(total, 'more value')} {'is' if total == 1 else 'are'} missing: {_some([f'{m.name} under {arm}' for m, arm, _ in little])}."
        )
    if beside:
        verb = "is" if sum(beside) == 1 else "are"
        found.append(f"{count(sum(beside), 'value')} {verb} missing in {count(len(beside), 'cell')} of the matrix of side effects.")
    if found:
        found.append("What is missing drops out of differences; for the tolerance, the worst is assumed of what is missing under steering.")
    return found


def _reasons(measure: Measure, arm: str) -> str:
    reasons = measure.reasons.get(arm, {})
    return f" ({', '.join(f'{reason}: {times}' for reason, times in reasons.items())})" if reasons else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_TOLD]) + (f", and {len(names) - _TOLD} more" if len(names) > _TOLD else "")


def _sentence(tone: Tone, text: str) -> Sentence:
    start = next((start for start in ("at ", "no ", "taken ") if text.startswith(start)), "")
    return Sentence(tone=tone, text=start.capitalize() + text.removeprefix(start))


def number(value: float) -> str:
    """Return a number with no more digits than it needs."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
