"""``steered-lm demo``: vectors, two searches, held-out arms, capability cost and a report, end to end on two CPU cores."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from steered_lm.arms import capability, compare
from steered_lm.config import Config
from steered_lm.content import TINY_CHAT
from steered_lm.persona.load import list_personas
from steered_lm.progress import GenerationBar, StepBar
from steered_lm.report.assemble import Findings, assemble
from steered_lm.report.data import ModelInfo
from steered_lm.report.page import Report, ReportFiles, build_report, render
from steered_lm.study import ModelConfig, SearchConfig, Study, StudyConfig, build
from steered_lm.tiny_chat.grammar import parse

if TYPE_CHECKING:
    from steered_lm.judges.audit_report import AuditReport
    from steered_lm.search.result import OptimizeResult


class DemoConfig(Config):
    """What ``steered-lm demo`` runs; ``persona`` None is the first of ours, ``pairs`` and ``held_out_pairs`` are those of ``ExtractConfig``."""

    out: Path
    persona: str | None = None
    model: ModelConfig = ModelConfig()
    budget: int = 96
    alpha: float = 0.4
    layers: str = "auto"
    pairs: int = 120
    held_out_pairs: int = 60
    seed: int = 0


@dataclass
class _Clock:
    """Announces each stage and keeps its wall time."""

    console: Console
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{len(self.stages) + 1}. {name}", align="left")
        started = time.perf_counter()
        yield
        self.stages[name] = time.perf_counter() - started


def run_demo(config: DemoConfig, console: Console) -> ReportFiles:
    """Run every stage and write the report; whatever an earlier run left in ``config.out`` is reused.

    Raises:
        UserError: when the persona is unknown, the folder holds another run, or a direction is at chance level.
    """
    clock = _Clock(console)
    name = config.persona or list_personas()[0]
    folder = config.out / f"{name}-seed{config.seed}-budget{config.budget}-alpha{config.alpha:g}"
    with clock.stage("Trait vectors from contrast pairs"):
        vectors = _vectors(config, console)
    study = Study(StudyConfig(persona=name, vectors=vectors, model=config.model, alpha=config.alpha))
    with clock.stage(f"The persona {name!r}, its judge, and the model inside the harness"):
        console.print(f"{study.persona.description}\nsystem prompt of the prompting baseline: [italic]{study.persona.system_prompt}[/italic]")
        console.print(f"judge: {study.judge.name}; steering at layers {list(study.template.layers)}, alpha {config.alpha:g}")
    searches = {optimizer: _search(study, config, optimizer, folder, clock) for optimizer in ("cma_es", "random_search")}
    with clock.stage("Held-out comparison: every arm on the test split"):
        arms = compare(study, searches, folder)
    with clock.stage("What it costs: knowledge and truthfulness, item by item"):
        costs = capability(study, searches["cma_es"].best, "optimised by cma_es")
    template = study.template
    settings = {"budget an optimiser": config.budget, "alpha": config.alpha, "unit": template.unit, "layers": ", ".join(map(str, template.layers))}
    settings |= {"positions": template.positions, "operation": template.operation, "max new tokens": study.config.max_new_tokens, "seed": config.seed}
    findings = Findings(arms=arms, searches=searches, costs=costs, seed=config.seed, stages=clock.stages, settings=settings)
    formed = _well_formed if config.model.model == TINY_CHAT else None
    data = assemble(study.persona, study.judge, study.vectors, _model_info(study), findings, well_formed=formed)
    files = render(data, folder / "report.html")
    _summary(build_report(data), console)
    console.print(f"\nbest spec: {searches['cma_es'].spec_path}\nreport:    {files.html.resolve()}", soft_wrap=True)
    return files


def _vectors(config: DemoConfig, console: Console) -> Path:
    from steered_lm.extract.contrast import available_traits

    pairs, held_out = config.pairs, config.held_out_pairs
    path = config.out / f"{config.model.model.replace('/', '_')}-{config.layers}-{pairs}-{held_out}.safetensors"
    if path.is_file():
        console.print(f"reusing {path}")
        return path
    with StepBar(console) as bar:
        cache = config.out / "activations"
        build(config.model, available_traits(), config.layers, path, cache=cache, progress=bar, pairs=pairs, held_out_pairs=held_out)
    return path


def _model_info(study: Study) -> ModelInfo:
    from steered_lm.steering.vectors import model_fingerprint

    model, meta = study.lm.model, study.vectors.meta
    count = sum(p.numel() for p in model.parameters())
    return ModelInfo(
        name=study.config.model.model,
        fingerprint=model_fingerprint(model),
        parameters=count,
        layers=meta.n_layers,
        d_model=meta.d_model,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
    )


def _well_formed(prompt: str, reply: str) -> bool:
    return parse(reply) is not None


def _search(study: Study, config: DemoConfig, optimizer: str, folder: Path, clock: _Clock) -> "OptimizeResult":
    options = {"population": 8} if optimizer == "random_search" else {}
    search = SearchConfig(optimizer=optimizer, options=options, budget=config.budget, seed=config.seed)
    title = f"Search by {optimizer}: {config.budget} candidate evaluations"
    with clock.stage(title), GenerationBar(clock.console, optimizer) as bar:
        return study.search(search, folder / optimizer, progress=bar, on_audit=lambda report: _say(report, clock.console))


def _say(report: "AuditReport", console: Console) -> None:
    console.print(report.conclusion(), soft_wrap=True, markup=False, emoji=False)


def _summary(report: Report, console: Console) -> None:
    table = Table(title="Mean persona fit (1-5) on held-out prompts, 95 % intervals")
    for column in ("arm", "mean", "interval", "minus unsteered", "interval ", "p (Holm)", "missing"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, summary in zip(report.data.arms, report.analysis.arms, strict=True):
        against = report.analysis.against(arm.name, report.data.unsteered.name)
        cells = [_number(summary.score.value), _interval(summary.score.low, summary.score.high)]
        cells += ["", "", ""] if against is None else [
            _number(against.difference.mean, signed=True),
            _interval(against.difference.low, against.difference.high),
            "-" if against.p_holm is None else f"{against.p_holm:.2g}",
        ]  # fmt: skip
        table.add_row(arm.name, *cells, str(arm.missing))
    console.print(table)
    console.print(f"\n[bold]{report.headline.title}[/bold]")
    for sentence in report.headline.sentences:
        console.print(f"• {sentence.text}", highlight=False)


def _number(value: float | None, *, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f} to {high:.2f}"
