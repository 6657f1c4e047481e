"""The command line: ``steered-lm vectors | persona | traits | judge | lamp | measure | monitor | cost | optimize | eval | demo | report``."""

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import steered_lm
from steered_lm.commands.cost import cost
from steered_lm.commands.judge import judge_app
from steered_lm.commands.lamp import lamp_app, persona_from_lamp
from steered_lm.commands.measure import measure_app
from steered_lm.commands.model import BatchSize, Device, Dtype, ModelName, PromptFormatName, PromptFormatOption, model_config
from steered_lm.commands.monitor import monitor_app
from steered_lm.commands.options import JudgeOptions, parse_options
from steered_lm.commands.traits import traits_app
from steered_lm.commands.vectors import vectors_app
from steered_lm.content import TINY_CHAT
from steered_lm.errors import UserError
from steered_lm.progress import GenerationBar
from steered_lm.study import ModelConfig, SearchConfig, Study, StudyConfig

console = Console(emoji=False)  # judge names hold colons
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__import__("steered_lm").__doc__)
persona_app = typer.Typer(no_args_is_help=True, help="List, show and build personas.")
report_app = typer.Typer(no_args_is_help=True, help="Draw reports again from their JSON.")
app.add_typer(vectors_app, name="vectors")
app.add_typer(persona_app, name="persona")
app.add_typer(report_app, name="report")
app.add_typer(judge_app, name="judge")
app.add_typer(traits_app, name="traits")
app.add_typer(lamp_app, name="lamp")
persona_app.command("from-lamp")(persona_from_lamp)
app.add_typer(measure_app, name="measure")
app.add_typer(monitor_app, name="monitor")
app.command("cost")(cost)


class GemmName(StrEnum):
    """Libraries of the engine's float32 linear layers on a CPU."""

    auto = "auto"
    torch = "torch"
    onednn = "onednn"


class AuditName(StrEnum):
    """What a search does with a judge that its audit does not trust."""

    refuse = "refuse"
    warn = "warn"
    off = "off"


