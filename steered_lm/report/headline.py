"""The verdict in plain words: every sentence is chosen by the numbers, and none of them is written for success."""

from typing import Literal

from steered_lm.config import Config
from steered_lm.report.analysis import Analysis, Capability, Comparison, Outcome, Question
from steered_lm.report.data import Arm, ReportData
from steered_lm.report.wording import count, p_value, percent, plain, points, signed, span, span_points

Tone = Literal["good", "bad", "unclear", "warning"]

_RIVALS: dict[Question, str] = {
    "prompted": "A system prompt",
    "optimizer": "The other search",
    "random_direction": "A push of equal size in a random direction",
}
_TITLES: dict[Outcome, tuple[Tone, str]] = {
    "higher": ("good", "Steering raised the persona fit."),
    "lower": ("bad", "Steering lowered the persona fit."),
    "uncorrected": ("unclear", "The effect of steering does not survive the correction for several comparisons."),
    "unclear": ("unclear", "No effect of steering on the persona fit could be shown."),
    "no_interval": ("unclear", "The effect of steering has no interval, so it is not established."),
    "no_data": ("unclear", "Steering could not be compared: no item has a score on both sides."),
}
_TAILS: dict[Outcome, str] = {
    "unclear": " The interval includes zero: the data are compatible with no effect.",
    "uncorrected": " The interval alone excludes zero, but among so many comparisons one such finding comes up by chance too easily; it is a hint.",
}
_RIVAL_SAYS: dict[Outcome, tuple[Tone, str]] = {
    "higher": ("good", "{} is above it."),
    "lower": ("bad", "{} is below it."),
    "uncorrected": ("unclear", "The interval excludes zero, but not after the correction for several comparisons."),
    "unclear": ("unclear", "The data do not tell the two apart."),
    "no_interval": ("unclear", "Without an interval the two cannot be told apart."),
}


class Sentence(Config):
    """One statement, and whether it is good news, bad news, undecided, or a warning about the measurement."""

    tone: Tone
    text: str


class Headline(Config):
    """The verdict of a report: ``title`` says it in one line, ``sentences`` carry numbers, costs and warnings."""

    tone: Tone
    title: str
    sentences: tuple[Sentence, ...]


def headline(data: ReportData, analysis: Analysis) -> Headline:
    """Return the verdict that the numbers allow."""
    main = data.main_arm
    effect = None if main is None else analysis.against(main.name, data.unsteered.name)
    if main is None or effect is None:
        title = "No steered arm was evaluated, so there is no verdict on steering."
        return Headline(tone="unclear", title=title, sentences=tuple(_warnings(data, analysis)))
    tone, title = _TITLES[effect.outcome]
    failed = [*_judge_failed(data), *_null_failed(analysis)]
    if failed and tone in ("good", "bad"):
        tone, title = "warning", "The persona fit moved, but the measurement failed its own checks."
    sentences = [_effect(effect, data, analysis.family)]
    sentences += [_rival(c) for c in analysis.comparisons if c.question in _RIVALS and c.arm == main.name]
    costs = [_cost(c) for c in analysis.capability if c.arm == main.name]
    sentences += costs or [Sentence(tone="warning", text="What steering costs in capability was not measured.")]
    return Headline(tone=tone, title=title, sentences=(*sentences, *_warnings(data, analysis)))


def _effect(effect: Comparison, data: ReportData, family: int) -> Sentence:
    d, low, high = effect.difference, *data.judge.scale
    if d.mean is None:
        text = f"None of the {count(len(data.items), 'held-out prompt')} has a verdict for both {effect.arm} and {effect.baseline}."
        return Sentence(tone="unclear", text=text)
    verb = "moved" if effect.outcome in ("higher", "lower") else "was seen to move"
    dropped = f" ({count(d.missing, 'prompt')} left out, where a verdict is missing)" if d.missing else ""
    text = (
        f"Steering ({effect.arm}) {verb} the judge's mean fit to the persona {data.persona.name} from {plain(d.mean_b)} to {plain(d.mean_a)} "
        f"on a scale of {low:g} to {high:g}, on {count(d.n, 'held-out prompt')}{dropped}: difference {_interval(effect)}"
    )
    if effect.p_holm is not None:
        text += f", p {_equals(effect.p_holm)} corrected for {count(family, 'comparison')}"
    return Sentence(tone=_TITLES[effect.outcome][0], text=text + "." + _TAILS.get(effect.outcome, ""))


