"""Numbers as a reader sees them: signs that are always there, intervals in words, a dash for what is missing."""

from steered_lm.stats import Estimate, PairedDifference

NOTHING = "\N{EN DASH}"


def plain(value: float | None, digits: int = 2) -> str:
    """Return ``2.10``, with a real minus sign; a dash for None."""
    if value is None:
        return NOTHING
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0.0 else text.replace("-", "\N{MINUS SIGN}")


def signed(value: float | None, digits: int = 2) -> str:
    """Return ``+1.80`` or ``-0.30``; zero carries no sign."""
    text = plain(value, digits)
    return text if value is None or float(f"{value:.{digits}f}") <= 0.0 else f"+{text}"


def percent(value: float | None, digits: int = 0) -> str:
    """Return a share as ``61%``."""
    return NOTHING if value is None else f"{plain(100.0 * value, digits)}%"


def points(value: float | None, digits: int = 1) -> str:
    """Return a difference of shares in percentage points, ``-3.0``."""
    return NOTHING if value is None else signed(100.0 * value, digits)


def p_value(value: float | None) -> str:
    """Return ``0.013`` or ``< 0.001``."""
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def span(low: float | None, high: float | None, *, sign: bool = False, digits: int = 2) -> str:
    """Return an interval as ``1.20 to 2.30``; a dash when there is none."""
    if low is None or high is None:
        return NOTHING
    return f"{signed(low, digits)} to {signed(high, digits)}" if sign else f"{plain(low, digits)} to {plain(high, digits)}"


def span_points(low: float | None, high: float | None) -> str:
    """Return an interval of shares in percentage points, ``-8.1 to +2.0``."""
    return NOTHING if low is None or high is None else f"{points(low)} to {points(high)}"


def span_percent(low: float | None, high: float | None) -> str:
    """Return an interval of shares as ``52 to 71%``."""
    return NOTHING if low is None or high is None else f"{plain(100.0 * low, 0)} to {percent(high)}"


def estimate(value: Estimate | None, *, share: bool = False, digits: int = 2) -> str:
    """Return ``2.10 (1.80 to 2.40)``, or the number alone when it has no interval."""
    if value is None or value.value is None:
        return NOTHING
    number = percent(value.value) if share else plain(value.value, digits)
    if value.low is None:
        return f"{number} (no interval)"
    return f"{number} ({span_percent(value.low, value.high) if share else span(value.low, value.high, digits=digits)})"


def difference(value: PairedDifference, *, share: bool = False, digits: int = 2) -> str:
    """Return ``+1.80 (+1.20 to +2.30)``, or the number alone when it has no interval."""
    if value.mean is None:
        return NOTHING
    number = points(value.mean) if share else signed(value.mean, digits)
    if value.low is None:
        return f"{number} (no interval)"
    return f"{number} ({span_points(value.low, value.high) if share else span(value.low, value.high, sign=True, digits=digits)})"


def count(number: int, noun: str) -> str:
    """Return ``1 item`` or ``12 items``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def setting(value: float | None) -> str:
    """Return a swept setting's value, ``0.5``, with a real minus sign; nothing for None."""
    return "" if value is None else f"{value:g}".replace("-", "\N{MINUS SIGN}")