@app.callback()
def _global(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the library's log.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


@app.command()
def version() -> None:
    """Print the version."""
    console.print(steered_lm.__version__)


@persona_app.command("list")
def persona_list() -> None:
    """List the personas that come with the package."""
    from steered_lm.persona.load import list_personas, load_persona

    table = Table()
    for column in ("persona", "self/other", "formality", "distance", "narrative", "tone", "build/tune/validate/test", "description"):
        table.add_column(column)
    for name in list_personas():
        persona = load_persona(name)
        splits = "/".join(str(len(persona.items(s))) for s in ("build", "tune", "validate", "test"))
        table.add_row(name, *(f"{v:+.1f}" for v in persona.traits.values()), splits, persona.description)
    console.print(table)


@persona_app.command("show")
def persona_show(name: Annotated[str, typer.Argument(help="A persona of ours, or a folder.")]) -> None:
    """Show a persona's profile and one conversation."""
    from steered_lm.persona.load import load_persona

    persona = load_persona(name)
    console.print(f"[bold]{persona.name}[/bold]: {persona.description}\n\n{persona.profile}\n")
    for turn in persona.conversations[0].turns:
        console.print(f"[dim]{turn.speaker}:[/dim] {turn.text}")


@persona_app.command("build")
def persona_build(folder: Annotated[Path, typer.Argument(help="A folder with persona.yaml and conversations.jsonl.")]) -> None:
    """Build profile, features, samples and judge prompt from a persona's conversations."""
    from steered_lm.persona.build import build_persona

    persona = build_persona(str(folder))
    console.print(f"built {folder}: " + ", ".join(f"{len(persona.items(s))} {s}" for s in ("build", "tune", "validate", "test")) + " items")


@app.command()
def optimize(
    persona: Annotated[str, typer.Option(help="A persona of ours (steered-lm persona list), or a folder.")],
    vectors: Annotated[Path, typer.Option(help="Trait vectors of this model (steered-lm vectors build).")],
    out: Annotated[Path, typer.Option(help="The run's folder; a killed run goes on when started again with the same one.")],
    model: ModelName = TINY_CHAT,
    optimizer: Annotated[str, typer.Option(help="cma_es, random_search, or a path to a file of yours with make(space, seed, **options).")] = "cma_es",
    budget: Annotated[int, typer.Option(help="Candidate evaluations on the tuning split; whole generations only.")] = 96,
    population: Annotated[int | None, typer.Option(help="Candidates a generation; by default the optimiser's own (cma_es: 4 + 3 ln n).")] = None,
    sigma0: Annotated[float | None, typer.Option(help="cma_es: first step size as a share of the box; default 0.3.")] = None,
    alpha: Annotated[float, typer.Option(help="Strength: a share of the residual stream's norm, times weights in [-1, 1].")] = 0.4,
    layers: Annotated[str, typer.Option(help="Blocks to steer, such as 4 or 3,4; by default all of the vectors file.")] = "",
    traits: Annotated[str, typer.Option(help="Traits to search over, comma-separated; by default all of the vectors file.")] = "",
    unit: Annotated[str, typer.Option(help="residual or raw.")] = "residual",
    positions: Annotated[str, typer.Option(help="response, prompt or all.")] = "response",
    operation: Annotated[str, typer.Option(help="add, ablate or clamp.")] = "add",
    judge: Annotated[
        str, typer.Option(help="stylometric (offline), openai:<model>, anthropic:<model>, hf:<model>, or a panel's YAML file.")
    ] = "stylometric",
    judge_base_url: Annotated[str | None, typer.Option(help="openai: the endpoint, such as http://localhost:8000/v1.")] = None,
    judge_option: JudgeOptions = [],  # noqa: B006 - typer takes a list as default and copies it
    judge_cache: Annotated[Path | None, typer.Option(help="SQLite file that keeps verdicts between runs.")] = None,
    missing_limit: Annotated[float, typer.Option(help="Stop when more than this share of verdicts is missing.")] = 0.2,
    audit: Annotated[
        AuditName, typer.Option(help="Short audit of the judge first: refuse or warn when it is not trusted, or off.")
    ] = AuditName.refuse,
    effect: Annotated[float, typer.Option(help="Points of persona fit that the judge must be able to show between two candidates.")] = 0.5,
    finalists: Annotated[int, typer.Option(help="How many of the best are evaluated again on the validation split.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of responses.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="The optimiser's seed.", min=0)] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    memory_budget: Annotated[str | None, typer.Option(help="Memory for the engine beside the weights, such as 4GiB.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Take lm-eval's own code path in place of the engine: slower, for comparisons.")] = False,
    gemm: Annotated[GemmName, typer.Option(help="Library of float32 linear layers on a CPU.")] = GemmName.auto,
    prompt_format: PromptFormatOption = PromptFormatName.chat,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many judgements a search takes at most, and ask nothing.")] = False,
) -> None:
    """Search the trait weights that make a model's responses fit a persona, with the harness as the fitness function."""
    from steered_lm.search.result import mean_seconds

    settings: dict[str, Any] = {"alpha": alpha, "unit": unit, "positions": positions, "operation": operation, "missing_limit": missing_limit}
    settings |= {"audit": audit.value, "effect": effect}
    settings |= {"persona": persona, "vectors": vectors, "judge": judge, "judge_cache": judge_cache, "max_new_tokens": max_new_tokens}
    settings |= {
        "traits": [t.strip() for t in traits.split(",") if t.strip()],
        "layers": [part.strip() for part in layers.split(",") if part.strip()],
    }
    settings |= {
        "judge_options": parse_options(judge_option) | ({} if judge_base_url is None else {"base_url": judge_base_url}),
        "model": model_config(model, device, dtype, batch_size, prompt_format).model_copy(
            update={"memory_budget": memory_budget, "exact": exact, "gemm": gemm.value}
        ),
    }
    study = Study(StudyConfig.parse(settings, source="optimize"))
    options = {k: v for k, v in {"population": population, "sigma0": sigma0}.items() if v is not None}
    search = SearchConfig(optimizer=optimizer, options=options, budget=budget, finalists=finalists, seed=seed)
    if dry_run:
        from steered_lm.commands.plan import plan_search

        for sentence in plan_search(study, search).sentences():
            console.print(sentence, soft_wrap=True)
        return
    try:
        with GenerationBar(console, optimizer) as bar:
            result = study.search(
                search, out, progress=bar, on_audit=lambda report: console.print(report.conclusion(), soft_wrap=True, markup=False, emoji=False)
            )
    except KeyboardInterrupt:
        kept = "" if judge_cache is None else f", and finished verdicts in {judge_cache}"
        Console(stderr=True, emoji=False).print(
            f"interrupted. Finished generations are in {out}{kept}: the same command goes on from there.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        raise
    table = Table(title=f"{persona}: mean persona fit (1-5), chosen candidate {result.chosen}")
    for column in ("split", "mean", "standard error", "scored", "missing"):
        table.add_column(column, justify="left" if column == "split" else "right")
    rows = {"tuning (best seen)": result.tune, "validation": result.validate, "test": result.test, "test, unsteered": result.unsteered}
    for name, e in rows.items():
        table.add_row(name, _number(e.mean), _number(e.standard_error), str(e.n), str(e.missing))
    console.print(table)
    console.print(
        f"optimism gap (tuning minus test): {_number(result.optimism_test.gap)} ± {_number(result.optimism_test.standard_error)} (standard error)"
    )
    if seconds := mean_seconds(result.generations):
        parts = ", ".join(
            f"{name.replace('_', ' ')} {value:.2f}" for name, value in seconds.items() if name != "total" and (value or name != "judge_hidden")
        )
        planned = study.lm.engine.report.planned_bytes / 2**20
        console.print(f"{seconds['total']:.2f} s a generation: {parts}; {planned:,.0f} MiB planned beside the weights", soft_wrap=True)
    same: dict[str, Any] = {"persona": persona}  # judged as here, else the numbers would not be comparable
    if judge != StudyConfig.model_fields["judge"].default:
        same |= {"judge": judge} | {f"judge_{name}": value for name, value in study.config.judge_options.items()}
    console.print(
        f"best spec: {result.spec_path}\n"
        f"use it: lm_eval --model steered-hf --model_args pretrained={model},steering={result.spec_path} --tasks persona_judge "
        f"--metadata '{json.dumps(same)}'",
        soft_wrap=True,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Run lm_eval's own command line with steered-hf and our tasks registered: the fallback where the start-up hook is not active."""
    from steered_lm._autoload import install
    from steered_lm.harness.command import lm_eval_main

    install()
    lm_eval_main(context.args)


@report_app.command("render")
def report_render(
    data: Annotated[Path, typer.Argument(help="The report.json of a run, or the cost.json of a cost page.")],
    out: Annotated[Path | None, typer.Option(help="The page to write: by default report.html; of a cost page the folder for its files.")] = None,
) -> None:
    """Draw a report or a cost page again from its JSON."""
    from steered_lm.report import load_report, render
    from steered_lm.report.cost_data import holds_cost, load_cost
    from steered_lm.report.cost_page import render_cost

    page = render_cost(load_cost(data), out or Path("cost")).html if holds_cost(data) else render(load_report(data), out or Path("report.html")).html
    console.print(f"wrote {page}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; a second run reuses what is there.")] = Path("demo"),
    persona: Annotated[str | None, typer.Option(help="A persona of ours; by default the first.")] = None,
    model: ModelName = TINY_CHAT,
    budget: Annotated[int, typer.Option(help="Candidate evaluations an optimiser.")] = 96,
    alpha: Annotated[float, typer.Option(help="Strength of the searched specs.")] = 0.4,
    seed: Annotated[int, typer.Option(help="Seed of both optimisers.", min=0)] = 0,
    device: Device = None,
) -> None:
    """Watch the whole path: vectors, search, held-out comparison, capability cost and a report."""
    from steered_lm.demo import DemoConfig, run_demo

    run_demo(DemoConfig(out=out, persona=persona, model=ModelConfig(model=model, device=device), budget=budget, alpha=alpha, seed=seed), console)


def main() -> None:
    """Run the command line; what the user got wrong is printed in one sentence and exits with 2."""
    try:
        app()
    except UserError as error:
        told = f"[bold red]error:[/bold red] {escape(str(error))}"
        Console(stderr=True, emoji=False).print(told, markup=True, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
