"""``steered-lm judge rejudge``: saved samples judged again, by other judges or against another rubric, without generating again."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steered_lm.commands.logs import saved_samples
from steered_lm.commands.options import (
    CacheFile,
    Description,
    JudgeNames,
    JudgeOptions,
    KindName,
    PersonaName,
    RubricFile,
    TraitName,
    make_judges,
    make_question,
)
from steered_lm.commands.tables import interval, number, show_agreement, table
from steered_lm.config import write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges import check_missing
from steered_lm.judges.base import Judge, JudgeRequest, Usage, Verdict
from steered_lm.judges.budget import BudgetReached
from steered_lm.judges.question import Question
from steered_lm.judges.samples import SavedSample, sample_files

if TYPE_CHECKING:
    from steered_lm.stats import Values

console = Console(emoji=False)
_SEED = 0
_REASONS = 3
_INTERRUPTED = 130  # what shells return for a process that Ctrl-C ended


class _Judged(NamedTuple):
    """A judge and its verdicts, in the order of the samples."""

    judge: Judge
    verdicts: list[Verdict]


def rejudge(
    files: Annotated[
        list[Path],
        typer.Argument(help="lm-eval's samples_*.jsonl, Inspect's logs, JSONL with prompt and response, or folders of the first two."),
    ],
    judge: JudgeNames,
    kind: KindName = "persona_fit",
    persona: PersonaName = None,
    trait: TraitName = None,
    description: Description = None,
    rubric: RubricFile = None,
    judge_option: JudgeOptions = [],  # noqa: B006 - typer's way to say none; it copies the list
    against: Annotated[Path | None, typer.Option(help="pairwise: the other system's log; its responses to the same ids are the other ones.")] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option(help="Where prompts are: a field of lm-eval's documents, of Inspect's metadata or of JSONL; arguments: lm-eval's whole text."),
    ] = None,
    cache: CacheFile = None,
    missing_limit: Annotated[float, typer.Option(help="Fail when more than this share of a judge's verdicts is missing.", min=0, max=1)] = 0.2,
    limit: Annotated[int | None, typer.Option(help="Judge the first so many samples of each file alone.", min=1)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would take, and ask nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSONL file to write, a line for each sample and judge.", dir_okay=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out when it exists.")] = False,
) -> None:
    """Judge saved samples again. Finished verdicts are kept in --cache (by default beside --out), so a run that was stopped goes on from there."""
    if out is None and not dry_run:
        raise JudgeError("rejudge needs --out, the JSONL file to write (or --dry-run).")
    if out is not None and out.exists() and not (overwrite or dry_run):
        raise JudgeError(f"--out {str(out)!r} exists. Name another file, or add --overwrite; verdicts in the cache are not paid for again.")
    question = make_question(kind, persona=persona, trait=trait, description=description, rubric=rubric)
    samples = _paired(_read(files, prompt_field, limit), against, prompt_field) if against is not None else _read(files, prompt_field, limit)
    if question.kind == "trait":
        samples = [_with_trait(sample) for sample in samples]
    _check(question, samples)
    kept = cache or (out.with_suffix(".cache.sqlite") if out is not None else None)
    judges = make_judges(judge, question, judge_option, cache=kept if not dry_run or (kept is not None and kept.exists()) else None)
    if len({j.identity for j in judges}) < len(judges):
        raise JudgeError(f"--judge names the same judge twice: {', '.join(j.name for j in judges)}. Name each once.")
    requests = [sample.request for sample in samples]
    if dry_run:
        console.print(_estimates(judges, requests))
        return
    assert out is not None
    assert kept is not None
    judged = [_Judged(j, _ask(j, requests, kept)) for j in judges]
    lines = (_line(question, sample, j, v) for j, verdicts in judged for sample, v in zip(samples, verdicts, strict=True))
    write_atomic(out, "".join(lines))
    _show(question, samples, judged)
    console.print(f"wrote {len(samples) * len(judged):,} verdicts to {out}; kept in {kept}", soft_wrap=True, markup=False)
    for one, verdicts in judged:
        try:
            check_missing(verdicts, missing_limit)
        except JudgeError as problem:
            raise JudgeError(f"judge {one.name}: {problem}") from problem


def _read(files: Sequence[Path], prompt_field: str | None, limit: int | None) -> list[SavedSample]:
    """Return the samples of all files, the first ``limit`` of each."""
    return [sample for file in sample_files(files) for sample in saved_samples(file, prompt_field)[:limit]]


def _with_trait(sample: SavedSample) -> SavedSample:
    """Return a sample of a trait's task with its verdict on the trait as the old one; its other numbers are made of that one."""
    return sample if sample.trait is None else sample.model_copy(update={"old": sample.trait, "old_scores": {}})


