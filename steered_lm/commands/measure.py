"""``steered-lm measure``: perplexity and distance to the unsteered model, iso-KL calibration, and the fluency of saved responses."""

from collections.abc import Sequence
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
from steered_lm.measure.texts import ENGLISH, as_split, read_text, text_file
from steered_lm.steering.spec import SteeringSpec
from steered_lm.study import ModelConfig, load_lm

if TYPE_CHECKING:
    from steered_lm.harness.model import SteeredHFLM
    from steered_lm.measure.passages import Passage
    from steered_lm.stats import PairedDifference

console = Console(emoji=False)
measure_app = typer.Typer(no_args_is_help=True, help="Perplexity, distance to the unsteered model, fluency.")

Text = Annotated[
    str,
    typer.Option(help="A text file, JSONL with text, JSONL with prompts and responses, or a text of ours: english, tiny_talk.", show_default=True),
]
SplitName = Annotated[str, typer.Option("--split", help="Where a document of a text file ends: paragraph, line or file.")]
Width = Annotated[int | None, typer.Option("--window", help="Most tokens that the model reads at once; by default all that it takes.", min=2)]
Overlap = Annotated[int, typer.Option(help="Least number of tokens before a predicted one in later windows; more takes longer.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="JSON file for all numbers, item by item.")]


@measure_app.command("perplexity")
def perplexity(
    steering: Annotated[list[Path], typer.Option(help="A steering spec; again for more. The unsteered model is always among them.")] = [],  # noqa: B006
    model: ModelName = TINY_CHAT,
    text: Text = ENGLISH,
    split: SplitName = "paragraph",
    window: Width = None,
    overlap: Overlap = 1,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="Also the KL divergence to the unsteered model.")] = True,
    plain: PlainFormat = False,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the random sign patterns of the paired test.", min=0)] = 0,
    json_file: JsonFile = None,
) -> None:
    """Token perplexity of a text under steering specs, and what changed against the unsteered model, paired by window."""
    from steered_lm.measure.divergence import kl_to_unsteered
    from steered_lm.measure.perplexity import perplexities
    from steered_lm.stats import holm

    specs = [SteeringSpec.load(path) for path in steering]
    lm, passages, length = _loaded(model, text, split, window, plain=plain, device=device, dtype=dtype)
    arms: list[SteeringSpec | None] = [None, *specs]
    found = perplexities(lm.engine, passages, arms, length=length, overlap=overlap)
    distances = kl_to_unsteered(lm.steerer, passages, specs, length=length, overlap=overlap) if kl and specs else []
    differences = [one.nll.minus(found[0].nll, seed=seed) for one in found[1:]]
    corrected = holm([difference.p_value for difference in differences])
    names = ["unsteered", *map(str, steering)]
    title = f"{text}: {sum(found[0].nll.tokens):,} tokens in {len(found[0].nll.items)} windows; nll and KL in nats a token, 95 % intervals"
    columns = ("perplexity", "nll", "nll - unsteered", "p (Holm)", "KL", "missing")
    shown = table(title, ("arm",), columns if distances else (*columns[:4], columns[-1]))
    for place, (name, one) in enumerate(zip(names, found, strict=True)):
        estimate = one.estimate()
        change = _change(differences[place - 1], corrected[place - 1], shown) if place else ("-", "-")
        distance = distances[place - 1].estimate() if distances and place else None
        far = "-" if distance is None else f"{number(distance.value)}\n{interval(distance, shown)}"
        first = f"{number(estimate.value)}\n{interval(estimate, shown)}"
        row = (first, number(one.nll.mean), *change, *((far,) if distances else ()), str(estimate.missing))
        shown.add_row(escape(name), *row)
    console.print(shown)
    if json_file is not None:
        arms_json = [
            {
                "arm": name,
                "spec": None if spec is None else spec.digest,
                "perplexity": one.estimate().model_dump(mode="json"),
                "nll": {"estimate": one.nll.estimate().model_dump(mode="json"), **one.nll.model_dump(mode="json")},
                "minus_unsteered": differences[place - 1].model_dump(mode="json") if place else None,
                "p_holm": corrected[place - 1] if place else None,
                "kl": {"estimate": distances[place - 1].estimate().model_dump(mode="json"), **distances[place - 1].model_dump(mode="json")}
                if distances and place
                else None,
            }
            for place, (name, spec, one) in enumerate(zip(names, arms, found, strict=True))
        ]
        _write(json_file, {"model": model, "text": text, "split": split, "window": length, "overlap": overlap, "arms": arms_json})


