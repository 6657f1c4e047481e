"""``steered-lm traits``: new traits in the published form of Persona Vectors, whether a file is in it, and models trained to show a trait."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from steered_lm.commands.options import parse_options
from steered_lm.commands.trait_models import mount

console = Console(emoji=False)
traits_app = typer.Typer(no_args_is_help=True, help="Write and check traits of your own; train models to show a trait, and measure them.")
mount(traits_app)


@traits_app.command("new")
def new(
    name: Annotated[str, typer.Option(help="The trait's name, which its files get.")],
    description: Annotated[str, typer.Option(help="What it means, in a sentence: 'the response …'.")],
    model: Annotated[str, typer.Option(help="Who writes: openai:<model>, any OpenAI-compatible endpoint.")],
    option: Annotated[list[str], typer.Option(help="name=value for the endpoint, such as base_url=http://localhost:8000/v1; again for more.")] = [],  # noqa: B006 - typer takes a list as default and copies it
    out: Annotated[Path, typer.Option(help="Folder that gets extract/<name>.json and eval/<name>.json.")] = Path("traits"),
) -> None:
    """Write a new trait: 5 instruction pairs, 20 questions for extraction and 20 others for evaluation."""
    from steered_lm.judges.trait_writer import TraitWriter, refuse_existing, save_trait

    refuse_existing(name, out)
    made = TraitWriter.of(model, **parse_options(option, "--option")).write(name, description)
    extract, evaluate = save_trait(made, out)
    console.print(f"wrote {extract} and {evaluate}. Read them before you measure with them.", soft_wrap=True, markup=False)
    metadata = f'{{"trait": "{evaluate}", "judge": "openai:<model>"}}'
    console.print(f"Use it: lm_eval --model steered-hf … --tasks pv_trait --metadata '{metadata}'", soft_wrap=True, markup=False)


@traits_app.command("check")
def check(
    trait: Annotated[
        str, typer.Argument(help="A trait's .json file, a contrast set's .yaml file, a folder with one trait, or the name of one of ours.")
    ],
    folder: Annotated[Path | None, typer.Option(help="Where the trait of that name lies, in extract/ and eval/.")] = None,
) -> None:
    """Say what a trait's files hold, and end with 1 when they differ from the published form in counts or are too alike."""
    from steered_lm.judges.traits import load_trait

    loaded = load_trait(trait, folder)
    for use, file in (("extraction", loaded.extract), ("evaluation", loaded.evaluate)):
        said = "no file" if file is None else f"{len(file.instruction)} instruction pairs, {len(file.questions)} questions"
        console.print(f"{escape(loaded.name)}, {use}: {said}", soft_wrap=True)
    console.print(
        f"judged by: {'our rubric and the description' if loaded.description else 'the eval_prompt, as there is no description'}", soft_wrap=True
    )
    for remark in loaded.remarks:
        console.print(f"[yellow]note:[/yellow] {escape(remark)}", soft_wrap=True)
    if loaded.remarks:
        raise typer.Exit(1)
