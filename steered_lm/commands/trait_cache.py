"""``steered-lm traits cache``: the finished steps of experiments, how large they are, and how to be rid of them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steered_lm.commands.cache import seconds

if TYPE_CHECKING:
    from steered_lm.trait_models.store import StepInfo, Store

console = Console(emoji=False)
steps_app = typer.Typer(no_args_is_help=True, help="Show and shrink a folder of finished steps.")

Folder = Annotated[Path, typer.Argument(help="The folder that experiments name as training.dataset_options.cache_dir.")]


@steps_app.command("list")
def list_steps(folder: Folder) -> None:
    """Show every step: what it is, how it stands, when that last changed, and its size."""
    found = _store(folder).steps()
    console.print(_steps_table(found))
    console.print(f"{_steps(len(found))}, {_size(sum(info.size for info in found))}")


@steps_app.command("prune")
def prune_steps(
    folder: Folder,
    older_than: Annotated[str | None, typer.Option(help="Only what last changed longer ago than this, such as 30d, 12h or 2w.")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only steps that failed or were never finished.")] = False,
    config: Annotated[list[Path], typer.Option(help="An experiment whose steps stay; again for more.")] = [],  # noqa: B006 - typer takes a list as default and copies it
    also_used: Annotated[bool, typer.Option("--also-used", help="Take what these experiments use as well.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them. Without this flag they are only listed.")] = False,
) -> None:
    """List the steps that may go, and remove them with --delete; they are done again when an experiment needs them.

    Conditions add up, and steps with a job under way always stay.
    """
    from steered_lm.trait_models.experiment import Experiment, ExperimentError
    from steered_lm.trait_models.workflow import used_steps

    if older_than is None and not failed and not config:
        raise ExperimentError(
            "prune needs at least one of --older-than, --failed and --config (which keeps what it uses). To drop everything, delete the folder."
        )
    if also_used and not config:
        raise ExperimentError("--also-used needs --config: it takes what these experiments use.")
    store = _store(folder)
    used = {step for file in config for step in used_steps(Experiment.load(file))}
    chosen = store.prunable(older_than=0.0 if older_than is None else seconds(older_than), failed=failed, used=used, also_used=also_used)
    console.print(_steps_table(chosen))
    total = _size(sum(info.size for info in chosen))
    if not delete:
        console.print(f"{_steps(len(chosen))}, {total}, would be removed. Add --delete to remove them.")
        return
    removed = sum(store.remove(info) for info in chosen)
    console.print(f"removed {removed} of {_steps(len(chosen))}" + ("; another process is working on the others" if removed < len(chosen) else ""))


def _steps_table(steps: "Sequence[StepInfo]") -> Table:
    table = Table()
    for column in ("step", "of", "state"):
        table.add_column(column, overflow="fold")
    for column in ("age", "size", "key"):
        table.add_column(column, justify="right", no_wrap=True)
    now = time.time()
    for info in steps:
        table.add_row(info.name, escape(info.label), info.status, _age(now - info.changed), _size(info.size), info.key[:12])
    return table


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


def _age(elapsed: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if elapsed >= length:
            return f"{elapsed / length:.0f} {unit}"
    return f"{elapsed:.0f} s"


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number >= 2**20 else f"{number / 2**10:,.1f} KiB"


def _store(folder: Path) -> "Store":
    from steered_lm.trait_models.experiment import ExperimentError
    from steered_lm.trait_models.store import Store

    if not folder.is_dir():
        raise ExperimentError(f"folder {str(folder)!r} does not exist. Give the one that an experiment names as training.dataset_options.cache_dir.")
    return Store(folder)
