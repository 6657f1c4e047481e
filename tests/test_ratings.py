"""Human ratings: sheets that give nothing away, files read back with care, and sums that are right."""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steered_lm.cli import app
from steered_lm.errors import JudgeError, UserError
from steered_lm.judges.base import PREFERENCE, JudgeRequest, Verdict
from steered_lm.judges.question import Question
from steered_lm.judges.ratings import Answer, Rated, read_ratings
from steered_lm.judges.rubric import KINDS, Rubric
from steered_lm.judges.samples import SavedSample
from steered_lm.judges.sheets import Asked, Sample, SheetKey, make_sheets, pair_samples, people_instructions, requests_of, sheet_page, write_sheets
from steered_lm.judges.tally import PEOPLE, item_names, judge_values, summarise
from steered_lm.persona.load import load_persona

ARMS = ("zebra", "quokka", "narwhal")  # names that no text holds by chance
NASTY = '</script><script>alert("x")</script> & <b>bold</b>\u2028 {{ 7 * 7 }}'


@pytest.fixture(scope="module")
def walt() -> Question:
    return Question.of_persona(load_persona("walt"), "pairwise")


@pytest.fixture(scope="module")
def fit() -> Question:
    return Question.of_persona(load_persona("walt"))


def samples(n: int, arms: int = 2) -> list[Sample]:
    texts = [{arm: f"{'ABC'[a] * 3}{k}, {a}." for a, arm in enumerate(ARMS[:arms])} for k in range(n)]
    return [Sample(id=f"q{k}", prompt=f"Question {k}?", responses=responses) for k, responses in enumerate(texts)]


def paired_key(question: Question, n: int = 12, arms: int = 2, **facts: Any) -> SheetKey:
    asked = Asked(kind=question.kind, persona="walt")
    return make_sheets(samples(n, arms), question, asked, **{"seed": 0, "repeats": 0.25, **facts})


def rate(key: SheetKey, rater: int, wanted: Any) -> Rated:
    """What a rater says who knows the arms: ``wanted(sample, arms in order, repeat)`` names an arm, ``tie``, a number or None."""
    answers = {}
    for shown in key.sheets[rater].items:
        want = wanted(shown.sample, shown.arms, shown.repeat)
        if isinstance(want, str):
            want = want if want == "tie" else "ABC"[shown.arms.index(want)]
            answers[shown.item] = Answer(choice=want)
        else:
            answers[shown.item] = Answer(rating=want)
    return Rated(key.sheets[rater].rater, answers)


def saved(folder: Path, rated: Rated, key: SheetKey, **facts: Any) -> Path:
    """Write what the page saves."""
    other = {"rating", "declines"} if key.scale is None else {"choice", "confidence"}
    rows = [{"item": item, **answer.model_dump(exclude=other)} for item, answer in rated.answers.items()]
    path = folder / f"{rated.rater}.json"
    path.write_text(json.dumps({"format": "steered-lm ratings", "version": 1, "sheet": key.sheet, "rater": rated.rater, "ratings": rows} | facts))
    return path


