"""``steered-lm lamp`` and ``steered-lm persona from-lamp``: LaMP's files, and a persona of one of its authors."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steered_lm.errors import UserError

console = Console(emoji=False)
lamp_app = typer.Typer(no_args_is_help=True, help="The personalisation benchmark LaMP.")

TaskName = Annotated[str, typer.Option("--task", help="LaMP_1 to LaMP_7.")]
DataFolder = Annotated[str | None, typer.Option("--data", help="Folder that holds LaMP_1, …; by default STEERED_LM_DATA.")]


@lamp_app.command("download")
def lamp_download(
    task: Annotated[str, typer.Option("--task", help="LaMP_1 to LaMP_7, comma-separated; LaMP_6 needs a licence and is not downloaded.")],
    out: Annotated[Path, typer.Option(help="The folder to fill, which data or STEERED_LM_DATA then names.")],
    split: Annotated[str, typer.Option(help="train, dev or test (questions alone).")] = "dev",
    by_time: Annotated[bool, typer.Option("--by-time", help="The files divided by time, with dates; they go to <out>/time.")] = False,
    url: Annotated[str | None, typer.Option(help="Where the files lie; by default STEERED_LM_LAMP_URL, else the authors' host.")] = None,
) -> None:
    """Fetch the official files of a split."""
    from steered_lm.lamp.download import download
    from steered_lm.lamp.task import task_named

    for chosen in [task_named(name) for name in task.split(",")]:
        paths = download(
            chosen, split, out, by_time=by_time, url=url, on_file=lambda address, path: console.print(f"fetching {address}", soft_wrap=True)
        )
        for path in paths:
            console.print(f"{path}: {path.stat().st_size:,} bytes", soft_wrap=True)


def persona_from_lamp(
    row: Annotated[str, typer.Option("--id", help="The row whose author it is.")],
    out: Annotated[Path, typer.Option(help="The persona's folder, which must not hold one yet.")],
    task: TaskName = "LaMP_7",
    data: DataFolder = None,
    split: Annotated[str, typer.Option(help="train, dev, ….")] = "dev",
    name: Annotated[str | None, typer.Option(help="The persona's name; by default the task and the row's id.")] = None,
    licence: Annotated[str, typer.Option(help="The licence of the texts.")] = "unknown",
) -> None:
    """Make a persona of one author from a LaMP profile, ready for optimize and persona_judge."""
    from steered_lm.lamp.persona import persona_from_profile
    from steered_lm.lamp.rows import read_rows
    from steered_lm.lamp.task import task_named

    chosen = task_named(task)
    found = [candidate for candidate in read_rows(chosen, data, split) if candidate.id == row]
    if not found:
        raise UserError(f"--id {row!r} is no row of {chosen.name}, split {split!r}. Take an id of its file of questions.")
    persona = persona_from_profile(chosen, found[0], out, name=name, licence=licence)
    console.print(
        f"wrote {out}: " + ", ".join(f"{len(persona.items(s))} {s}" for s in ("build", "tune", "validate", "test")) + " items", soft_wrap=True
    )
