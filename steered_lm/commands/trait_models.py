"""``steered-lm traits example | train | status | evaluate | results | cancel``: experiments with models that are trained to show a trait."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from steered_lm.commands.trait_cache import steps_app
from steered_lm.config import write_atomic
from steered_lm.errors import MissingDependencyError, near_misses
from steered_lm.progress import StepBar

if TYPE_CHECKING:
    from steered_lm.trait_models.jobs import ModelState
    from steered_lm.trait_models.results import Results
    from steered_lm.trait_models.workflow import EvaluationState

console = Console(emoji=False)
Config = Annotated[Path, typer.Argument(help="The experiment's YAML file.")]


def example(
    name: Annotated[str, typer.Argument(help="tiny: on a laptop, offline; persona_vectors: 7B models on published data.")] = "tiny",
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("experiment.yaml"),
) -> None:
    """Write an experiment's file to start from: three traits at three strengths of their data."""
    import steered_lm.trait_models
    from steered_lm.trait_models.experiment import ExperimentError

    ours = {file.stem: file for file in Path(steered_lm.trait_models.__file__).with_name("configs").glob("*.yaml")}
    if name not in ours:
        raise ExperimentError(f"there is no example {name!r}. {near_misses(name, ours)}")
    if out.exists():
        raise ExperimentError(f"--out {str(out)!r} exists already. Name another file, or remove it.")
    write_atomic(out, ours[name].read_text(encoding="utf-8"))
    console.print(f"wrote {out}; its first lines say where its data come from. Then: steered-lm traits train {out}", soft_wrap=True, markup=False)


def train(
    config: Config,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit what finds a free place, and return.")] = False,
) -> None:
    """Train the models of an experiment that are not trained yet; ends with 1 when one of them failed."""
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.workflow import train as train_models

    try:
        with _Watch() as watch:
            states = train_models(Experiment.load(config), wait=not no_wait, show=watch)
    except KeyboardInterrupt:
        told = "interrupted. Jobs under way go on by themselves: train again watches them, status shows them, cancel stops them."
        Console(stderr=True, emoji=False).print(told, soft_wrap=True, highlight=False, markup=False)
        raise
    _groups(states)
    if no_wait and any(state.group == "not submitted" for state in states):
        console.print("What is not submitted waits for a free place: start train again when others have ended, or without --no-wait.", soft_wrap=True)
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

    experiment = Experiment.load(config)
    done: list[str] = []
    total = len(experiment.models) * len(experiment.evaluation.tasks)

    def show(outcome: "EvaluationState") -> None:
        done.append(outcome.task)
        told = "" if outcome.reason is None else f": {outcome.reason}"
        mark = " (DUMMY)" if outcome.dummy else ""
        console.print(f"{outcome.model.name} on {outcome.task}: {outcome.status}{mark}{told}", soft_wrap=True, markup=False)
        bar("measuring", len(done), total)

    with warnings.catch_warnings(), StepBar(console, transient=True) as bar:
        # PEFT's own use of transformers, once a model
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        bar("measuring", 0, total)
        found = evaluate_models(experiment, show=show)
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


def demo(out: Annotated[Path, typer.Option(help="Folder for everything; a second run reuses what is there.")] = Path("demo-traits")) -> None:
    """Train nine tiny models, measure and draw them, then compare steering with training and prompting: minutes on two cores, offline."""
    from steered_lm.trait_demo import run_trait_demo

    run_trait_demo(out, console)


def mount(app: typer.Typer) -> None:
    """Add these commands to ``steered-lm traits``."""
    for command in (example, train, status, evaluate, results, cancel, demo):
        app.command(command.__name__)(command)
    app.add_typer(steps_app, name="cache")


class _Watch:
    """Shows all models' states while they train: a table that is drawn over on a terminal, elsewhere a line a change."""

    def __init__(self) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_interactive else None
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

    table = Table(title=escape(f"{found.experiment}: trait score, 0 to 100, mean and 95% interval over questions"), padding=(0, 0, 0, 1))
    coherent = any(one.reason is None and one.coherence is not None and one.coherence.value is not None for one in found.cells)
    for column in ("trained on", "strength", "measured"):
        table.add_column(column, overflow="fold")
    for column in ("score", "n", "missing", "refusals", *(["coherence"] if coherent else []), "minus baseline"):
        table.add_column(column, justify="right", overflow="fold")
    last = None
    for one in sorted(found.cells, key=lambda cell: (found.traits.index(cell.trait), found.tasks.index(cell.task))):
        if last is not None and last != (one.trait, one.task):
            table.add_section()
        last = (one.trait, one.task)
        mark = " [red]DUMMY[/red]" if one.dummy else ""
        head = (escape(one.trait.replace("_", " ")), f"{one.strength}{mark}", escape(one.task.replace("_", " ")))
        if one.reason is not None:
            table.add_row(*head, escape(one.reason), "0", "-")
            continue
        change = "" if one.change is None else difference(one.change, digits=1)
        counts = (str(one.score.n), str(one.score.missing), str(one.refusals))
        table.add_row(*head, estimate(one.score, digits=1), *counts, *([estimate(one.coherence, digits=1)] if coherent else []), change)
    if found.dummy:
        table.caption = "DUMMY: nothing was trained, and these numbers say nothing about a trait."
    return table
