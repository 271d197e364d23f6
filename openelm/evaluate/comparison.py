"""The paper's table of a suite, with models that were measured here among the published ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from openelm.errors import printable
from openelm.evaluate.presets import Suite, TaskSpec
from openelm.evaluate.published import PUBLISHED, SOURCES, PublishedRow
from openelm.evaluate.results import SuiteResult, TaskResult
from openelm.evaluate.tables import (
    Cell,
    aligned,
    comma_separated,
    html_page,
    html_table,
    html_text,
    markdown,
    markdown_text,
)

_REMARKS = {
    "openllm": "OpenELM's model card calls this table LLM360.",
    "llm360": "OpenELM's model card calls this table OpenLLM. CrowS-Pairs is the percentage of stereotyped sentences, "
    "which the average takes in as if higher were better.",
    "commonsense": "Models here have learned from the training splits of these tasks: fine-tuned, not zero-shot, "
    "though no examples stand before a question.",
}
TITLE = "OpenELM: published and measured scores"


@dataclass(frozen=True)
class Value:
    """A cell in percent, and how it was measured; `mark` is the number of its footnote."""

    percent: float
    shots: int | None = None
    metric: str | None = None
    half_interval: float | None = None
    n: int | None = None
    mark: int | None = None


@dataclass(frozen=True)
class Line:
    """A model; `values` has one entry a column of the suite, None where nothing is known."""

    model: str
    parameters: int | None
    tokens: int | None
    values: tuple[Value | None, ...]
    average: Value | None
    source: str
    measured: bool


@dataclass(frozen=True)
class Comparison:
    """One table: published OpenELM rows, measured rows, rows of other models; footnotes count from 1."""

    suite: Suite
    lines: tuple[Line, ...]
    footnotes: tuple[str, ...]


def compare(suite: Suite, results: Iterable[SuiteResult]) -> Comparison:
    """Put the results of a suite, in their order, among the published rows of it."""
    footnotes: list[str] = []
    published = [row for row in PUBLISHED if row.suite == suite.name]
    lines = [_published(row, suite, footnotes) for row in published if row.is_openelm]
    lines += [_measured(result, suite, footnotes) for result in results if result.suite == suite.name]
    lines += [_published(row, suite, footnotes) for row in published if not row.is_openelm]
    return Comparison(suite, tuple(lines), tuple(footnotes))


def _published(row: PublishedRow, suite: Suite, footnotes: list[str]) -> Line:
    mark = _mark(row.note or "", footnotes)
    values = tuple(
        Value(row.values[spec.task], spec.shots, None if row.note else spec.metric, mark=mark)
        if spec.task in row.values
        else None
        for spec in suite.tasks
    )
    average = None if row.average is None else Value(row.average, mark=mark)
    return Line(row.model, row.parameters, row.tokens, values, average, row.source, measured=False)


def _measured(result: SuiteResult, suite: Suite, footnotes: list[str]) -> Line:
    found = {task.task: task for task in result.tasks}
    values = tuple(_value(found[spec.task], spec, footnotes) if spec.task in found else None for spec in suite.tasks)
    average = None
    if result.average is not None:
        parts = f"mean of {len(found)} of the {len(suite.tasks)} columns" if len(found) < len(suite.tasks) else ""
        average = Value(_percent(result.average), mark=_mark(parts, footnotes))
    return Line(result.model, None, None, values, average, f"ours: {result.file}", measured=True)


def _value(task: TaskResult, spec: TaskSpec, footnotes: list[str]) -> Value:
    half = None if task.low is None or task.high is None else _percent((task.high - task.low) / 2)
    notes = [] if task.note is None else [task.note]
    if task.shots != spec.shots:
        notes.append(f"{task.shots}-shot, and {spec.shots}-shot in the paper")
    if task.metric != spec.metric:
        notes.append(f"{task.metric}, and {spec.metric} in the paper")
    return Value(_percent(task.value), task.shots, task.metric, half, task.n, _mark("; ".join(notes), footnotes))


def _mark(note: str, footnotes: list[str]) -> int | None:
    if not note:
        return None
    if note not in footnotes:
        footnotes.append(note)
    return footnotes.index(note) + 1


def _percent(fraction: float) -> float:
    return round(100 * fraction, 4)


def as_text(comparisons: Sequence[Comparison]) -> str:
    """Lay out every table for a terminal, what its columns, marks and sources mean below it."""
    return "\n".join(
        f"{item.suite.title}\n\n{aligned(*_table(item), decimals=2)}\n"
        + "".join(f"{printable(line)}\n" for line in _remarks(item))
        for item in comparisons
    )


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """Lay out every table as Markdown."""
    return "\n".join(
        f"## {item.suite.title}\n\n{markdown(*_table(item), decimals=2)}\n"
        + "".join(f"- {markdown_text(line)}\n" for line in _remarks(item))
        for item in comparisons
    )


def as_html(comparisons: Sequence[Comparison]) -> str:
    """Lay out every table on one page that needs nothing else."""
    body = ""
    for item in comparisons:
        marked = {index for index, line in enumerate(item.lines) if line.measured}
        body += f"<h2>{html_text(item.suite.title)}</h2>\n{html_table(*_table(item), decimals=2, marked=marked)}"
        body += "".join(f'<p class="remark">{html_text(line)}</p>\n' for line in _remarks(item))
    return html_page(TITLE, body)


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """Lay out one CSV line a known value, the average under the task "average"."""
    rows: list[list[Cell]] = []
    for item in comparisons:
        names = [*(spec.task for spec in item.suite.tasks), "average"]
        for line in item.lines:
            for task, value in zip(names, (*line.values, line.average), strict=True):
                if value is not None:
                    about = (item.suite.name, line.model, line.parameters, line.tokens, task)
                    rows.append([*about, *_known(item, value).values(), line.source])
    return comma_separated(("suite", "model", "parameters", "tokens", "task", *_KNOWN, "source"), rows)


def to_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return plain data for a JSON file."""
    return {"sources": SOURCES, "suites": [_suite_json(item) for item in comparisons]}


