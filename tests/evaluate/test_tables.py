"""Tables keep their shape whatever the cells hold."""

from __future__ import annotations

import csv
import io

from openelm.evaluate.tables import Cell, aligned, comma_separated, html_table, markdown

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


def test_decimals_are_those_that_were_asked_for() -> None:
    assert "| 2.5 |" in markdown(COLUMNS, ROWS, decimals=1)
    assert " 2.5000 " in aligned(COLUMNS, ROWS, decimals=4)


def test_markdown_cannot_begin_html() -> None:
    assert markdown(["<b>"], [["<i>"]]) == "| &lt;b> |\n| --- |\n| &lt;i> |\n"


def test_csv_comes_back_as_it_was_but_for_control_characters() -> None:
    rows = [*ROWS, ['quo"te, comma', 1e-7, -3]]
    assert list(csv.reader(io.StringIO(comma_separated(COLUMNS, rows)))) == [
        COLUMNS,
        ["xz -9", "2.5", "1234567"],
        ["a|b\\x1b[31m", "", "1"],
        ['quo"te, comma', "1e-07", "-3"],
    ]


def test_html_escapes_cells_and_marks_rows() -> None:
    assert html_table(["<a>", "n"], [["&", 1], ['"', None]], marked={1}) == (
        '<div class="scroll"><table>\n'
        '<thead><tr><th>&lt;a&gt;</th><th class="number">n</th></tr></thead>\n'
        '<tbody>\n<tr><td>&amp;</td><td class="number">1</td></tr>\n'
        '<tr class="marked"><td>&quot;</td><td class="number">-</td></tr>\n'
        "</tbody>\n</table></div>\n"
    )