@measure_app.command("calibrate")
def calibrate(
    steering: Annotated[Path, typer.Option(help="The steering spec whose alpha is sought.")],
    kl: Annotated[float, typer.Option(help="Wanted KL divergence to the unsteered model, nats a token.")],
    model: ModelName = TINY_CHAT,
    text: Text = ENGLISH,
    split: SplitName = "paragraph",
    window: Width = None,
    plain: PlainFormat = False,
    device: Device = None,
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the spec with that alpha here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the alpha at which a spec is a given KL divergence away from the unsteered model, so that specs can be compared at equal distance."""
    from steered_lm.measure.divergence import calibrated, with_alpha

    spec = SteeringSpec.load(steering)
    lm, passages, length = _loaded(model, text, split, window, plain=plain, device=device, dtype=dtype)
    found = calibrated(lm.steerer, passages, spec, kl, length=length)
    shown = table(f"{text}: mean KL to the unsteered model, nats a token", (), ("alpha", "KL"))
    for alpha, reached in found.tried:
        shown.add_row(f"{alpha:.4g}", f"{reached:.4g}")
    console.print(shown)
    console.print(f"alpha {found.alpha:.4g} gives a KL divergence of {found.kl:.4g} nats a token (wanted {kl:g})", soft_wrap=True)
    if out is not None:
        with_alpha(spec, found.alpha).save(out)
        console.print(f"wrote {out}", soft_wrap=True, highlight=False)
    if json_file is not None:
        _write(json_file, {"model": model, "text": text, "split": split, "window": length, **found.model_dump(mode="json")})


@measure_app.command("fluency")
def fluency_command(
    files: Annotated[list[Path], typer.Argument(help="JSONL with prompts and responses, lm-eval's samples_*.jsonl, or Inspect's logs.")],
    json_file: JsonFile = None,
) -> None:
    """Variety (distinct-n), repetition of word pairs and length of saved responses."""
    from steered_lm.measure.fluency import fluency

    read = {str(path): saved_examples(path) for path in files}
    found = {name: fluency([one.response for one in own], prompts=[repr(one.turns) for one in own]) for name, own in read.items()}
    shown = table("Fluency: means over prompts", ("file", "measure"), ("mean", "95 % interval", "prompts", "too short"))
    for name, one in found.items():
        for measure, estimate in one.estimates().items():
            shown.add_row(escape(name), measure, number(estimate.value), interval(estimate, shown), str(estimate.n), str(estimate.missing))
    console.print(shown)
    if json_file is not None:
        files_json = {
            name: {"estimates": {key: value.model_dump(mode="json") for key, value in one.estimates().items()}, **one.model_dump(mode="json")}
            for name, one in found.items()
        }
        _write(json_file, files_json)


def _loaded(
    model: str, text: str, split: str, window: int | None, *, plain: bool, device: str | None, dtype: str
) -> "tuple[SteeredHFLM, Sequence[Passage], int]":
    """Return the model, the passages, and how many tokens it reads at once."""
    from steered_lm.measure.passages import read_passages

    config = ModelConfig.parse({"model": model, "device": device, "dtype": dtype, "prompt_format": "plain" if plain else "chat"}, source="--model")
    file, cut = text_file(text), as_split(split)
    read_text(file)  # what is wrong with it is said before the model is loaded
    lm = load_lm(config)
    passages = read_passages(file, lm.tokenizer, lm.prefix_token_id, split=cut, prompt_format=config.prompt_format)
    return lm, passages, min(window or lm.max_length, lm.max_length)


def _change(difference: "PairedDifference", corrected: float | None, shown: Any) -> tuple[str, str]:
    return f"{number(difference.mean)}\n{interval(difference, shown)}", "-" if corrected is None else f"{corrected:.3g}"


def _write(path: Path, numbers: Any) -> None:
    write_atomic(path, canonical_json(numbers) + "\n")
    console.print(f"wrote {path}", soft_wrap=True, highlight=False)
