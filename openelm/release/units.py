"""Write counts, sizes and times the way a person reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")
NARROW_SPACE = "\u202f"  # keeps a number and its unit on one line


def significant(value: float, digits: int = 4) -> str:
    """Write `value` with at least `digits` significant digits and grouped thousands: 1.742, 33,120, 0.0003."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def count(value: float, separator: str = NARROW_SPACE) -> str:
    """Write a large count in thousands (k), millions (M), billions (B) or trillions (T): 271.5 M."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{_three_digits(value / factor)}{separator}{suffix}"
    return significant(value, 3)


def size(size_bytes: float) -> str:
    """Write a number of bytes in decimal units: 5.46 MB."""
    for factor, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor * 0.9995:
            return f"{_three_digits(size_bytes / factor)}{NARROW_SPACE}{suffix}"
    return f"{size_bytes:.0f}{NARROW_SPACE}B"


def duration(seconds: float) -> str:
    """Write a time in its two largest units: 3 h 12 min."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{significant(seconds, 3)}{NARROW_SPACE}s"
    total = round(seconds)
    parts = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "min"), (total % 60, "s"))
    first = next(i for i, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount}{NARROW_SPACE}{unit}" for amount, unit in parts[first : first + 2] if amount)


def percent(fraction: float, digits: int = 3) -> str:
    """Write a fraction as a percentage: 0.412 is 41.2 %."""
    return f"{significant(100 * fraction, digits)}{NARROW_SPACE}%"


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: 1 document, 2 documents."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def spread(items: Sequence[Item], limit: int) -> list[Item]:
    """Choose at most `limit` of the items, evenly, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")
