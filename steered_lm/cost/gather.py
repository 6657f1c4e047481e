"""Results of all arms as the measures and samples of a page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from steered_lm.cost.measures import Reading, band_shares
from steered_lm.harness.items import ItemResult
from steered_lm.measure.fluency import fluency
from steered_lm.measure.means import TokenMean
from steered_lm.report.cost_data import UNSTEERED, Judged, Measure, Role
from steered_lm.report.data import Reply, Sample

Written = Mapping[str, Mapping[str, Sequence[ItemResult]]]
"""By task and arm, what generative tasks gave."""
NO_REASON = "no value, and no reason was given"
TOO_SHORT = "no pair of words in it"
_SAMPLES = 4
# what is shown beside a reply, and what it is of a task
_SCORES = {"trait_score": "{}", "persona_fit": "{}, fit", "truthful": "{}, truthful"}


def item_measure(reading: Reading, results: Mapping[str, Sequence[ItemResult]], *, grouped: bool) -> Measure:
    """Return what a reading says of every arm's results; ``grouped`` keeps the items' subjects."""
    first = results[UNSTEERED]
    return Measure(
        name=reading.name,
        role=reading.role,
        kind=reading.kind,
        higher_is_better=reading.higher_is_better,
        scale=reading.scale,
        chance=reading.chance,
        trait=reading.trait,
        beside=reading.beside,
        items=tuple(item.item for item in first),
        groups=tuple(item.group for item in first) if grouped else (),
        values={arm: tuple(item.metrics.get(reading.metric) for item in items) for arm, items in results.items()},
        reasons={arm: _reasons(items, reading.metric) for arm, items in results.items()},
        judged={arm: _judged(items, first, reading.metric) for arm, items in results.items()} if _several(first) else {},
        bands={arm: shares for arm, items in results.items() if (shares := band_shares([i.metrics for i in items]))} if reading.bands else {},
        about=reading.about,
    )


def _reasons(items: Sequence[ItemResult], metric: str) -> dict[str, int]:
    """Return how many items each reason left without a value; where an item's responses lack theirs for several reasons, the most frequent one."""
    lacking = [Counter(item.missing_of(metric)) for item in items if metric not in item.metrics]
    return dict(Counter(reasons.most_common(1)[0][0] if reasons else NO_REASON for reasons in lacking))


def _several(items: Sequence[ItemResult]) -> bool:
    return any(len(item.responses) > 1 for item in items)


def _judged(items: Sequence[ItemResult], unsteered: Sequence[ItemResult], metric: str) -> Judged:
    """Return how many responses an arm was to have, as many as the unsteered model, and how many of them have no value."""
    asked = [len(one.responses) for one in unsteered]
    lost = [len(item.missing_of(metric)) if item.responses else count for item, count in zip(items, asked, strict=True)]
    return Judged(responses=sum(asked), missing=sum(lost))


def token_measure(name: str, role: Role, means: Mapping[str, TokenMean], *, exponentiate: bool, about: str) -> Measure:
    """Return every arm's mean over tokens; of a cost, lower is better."""
    first = means[UNSTEERED]
    values = {arm: mean.totals for arm, mean in means.items()}
    return Measure(
        name=name,
        role=role,
        kind="tokens",
        higher_is_better=False if role == "cost" else None,
        exponentiate=exponentiate,
        items=first.items,
        tokens=first.tokens,
        values=values,
        about=about,
    )


def fluency_measures(written: Written, arms: Sequence[str]) -> list[Measure]:
    """Return variety, repetition and length of all responses, as notes."""
    if not written:
        return []
    names = [f"{task} {item.item}" for task, results in written.items() for item in results[UNSTEERED]]
    values: dict[str, dict[str, list[float | None]]] = {"distinct pairs of words": {}, "repetition": {}, "words": {}}
    for arm in arms:
        per_item = [fluency(item.responses, sizes=(2,)) for results in written.values() for item in results[arm]]
        values["distinct pairs of words"][arm] = [_mean(one.distinct[2]) for one in per_item]
        values["repetition"][arm] = [_mean(one.repetition) for one in per_item]
        values["words"][arm] = [_mean(one.words) for one in per_item]
    abouts = {
        "distinct pairs of words": "share of different word pairs in a response, mean over an item's responses",
        "repetition": "share of word pairs that came before in the response, mean over an item's responses",
        "words": "words in a response, mean over an item's responses",
    }
    return [
        Measure(
            name=name,
            role="note",
            kind="score",
            higher_is_better=None,
            items=tuple(names),
            values={arm: tuple(found) for arm, found in by_arm.items()},
            reasons={arm: {TOO_SHORT: found.count(None)} for arm, found in by_arm.items() if None in found},
            about=abouts[name],
        )
        for name, by_arm in values.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def samples(written: Written, arms: Sequence[str]) -> tuple[Sample, ...]:
    """Return the first prompts of each generative task with every arm's reply and its score."""
    found = []
    for task, results in written.items():
        for number, item in enumerate(results[UNSTEERED][:_SAMPLES]):
            replies = tuple(_reply(arm, results[arm][number]) for arm in arms)
            found.append(Sample(prompt=item.prompt, scored=_scored(task, item), replies=replies))
    return tuple(found)


def _scored(task: str, item: ItemResult) -> str:
    """Return what the score of a task's replies is; only the first of an item's responses is shown, and the score is that of all."""
    name = next((words.format(task) for metric, words in _SCORES.items() if metric in item.metrics or metric in item.missing), task)
    return name if len(item.responses) < 2 else f"{name}, mean of {len(item.responses)} responses of which this is the first"


def _reply(arm: str, item: ItemResult) -> Reply:
    score = next((item.metrics[name] for name in _SCORES if name in item.metrics), None)
    missing = next((reason for name in _SCORES for reason in item.missing_of(name)), None) if score is None else None
    return Reply(arm=arm, text=item.responses[0] if item.responses else "", score=score, missing=missing)
