"""Results of all arms as the measures and samples of a page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from steered_lm.cost.measures import Reading, band_shares
from steered_lm.harness.items import ItemResult
from steered_lm.measure.fluency import fluency
from steered_lm.measure.means import TokenMean
from steered_lm.report.cost_data import UNSTEERED, Measure, Role
from steered_lm.report.data import Reply, Sample

Written = Mapping[str, Mapping[str, Sequence[ItemResult]]]
"""By task and arm, what generative tasks gave."""
_SAMPLES = 4
# what is shown beside a reply
_SCORES = ("trait_score", "persona_fit")


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
        items=tuple(item.item for item in first),
        groups=tuple(item.group for item in first) if grouped else (),
        values={arm: tuple(item.metrics.get(reading.metric) for item in items) for arm, items in results.items()},
        reasons={arm: dict(Counter(reason for item in items for reason in item.missing_of(reading.metric))) for arm, items in results.items()},
        bands={arm: shares for arm, items in results.items() if (shares := band_shares([i.metrics for i in items]))} if reading.bands else {},
        about=reading.about,
    )


def token_measure(name: str, role: Role, means: Mapping[str, TokenMean], *, exponentiate: bool, about: str) -> Measure:
    """Return every arm's mean over tokens, lower is better."""
    first = means[UNSTEERED]
    values = {arm: mean.totals for arm, mean in means.items()}
    return Measure(
        name=name,
        role=role,
        kind="tokens",
        higher_is_better=False,
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
        "distinct pairs of words": "share of different word pairs in a response",
        "repetition": "share of word pairs that came before in the response",
        "words": "length of a response",
    }
    return [
        Measure(
            name=name,
            role="note",
            kind="score",
            higher_is_better=None,
            items=tuple(names),
            values={arm: tuple(found) for arm, found in by_arm.items()},
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
    for results in written.values():
        for number, item in enumerate(results[UNSTEERED][:_SAMPLES]):
            replies = tuple(_reply(arm, results[arm][number]) for arm in arms)
            found.append(Sample(prompt=item.prompt, replies=replies))
    return tuple(found)


def _reply(arm: str, item: ItemResult) -> Reply:
    score = next((item.metrics[name] for name in _SCORES if name in item.metrics), None)
    missing = next((reason for name in _SCORES for reason in item.missing_of(name)), None) if score is None else None
    return Reply(arm=arm, text=item.responses[0] if item.responses else "", score=score, missing=missing)
