"""``steered-lm judge audit``: may this judge be optimised towards, and how small a difference can it show?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
from steered_lm.config import canonical_json, write_atomic

if TYPE_CHECKING:
    from steered_lm.judges.audit_report import AuditReport
    from steered_lm.judges.base import Usage
    from steered_lm.stats import Estimate

console = Console(emoji=False)  # openai:x:free is no emoji
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "n/a": "dim"}


def audit_command(
    judge: JudgeNames,
    kind: KindName = "persona_fit",
    persona: PersonaName = None,
    trait: TraitName = None,
    description: Description = None,
    rubric: RubricFile = None,
    judge_option: JudgeOptions = [],  # noqa: B006 - typer takes a list as default and copies it
    anchors: Annotated[Path | None, typer.Option(help="JSONL file with prompt, response and level (high, low), in place of ours.")] = None,
    items: Annotated[int, typer.Option(help="Most anchors of each sort; fewer where there are no more.")] = 12,
    repeats: Annotated[int, typer.Option(help="How often each anchor is judged.")] = 2,
    effect: Annotated[
        float | None, typer.Option(help="The difference of two arms that is sought, in points; default: an eighth of the scale.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="On how many prompts the arms will be compared.")] = 50,
    cache: CacheFile = None,
    missing_limit: Annotated[float, typer.Option(help="The largest share of missing verdicts that does not fail.", min=0, max=1)] = 0.2,
    seed: Annotated[int, typer.Option(help="Draws the items.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the reports, one a judge.", dir_okay=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would ask for, and ask nothing.")] = False,
) -> None:
    """Audit judges on items of known quality; exit status 0 when all are trusted for the effect that is sought, 1 otherwise."""
    from steered_lm.judges.audit import audit, audit_requests, beside_cache, estimate_usage  # scipy takes a second
    from steered_lm.judges.audit_items import audit_items

    question = make_question(kind, persona=persona, trait=trait, description=description, rubric=rubric)
    chosen = audit_items(question, count=items, seed=seed, anchors=anchors)
    judges = make_judges(judge, question, judge_option, cache=cache if not dry_run or (cache is not None and cache.exists()) else None)
    if dry_run:
        asked = audit_requests(chosen, repeats)
        for one in judges:
            # the first round may come from the cache, the repeats never do
            rounds = (estimate_usage(one, asked[: len(chosen)]), estimate_usage(beside_cache(one), asked[len(chosen) :]))
            usage = None if rounds[0] is None or rounds[1] is None else rounds[0] + rounds[1]
            cost = "computed on this machine" if usage is None else f"about {describe_usage(usage)}"
            console.print(f"{one.name}: {len(asked):,} verdicts on {len(chosen)} items; {cost}", soft_wrap=True)
        return
    reports: list[AuditReport] = []
    for one in judges:
        report = audit(one, question, chosen, repeats=repeats, effect=effect, prompts=prompts, missing_limit=missing_limit, seed=seed)
        reports.append(report)
        show(report)
        if out is not None:
            write_atomic(out, canonical_json([r.model_dump(mode="json") for r in reports]) + "\n")
    if not all(report.trusted for report in reports):
        raise typer.Exit(1)


def show(report: "AuditReport") -> None:
    """Print a report: figures, what was found in sentences, the smallest detectable difference, and the conclusion."""
    subject = f"{report.kind}{f' of {report.about}' if report.about else ''}"
    low, high = report.scale
    table = Table(title=f"Audit of {report.judge}: {subject}, {low:g} to {high:g}", caption=_counts(report))
    for column in ("part", "verdict", "estimate", "95 % interval", "n", "missing"):
        table.add_column(column, justify="right" if column in ("estimate", "n", "missing") else "left")
    for part in report.parts:
        estimate = part.estimate
        figures = () if estimate is None else (_number(estimate.value), _interval(estimate), str(estimate.n), str(estimate.missing))
        table.add_row(part.name, f"[{_COLOURS[part.outcome]}]{part.outcome}[/]", *figures)
    console.print(table)
    for part in report.parts:
        console.print(f"[{_COLOURS[part.outcome]}]{part.name}[/]: {escape(part.sentence)}", highlight=False)
    quiet = report.part("retest").estimate
    none_found = quiet is not None and quiet.value == 0
    detectable = Table(title="Smallest detectable difference of two arms on the same prompts", caption="paired t test, 5 % two-sided, power 80 %")
    for column in ("prompts", "by noise alone", "with replies' scatter"):
        detectable.add_column(column, justify="right")
    for row in report.detectable:
        detectable.add_row(f"{row.prompts:,}", "none found" if none_found else _number(row.noise), _number(row.replies))
    detectable.add_row(f"needed for {report.effect:g}", "-" if none_found else _count(report.needed_noise), _count(report.needed_replies))
    console.print(detectable)
    console.print(f"[bold {'green' if report.trusted else 'red'}]{escape(report.conclusion())}[/]", soft_wrap=True)


def describe_usage(usage: "Usage") -> str:
    """Return requests, tokens and dollars in words."""
    price = "" if usage.dollars is None else f", {usage.dollars:.2f} dollars"
    return f"{usage.requests:,} requests, {usage.input_tokens:,} tokens in, {usage.output_tokens:,} tokens out{price}"


def _counts(report: "AuditReport") -> str:
    items = ", ".join(f"{count} {sort}" for sort, count in report.items.items())
    usage = "" if report.usage is None else f"; {describe_usage(report.usage)}"
    return f"{report.judgements} verdicts on {items}{usage}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _interval(estimate: "Estimate") -> str:
    return "-" if estimate.low is None or estimate.high is None else f"{estimate.low:.3g} to {estimate.high:.3g}"