def embedded(page: str) -> dict[str, Any]:
    """The data of a page, read as a browser does: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="sheet">(.*?)</script', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


# --- sheets


def test_nothing_that_raters_get_names_an_arm_or_tells_repeats_apart(tmp_path: Path, walt: Question) -> None:
    key = paired_key(walt, arms=3)
    files = write_sheets(key, walt, tmp_path)
    assert [f.name for f in files] == [f"sheet-{key.sheet}-rater-{r}.{kind}" for r in (1, 2) for kind in ("html", "csv")]
    assert {f.parent for f in files} == {tmp_path / "for-raters"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not any(arm in text for arm in ARMS)
        assert '"repeat' not in text and "repeat" not in text.partition("\n")[0]
        assert "Question 3?" in text
    assert all(arm in (tmp_path / "key.json").read_text() for arm in ARMS)
    assert SheetKey.load(tmp_path / "key.json") == key


def test_a_page_holds_the_responses_in_the_order_of_the_key(walt: Question) -> None:
    key = paired_key(walt)
    for sheet in key.sheets:
        data = embedded(sheet_page(key, sheet, walt))
        assert (data["sheet"], data["rater"], data["letters"]) == (key.sheet, sheet.rater, ["A", "B"])
        for shown, item in zip(sheet.items, data["items"], strict=True):
            assert item["item"] == shown.item
            assert item["responses"] == [key.samples[shown.sample].responses[arm] for arm in shown.arms]
            assert set(item) == {"item", "prompt", "responses", "notes"}


def test_a_page_escapes_every_text_and_may_load_nothing(fit: Question) -> None:
    nasty = Sample(id="x", prompt=NASTY, responses={"zebra": NASTY})
    question = Question(fit.rubric.model_copy(update={"instructions": NASTY}), NASTY, "x")
    key = make_sheets([nasty], question, Asked(kind="persona_fit"), raters=1, repeats=0, seed=0)
    page = sheet_page(key, key.sheets[0], question)
    assert embedded(page)["items"][0]["prompt"] == NASTY
    assert embedded(page)["items"][0]["responses"] == [NASTY]
    assert page.count("<script") == 2 and page.count("</script") == 2
    assert "<b>bold" not in page and "alert(&#34;x&#34;)" in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["']|@import|url\(|https?://|fetch\(|XMLHttp""", page.replace("link.href = URL", ""))
    assert "innerHTML" not in page


def test_every_order_comes_up_equally_often_and_each_rater_has_their_own(walt: Question) -> None:
    key = paired_key(walt, n=30, arms=3, raters=3, repeats=0.2)
    for sheet in key.sheets:
        orders = Counter(shown.arms for shown in sheet.items if not shown.repeat)
        assert sorted(orders.values()) == [5] * 6
        assert sorted(shown.sample for shown in sheet.items if not shown.repeat) == list(range(30))
    assert len({tuple((s.sample, s.arms) for s in sheet.items) for sheet in key.sheets}) == 3
    assert len({shown.item for sheet in key.sheets for shown in sheet.items}) == 3 * 36


def test_an_odd_number_of_pairs_is_balanced_but_for_one_and_the_extra_one_is_random(walt: Question) -> None:
    extra = set()
    for seed in range(8):
        orders = Counter(shown.arms for shown in paired_key(walt, n=7, seed=seed, repeats=0).sheets[0].items)
        assert sorted(orders.values()) == [3, 4]
        extra.add(orders.most_common(1)[0][0])
    assert len(extra) == 2


def test_repeats_come_later_with_their_letters_changed(walt: Question) -> None:
    key = paired_key(walt, n=20, repeats=0.3)
    for sheet in key.sheets:
        again = [(place, shown) for place, shown in enumerate(sheet.items) if shown.repeat]
        assert len(again) == 6
        for place, shown in again:
            first, before = next((p, s) for p, s in enumerate(sheet.items) if s.sample == shown.sample and not s.repeat)
            assert first < 10 <= place
            assert shown.arms == before.arms[::-1]


def test_single_responses_are_shown_alone_and_each_arm_of_each_prompt_once(fit: Question) -> None:
    key = paired_key(fit, n=5, repeats=0)
    assert key.letters == () and key.scale == (1, 5)
    assert Counter((s.sample, s.arms) for s in key.sheets[0].items) == Counter((k, (arm,)) for k in range(5) for arm in ARMS[:2])


def test_the_same_seed_gives_the_same_sheets_and_another_one_others(walt: Question) -> None:
    assert paired_key(walt, items=6) == paired_key(walt, items=6)
    other = paired_key(walt, items=6, seed=1)
    assert other.sheet != paired_key(walt, items=6).sheet
    assert {s.id for s in other.samples} != {s.id for s in paired_key(walt, items=6).samples}


