"""Numbers in plain words, the same in the terminal and, after ``typographic``, in the report.

ASCII, because a terminal or a log may know no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

MISSING = "-"


def score(value: float | None, *, percent: bool = True, digits: int = 1) -> str:
    """``0.6125`` -> ``61.2 %``, or ``0.612`` for a metric that is no share; a dash where there is
    none.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if percent:
        return f"{100 * value:.{digits}f} %"
    return f"{value:.3f}"


def change(value: float | None, *, percent: bool = True, digits: int = 1) -> str:
    """A signed difference, in points where the metric is a percentage: ``+1.3``. Zero after
    rounding has no sign.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if percent:
        text = f"{100 * value:+.{digits}f}"
    else:
        text = f"{value:+.3f}"
    if float(text) == 0:
        return text[1:]
    return text


def number(value: float | None, digits: int = 3) -> str:
    """``0.81234`` -> ``0.812``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}"


def size(count: float) -> str:
    """Bytes in decimal units: ``98304`` -> ``98 kB``, ``1620000`` -> ``1.6 MB``."""
    amount, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if unit != "B" and amount < 9.95:
            digits = 1
        else:
            digits = 0
        if round(amount, digits) < 1000 or unit == units[-1]:
            break
        amount /= 1000
    return f"{amount:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """``0.42`` -> ``0.4 s``, ``125`` -> ``2 min 5 s``, ``4320`` -> ``1 h 12 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        if rest:
            return f"{minutes} min {rest} s"
        return f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    if rest:
        return f"{hours} h {rest} min"
    return f"{hours} h"


def count(amount: int, noun: str) -> str:
    """``1 client``, ``16 clients``, ``12,288 values``."""
    if amount == 1:
        return f"{amount:,} {noun}"
    return f"{amount:,} {noun}s"


def some(names: Sequence[str], most: int) -> str:
    """``a, b, c and 997 more``; all of them where there are no more than ``most``."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most:,} more"


def typographic(text: str) -> str:
    """A real minus and dash, and a percent sign that stays with its number; the terminal keeps
    ASCII.
    """
    if text == MISSING:
        return "–"
    return text.replace("-", "−").replace(" %", "\N{NARROW NO-BREAK SPACE}%")


def shorten(name: str, longest: int) -> str:
    """The middle of a long name gives way, because both ends of ``hospital-north-ward-17`` tell
    clients apart.
    """
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[len(name) - tail :]}"


def shares(values: Iterable[float | None]) -> bool:
    """Whether a metric reads best as a percentage: every value that is a number lies between 0 and
    1.
    """
    return all(0 <= value <= 1 for value in values if value is not None and math.isfinite(value))
