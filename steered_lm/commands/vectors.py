"""``steered-lm vectors``: trait vectors built from contrast sets, and what a file of them holds."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steered_lm.commands.model import BatchSize, Device, Dtype, ModelName, PromptFormatName, PromptFormatOption, model_config
from steered_lm.commands.options import JudgeOptions, parse_options
from steered_lm.content import TINY_CHAT
from steered_lm.progress import StepBar

console = Console(emoji=False)
vectors_app = typer.Typer(no_args_is_help=True, help="Build and inspect trait vectors.")


@vectors_app.command("build")
def vectors_build(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: ModelName = TINY_CHAT,
    traits: Annotated[str, typer.Option(help="Comma-separated traits of ours or files; all: the five axes; persona_vectors: those seven.")] = "all",
    layers: Annotated[str, typer.Option(help="0-indexed blocks such as 4 or 3,4,5; auto: two thirds of the depth; all.")] = "auto",
    method: Annotated[str | None, typer.Option(help="svd, mean_diff or pca; by default svd, with --judge mean_diff.")] = None,
    pooling: Annotated[str, typer.Option(help="response_mean, prompt_mean or prompt_last.")] = "response_mean",
    pairs: Annotated[int, typer.Option(help="Contrast pairs a trait to build on.", min=2)] = 120,
    held_out_pairs: Annotated[int, typer.Option(help="Held-out contrast pairs a trait to check on.", min=1)] = 60,
    pairs_file: Annotated[Path | None, typer.Option(help='Use this older pair list instead: {"R1": [{"pos": …, "neg": …}]}.')] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the model's own responses.", min=1)] = 64,
    allow_chance: Annotated[bool, typer.Option(help="Keep directions that separate held-out pairs no better than chance.")] = False,
    judge: Annotated[
        str | None, typer.Option(help="Keep only responses that this judge confirms (trait and coherence), as in Persona Vectors: openai:<model>, …")
    ] = None,
    judge_option: JudgeOptions = [],  # noqa: B006 - typer takes a list as default and copies it
    judge_cache: Annotated[Path | None, typer.Option(help="SQLite file that keeps verdicts between runs.")] = None,
    missing_limit: Annotated[float, typer.Option(help="--judge: stop when more than this share of judgements failed.", min=0, max=1)] = 0.2,
    device: Device = None,
    dtype: Dtype = "auto",
    batch_size: BatchSize = "auto",
    prompt_format: PromptFormatOption = PromptFormatName.chat,
    seed: Annotated[int, typer.Option(help="Which pairs are drawn.", min=0)] = 0,
) -> None:
    """Build trait vectors from contrast sets and write them with the facts of how they came out."""
    from steered_lm.extract.contrast import available_traits
    from steered_lm.judges.traits import TRAITS
    from steered_lm.study import build

    groups = {"all": available_traits() if pairs_file is None else [], "persona_vectors": [*TRAITS]}
    names = [name for part in traits.split(",") for name in groups.get(part.strip(), [part.strip()])]
    chosen = method or ("svd" if judge is None else "mean_diff")
    settings: dict[str, Any] = {"method": chosen, "pooling": pooling, "pairs": pairs, "held_out_pairs": held_out_pairs, "seed": seed}
    settings |= {"max_new_tokens": max_new_tokens, "allow_chance": allow_chance, "missing_limit": missing_limit}
    with StepBar(console) as bar:
        made = build(
            model_config(model, device, dtype, batch_size, prompt_format),
            names,
            layers,
            out,
            pairs_file=pairs_file,
            cache=out.parent / f"{out.stem}.cache",
            progress=bar,
            judge=judge,
            judge_options=parse_options(judge_option),
            judge_cache=judge_cache,
            **settings,
        )
    console.print(_vectors_table(made))
    _show_confirmed(made)
    console.print(
        f"wrote {out}. Use it: --model_args pretrained={model},vectors={out},layer={made.meta.layers[0]},alpha=0.4,weights={made.meta.traits[0]}:1",
        soft_wrap=True,
    )


@vectors_app.command("show")
def vectors_show(path: Annotated[Path, typer.Argument(help="A trait-vectors file.")]) -> None:
    """Show what a trait-vectors file holds."""
    from steered_lm.steering.vectors import TraitVectors

    vectors = TraitVectors.load(path)
    meta = vectors.meta
    console.print(
        f"{path}: {meta.method}, {meta.pooling}, model {meta.model_id} ({meta.n_layers} blocks, d_model {meta.d_model}), "
        f"steered-lm {meta.library_version}",
        soft_wrap=True,
    )
    console.print(_vectors_table(vectors))
    _show_confirmed(vectors)


def _show_confirmed(vectors: Any) -> None:
    for trait, found in vectors.meta.confirmed.items():
        table = Table(title=escape(f"{trait}: responses confirmed by {found.trait_judge} (trait) and {found.coherence_judge} (coherence)"))
        for column in ("split/side", "generated", "kept", "wrong side", "incoherent", "missing"):
            table.add_column(column, justify="left" if column == "split/side" else "right")
        for name, counts in found.counts.items():
            table.add_row(name, *map(str, counts.model_dump().values()))
        console.print(table)


def _vectors_table(vectors: Any) -> Table:
    table = Table(title="Trait vectors: how well each direction separates pairs it was not built on")
    for column in ("trait", "layer", "held-out pairs on the right side", "lower bound", "explained variance", "cosine with", "residual norm"):
        table.add_column(column, justify="left" if column in {"trait", "cosine with"} else "right")
    for trait, by_layer in vectors.meta.stats.items():
        for layer, s in by_layer.items():
            right = f"{s.held_out_right_side:.0%} of {s.held_out_pairs}" + (" (chance)" if s.at_chance else "")
            cosine = ", ".join(f"{other} {value:.2f}" for other, value in s.cosine.items())
            norm = vectors.meta.residual_norms[layer].response
            table.add_row(trait, str(layer), right, f"{s.held_out_low:.0%}", f"{s.explained_variance:.0%}", cosine, f"{norm:.3g}")
    return table