def _paired(samples: Sequence[SavedSample], against: Path, prompt_field: str | None) -> list[SavedSample]:
    """Return samples that hold the other log's response to the same prompt."""
    others = {(other.id, other.repeat): other.request for other in _read([against], prompt_field, None)}
    found = []
    for sample in samples:
        other = others.get((sample.id, sample.repeat))
        if other is None or other.prompt != sample.request.prompt:
            what = "has another prompt" if other is not None else "is missing"
            raise JudgeError(f"--against {str(against)!r}: sample {sample.id!r} of {sample.file!r} {what} there. Give a log of the same items.")
        found.append(sample.model_copy(update={"request": sample.request.model_copy(update={"other": other.response})}))
    return found


def _check(question: Question, samples: Sequence[SavedSample]) -> None:
    """Refuse samples that lack what the rubric shows, before anything is paid for.

    Raises:
        JudgeError: naming the first one.
    """
    for sample in samples:
        try:
            question.user(sample.request)
        except JudgeError as problem:
            raise JudgeError(f"{sample.file!r}, sample {sample.id!r}: {problem} Pairs: --against names the other system's log.") from problem


def _ask(judge: Judge, requests: Sequence[JudgeRequest], cache: Path) -> list[Verdict]:
    console.print(f"asking {judge.name} about {len(requests):,} responses", highlight=False, markup=False)
    go_on = f"Finished verdicts are in {cache}: the same command goes on from there."
    try:
        return judge.judge(requests)
    except BudgetReached as stop:
        raise JudgeError(f"{stop} {go_on}") from stop
    except KeyboardInterrupt:
        Console(stderr=True, emoji=False).print(f"interrupted. {go_on}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(_INTERRUPTED)


def _line(question: Question, sample: SavedSample, judge: Judge, verdict: Verdict) -> str:
    rubric = f"{question.rubric.name}@{question.rubric.version}"
    facts = {"file": sample.file, "id": sample.id, "repeat": sample.repeat, **sample.request.model_dump(mode="json", exclude_defaults=True)}
    facts |= {"judge": judge.name, "rubric": rubric, "about": question.about, "verdict": verdict.record()}
    facts |= {"old": None if sample.old is None else sample.old.record(), "old_scores": sample.old_scores}
    return json.dumps(facts, ensure_ascii=False) + "\n"


def spent(verdicts: Sequence[Verdict]) -> Usage:
    """Return what verdicts took now: those from a cache cost nothing, and one that was made of others cost what they did."""
    total = Usage()
    for verdict in verdicts:
        if not verdict.cached:
            total += spent(verdict.parts) if verdict.parts else verdict.usage or Usage()
    return total


def _estimates(judges: Sequence[Judge], requests: Sequence[JudgeRequest]) -> Table:
    from steered_lm.judges.audit import estimate_usage

    shown = table(f"Estimate for {len(requests):,} samples; nothing was asked", ("judge",), ("requests", "tokens in", "tokens out", "dollars"))
    for judge in judges:
        usage = estimate_usage(judge, requests)
        shown.add_row(escape(judge.name), *(("computed here", "-", "-", "-") if usage is None else _usage(usage)))
    return shown


def _show(question: Question, samples: Sequence[SavedSample], judged: Sequence[_Judged]) -> None:
    """Print means, cost, comparison with the logs' scores, and agreement; files are told apart by number."""
    files = list(dict.fromkeys(sample.file for sample in samples))
    if len(files) > 1:
        for number, file in enumerate(files, start=1):
            console.print(f"file {number}: {file}", highlight=False, markup=False, soft_wrap=True)
    of_file = {number: [i for i, sample in enumerate(samples) if sample.file == file] for number, file in enumerate(files, start=1)}
    console.print(_means(question, samples, judged, of_file))
    if question.kind == "pairwise":
        console.print(_pairs(judged, of_file))
    cost = table("What it took; verdicts from the cache cost nothing", ("judge",), ("from cache", "requests", "tokens in", "tokens out", "dollars"))
    for judge, verdicts in judged:
        cost.add_row(escape(judge.name), f"{sum(v.cached for v in verdicts):,} of {len(verdicts):,}", *_usage(spent(verdicts)))
    console.print(cost)
    old = _comparison(samples, judged, of_file)
    if old.row_count:
        console.print(old)
    if len(judged) > 1:
        _show_agreement(samples, judged)


def _means(question: Question, samples: Sequence[SavedSample], judged: Sequence[_Judged], of_file: Mapping[int, list[int]]) -> Table:
    from steered_lm.stats import mean_interval

    low, high = question.bounds
    about = f" of {question.about}" if question.about else ""
    title = f"{question.kind}{about}, {low:g} to {high:g}; repeats of a prompt count once, as their mean"
    shown = table(title, ("judge", "file"), ("mean", "95 % interval", "prompts", "missing"), ("why missing",))
    for judge, verdicts in judged:
        for file, chosen in of_file.items():
            found = mean_interval(_by_prompt(samples, [v.score for v in verdicts], chosen), bounds=question.bounds)
            reasons = Counter(reason for i in chosen if (reason := verdicts[i].missing) is not None)
            why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_REASONS))
            missing = f"{reasons.total()} of {len(chosen)}"
            shown.add_row(escape(judge.name), str(file), number(found.value), interval(found, shown), str(found.n), missing, escape(why) or "-")
    return shown


