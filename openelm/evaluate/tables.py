"""Rows to a table: Markdown for files, aligned text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from openelm.errors import printable

Cell = str | int | float | None


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Lay out a Markdown table; columns that hold a number are aligned right."""
    texts = [[_text(cell).replace("|", "\\|") for cell in row] for row in rows]
    heads = [_text(column).replace("|", "\\|") for column in columns]
    rule = ["---:" if right else "---" for right in _numeric(columns, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rule, *texts])


def aligned(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Lay out columns of equal width, two spaces apart; columns that hold a number are aligned right."""
    lines = [[_text(cell) for cell in line] for line in [columns, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    layout = list(zip(widths, _numeric(columns, rows), strict=True))
    return "".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, (width, right) in zip(line, layout, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def _numeric(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    return [any(isinstance(row[index], int | float) for row in rows) for index in range(len(columns))]


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else printable(cell)