@pytest.mark.parametrize("kind", KINDS)
def test_people_get_the_rubrics_words_but_for_those_about_json(kind: Any) -> None:
    shown = " ".join(people_instructions(Rubric.load(kind).instructions))
    assert len(shown) > 200 and "JSON" not in shown and "reply_a" not in shown and "score" not in shown.replace("a score.", "")


def test_references_of_a_truthfulness_sheet_are_shown() -> None:
    question = Question.of_kind("truthful")
    sample = Sample(id="x", prompt="Where?", responses={"zebra": "Here."}, references=("There.",), false_references=("Nowhere.",))
    key = make_sheets([sample], question, Asked(kind="truthful"), raters=1, repeats=0, seed=0)
    data = embedded(sheet_page(key, key.sheets[0], question))
    assert data["items"][0]["notes"] == {"true answers": ["There."], "false answers": ["Nowhere."]}
    assert (data["buttons"], data["scale"]) == (False, [0, 100])


def test_cells_that_a_spreadsheet_would_run_begin_with_an_apostrophe(tmp_path: Path, walt: Question) -> None:
    formula = Sample(id="x", prompt="=1+1", responses={"zebra": '=HYPERLINK("http://x")', "quokka": "- a list,\n- of two"})
    key = make_sheets([formula], walt, Asked(kind="pairwise"), raters=1, repeats=0, seed=0)
    (table,) = [f for f in write_sheets(key, walt, tmp_path) if f.suffix == ".csv"]
    (row,) = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline=""))
    assert row["message"] == "'=1+1"
    assert {row["A"], row["B"]} == {'\'=HYPERLINK("http://x")', "'- a list,\n- of two"}


def saved_samples(arm: str, ids: list[str], prompts: list[str], empty: str = "") -> list[SavedSample]:
    return [
        SavedSample(file=f"{arm}.jsonl", id=i, request=JudgeRequest(prompt=p, response="" if i == empty else f"{arm} on {p}"))
        for i, p in zip(ids, prompts, strict=True)
    ]


def test_samples_are_paired_by_id_and_what_lacks_an_arm_or_a_text_is_left_out() -> None:
    arms = {"a": saved_samples("a", ["1", "2", "3"], ["x", "y", "z"], empty="3"), "b": saved_samples("b", ["3", "2", "9"], ["z", "y", "w"])}
    found = pair_samples(arms)
    assert [(s.id, s.responses) for s in found.samples] == [("2", {"a": "a on y", "b": "b on y"})]
    assert (found.unpaired, found.empty) == (1, 1)


