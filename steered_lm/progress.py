"""Progress bars of the command line."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from steered_lm.search.result import Generation


class _Bar:
    """Columns are few and narrow, so that a bar and its note fit into 80 characters."""

    def __init__(self, console: Console, last: ProgressColumn, *, transient: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), last)
        self._progress = Progress(*columns, console=console, transient=transient, disable=transient and not console.is_interactive)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


class StepBar(_Bar):
    """One bar a step, for callbacks of the form ``(what, done, total)``."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        """Draw on a console; a transient bar is gone when it ends, and is not drawn at all where nothing can be drawn over."""
        super().__init__(console, TimeElapsedColumn(), transient=transient)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` rows of a step are finished."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)


class GenerationBar(_Bar):
    """A search's bar: best, mean, missing, seconds a generation."""

    def __init__(self, console: Console, name: str) -> None:
        """Draw on a console under the optimiser's name."""
        super().__init__(console, TextColumn("{task.fields[note]}"))
        self._task = self._progress.add_task(name, total=None, note="")

    def __call__(self, generation: "Generation") -> None:
        """Show one finished generation."""
        g = generation
        seconds = "replayed" if g.replayed else f"{g.seconds.get('total', 0.0):.1f} s/gen"
        note = f"best {g.best:.2f} mean {g.mean:.2f} missing {g.missing}/{g.verdicts} {seconds}"
        self._progress.update(self._task, completed=g.evaluated, total=g.planned, note=note)