def _suite_json(item: Comparison) -> dict[str, Any]:
    def plain(value: Value | None) -> dict[str, Cell] | None:
        return None if value is None else _known(item, value)

    names = [spec.task for spec in item.suite.tasks]
    rows = [
        {
            "model": line.model,
            "parameters": line.parameters,
            "tokens": line.tokens,
            "tasks": dict(zip(names, map(plain, line.values), strict=True)),
            "average": plain(line.average),
            "source": line.source,
            "measured": line.measured,
        }
        for line in item.lines
    ]
    columns = [{"task": spec.task, "shots": spec.shots, "metric": spec.metric} for spec in item.suite.tasks]
    return {"suite": item.suite.name, "title": item.suite.title, "columns": columns, "rows": rows}


_KNOWN = ("percent", "shots", "metric", "half_interval", "n", "note")


def _known(item: Comparison, value: Value) -> dict[str, Cell]:
    note = None if value.mark is None else item.footnotes[value.mark - 1]
    known = (value.percent, value.shots, value.metric, value.half_interval, value.n, note)
    return dict(zip(_KNOWN, known, strict=True))


def _table(item: Comparison) -> tuple[list[str], list[list[Cell]]]:
    columns = ["model", "parameters", "tokens", *(spec.title for spec in item.suite.tasks), "average", "source"]
    rows: list[list[Cell]] = [
        [
            f"{line.model} (ours)" if line.measured else line.model,
            _short(line.parameters, 1e9, "B", 2),
            _short(line.tokens, 1e12, "T", 1),
            *(_cell(value) for value in (*line.values, line.average)),
            line.source,
        ]
        for line in item.lines
    ]
    return columns, rows


def _short(number: int | None, unit: float, letter: str, decimals: int) -> str | None:
    return None if number is None else f"{number / unit:.{decimals}f}{letter}"


def _cell(value: Value | None) -> Cell:
    if value is None or (value.half_interval is None and value.mark is None):
        return None if value is None else value.percent
    half = "" if value.half_interval is None else f" ± {value.half_interval:.2f}"
    return f"{value.percent:.2f}{half}" + ("" if value.mark is None else f" [{value.mark}]")


def _remarks(item: Comparison) -> list[str]:
    lines = [f"[{number}] {note}" for number, note in enumerate(item.footnotes, start=1)]
    columns = ", ".join(f"{spec.title} {spec.shots}-shot {spec.metric}" for spec in item.suite.tasks)
    lines.append(f"Percent: {columns}. The average is the unweighted mean of the columns.")
    if item.suite.name in _REMARKS:
        lines.append(_REMARKS[item.suite.name])
    if any(line.measured for line in item.lines):
        lines.append("(ours) is measured, ± half of its interval; everything else is published.")
    used = [source for source in SOURCES if any(line.source == source for line in item.lines)]
    return [*lines, *(f"{source}: {SOURCES[source]}." for source in used)]


FORMATS = {"text": as_text, "md": as_markdown, "csv": as_csv, "html": as_html}
"""--format -> the function that lays out."""