def _rival(c: Comparison) -> Sentence:
    who, d = f"{_RIVALS[c.question]} ({c.baseline})", c.difference
    if d.mean is None:
        return Sentence(tone="unclear", text=f"{who} could not be compared: no item has a score on both sides.")
    where = f" on the {count(d.n, 'prompt')} that both have verdicts for" if d.missing else ""
    text = f"{who} reaches {plain(d.mean_b)} where {c.arm} reaches {plain(d.mean_a)}{where}: difference {_interval(c)}. "
    tone, verdict = _RIVAL_SAYS[c.outcome]
    return Sentence(tone=tone, text=text + verdict.format(c.arm[:1].upper() + c.arm[1:]))


def _cost(c: Capability) -> Sentence:
    d, share = c.difference, c.metric == "accuracy"
    if d.mean is None:
        return Sentence(tone="warning", text=f"Cost on {c.task} is unknown: no item was answered by both models.")
    before, after = (percent(d.mean_b), percent(d.mean_a)) if share else (plain(d.mean_b), plain(d.mean_a))
    change, unit = (points(d.mean), " points") if share else (signed(d.mean), "")
    text = f"Cost: {c.task} went from {before} to {after} on {count(d.n, 'item')} ({change}{unit}"
    if d.low is None or d.high is None:
        return Sentence(tone="unclear", text=f"{text}, no interval: {d.reason}).")
    text += f", {d.confidence:.0%} interval {span_points(d.low, d.high) if share else span(d.low, d.high, sign=True)}). "
    worse, better = (d.low, d.high) if c.higher_is_better else (-d.high, -d.low)
    if better < 0:
        return Sentence(tone="bad", text=text + "This loss is larger than chance explains.")
    if worse > 0:
        return Sentence(tone="good", text=text + "No loss; steering even helped here.")
    bound = f"{plain(-100.0 * worse, 1)} points" if share else plain(-worse)
    return Sentence(tone="unclear", text=text + f"No loss is shown, and one of up to {bound} is not ruled out.")


def _warnings(data: ReportData, analysis: Analysis) -> list[Sentence]:
    found = [*_judge_failed(data), *_null_failed(analysis)]
    if data.judge.auc is None:
        found.append(f"The judge {data.judge.name} was not validated on held-out texts, so its scores may measure something else than the persona.")
    if not analysis.null:
        found.append("There is no null arm, so it is unknown what difference this measurement finds between a system and itself.")
    found += [text for arm in data.arms if (text := _missing_warning(arm, data.max_missing))]
    smallest = min((2.0 / 2**c.difference.n for c in analysis.comparisons if c.difference.n), default=0.0) * analysis.family
    if smallest > 1.0 - data.confidence + 1e-12:
        reach = f"with {count(analysis.family, 'comparison')} the smallest corrected p-value that could come out is {plain(min(1.0, smallest), 3)}"
        found.append(f"There are too few items: {reach}.")
    weak = [f"{v.trait} at layer {v.layer}" for v in analysis.vectors if v.separates is False]
    if weak:
        found.append(f"Directions that separate held-out pairs no better than chance: {', '.join(weak)}.")
    return [Sentence(tone="warning", text=text) for text in found]


def _judge_failed(data: ReportData) -> list[str]:
    judge = data.judge
    if judge.auc is None or (judge.auc if judge.auc_low is None else judge.auc_low) > 0.5:
        return []
    found = f"The judge {judge.name} does not tell the persona from others better than chance (held-out AUC {plain(judge.auc)})"
    return [f"{found}, so its scores mean nothing."]


def _null_failed(analysis: Analysis) -> list[str]:
    return [
        f"The null arm {c.arm} differs from {c.baseline}, the same system, by {_interval(c)}. Something other than steering moves the scores."
        for c in analysis.null
        if c.outcome in ("higher", "lower")
    ]


def _missing_warning(arm: Arm, allowed: float) -> str:
    if not arm.scores or arm.missing / len(arm.scores) <= allowed:
        return ""
    share = f"{arm.missing} of {count(len(arm.scores), 'verdict')} of {arm.name} are missing, more than {allowed:.0%}"
    return f"{share}; its comparisons rest on the others, which may not be typical."


def _interval(c: Comparison) -> str:
    d = c.difference
    if d.low is None:
        return f"{signed(d.mean)} (no interval: {d.reason})"
    return f"{signed(d.mean)} ({d.confidence:.0%} interval {span(d.low, d.high, sign=True)})"


def _equals(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"
