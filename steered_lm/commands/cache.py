"""``steered-lm judge cache``: what a judge cache holds, how to shrink it and how to get its verdicts out."""

import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steered_lm.config import write_atomic
from steered_lm.errors import JudgeError
from steered_lm.judges.cache import CacheFilter, CacheGroup, JudgeCache

console = Console(emoji=False)
cache_app = typer.Typer(no_args_is_help=True, help="Show, shrink and export a judge cache.")

CacheFile = Annotated[Path, typer.Argument(help="The SQLite file that a run's --cache, --judge-cache or cache= named.")]
_SECONDS = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


@cache_app.command("stats")
def stats(file: CacheFile) -> None:
    """Show what is kept by judge and rubric, and what it cost once."""
    groups = JudgeCache.existing(file).stats()
    kept = sum(group.verdicts for group in groups)
    console.print(f"{file}: {kept:,} verdicts, {_size(file):,} bytes", soft_wrap=True, markup=False)
    console.print(_table(groups))


@cache_app.command("prune")
def prune(
    file: CacheFile,
    older_than: Annotated[str | None, typer.Option(help="Age, such as 30d, 12h or 2w.")] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's name, as stats shows it.")] = None,
    model: Annotated[str | None, typer.Option(help="The judge's model.")] = None,
    rubric: Annotated[str | None, typer.Option(help="A rubric as stats shows it, or all its versions: trait_expression@1, trait_expression.")] = None,
    about: Annotated[str | None, typer.Option(help="The persona or trait that was judged against.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and keep them.")] = False,
) -> None:
    """Remove verdicts, which are then paid for again; conditions add up."""
    name, _, version = (rubric or "").partition("@")
    before = None if older_than is None else time.time() - seconds(older_than)
    chosen = CacheFilter(created_before=before, judge=judge, model=model, rubric=name or None, rubric_version=version or None, about=about)
    if chosen == CacheFilter():
        raise JudgeError("prune needs at least one of --older-than, --judge, --model, --rubric and --about. To drop everything, delete the file.")
    cache = JudgeCache.existing(file)
    if dry_run:
        console.print(f"{cache.count(chosen):,} of {len(cache):,} verdicts would be removed")
        return
    size, held = _size(file), len(cache)
    console.print(f"removed {cache.prune(chosen):,} of {held:,} verdicts; {size:,} bytes before, {_size(file):,} now")


@cache_app.command("export")
def export(
    file: CacheFile, out: Annotated[Path | None, typer.Option(help="A JSONL file to write; by default standard output.", dir_okay=False)] = None
) -> None:
    """Write every verdict as a line of JSON: key, date, judge, model, rubric, subject, verdict."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in JudgeCache.existing(file).export())
    if out is None:
        sys.stdout.writelines(lines)
        return
    text = "".join(lines)
    write_atomic(out, text)
    console.print(f"wrote {text.count(chr(10)):,} verdicts to {out}", soft_wrap=True, markup=False)


def _table(groups: list[CacheGroup]) -> Table:
    table = Table()
    for column in ("judge", "rubric", "about"):
        table.add_column(column, overflow="fold")
    for column in ("verdicts", "first, last", "tokens in, out", "dollars"):
        table.add_column(column, justify="right", no_wrap=True)
    for g in groups:
        judge = g.judge if not g.model or g.model in g.judge else f"{g.judge} ({g.model})"
        rubric = f"{g.rubric}@{g.rubric_version}" if g.rubric else "-"
        cost = "-" if g.dollars is None else f"{g.dollars:.4f}"
        dates = "\n".join(dict.fromkeys((_day(g.first), _day(g.last))))
        table.add_row(
            escape(judge), escape(rubric), escape(g.about) or "-", f"{g.verdicts:,}", dates, f"{g.input_tokens:,}\n{g.output_tokens:,}", cost
        )
    return table


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _size(file: Path) -> int:
    """Return the bytes of the file and of its write-ahead log, which other processes may hold open."""
    return sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}-wal")) if part.exists())


def seconds(age: str) -> float:
    """Return an age such as ``30d`` in seconds.

    Raises:
        JudgeError: when it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", age.strip())
    if not found:
        raise JudgeError(f"--older-than {age!r} is no age. Write a number and m (minutes), h (hours), d (days) or w (weeks), such as 30d.")
    return float(found[1]) * _SECONDS[found[2]]
