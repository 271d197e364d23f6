"""Rows to a table: Markdown for files, aligned text for a terminal, CSV for programs, HTML for a browser."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Collection, Sequence

from openelm.errors import printable

Cell = str | int | float | None

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1b1d20; --soft: #5c6066; --rule: #deded8; --mark: #eaf3fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e6e6e2; --soft: #a0a4aa; --rule: #30343b; --mark: #1d2f3c; }
}
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--rule); text-align: left; }
th.number, td.number { text-align: right; }
tr.marked { background: var(--mark); font-weight: 600; }
.remark { color: var(--soft); margin: 0.25rem 0; font-size: 13px; }
"""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, decimals: int = 3) -> str:
    """Lay out a Markdown table; columns that hold a number are aligned right."""
    texts = [[markdown_text(_text(cell, decimals)) for cell in row] for row in rows]
    heads = [markdown_text(column) for column in columns]
    rule = ["---:" if right else "---" for right in _numeric(columns, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [heads, rule, *texts])


def markdown_text(text: str) -> str:
    """Escape what would end a cell or begin HTML."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def aligned(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, decimals: int = 3) -> str:
    """Lay out columns of equal width, two spaces apart; columns that hold a number are aligned right."""
    lines = [[_text(cell, decimals) for cell in line] for line in [columns, *rows]]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    layout = list(zip(widths, _numeric(columns, rows), strict=True))
    return "".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, (width, right) in zip(line, layout, strict=True)
        ).rstrip()
        + "\n"
        for line in lines
    )


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Lay out CSV with numbers in full and nothing where there is no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue()


def html_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, decimals: int = 3, marked: Collection[int] = ()
) -> str:
    """Lay out an HTML table; columns that hold a number are aligned right, rows with an index in `marked` stand out."""
    right = _numeric(columns, rows)

    def row(cells: Sequence[Cell], tag: str) -> str:
        kinds = (' class="number"' if number else "" for number in right)
        return "".join(
            f"<{tag}{kind}>{html_text(_text(cell, decimals))}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
        )

    starts = ['<tr class="marked">' if index in marked else "<tr>" for index in range(len(rows))]
    body = "".join(f"{start}{row(cells, 'td')}</tr>\n" for start, cells in zip(starts, rows, strict=True))
    head = f"<thead><tr>{row(columns, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}</tbody>\n</table></div>\n'


def html_text(text: str) -> str:
    """Escape all that HTML would not show as it is."""
    return html.escape(printable(text))


def html_page(title: str, body: str) -> str:
    """Wrap HTML to a page, light or dark as the reader's system is, that asks the network for nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html_text(title)}</h1>\n{body}</body>\n</html>\n"
    )


def _numeric(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[bool]:
    return [any(isinstance(row[index], int | float) for row in rows) for index in range(len(columns))]


def _text(cell: Cell, decimals: int) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.{decimals}f}"
    return f"{cell:,}" if isinstance(cell, int) else printable(cell)
