"""``steered-lm monitor``: where responses and prompts lie along trait vectors, and whether training data would move a model."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from steered_lm.commands.logs import saved_examples
from steered_lm.commands.model import Device, Dtype, ModelName, PlainFormat
from steered_lm.commands.tables import interval, number, table
from steered_lm.config import canonical_json, write_atomic
from steered_lm.content import TINY_CHAT
from steered_lm.errors import UserError
from steered_lm.progress import StepBar
from steered_lm.study import ModelConfig, load_model

if TYPE_CHECKING:
    from steered_lm.extract.projections import Projected, Projections
    from steered_lm.measure.examples import Example

console = Console(emoji=False)
monitor_app = typer.Typer(no_args_is_help=True, help="Watch responses and training data along trait vectors.")


@monitor_app.callback()
def _group() -> None:
    """Watch responses and training data along trait vectors."""


@monitor_app.command("project")
def project_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSONL with prompt and response (and system), or with messages; lm-eval's samples_*.jsonl; Inspect's log.", metavar="FILE"
        ),
    ],
    vectors: Annotated[Path, typer.Option(help="Trait vectors of this model (steered-lm vectors build).")],
    out: Annotated[Path, typer.Option(help="Columns to write, a line a row: .jsonl or .csv. The page is written beside it as .html.")],
    model: ModelName = TINY_CHAT,
    traits: Annotated[str, typer.Option(help="Traits, comma-separated; by default all of the vectors file.")] = "",
    layers: Annotated[str, typer.Option(help="Layers, comma-separated; by default all of the vectors file.")] = "",
    difference: Annotated[
        bool, typer.Option("--difference", help="Also the projection difference: minus the model's own response to the same prompt.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="--difference: longest own response.", min=1)] = 64,
    allow_foreign_vectors: Annotated[bool, typer.Option("--allow-foreign-vectors", help="Take vectors of another model, such as the base.")] = False,
    batch_size: Annotated[int, typer.Option(help="Rows in one pass.", min=1)] = 16,
    plain: PlainFormat = False,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the random sign patterns of the paired test.", min=0)] = 0,
) -> None:
    """Project a file's responses, and the last prompt token before each, on trait vectors: columns, a table and a page."""
    from steered_lm.extract.activations import Row
    from steered_lm.extract.projections import project
    from steered_lm.measure.examples import rendered
    from steered_lm.report.monitor import MonitorData, monitor_rows, render_monitor
    from steered_lm.steering.blocks import find_blocks
    from steered_lm.steering.vectors import TraitVectors

    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--out {str(out)!r} is neither .jsonl nor .csv. Name a file that ends in one of them.")
    wanted = _numbers(layers)
    examples, loaded = saved_examples(file), TraitVectors.load(vectors)
    config = ModelConfig.parse({"model": model, "device": device, "dtype": dtype, "prompt_format": "plain" if plain else "chat"}, source="--model")
    ours, tokenizer = load_model(config)
    loaded.check_model(ours, allow_foreign=allow_foreign_vectors)
    rows = [Row(rendered(example, tokenizer, config.prompt_format), example.response) for example in examples]
    with StepBar(console) as bar:
        found = project(
            ours,
            tokenizer,
            find_blocks(ours),
            rows,
            loaded,
            traits=_names(traits),
            layers=wanted,
            own=difference,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=bar,
        )
    data = MonitorData(
        source=file.name,
        model=model,
        vectors=vectors.name,
        ids=tuple(example.id for example in examples),
        scores=tuple(example.score for example in examples),
        projections=tuple(found.projections),
        prompts=tuple(row.prompt for row in rows),
    )
    columns = ("mean", "95 % interval", "of norm", "prompts" if data.repeated else "rows", "missing")
    shown = table(f"{file.name}: projections of responses", ("trait", "layer"), (*columns, "minus own", "95 % interval") if difference else columns)
    for row in monitor_rows(data, seed=seed):
        mean = row.response
        share = "-" if mean.value is None else f"{mean.value / row.norm:.1%}"
        own = () if row.difference is None else (number(row.difference.mean), interval(row.difference, shown))
        shown.add_row(escape(row.trait), str(row.layer), number(mean.value), interval(mean, shown), share, str(mean.n), str(mean.missing), *own)
    console.print(shown)
    write_atomic(out, _written(list(_columns(examples, found)), csv_file=out.suffix == ".csv"))
    page = render_monitor(data, out.with_suffix(".html"), seed=seed)
    console.print(f"wrote {out} and {page}", soft_wrap=True, highlight=False)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    parts = _names(text)
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--layers {text!r} is not understood. Write 0-indexed blocks, such as 4 or 3,4.")
    return [int(part) for part in parts]


def _columns(examples: "Sequence[Example]", found: "Projected") -> Iterator[dict[str, Any]]:
    """Yield one flat record a row: texts, score, and the numbers of each direction under ``<trait>/<layer>/<what>``."""
    for place, example in enumerate(examples):
        record: dict[str, Any] = {"id": example.id, "prompt": example.prompt, "response": example.response, "score": example.score}
        if found.own_responses:
            record["own_response"] = found.own_responses[place]
        for one in found.projections:
            record |= {f"{one.trait}/{one.layer}/{name}": value for name, value in _values(one, place).items()}
        yield record


def _values(one: "Projections", place: int) -> dict[str, float | None]:
    response, prompt = one.response[place], one.prompt_last[place]
    found = {
        "response": response,
        "response_of_norm": None if response is None else response / one.norm,
        "prompt_last": prompt,
        "prompt_last_of_norm": None if prompt is None else prompt / one.norm,
    }
    return found | ({"own": one.own[place], "difference": one.difference[place]} if one.own else {})


def _written(records: Sequence[dict[str, Any]], *, csv_file: bool) -> str:
    if not csv_file:
        return "".join(canonical_json(record) + "\n" for record in records)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
