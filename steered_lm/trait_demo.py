"""``steered-lm traits demo``: nine tiny models trained, measured and drawn, then steered against trained against prompted, on two CPU cores."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from steered_lm.config import write_atomic
from steered_lm.content import TINY_CHAT
from steered_lm.progress import StepBar
from steered_lm.study import ModelConfig, build

if TYPE_CHECKING:
    from steered_lm.report.cost_page import CostFiles
    from steered_lm.trait_models.experiment import Experiment
    from steered_lm.trait_models.jobs import ModelState
    from steered_lm.trait_models.results import Results

TRAIT = "formality"
SYSTEM = "Use formal wording in every sentence."
SWEEP = "alpha=0.1:0.9:0.1"
SAMPLES = 10


def run_trait_demo(out: Path, console: Console) -> "Results":
    """Run every stage in a folder, and return the experiment's numbers; whatever an earlier run finished there is reused.

    Raises:
        UserError: when a training fails, or the folder holds another experiment.
    """
    from steered_lm.report.trait_models import write_pngs, write_results
    from steered_lm.trait_models.experiment import ExperimentError
    from steered_lm.trait_models.workflow import evaluate, results, train

    started = time.perf_counter()
    console.rule("[bold]1. Training data: three benign traits, each at three strengths", align="left")
    experiment = _experiment(out)
    console.rule(f"[bold]2. {len(experiment.models)} trainings (LoRA)", align="left")
    with StepBar(console) as bar:
        states = train(experiment, show=lambda found: bar("training", sum(s.status == "succeeded" for s in found), len(found)))
    failed = [state for state in states if state.trained is None]
    if failed:
        raise ExperimentError(f"model {failed[0].model.name!r} was not trained: {failed[0].error or failed[0].status}. Start the same command again.")
    console.rule(f"[bold]3. Every model on {len(experiment.evaluation.tasks)} traits", align="left")
    total = len(experiment.models) * len(experiment.evaluation.tasks)
    done: list[str] = []
    with StepBar(console) as bar:

        def tell(outcome: object) -> None:
            done.append("one")
            bar("measuring", len(done), total)

        evaluate(experiment, show=tell)
    found = results(experiment)
    files = write_results(found, out / "results")
    pictures = write_pngs(found, out / "results")
    _verdict(found, console)
    console.rule(f"[bold]4. {TRAIT}: steered, trained, prompted, and what each costs", align="left")
    page = _compared(out, states, console)
    console.print(
        f"\nresults: {files.html.resolve()}, {len(pictures)} PNG beside it\ncosts:   {page.html.resolve()}", soft_wrap=True, highlight=False
    )
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    return found


def _experiment(out: Path) -> "Experiment":
    import steered_lm.trait_models
    from steered_lm.tiny_chat.trait_data import write_tiny_sets
    from steered_lm.trait_models.experiment import Experiment

    write_tiny_sets(out / "tiny-data")
    ours = Path(steered_lm.trait_models.__file__).with_name("configs") / "tiny.yaml"
    return Experiment.load(write_atomic(out / "experiment.yaml", ours.read_text(encoding="utf-8")))


def _verdict(found: "Results", console: Console) -> None:
    """Say for each trained trait how far it rose, and whether more than any other."""
    from steered_lm.report.wording import difference, estimate

    for trait in found.traits:
        own = {cell.strength: cell for cell in found.cells if cell.trait == cell.task == trait}
        low, high = own["baseline"].score, own["severe"].score
        apart = low.high is not None and high.low is not None and low.high < high.low
        others = [c for c in found.cells if c.trait == trait and c.task != trait and c.strength == "severe" and c.change is not None]
        most = max(others, key=lambda cell: abs(cell.change.mean or 0.0) if cell.change else 0.0)
        assert most.change is not None
        levels = " → ".join(estimate(own[strength].score, digits=1) for strength in ("baseline", "mild", "severe"))
        console.print(f"{trait}: {levels}; baseline and severe {'do not overlap' if apart else 'overlap'}", highlight=False, soft_wrap=True)
        console.print(f"  most moved of the others: {most.task}, {difference(most.change, digits=1)}", highlight=False, soft_wrap=True)


def _compared(out: Path, states: "list[ModelState]", console: Console) -> "CostFiles":
    from steered_lm.cost.config import CostConfig
    from steered_lm.cost.run import run_cost
    from steered_lm.report.cost_page import render_cost
    from steered_lm.steering.spec import SteeringSpec, VectorsRef

    vectors = out / "vectors.safetensors"
    if not vectors.is_file():
        with StepBar(console) as bar:
            build(ModelConfig(), [TRAIT], "auto", vectors, progress=bar)
    (layer,) = _layers(vectors)
    spec = SteeringSpec(vectors=VectorsRef.to(vectors), weights={TRAIT: 1.0}, layers=(layer,), alpha=0.4).save(out / "steered.yaml")
    adapters = {s.model.strength: Path(s.trained.peft) for s in states if s.model.trait == TRAIT and s.trained and s.trained.peft}
    config = CostConfig(
        model=ModelConfig(model=TINY_CHAT),
        steering=(spec,),
        out=out / "cost",
        sweep=SWEEP,
        traits=(TRAIT,),
        peft=adapters,
        system=(SYSTEM,),
        samples=SAMPLES,
        tolerance=0.05,
    )
    with StepBar(console) as bar:
        data = run_cost(config, lambda what, done, total: bar("measuring", done, total))
    return render_cost(data, out / "cost")


def _layers(vectors: Path) -> tuple[int, ...]:
    from steered_lm.steering.vectors import TraitVectors

    return TraitVectors.load(vectors).meta.layers
