"""Tables keep their shape whatever the cells hold."""

from __future__ import annotations

from openelm.evaluate.tables import Cell, aligned, markdown

COLUMNS = ["name", "bits per byte", "bytes"]
ROWS: list[list[Cell]] = [["xz -9", 2.5, 1234567], ["a|b\x1b[31m", None, 1]]


def test_markdown_escapes_what_would_break_a_row() -> None:
    assert markdown(COLUMNS, ROWS) == (
        "| name | bits per byte | bytes |\n"
        "| --- | ---: | ---: |\n"
        "| xz -9 | 2.500 | 1,234,567 |\n"
        "| a\\|b\\x1b[31m | - | 1 |\n"
    )


def test_aligned_columns_line_up() -> None:
    assert aligned(COLUMNS, ROWS) == (
        "name         bits per byte      bytes\n"
        "xz -9                2.500  1,234,567\n"
        "a|b\\x1b[31m              -          1\n"
    )