def _pairs(judged: Sequence[_Judged], of_file: Mapping[int, list[int]]) -> Table:
    """Return who won, and how often only the order decided: a mean near zero may be ties, or a judge that prefers a place."""
    shown = table("Pairs, each asked in both orders", ("judge", "file"), ("log wins", "--against wins", "ties", "winner changed when swapped"))
    for judge, verdicts in judged:
        for file, chosen in of_file.items():
            scored = [verdicts[i] for i in chosen if verdicts[i].score is not None]
            won = Counter(verdict.choice for verdict in scored)
            told = [verdict.consistent for verdict in scored if verdict.consistent is not None]  # a panel's joint verdict has no order
            changed = f"{told.count(False)} of {len(told)}" if told else "-"
            shown.add_row(escape(judge.name), str(file), str(won["A"]), str(won["B"]), str(won["tie"]), changed)
    return shown


def _comparison(samples: Sequence[SavedSample], judged: Sequence[_Judged], of_file: Mapping[int, list[int]]) -> Table:
    """Return how the new scores compare with what the logs held: differences on the same scale alone, ranks always."""
    from steered_lm.stats import paired_difference, spearman_interval

    shown = table(
        "New scores against those of the logs",
        ("judge", "file", "old"),
        ("items", "new - old", "95 % interval", "p", "Spearman", "95 % interval"),
    )
    for judge, verdicts in judged:
        for file, chosen in of_file.items():
            new = _by_prompt(samples, [v.score for v in verdicts], chosen)
            for what, values, comparable in _old(samples, verdicts, chosen):
                before = _by_prompt(samples, values, chosen)
                rho = spearman_interval(new, before)
                told = ("-", "another scale", "-")
                if comparable:
                    gap = paired_difference(new, before, seed=_SEED)
                    told = (number(gap.mean), interval(gap, shown), number(gap.p_value))
                shown.add_row(escape(judge.name), str(file), escape(what), str(rho.n), *told, number(rho.value), interval(rho, shown))
    return shown


def _old(samples: Sequence[SavedSample], verdicts: Sequence[Verdict], chosen: Sequence[int]) -> "list[tuple[str, Values, bool]]":
    """Return a file's old scores by name, as long as the samples, and whether they are on the new verdicts' scale."""
    found: list[tuple[str, Values, bool]] = []
    logged = [(i, old) for i in chosen if (old := samples[i].old) is not None]
    for name in dict.fromkeys(old.judge for _, old in logged):
        scores = {i: old.score for i, old in logged if old.judge == name}
        same = all(old.scale == verdicts[i].scale for i, old in logged if old.judge == name)
        found.append((name, [scores.get(i) for i in range(len(samples))], same))
    for name in dict.fromkeys(metric for i in chosen for metric in samples[i].old_scores):
        found.append((name, [sample.old_scores.get(name) for sample in samples], False))
    return found


def _show_agreement(samples: Sequence[SavedSample], judged: Sequence[_Judged]) -> None:
    from steered_lm.judges.agreement import agreement
    from steered_lm.judges.verdicts import CHOICE_CODES, metric_of, value

    items = [f"{sample.file}, {sample.id}, {sample.repeat}" for sample in samples]
    by_judge = {judge.name: dict(zip(items, verdicts, strict=True)) for judge, verdicts in judged}
    if len(by_judge) < len(judged):
        console.print("agreement is not shown, as two judges have one name")
        return
    ratings = {name: [value(given[item]) for item in items] for name, given in by_judge.items()}
    found = agreement(ratings, metric=metric_of(by_judge), items=items, seed=_SEED)
    show_agreement(console, found, "Agreement", worst=0, codes={**CHOICE_CODES})
    console.print("item by item: steered-lm judge agreement, with the file that was written", highlight=False)


def _by_prompt(samples: Sequence[SavedSample], values: "Values", chosen: Sequence[int]) -> list[float | None]:
    """Return one value a prompt: the mean over its repeats, which are no independent items."""
    by_id: dict[str, list[float]] = {samples[i].id: [] for i in chosen}
    for i in chosen:
        if (value := values[i]) is not None:
            by_id[samples[i].id].append(value)
    return [fmean(found) if found else None for found in by_id.values()]


def _usage(usage: Usage) -> tuple[str, str, str, str]:
    dollars = "-" if usage.dollars is None else f"{usage.dollars:.4f}"
    return f"{usage.requests:,}", f"{usage.input_tokens:,}", f"{usage.output_tokens:,}", dollars
