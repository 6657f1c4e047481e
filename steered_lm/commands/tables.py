"""How commands about judges draw numbers: tables, intervals with the reason where there is none, agreement."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from steered_lm.judges.agreement import Agreement
    from steered_lm.stats import Estimate, PairedDifference


def table(title: str, texts: Sequence[str], numbers: Sequence[str], more_texts: Sequence[str] = ()) -> Table:
    """Return an empty table: columns of text, of numbers, and of text again."""
    made = Table(title=escape(title))
    for column in texts:
        made.add_column(column, overflow="fold")
    for column in numbers:
        made.add_column(column, justify="right", overflow="fold")  # half a number is a wrong one
    for column in more_texts:
        made.add_column(column, overflow="fold")
    return made


def number(value: float | None) -> str:
    """Return three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def interval(found: "Estimate | PairedDifference", shown_in: Table) -> str:
    """Return an interval; where there is none, the table's caption gets the reason."""
    if found.low is not None and found.high is not None:
        return f"{found.low:.3f} to {found.high:.3f}"
    said = f"No interval: {found.reason}."
    if said not in str(shown_in.caption or ""):
        shown_in.caption = f"{shown_in.caption or ''} {said}".strip()
    return "-"


def show_agreement(console: Console, found: "Agreement", title: str, *, worst: int, codes: Mapping[str, float] | None = None) -> None:
    """Print alpha, every pair of raters, and the items that they see most differently; ``codes`` name what numbers stand for."""
    named = {code: name for name, code in (codes or {}).items()}
    columns = ("items", "Cohen's kappa", "95 % interval", "Spearman", "95 % interval", "a - b")
    pairs = table("", ("a", "b"), columns)
    for pair in found.pairs:
        rho = ("-", "-") if pair.spearman is None else (number(pair.spearman.value), interval(pair.spearman, pairs))
        row = (str(pair.kappa.n), number(pair.kappa.value), interval(pair.kappa, pairs), *rho, number(pair.gap))
        pairs.add_row(escape(pair.a), escape(pair.b), *row)
    alpha = found.alpha
    pairs.title = escape(f"{title}; Krippendorff's alpha ({found.metric}, {alpha.n} items): {number(alpha.value)}, {interval(alpha, pairs)}")
    console.print(pairs)
    for item in found.disagreements[:worst]:
        scores = ", ".join(f"{name} {'-' if score is None else named.get(score, f'{score:g}')}" for name, score in item.scores.items())
        console.print(f"far apart: {item.item}: {scores}", highlight=False, markup=False, soft_wrap=True)
    if len(found.disagreements) > worst > 0:
        console.print(f"{len(found.disagreements)} of {found.items} items are seen differently; --json lists all", highlight=False)