def test_samples_whose_ids_do_not_fit_are_paired_by_prompt() -> None:
    arms = {"a": saved_samples("a", ["1", "2"], ["x", "y"]), "b": saved_samples("b", ["1", "2"], ["y", "x"])}
    assert [(s.id, s.prompt, s.responses["b"]) for s in pair_samples(arms).samples] == [("1", "x", "b on x"), ("2", "y", "b on y")]
    with pytest.raises(JudgeError, match="do not fit together"):
        pair_samples({"a": saved_samples("a", ["1"], ["x"]), "b": saved_samples("b", ["1"], ["y"])})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"items": 13}, "--items 13: 12 samples have a response of every arm"),
        ({"raters": 0}, "--raters 0"),
        ({"repeats": 0.7}, "at most half of the items"),
        ({"arms": 1}, "--arm names 1 arm"),
    ],
)
def test_sheets_that_cannot_be_made_are_refused(walt: Question, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        paired_key(walt, **facts)


# --- reading


def test_a_saved_page_and_a_filled_in_table_say_the_same(tmp_path: Path, walt: Question) -> None:
    key = paired_key(walt)
    files = write_sheets(key, walt, tmp_path)
    rated = rate(key, 0, lambda sample, arms, repeat: None if sample == 2 else "tie" if sample == 1 else "zebra")
    rated.answers[key.sheets[0].items[0].item] = Answer(choice="B", confidence=3, comment='so, "quoted"; yes')
    assert read_ratings(saved(tmp_path, rated, key), key) == rated
    table = next(f for f in files if f.name.endswith("rater-1.csv"))
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"), newline="")))
    for delimiter in ",;":
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            answer = rated.answers[row["item"]]
            writer.writerow(row | {"choice": (answer.choice or "").lower(), "confidence": answer.confidence or "", "comment": answer.comment})
        filled = tmp_path / "filled.csv"
        filled.write_text(out.getvalue(), encoding="utf-8-sig", newline="")
        assert read_ratings(filled, key) == rated


def test_ratings_of_a_table_may_say_declines_and_be_written_with_a_decimal(tmp_path: Path) -> None:
    question = Question.of_trait("humorous")
    key = make_sheets(samples(2, 1), question, Asked(kind="trait", trait="humorous"), raters=1, repeats=0, seed=0)
    one, two = (shown.item for shown in key.sheets[0].items)
    path = tmp_path / "r.csv"
    path.write_text(f"sheet,rater,item,rating\n{key.sheet},rater-1,{one},40.0\n{key.sheet},rater-1,{two},Declines\n")
    assert read_ratings(path, key).answers == {one: Answer(rating=40), two: Answer(declines=True)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sheet": "0000000000"}, "belong to sheet '0000000000', and the key is of"),
        ({"rater": "rater-7"}, "the key has no rater 'rater-7'"),
        ({"format": "something"}, "not what a rating page saves"),
        ({"ratings": [{"item": "nope", "choice": "A"}]}, "item 'nope' is on no sheet of this key"),
        ({"ratings": [{"item": "{other}", "choice": "A"}]}, "is on the sheet of rater-2, and not on that of rater-1"),
        ({"ratings": [{"item": "{own}", "choice": "A"}, {"item": "{own}", "choice": "A"}]}, "is there twice"),
        ({"ratings": [{"item": "{own}", "choice": "C"}]}, "choice 'C'. Allowed: A, B, tie, or nothing"),
        ({"ratings": [{"item": "{own}", "rating": 3}]}, "has a rating, and the sheet asks for a choice"),
        ({"ratings": [{"item": "{own}", "choice": "A", "confidence": 4}]}, "confidence: Input should be less than or equal to 3"),
        ({"ratings": [{"item": "{own}", "chioce": "A"}]}, "chioce: Extra inputs"),
        ({"ratings": "A"}, "not what a rating page saves"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_item(tmp_path: Path, walt: Question, change: dict[str, Any], message: str) -> None:
    key = paired_key(walt)
    own, other = (json.dumps(key.sheets[k].items[0].item).strip('"') for k in (0, 1))
    change = json.loads(json.dumps(change).replace("{own}", own).replace("{other}", other))
    with pytest.raises(JudgeError, match=message):
        read_ratings(saved(tmp_path, rate(key, 0, lambda *_: "tie"), key, **change), key)


@pytest.mark.parametrize("rating", [0, 6, 2.5])
def test_a_rating_off_the_scale_is_refused(tmp_path: Path, fit: Question, rating: float) -> None:
    key = paired_key(fit)
    with pytest.raises(JudgeError, match=r"rating .*\. Allowed: a whole number from 1 to 5, or nothing"):
        read_ratings(saved(tmp_path, rate(key, 0, lambda *_: rating), key), key)


def test_a_response_that_declines_is_no_answer_where_the_sheet_does_not_offer_it(tmp_path: Path, fit: Question) -> None:
    key = paired_key(fit)
    rated = Rated("rater-1", {key.sheets[0].items[0].item: Answer(declines=True)})
    with pytest.raises(JudgeError, match="marked as declines, which this sheet does not offer"):
        read_ratings(saved(tmp_path, rated, key), key)


# --- sums


def test_wins_are_shares_of_prompts_with_ties_counted_half_whatever_the_letters_were(walt: Question) -> None:
    key = paired_key(walt, n=16, repeats=0)
    first = rate(key, 0, lambda sample, arms, repeat: "zebra" if sample < 12 else "tie" if sample < 14 else "quokka")
    second = rate(key, 1, lambda sample, arms, repeat: "zebra" if sample < 12 else None)
    report = summarise(key, [first, second])
    assert report.wins["zebra"].value == pytest.approx((12 + 2 * 0.5) / 16)
    assert report.wins["quokka"].value == pytest.approx((2 + 2 * 0.5) / 16)
    assert report.chance == 0.5 and report.ties is not None and report.ties.value == pytest.approx(2 / 28)
    (pair,) = report.comparisons
    assert pair.difference.mean == pytest.approx(10 / 16) and pair.difference.excludes_zero
    assert pair.difference.p_value is not None and pair.difference.p_value < 0.05
    assert [(r.shown, r.missing) for r in report.raters] == [(16, 0), (16, 4)]
    # balanced orders: someone who prefers an arm chooses each letter about equally often
    assert report.places["A"].value is not None and 0.3 < report.places["A"].value < 0.7


def test_an_arm_that_wins_everywhere_has_wilsons_interval(walt: Question) -> None:
    key = paired_key(walt, n=12, repeats=0)
    report = summarise(key, [rate(key, 0, lambda *_: "zebra")])
    assert (report.wins["zebra"].value, report.wins["zebra"].method) == (1.0, "Wilson interval")
    assert report.wins["zebra"].low is not None and report.wins["zebra"].low == pytest.approx(0.7575, abs=1e-3)
    assert report.agreement is None


def test_a_rater_who_always_takes_the_first_place_prefers_no_arm_and_is_seen(walt: Question) -> None:
    key = paired_key(walt, n=40, repeats=0.25, raters=1)
    report = summarise(key, [rate(key, 0, lambda sample, arms, repeat: arms[0])])
    assert report.wins["zebra"].value == pytest.approx(0.5)
    assert not report.comparisons[0].difference.excludes_zero
    assert report.places["A"].value == 1.0 and report.places["A"].low is not None and report.places["A"].low > 0.9
    assert report.consistency.value == 0.0 and report.consistency.n == 10  # repeats have their letters changed


def test_steady_raters_say_the_same_of_repeats(walt: Question, fit: Question) -> None:
    key = paired_key(walt, n=20, raters=1)
    assert summarise(key, [rate(key, 0, lambda *_: "quokka")]).consistency.value == 1.0
    key = paired_key(fit, n=20, raters=1)
    unsteady = summarise(key, [rate(key, 0, lambda sample, arms, repeat: 3 + repeat)])
    assert (unsteady.consistency.value, unsteady.consistency.n) == (0.0, 10)
    half = summarise(key, [rate(key, 0, lambda sample, arms, repeat: None if repeat else 3)])
    assert half.consistency.value is None and half.consistency.n == 0 and half.raters[0].missing == 10


def test_three_arms_are_compared_two_by_two_with_corrected_p_values(walt: Question) -> None:
    key = paired_key(walt, n=18, arms=3, repeats=0, raters=1)
    report = summarise(key, [rate(key, 0, lambda sample, arms, repeat: "narwhal" if sample < 15 else "tie")])
    assert report.chance == pytest.approx(1 / 3)
    assert report.wins["narwhal"].value == pytest.approx((15 + 3 / 3) / 18)
    assert sum(report.wins[arm].value or 0 for arm in ARMS) == pytest.approx(1)
    assert [(c.a, c.b) for c in report.comparisons] == [("zebra", "quokka"), ("zebra", "narwhal"), ("quokka", "narwhal")]
    assert all(c.p_adjusted is not None and c.difference.p_value is not None and c.p_adjusted >= c.difference.p_value for c in report.comparisons)
    assert set(report.places) == {"A", "B", "C"}


def test_ratings_are_means_over_prompts(fit: Question) -> None:
    key = paired_key(fit, n=12, repeats=0)
    first = rate(key, 0, lambda sample, arms, repeat: 4 + (sample % 2) if arms == ("zebra",) else 2)
    second = rate(key, 1, lambda sample, arms, repeat: 4 if arms == ("zebra",) else 1 + sample % 3)
    report = summarise(key, [first, second])
    assert report.means["zebra"].value == pytest.approx((4.5 + 4) / 2)
    assert report.means["quokka"].value == pytest.approx(2)
    assert report.means["zebra"].n == 12
    assert report.comparisons[0].difference.mean == pytest.approx(2.25)
    assert report.agreement is not None and report.agreement.metric == "ordinal" and report.agreement.items == 24
    assert not report.wins and not report.places and report.chance is None


def test_missing_answers_are_never_invented(walt: Question) -> None:
    key = paired_key(walt, n=12, repeats=0)
    rated = Rated("rater-1", {key.sheets[0].items[0].item: Answer(choice="tie"), key.sheets[0].items[1].item: Answer(comment="unclear")})
    report = summarise(key, [rated])
    assert (report.wins["zebra"].n, report.wins["zebra"].missing, report.wins["zebra"].low) == (1, 11, None)
    assert report.raters[0].missing == 11
    with pytest.raises(JudgeError, match="there is no answer in the ratings"):
        summarise(key, [Rated("rater-1", {})])
    with pytest.raises(JudgeError, match="ratings of rater-1 are there twice"):
        summarise(key, [rated, rated])


def test_raters_agreement_is_on_the_arms_and_not_on_the_letters(walt: Question) -> None:
    key = paired_key(walt, n=20)
    both = [rate(key, rater, lambda sample, arms, repeat: ARMS[sample % 2]) for rater in (0, 1)]
    report = summarise(key, both)
    assert report.agreement is not None and report.agreement.alpha.value == 1.0
    assert report.codes == {"tie": 0, "zebra": 1, "quokka": 2}


# --- judges beside people


def verdict(score: float, **facts: Any) -> Verdict:
    return Verdict(score=score, judge="j", **facts)


def test_a_judges_verdicts_on_pairs_count_in_either_order(walt: Question) -> None:
    key = paired_key(walt, n=3, repeats=0)
    requests = list(requests_of(key).values())
    verdicts = {
        requests[0]: verdict(1, scale=PREFERENCE, choice="A"),
        requests[1].swapped(): verdict(1, scale=PREFERENCE, choice="A"),
        requests[2]: verdict(0, scale=PREFERENCE, choice="tie"),
    }
    assert judge_values(key, verdicts) == [1.0, 2.0, 0.0]
    assert judge_values(key, {}) == [None, None, None]


def test_without_verdicts_on_pairs_the_higher_score_wins_and_equal_ones_tie(walt: Question) -> None:
    key = paired_key(walt, n=4, repeats=0, arms=3)
    scores = [(1, 2, 5), (4, 4, 2), (5, 2, 1), (3, None, 1)]
    verdicts = {
        JudgeRequest(prompt=s.prompt + " ", response=s.responses[arm]): verdict(score)
        for s, row in zip(key.samples, scores, strict=True)
        for arm, score in zip(ARMS, row, strict=True)
        if score is not None
    }
    assert judge_values(key, verdicts) == [3.0, 0.0, 1.0, None]
    with pytest.raises(JudgeError, match="compares three arms"):
        requests_of(key)


def test_judges_are_compared_with_peoples_joint_answer(fit: Question) -> None:
    key = paired_key(fit, n=10, raters=3, repeats=0)
    rated = [rate(key, r, lambda sample, arms, repeat, r=r: [1, 3, 4][r] if sample else 2) for r in range(3)]
    report = summarise(key, rated, {"j": [3.0] * 18 + [1.0, 2.0]})
    assert report.with_judges is not None and report.with_judges.raters == (PEOPLE, "j")
    assert report.with_judges.pairs[0].kappa.n == len(item_names(key)) == 20
    people = {d.item: d.scores[PEOPLE] for d in report.with_judges.disagreements}
    assert people["q0 [zebra]"] == 2 and people["q9 [quokka]"] == 3


# --- the commands


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["judge", *map(str, arguments)], env={"COLUMNS": "200"})


def arm_files(folder: Path) -> tuple[Path, Path]:
    lines = [("You wait in the rain, stranger, no joke.", "I am delighted to assist you today."), ("Yeah, your tea is cold.", "Tea is a beverage.")]
    for number, arm in enumerate(("zebra", "quokka")):
        rows = [{"id": f"q{k}", "prompt": f"What of thing {k}?", "response": f"{lines[k % 2][number]} ({k})"} for k in range(14)]
        (folder / f"{arm}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "zebra.jsonl", folder / "quokka.jsonl"


def test_the_commands_go_from_samples_to_a_report_with_judges(tmp_path: Path) -> None:
    one, two = arm_files(tmp_path)
    arms = ("--arm", f"zebra={one}", "--arm", f"quokka={two}")
    made = invoke("sheet", *arms, "--persona", "walt", "--items", 12, "--repeats", 0.25, "--out", tmp_path / "s")
    assert made.exit_code == 0, made.output
    assert "12 prompts, 15 items a rater" in made.output
    key = SheetKey.load(tmp_path / "s" / "key.json")
    files = [saved(tmp_path, rate(key, r, lambda sample, arms, repeat, r=r: "zebra" if sample > r else "tie"), key) for r in (0, 1)]
    by_score = tmp_path / "verdicts.jsonl"
    rejudged = invoke("rejudge", one, two, "--persona", "walt", "--judge", "stylometric", "--out", by_score)
    assert rejudged.exit_code == 0, rejudged.output
    done = invoke("ratings", tmp_path / "s" / "key.json", *files, "--verdicts", by_score, "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wins"]["zebra"]["value"] == pytest.approx((11.5 + 11) / 24)
    assert report["with_judges"]["raters"] == ["people", "stylometric"]
    assert report["with_judges"]["alpha"]["n"] == 12
    assert "place A was chosen in" in done.output and f"far apart: {key.samples[1].id}: rater-1 zebra, rater-2 tie" in done.output
    again = invoke("sheet", "--arm", f"zebra={one}", "--arm", f"quokka={two}", "--persona", "walt", "--out", tmp_path / "s")
    assert isinstance(again.exception, UserError) and "holds a key already" in str(again.exception)


def test_a_judge_can_be_asked_about_the_sheet_and_is_refused_when_the_question_has_changed(tmp_path: Path) -> None:
    one, two = arm_files(tmp_path)
    asked = ["--kind", "persona_fit", "--persona", "walt"]
    made = invoke("sheet", "--arm", f"zebra={one}", "--arm", f"quokka={two}", *asked, "--raters", 1, "--out", tmp_path / "s")
    assert made.exit_code == 0, made.output
    path = tmp_path / "s" / "key.json"
    key = SheetKey.load(path)
    file = saved(tmp_path, rate(key, 0, lambda sample, arms, repeat: 5 if arms == ("zebra",) else 1), key)
    done = invoke("ratings", path, file, "--judge", "stylometric", "--json", tmp_path / "report.json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["means"]["zebra"]["value"] == 5 and report["with_judges"]["metric"] == "interval"
    assert report["with_judges"]["pairs"][0]["spearman"]["value"] > 0.5
    path.write_text(key.model_copy(update={"question": "0" * 64}).model_dump_json())
    assert "has changed since the sheets were made" in str(invoke("ratings", path, file, "--judge", "stylometric").exception)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["zebra"], "--arm 'zebra' is not name=file"),
        (["zebra=x.jsonl", "zebra=y.jsonl"], "the name 'zebra' is taken"),
        (["tie=x.jsonl"], "the name 'tie' is taken"),
        (["zebra=none.jsonl"], "'none.jsonl' does not exist"),
    ],
)
def test_arms_that_are_wrong_are_refused(tmp_path: Path, arms: list[str], message: str) -> None:
    given = [part for arm in arms for part in ("--arm", arm)]
    assert message in str(invoke("sheet", *given, "--persona", "walt", "--out", tmp_path / "s").exception)
