"""``steered-lm judge agreement``: how far judges agree on what they have judged, and what each of them took."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from steered_lm.commands.rejudge import spent
from steered_lm.commands.tables import interval, number, show_agreement, table
from steered_lm.config import Config, write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges.agreement import Agreement, Metric, agreement
from steered_lm.judges.base import Usage, Verdict
from steered_lm.judges.verdicts import CHOICE_CODES, Verdicts, members, metric_of, read_verdicts, value
from steered_lm.stats import Estimate, mean_interval

console = Console(emoji=False)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything to this file, too.", dir_okay=False)]
WorstCount = Annotated[int, typer.Option("--worst", help="How many of the items that are seen most differently are printed.", min=0)]
_METRICS: dict[str, Metric | None] = {"auto": None, "interval": "interval", "ordinal": "ordinal", "nominal": "nominal"}


class JudgeSummary(Config):
    """What one judge did.

    Attributes:
        judge: its name.
        panel: the panel that it is a member of.
        verdicts: how many it gave, the missing included.
        missing: reasons, with how many verdicts lack a score for them.
        cached: how many were there from before and cost nothing.
        usage: what the others took.
        mean: of its scores.
    """

    judge: str
    panel: str | None = None
    verdicts: int
    missing: dict[str, int]
    cached: int
    usage: Usage
    mean: Estimate


class JudgesReport(Config):
    """What ``--json`` holds.

    Attributes:
        question: rubric with its version, and persona or trait.
        codes: pairs: what stands for a choice in the agreement's scores.
        judges: each judge, and below a panel its members.
        agreement: of all who are no panel.
    """

    question: str
    codes: dict[str, float]
    judges: tuple[JudgeSummary, ...]
    agreement: Agreement


def judge_agreement(
    verdicts: Annotated[list[Path], typer.Argument(help="Files that steered-lm judge rejudge wrote, of the same samples and the same question.")],
    metric: Annotated[
        str, typer.Option(help="nominal, ordinal or interval; auto: nominal for choices, ordinal for whole scores, else interval.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    worst: WorstCount = 5,
    json_file: JsonFile = None,
) -> None:
    """Show how far judges agree, item by item, and what each took. A panel's members are compared in its place."""
    if metric not in _METRICS:
        raise JudgeError(f"--metric {metric!r}. Allowed: {', '.join(_METRICS)}.")
    found = read_verdicts(verdicts)
    raters = found.raters()
    if len(raters) < 2:
        raise JudgeError(f"there are verdicts of {', '.join(raters)} alone. Agreement takes two judges: give a panel's verdicts, or further files.")
    items = list(found.requests)
    ratings = {name: [value(given.get(item)) for item in items] for name, given in raters.items()}
    report = JudgesReport(
        question=found.question,
        codes=dict(CHOICE_CODES) if metric_of(raters) == "nominal" else {},
        judges=tuple(_summaries(found)),
        agreement=agreement(ratings, metric=_METRICS[metric] or metric_of(raters), items=items, seed=seed),
    )
    _show(report, worst)
    if json_file is not None:
        console.print(f"wrote {write_atomic(json_file, report.model_dump_json(indent=1) + chr(10))}", soft_wrap=True)


def _summaries(found: Verdicts) -> list[JudgeSummary]:
    """Return a line a judge, and under each panel one a member."""
    lines = []
    for judge, given in found.judges.items():
        lines.append(_summary(judge, list(given.values())))
        parts = [members(verdict) for verdict in given.values()]
        for member in dict.fromkeys(name for of_one in parts for name in of_one):
            lines.append(_summary(member, [of_one[member] for of_one in parts if member in of_one], panel=judge))
    return lines


def _summary(judge: str, verdicts: Sequence[Verdict], panel: str | None = None) -> JudgeSummary:
    return JudgeSummary(
        judge=judge,
        panel=panel,
        verdicts=len(verdicts),
        missing=dict(Counter(v.missing for v in verdicts if v.missing is not None).most_common()),
        cached=sum(v.cached for v in verdicts),
        usage=spent(verdicts),
        mean=mean_interval([v.score for v in verdicts], bounds=verdicts[0].scale),
    )


def _show(report: JudgesReport, worst: int) -> None:
    lines = table(f"{report.question}: judges", ("judge",), ("mean", "95 % interval", "missing"), ("why missing",))
    cost = table("What it took; verdicts from a cache cost nothing", ("judge",), ("from cache", "requests", "tokens in", "tokens out", "dollars"))
    for line in report.judges:
        name = f"- {line.judge}" if line.panel else line.judge
        dollars = "-" if line.usage.dollars is None else f"{line.usage.dollars:.4f}"
        why = "; ".join(f"{count} x {reason}" for reason, count in list(line.missing.items())[:3]) or "-"
        missing = f"{sum(line.missing.values())} of {line.verdicts}"
        lines.add_row(escape(name), number(line.mean.value), interval(line.mean, lines), missing, escape(why))
        counts = (line.cached, line.usage.requests, line.usage.input_tokens, line.usage.output_tokens)
        cost.add_row(escape(name), *(f"{count:,}" for count in counts), dollars)
    console.print(lines)
    console.print(cost)
    show_agreement(console, report.agreement, "Agreement of judges", worst=worst, codes=report.codes)
