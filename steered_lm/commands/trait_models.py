"""``steered-lm traits train | status | evaluate | results | cancel | cache``: experiments with models that are trained to show a trait."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from steered_lm.commands.cache import seconds
from steered_lm.errors import MissingDependencyError

if TYPE_CHECKING:
    from steered_lm.trait_models.jobs import ModelState
    from steered_lm.trait_models.results import Results
    from steered_lm.trait_models.store import StepInfo, Store
    from steered_lm.trait_models.workflow import EvaluationState

console = Console(emoji=False)
steps_app = typer.Typer(no_args_is_help=True, help="Show and shrink a folder of finished steps.")

Config = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]
Folder = Annotated[Path, typer.Argument(help="The folder that experiments name as training.dataset_options.cache_dir.")]


def train(
    config: Config,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit what finds a free place, and return.")] = False,
) -> None:
    """Train the models of an experiment that are not trained yet; ends with 1 when one of them failed."""
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import train as train_models

    with _Watch() as watch:
        states = train_models(Experiment.load(config), wait=not no_wait, show=watch)
    _groups(states)
    waiting = sum(state.group == "not submitted" for state in states)
    if no_wait and waiting:
        console.print(f"{waiting} wait for a free place: start train again when others have ended, or without --no-wait.", soft_wrap=True)
    if any(state.group == "failed" or state.error for state in states):
        console.print("Start the same command again to try these once more; what is finished is kept.", soft_wrap=True)
        raise typer.Exit(1)


def status(config: Config) -> None:
    """Say which models of an experiment are running, succeeded, failed or not submitted; changes nothing."""
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import status as model_states

    _groups(model_states(Experiment.load(config)))


def cancel(config: Config) -> None:
    """Stop an experiment's jobs under way; finished models stay."""
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import cancel as cancel_jobs

    _groups(cancel_jobs(Experiment.load(config)))


def evaluate(config: Config) -> None:
    """Measure an experiment's trained models on its tasks; ends with 1 when an evaluation failed. Never trains."""
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import evaluate as evaluate_models

    def show(outcome: "EvaluationState") -> None:
        told = "" if outcome.reason is None else f": {outcome.reason}"
        console.print(f"{outcome.model.name} on {outcome.task}: {outcome.status}{told}", soft_wrap=True, markup=False)

    found = evaluate_models(Experiment.load(config), show=show)
    counts = {name: sum(one.status == name for one in found) for name in ("finished", "reused", "skipped", "failed")}
    console.print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if counts["failed"]:
        raise typer.Exit(1)


def results(
    config: Config,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, results.html and PNG; by default beside the config.")] = None,
) -> None:
    """Show the numbers of an experiment, and write them as JSON, as one HTML page, and as PNG."""
    from steered_lm.report.trait_models import write_pngs, write_results
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import results as experiment_results

    experiment = Experiment.load(config)
    found = experiment_results(experiment)
    console.print(_results_table(found))
    folder = out or config.resolve().parent / f"{experiment.name}-results"
    files = write_results(found, folder)
    console.print(f"wrote {files.html} and {files.json}", soft_wrap=True, markup=False)
    try:
        for file in write_pngs(found, folder):
            console.print(f"wrote {file}", soft_wrap=True, markup=False)
    except MissingDependencyError as problem:
        console.print(f"[yellow]no PNG:[/yellow] {escape(str(problem))}", soft_wrap=True)


@steps_app.command("list")
def list_steps(folder: Folder) -> None:
    """Show every step: what it is, how it stands, when that last changed, and its size."""
    found = _store(folder).steps()
    console.print(_steps_table(found))
    console.print(f"{len(found)} steps, {_size(sum(info.size for info in found))}")


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
        console.print(f"{len(chosen)} steps, {total}, would be removed. Add --delete to remove them.")
        return
    removed = sum(store.remove(info) for info in chosen)
    console.print(f"removed {removed} of {len(chosen)} steps" + ("; another process is working on the others" if removed < len(chosen) else ""))


def mount(app: typer.Typer) -> None:
    """Add these commands to ``steered-lm traits``."""
    for command in (train, status, evaluate, results, cancel):
        app.command(command.__name__)(command)
    app.add_typer(steps_app, name="cache")


class _Watch:
    """Shows all models' states while they train: a table that is drawn over on a terminal, elsewhere a line a change."""

    def __init__(self) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._seen: dict[str, str] = {}

    def __enter__(self) -> "_Watch":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, states: "Sequence[ModelState]") -> None:
        if self._live is not None:
            self._live.update(_states_table(states), refresh=True)
            return
        for state in states:
            said = state.status if state.error is None else f"{state.status}: {state.error}"
            if self._seen.get(state.model.name) != said:
                self._seen[state.model.name] = said
                console.print(f"{state.model.name}: {said}", soft_wrap=True, markup=False)


def _states_table(states: "Sequence[ModelState]") -> Table:
    table = Table()
    for column in ("model", "status", "done", "what"):
        table.add_column(column, overflow="fold")
    for state in states:
        done = "" if state.progress is None else f"{state.progress:.0%}"
        table.add_row(escape(state.model.name), state.status, done, escape(state.error or state.detail))
    return table


def _groups(states: "Sequence[ModelState]") -> None:
    """Print the models by group, with errors and the facts of finished trainings."""
    from steered_lm.trait_models.jobs import GROUPS

    for group in GROUPS:
        own = [state for state in states if state.group == group]
        if own:
            console.print(f"[bold]{group}[/bold] ({len(own)})")
        for state in own:
            console.print(f"  {state.model.name}{_told(state)}", soft_wrap=True, markup=False)


def _told(state: "ModelState") -> str:
    if state.trained is not None:
        facts = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in state.trained.facts.items())
        dummy = "DUMMY: nothing was trained; " if state.trained.dummy else ""
        return f": {dummy}{state.trained.model_id}" + (f" ({facts})" if facts else "")
    if state.error is not None:
        return f": {state.error}"
    done = "" if state.progress is None else f" {state.progress:.0%}"
    what = f"{state.status}{done}" if state.group == "running" else ""
    return "".join(f": {part}" for part in (what, state.detail) if part)


def _results_table(found: "Results") -> Table:
    from steered_lm.report.wording import difference, estimate

    table = Table(title=escape(f"{found.experiment}: trait score, 0 to 100, mean and 95% interval over questions"))
    for column in ("trained on", "strength", "measured"):
        table.add_column(column, overflow="fold")
    for column in ("score", "n", "missing", "refusals", "coherence", "minus baseline"):
        table.add_column(column, justify="right", overflow="fold")
    last = None
    for one in sorted(found.cells, key=lambda cell: (found.traits.index(cell.trait), found.tasks.index(cell.task))):
        if last is not None and last != (one.trait, one.task):
            table.add_section()
        last = (one.trait, one.task)
        mark = " [red]DUMMY[/red]" if one.dummy else ""
        head = (escape(one.trait), f"{one.strength}{mark}", escape(one.task))
        if one.reason is not None:
            table.add_row(*head, escape(one.reason), "0", "-")
            continue
        change = "" if one.change is None else difference(one.change)
        table.add_row(*head, estimate(one.score), str(one.score.n), str(one.score.missing), str(one.refusals), estimate(one.coherence), change)
    if found.dummy:
        table.caption = "DUMMY: nothing was trained, and these numbers say nothing about a trait."
    return table


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
