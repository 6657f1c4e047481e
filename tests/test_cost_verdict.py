"""The verdict and the figures of a cost page with many measures, and what it says of missing values."""

import re
from typing import Any

import numpy as np
from cost_pages import accuracy, small
from test_cost_page import ALPHAS, built, page, words

from steered_lm.report.cost_data import UNSTEERED, CostArm, Judged, Measure
from steered_lm.report.cost_figures import cost_figures
from steered_lm.report.cost_page import build_cost

RIGHT = (1.0,) * 60
KEPT = accuracy(unsteered=(1.0,) * 900, a_1=(1.0,) * 900)


def traits(**moved: float) -> list[Measure]:
    """Twelve traits that stay where they are under ``a 1``, but for those that are named with a change."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(12):
        base = 50.0 + rng.normal(0.0, 6.0, 40)
        values = {UNSTEERED: tuple(base), "a 1": tuple(base + rng.normal(moved.get(f"t{i}", 0.0), 6.0, 40))}
        named: dict[str, Any] = {"name": f"trait t{i}", "role": "benefit", "kind": "score", "higher_is_better": None, "trait": f"t{i}"}
        found.append(Measure(**named, scale=(0.0, 100.0), items=tuple(map(str, range(40))), values=values))
    return found


def test_of_many_traits_those_that_moved_are_told_one_by_one_and_the_others_together() -> None:
    said = build_cost(small(KEPT, *traits(t3=20.0, t7=-30.0))).headline.sentences
    assert [s.text.split(" is ")[0] for s in said[:2]] == ["At alpha 1, trait t7", "At alpha 1, trait t3"]
    assert said[2].text.startswith(
        "At alpha 1, of 12 traits, 10 show no established change: trait t0, trait t1, trait t2, trait t4, trait t5, trait t6, and 4"
    )
    assert re.search(r"the widest interval is that of trait t\d+ under a 1, .* on 40 items\.$", said[2].text)
    assert len(said) == 4


def test_of_many_costs_measured_losses_come_first_and_what_is_open_shares_a_sentence() -> None:
    costs = [accuracy(f"task {i}", unsteered=RIGHT, a_1=((0.0,) * 30 + RIGHT[30:]) if i < 2 else RIGHT) for i in range(7)]
    said = build_cost(small(*costs, traits()[0])).headline
    texts = [s.text for s in said.sentences]
    assert [s.tone for s in said.sentences[1:4]] == ["bad", "bad", "unclear"]
    assert texts[1].startswith("No alpha is shown to keep task 0 within 2 points; at 1, a loss was measured there")
    assert texts[3].startswith(
        "No alpha is shown to keep 5 more costs within tolerance: task 2, task 3, task 4, task 5, task 6. At 1 no loss was measured"
    )
    assert "one beyond the tolerance is not excluded: too few items (5 costs); the widest interval is that of task" in texts[3]


def test_where_nothing_is_within_tolerance_losses_are_told_over_the_whole_sweep_as_gains_are() -> None:
    late = accuracy("late", unsteered=RIGHT, a_1=RIGHT, a_2=(0.0,) * 30 + RIGHT[30:])
    text = words(small(late, xs=(1.0, 2.0)))
    assert "No alpha is shown to keep late within 2 points; at 1, 60 items are too few" in text
    assert "Over the whole sweep losses are established, the largest of each: late −50.0 (" in text


def test_many_costs_that_are_kept_share_a_sentence_with_the_one_nearest_to_its_limit() -> None:
    right = (1.0,) * 900
    costs = [accuracy(f"task {i}", unsteered=right, a_1=(0.0, 0.0, *right[2:]) if i == 4 else right) for i in range(6)]
    (first, *_) = build_cost(small(*costs)).headline.sentences
    assert first.text.startswith("At alpha 1, 6 costs stay within their tolerances. Nearest to its own: task 4 stays within 2 points: change −0.2 (")


def test_of_many_benefits_those_that_moved_most_are_drawn_against_costs_and_come_first() -> None:
    data = small(*traits(t3=20.0, t7=-30.0), KEPT)
    figures = cost_figures(data, build_cost(data).analysis)
    names = [figure.name for figure in figures.trades]
    assert len(names) == 4
    assert {"trade-3-12", "trade-7-12"} < set(names)
    assert [figure.name for figure in figures.curves[:3]] == ["measure-3", "measure-7", "measure-12"]
    found = page(data)
    assert "Drawn are the 4 of 12 that moved most" in found.words
    assert "11 more measures without an established change" in found.words


def test_what_is_judged_of_a_traits_responses_is_drawn_against_that_trait_alone() -> None:
    values = {UNSTEERED: (1.0, 2.0), "a 1": (2.0, 2.0)}
    own = Measure(name="coherence", role="cost", kind="score", scale=(0.0, 100.0), beside="trait t1", items=("a", "b"), values=values)
    data = small(*traits()[:3], own)
    assert [figure.name for figure in cost_figures(data, build_cost(data).analysis).trades] == ["trade-1-3"]


def test_a_points_label_lies_away_from_the_lines_to_its_neighbours() -> None:
    figure = cost_figures(built("alpha").data, built("alpha").analysis).trades[0]
    (path,) = [drawn for drawn in figure.data if drawn.get("mode") == "lines+markers+text"]
    corners, x, y = path["textposition"], path["x"], path["y"]
    assert isinstance(corners, list)
    assert isinstance(x, list)
    assert isinstance(y, list)
    assert len(corners) == len(ALPHAS)
    # gains to the right and losses below: what is to the lower right or upper left of a middle point is the path itself
    for i in range(1, len(x) - 1):
        if float(str(x[i - 1])) < float(str(x[i])) < float(str(x[i + 1])) and float(str(y[i - 1])) > float(str(y[i])) > float(str(y[i + 1])):
            assert corners[i] in ("top right", "bottom left")


def test_missing_items_and_values_of_single_responses_are_told_apart() -> None:
    values = {UNSTEERED: (50.0, None, 52.0, 53.0, 49.0, 50.0), "a 1": (80.0, 81.0, None, None, 84.0, 80.0)}
    judged = {UNSTEERED: Judged(responses=18, missing=3), "a 1": Judged(responses=18, missing=8)}
    named: dict[str, Any] = {"name": "trait evil", "role": "benefit", "kind": "score", "higher_is_better": None, "scale": (0.0, 100.0)}
    reasons = {UNSTEERED: {"refused": 1}, "a 1": {"refused": 2}}
    data = small(Measure(**named, items=tuple("abcdef"), values=values, judged=judged, reasons=reasons))
    assert "2 of 6 items of trait evil are missing under a 1 (refused: 2)." in words(data)
    assert "11 of 36 values of single responses are missing" in words(data)
    assert "Missing: 2 items (refused); 1 item under unsteered alone; the values of 8 of 18 responses." in page(data).words


def test_scores_that_are_the_same_numbers_twice_are_told() -> None:
    first, other = traits(t3=20.0)[3:5]
    again = first.model_copy(update={"name": "again"})
    assert "These have the same values as another one, item by item" in words(small(first, again, other))
    assert "the same values" not in words(small(first, other))


def test_a_prompted_arms_empty_cell_says_why() -> None:
    nats: dict[str, Any] = {"kind": "tokens", "items": ("w",), "tokens": (9,), "values": {UNSTEERED: (20.0,)}}
    measures = (
        Measure(name="perplexity", role="cost", higher_is_better=False, exponentiate=True, **nats),
        Measure(name="kl", role="note", higher_is_better=None, **nats),
    )
    arms = (CostArm(name=UNSTEERED), CostArm(name="p", series="p", settings={"system turn": "Be formal."}))
    found = page(small(*measures, accuracy(unsteered=(1.0,) * 9, p=(1.0,) * 9), arms=arms, axis=None)).words
    assert "a plain text has no prompt that the system turn could be part of" in found
    assert "it is the distance that steering moves the model, and this arm is not steered" in found


def test_of_two_sides_of_zero_the_one_that_does_not_begin_is_named() -> None:
    right, wrong = (1.0,) * 900, (0.0,) * 200 + (1.0,) * 700
    values = {UNSTEERED: right, "a 1": right, "a -1": wrong}
    one = Measure(name="mmlu", role="cost", kind="accuracy", items=tuple(map(str, range(900))), values=values)
    said = words(small(one, xs=(1.0, -1.0)))
    assert "No negative alpha is shown to keep mmlu within 2 points; at −1, a loss was measured there" in said
    assert "No alpha is shown" not in said
    many = [one.model_copy(update={"name": f"task {i}", "values": values | {"a -1": right[:896] + (0.0,) * 4 if i else wrong}}) for i in range(7)]
    wide = small(*many, xs=(1.0, -1.0), tolerance=0.005)
    assert "No negative alpha is shown to keep 6 more costs within tolerance" in words(wide)


def test_the_worst_is_said_to_be_assumed_of_what_steering_made_missing_alone() -> None:
    right = (1.0,) * 900
    assert "the worst assumed of" not in words(small(accuracy(unsteered=(None, None, *right), a_1=(1.0, None, *right))))
    assert "(with the worst assumed of 1 missing item)" in words(small(accuracy(unsteered=(None, 1.0, *right), a_1=(None, None, *right))))


def test_no_worst_is_said_to_be_assumed_of_a_perplexity() -> None:
    nats = {UNSTEERED: tuple(20.0 + i for i in range(40)), "a 1": (None, *(20.0 + i + 0.01 * (i % 3) for i in range(1, 40)))}
    named: dict[str, Any] = {"name": "perplexity", "role": "cost", "kind": "tokens", "higher_is_better": False, "exponentiate": True}
    said = words(small(Measure(**named, items=tuple(map(str, range(40))), tokens=(10,) * 40, values=nats)))
    assert "1 item missing there, and no worst value can be assumed of them (perplexity ×1.001" in said


def test_a_single_missing_item_or_value_is_told_as_one() -> None:
    right = (1.0,) * 900
    judged = {UNSTEERED: Judged(responses=9, missing=0), "a 1": Judged(responses=9, missing=1)}
    named: dict[str, Any] = {"name": "trait evil", "role": "benefit", "kind": "score", "higher_is_better": None, "scale": (0.0, 100.0)}
    score = Measure(**named, items=("a", "b"), values={UNSTEERED: (50.0, 51.0), "a 1": (52.0, 50.0)}, judged=judged)
    said = words(small(score, accuracy(unsteered=right, a_1=(None, *right[1:]))))
    assert "1 item is missing in 1 cell of the table: mmlu 1." in said
    assert "1 of 18 values of single responses is missing" in said
