"""Measured models stand among the published ones, with their intervals and footnotes, in every layout."""

from __future__ import annotations

import csv
import html.parser
import io
import re

import pytest

from openelm.evaluate.comparison import FORMATS, compare, to_json
from openelm.evaluate.presets import PRESETS
from openelm.evaluate.results import SuiteResult, TaskResult

SUITE = PRESETS["openllm"]
HOSTILE = '<script src="//x">alert(1)</script>|\x1b[31m\n=1'


def result(*tasks: TaskResult, average: float | None = None, model: str = "mine") -> SuiteResult:
    return SuiteResult("openllm", model, average, tasks, "mine.json")


def task(
    name: str,
    value: float,
    interval: tuple[float, float] | None = None,
    *,
    shots: int | None = None,
    metric: str | None = None,
    note: str | None = None,
) -> TaskResult:
    (spec,) = [spec for spec in SUITE.tasks if spec.task == name]
    low, high = interval or (None, None)
    shots = spec.shots if shots is None else shots
    return TaskResult(name, shots, metric or spec.metric, value, low, high, 500, note)


class Cells(html.parser.HTMLParser):
    """Collects the cells of every row, and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.inside:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def mine(*tasks: TaskResult, average: float | None = None) -> list[str]:
    """The cells of the measured row."""
    page = FORMATS["html"]([compare(SUITE, [result(*tasks, average=average)])])
    (row,) = [row for row in Cells(page).rows if row[0] == "mine (ours)"]
    return row


def test_measured_rows_follow_the_family_and_precede_the_others() -> None:
    models = [line.model for line in compare(SUITE, [result(task("mmlu", 0.25))]).lines]
    assert models[7:] == ["OpenELM-3B-Instruct", "mine", "OPT", "Pythia", "MobiLlama", "OLMo"]


def test_a_result_of_another_suite_is_not_in_the_table() -> None:
    lines = compare(PRESETS["llm360"], [result(task("mmlu", 0.25))]).lines
    assert not any(line.measured for line in lines)


def test_a_fraction_is_shown_in_percent_with_half_of_its_interval() -> None:
    assert mine(task("mmlu", 0.2512, (0.24, 0.27))) == [
        *("mine (ours)", "-", "-", "-", "-", "25.12 ± 1.50", "-", "-", "-", "ours: mine.json")
    ]


@pytest.mark.parametrize(
    ("given", "footnote"),
    [
        (task("mmlu", 0.25, note="validation split"), "validation split"),
        (task("mmlu", 0.25, shots=0), "0-shot, and 5-shot in the paper"),
        (task("mmlu", 0.25, metric="acc_norm"), "acc_norm, and acc in the paper"),
        (task("mmlu", 0.25, shots=0, note="validation split"), "validation split; 0-shot, and 5-shot in the paper"),
    ],
)
def test_what_is_not_measured_as_in_the_paper_has_a_footnote(given: TaskResult, footnote: str) -> None:
    comparison = compare(SUITE, [result(given)])
    assert comparison.footnotes == (footnote,)
    for layout in ("text", "md", "html"):
        text = FORMATS[layout]([comparison])
        assert "25.00 [1]" in text and f"[1] {footnote}" in text


def test_equal_notes_share_a_footnote_and_others_count_on() -> None:
    first, second = task("mmlu", 0.25, note="a"), task("hellaswag", 0.3, note="b")
    comparison = compare(SUITE, [result(first, second), result(first, model="other")])
    assert comparison.footnotes == ("b", "a")
    rows = [[value.mark for value in line.values if value] for line in comparison.lines if line.measured]
    assert rows == [[1, 2], [2]]


def test_a_published_row_that_was_asked_otherwise_has_a_footnote_and_no_metric() -> None:
    comparison = compare(PRESETS["commonsense"], [])
    (line,) = comparison.lines
    assert len(comparison.footnotes) == 1
    assert {(value.mark, value.metric) for value in (*line.values, line.average) if value} == {(1, None)}


@pytest.mark.parametrize("layout", ["text", "md", "html"])
def test_the_table_of_fine_tuned_models_says_that_they_are(layout: str) -> None:
    assert FORMATS[layout]([compare(PRESETS["commonsense"], [])]).count("fine-tuned, not zero-shot") == 2


def test_an_average_of_a_part_says_so() -> None:
    comparison = compare(SUITE, [result(task("mmlu", 0.25), average=0.25)])
    assert comparison.footnotes == ("mean of 1 of the 5 columns",)
    whole = [task(spec.task, 0.25) for spec in SUITE.tasks]
    assert compare(SUITE, [result(*whole, average=0.25)]).footnotes == ()
    assert mine(*whole, average=0.25)[-2] == "25.00"


def test_csv_and_json_hold_the_same_values() -> None:
    comparisons = [compare(suite, [result(task("mmlu", 1 / 3, (0.3, 0.4), note="a, b"))]) for suite in PRESETS.values()]
    expected = set()
    for suite in to_json(comparisons)["suites"]:
        for row in suite["rows"]:
            for name, cell in {**row["tasks"], "average": row["average"]}.items():
                if cell is not None:
                    cells = (cell[key] for key in ("percent", "half_interval", "note"))
                    expected.add((suite["suite"], row["model"], name, *("" if c is None else str(c) for c in cells)))
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](comparisons))))
    columns = ("suite", "model", "task", "percent", "half_interval", "note")
    assert {tuple(line[column] for column in columns) for line in lines} == expected
    assert len(lines) == len(expected) == 8 * (8 + 6 + 9) + 9 + 6 + 1
    assert ("openllm", "mine", "mmlu", "33.3333", "5.0", "a, b") in expected


@pytest.mark.parametrize("layout", FORMATS)
def test_names_and_notes_cannot_leave_their_cells(layout: str) -> None:
    text = FORMATS[layout]([compare(SUITE, [result(task("mmlu", 0.25, note=HOSTILE), model=HOSTILE)])])
    assert "\x1b" not in text
    if layout in ("md", "html"):
        assert "<script" not in text
    if layout == "md":
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
        assert widths == {11}


def test_the_page_asks_the_network_for_nothing_and_knows_the_dark() -> None:
    page = FORMATS["html"]([compare(suite, []) for suite in PRESETS.values()])
    assert Cells(page).tags.isdisjoint({"script", "link", "img", "iframe", "a", "base", "form"})
    assert not re.search(r"url\(|@import|(src|href)=", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_shows_every_row_of_the_text() -> None:
    comparison = compare(SUITE, [result(task("mmlu", 0.25, (0.2, 0.3)))])
    lines = FORMATS["text"]([comparison]).splitlines()
    shown = [re.split(r" {2,}", line) for line in lines[2 : 3 + len(comparison.lines)]]
    assert Cells(FORMATS["html"]([comparison])).rows == shown
