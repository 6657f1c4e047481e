"""``steered-lm cost``: what steering buys and costs, on the same items for several specs or a sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from steered_lm.commands.model import BatchSize, Device, Dtype, ModelName, PromptFormatName, PromptFormatOption, model_config
from steered_lm.commands.options import JudgeOptions, parse_options
from steered_lm.commands.tables import table
from steered_lm.content import TINY_CHAT
from steered_lm.errors import UserError
from steered_lm.measure.texts import as_split
from steered_lm.progress import StepBar

if TYPE_CHECKING:
    from steered_lm.report.cost_data import Measure
    from steered_lm.report.cost_page import CostReport

console = Console(emoji=False)
_WIDTH = 4


def cost(
    steering: Annotated[list[Path], typer.Option(help="A steering spec; again for more. The unsteered model is always among the arms.")],
    model: ModelName = TINY_CHAT,
    sweep: Annotated[
        str | None, typer.Option(help="One setting at several values: alpha=0:3:0.5, kl=0.02,0.1, layer=1:4 or <trait>=-1:1:0.5 for its weight.")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Take every spec at the alpha that is this far from the unsteered model, nats a token.")] = None,
    task: Annotated[
        list[str],
        typer.Option(help="mmlu, mmlu_<category or subject>, truthfulqa_mc1, lamp_3, …; again for more. Default: MMLU and TruthfulQA."),
    ] = [],  # noqa: B006 - typer takes a list as default and copies it
    trait: Annotated[
        list[str],
        typer.Option(help="Also how strongly responses show a trait: evil, formality, …, a trait's file, persona_vectors (seven) or axes (five)."),
    ] = [],  # noqa: B006
    persona: Annotated[str | None, typer.Option(help="Also how well responses fit a persona.")] = None,
    persona_split: Annotated[str, typer.Option(help="Which of its prompts.")] = "test",
    peft: Annotated[list[str], typer.Option(help="Also the model trained: name=folder of an adapter, without steering; again for more.")] = [],  # noqa: B006
    system: Annotated[list[str], typer.Option(help="Also the model prompted: a system turn, without steering; again for more.")] = [],  # noqa: B006
    side_effects: Annotated[
        bool, typer.Option("--side-effects", help="Also each vector of the first spec's file by itself: what it does to every --trait.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(help="openai:<model>, anthropic:<model>, hf:<model>, a panel. Default: stylometric, and markers for the axes."),
    ] = None,
    judge_option: JudgeOptions = [],  # noqa: B006
    judge_cache: Annotated[Path | None, typer.Option(help="SQLite file that keeps verdicts; by default in --out.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with truthfulqa/, mmlu/, LaMP_n/; by default STEERED_LM_DATA, or the hub.")] = None,
    text: Annotated[str | None, typer.Option(help="Whose perplexity: a text file, JSONL, a text of ours (english, tiny_talk), or none.")] = None,
    split: Annotated[str, typer.Option(help="Where a document of a text file ends: paragraph, line or file.")] = "paragraph",
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompts of MMLU and TruthfulQA.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Items a task; by default all.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Responses a question of a trait; several are sampled.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Length of responses.", min=1)] = 64,
    tolerance: Annotated[float, typer.Option(help="Loss that is accepted, a share of each measure's scale: 0.02 are two points of accuracy.")] = 0.02,
    perplexity_tolerance: Annotated[float, typer.Option(help="Growth of perplexity that is accepted: 0.05 is five per cent.")] = 0.05,
    missing_limit: Annotated[float, typer.Option(help="Stop when more than this share of a task's judgements fails.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of sampled responses and of the tests' random sign patterns.", min=0)] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    memory_budget: Annotated[str | None, typer.Option(help="Memory for the engine beside the weights, such as 4GiB.")] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Take lm-eval's own code path in place of the engine: slower, for comparisons; needs a number as --batch-size."),
    ] = False,
    prompt_format: PromptFormatOption = PromptFormatName.chat,
    out: Annotated[Path, typer.Option(help="Folder for the page, its numbers and everything finished: the same command goes on from there.")] = Path(
        "cost"
    ),
) -> None:
    """Measure what steering buys and costs: the same items under several specs or a sweep, compared pair by pair."""
    from steered_lm.cost.config import CostConfig
    from steered_lm.cost.run import run_cost
    from steered_lm.report.cost_page import build_cost, render_cost

    chosen = model_config(model, device, dtype, batch_size, prompt_format)
    settings: dict[str, Any] = {
        "model": chosen.model_copy(update={"memory_budget": memory_budget, "exact": exact}),
        "steering": steering,
        "out": out,
        "sweep": sweep,
        "kl": kl,
        "peft": _adapters(peft),
        "system": system,
        "tasks": task,
        "traits": trait,
        "persona": persona,
        "persona_split": persona_split,
        "side_effects": side_effects,
        "judge": judge,
        "judge_options": parse_options(judge_option),
        "judge_cache": judge_cache,
        "data": data,
        "text": text,
        "split": as_split(split),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "tolerance": tolerance,
        "perplexity_tolerance": perplexity_tolerance,
        "missing_limit": missing_limit,
        "seed": seed,
    }
    config = CostConfig.parse(settings, source="cost")
    try:
        with StepBar(console) as bar:
            found = run_cost(config, lambda what, done, total: bar("measuring", done, total))
    except KeyboardInterrupt:
        Console(stderr=True, emoji=False).print(f"interrupted. What is finished is in {out}: the same command goes on from there.", soft_wrap=True)
        raise
    _show(build_cost(found))
    files = render_cost(found, out)
    console.print(f"page:  {files.html.resolve()}\ntable: {files.csv}\ndata:  {files.json}", soft_wrap=True, highlight=False)


def _adapters(given: list[str]) -> dict[str, str]:
    """Return adapters' folders by name; without one it is the model's in its experiment."""
    from steered_lm.cost.arms import trained_name

    found: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        folder, name = (folder, name) if sign else (text, trained_name(Path(text)))
        if not name or not folder or name in found:
            raise UserError(f"--peft {text!r}: each adapter needs a folder and a name of its own. Write --peft severe=runs/severe/adapter.")
        found[name] = folder
    return found


def _show(report: "CostReport") -> None:
    """Print the verdict, and what changed under every arm, a few measures a table so that they fit into a terminal."""
    data = report.data
    shown = [measure for measure in data.measures if measure.role != "note"]
    arms = [arm for arm in data.arms if arm.trait is None]
    for first in range(0, len(shown), _WIDTH):
        some = shown[first : first + _WIDTH]
        made = table(
            "Unsteered, and what changed; 95 % intervals, * p < 0.05 after Holm", ("arm",), [measure.name.replace("_", " ") for measure in some]
        )
        for arm in arms:
            name = arm.name if arm.x is None or len(data.series) > 1 else f"{data.axis} {arm.x:g}"
            made.add_row(escape(name), *(_cell(report, arm.name, measure) for measure in some))
        console.print(made)
    console.print(f"[bold]{escape(report.headline.title)}[/bold]")
    for sentence in report.headline.sentences:
        console.print(f"• {sentence.text}", highlight=False, markup=False)


def _cell(report: "CostReport", arm: str, measure: "Measure") -> str:
    from steered_lm.report.cost_wording import change_words, write_level
    from steered_lm.report.wording import count

    level, change = report.analysis.level(arm, measure.name), report.analysis.change(arm, measure.name)
    if level is None:
        return "-"
    if change is None:
        ends = [write_level(measure, value) for value in (level.low, level.high)]
        return f"{write_level(measure, level.value)}\n({ends[0]} to {ends[1]})"
    star = "*" if change.p_holm is not None and change.p_holm < 0.05 else ""
    number, _, interval = change_words(change).partition(" ")
    missing = f"\n{count(change.difference.missing, 'item')} missing" if change.difference.missing else ""
    return f"{number}{star}\n{interval}{missing}"
