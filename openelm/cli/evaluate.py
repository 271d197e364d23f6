"""`openelm eval` and `openelm compare`: what a model is worth, and whether another one is better."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from rich.progress import TaskProgressColumn

from openelm.cli.screen import Screen, WorkBar
from openelm.errors import ConfigError


def evaluate(arguments: argparse.Namespace) -> int:
    """Run a suite on a model folder and print the score."""
    if arguments.batch_tokens is not None and arguments.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens is {arguments.batch_tokens}", fix="use 1 or more")
    return _documents(arguments) if arguments.suite.startswith("bpb") else _tasks(arguments)


def _documents(arguments: argparse.Namespace) -> int:
    """Measure bits per byte of documents."""
    given = {name: getattr(arguments, name.replace("-", "_")) for name in ("limit", "out", "against", "batch-tokens")}
    if unused := [f"--{name}" for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(unused)} is for questions, and {arguments.suite} is text", fix="leave it out")
    from openelm.evaluate.suites import evaluate_suite
    from openelm.evaluate.tables import aligned
    from openelm.model.device import choose_device
    from openelm.model.folder import load_model
    from openelm.text.tokenizer import load_tokenizer

    folder, console = Path(arguments.model), Screen()
    model = load_model(folder, device=choose_device(arguments.device))
    score = evaluate_suite(arguments.suite, model, load_tokenizer(folder))
    if arguments.json:
        print(json.dumps(score.to_json()))
        return 0
    rows = [(document.name, document.bytes, document.tokens, document.bits_per_byte) for document in score.per_document]
    console.print(aligned(("document", "bytes", "tokens", "bits/byte"), rows))
    interval = f" [{score.low:.3f}, {score.high:.3f}]" if score.low is not None and score.high is not None else ""
    over = f", 95 % interval over {score.units} {score.interval_over}" if interval else ""
    console.print(f"bits per byte {score.value:.4f}{interval}{over}")
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    """Let a model answer questions."""
    _needs_harness()
    from openelm.evaluate.comparison import FORMATS
    from openelm.evaluate.comparison import compare as beside_published
    from openelm.evaluate.examinees import open_candidate
    from openelm.evaluate.presets import PRESETS
    from openelm.evaluate.results import read_result
    from openelm.evaluate.run import ExamOptions, default_folder, load_suite, result_file, run_suite
    from openelm.evaluate.tables import aligned
    from openelm.model.device import choose_device

    suite = arguments.suite
    if arguments.against and suite not in PRESETS:
        raise ConfigError(f"nothing is published of {suite}", fix=f"published: {', '.join(PRESETS)}")
    tasks = load_suite(suite, arguments.data)
    options, device = ExamOptions(arguments.limit, arguments.batch_tokens), choose_device(arguments.device)
    with _bar() as bar:
        candidate = open_candidate(Path(arguments.model), device, bar)
        folder = Path(arguments.out) if arguments.out else default_folder(candidate)
        exam = run_suite(candidate, suite, tasks, folder, options, bar)
    if arguments.json:
        print(json.dumps(exam.to_json()))
        return 0
    console, rows = Screen(), []
    for task in exam.tasks:
        low, high = task.interval or (None, None)
        between = "-" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
        rows.append((task.task, task.shots, task.metric, 100 * task.value, between, task.n, task.bits_per_byte))
    columns = ("task", "shots", "metric", "percent", "95 % interval", "questions", "bits/byte of the right answer")
    console.print(aligned(columns, rows, decimals=2))
    if len(exam.tasks) > 1:
        console.print(f"average {100 * exam.average:.2f}")
    for note in dict.fromkeys(task.note for task in exam.tasks if task.note):
        console.print(f"{', '.join(task.task for task in exam.tasks if task.note == note)}: {note}")
    if arguments.against:
        result = read_result(folder / result_file(suite, arguments.limit))
        console.print("\n" + FORMATS["text"]([beside_published(PRESETS[suite], [result])]))
    console.print(f"results in {folder}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Ask two models the same questions, and say which is better where that can be told."""
    _needs_harness()
    from openelm.evaluate.examinees import open_candidate
    from openelm.evaluate.paired import differences
    from openelm.evaluate.run import ExamOptions, default_folder, load_suite, run_suite
    from openelm.evaluate.tables import aligned
    from openelm.model.device import choose_device

    options, device = ExamOptions(arguments.limit, arguments.batch_tokens), choose_device(arguments.device)
    tasks = load_suite(arguments.suite, arguments.data)
    exams = []
    for model in (arguments.first, arguments.second):
        with _bar() as bar:
            candidate = open_candidate(Path(model), device, bar)
            exams.append(run_suite(candidate, arguments.suite, tasks, default_folder(candidate), options, bar))
        del candidate  # before the next one is loaded
    found = differences(*exams)
    if arguments.json:
        print(json.dumps({"models": [exam.to_json() for exam in exams], "differences": [d.to_json() for d in found]}))
        return 0
    rows = []
    for part in found:
        between = "-" if part.low is None or part.high is None else f"[{100 * part.low:+.1f}, {100 * part.high:+.1f}]"
        values = (100 * part.first, 100 * part.second, 100 * part.difference)
        rows.append((part.task, part.n, *values, between, part.disagreements, part.verdict))
    columns = ("task", "questions", "first", "second", "difference", "95 % interval", "differ", "the second is")
    Screen().print(aligned(columns, rows, decimals=2))
    return 0


def _bar() -> WorkBar:
    console = Screen(stderr=True)
    console.file = sys.stderr  # what it is now: the harness's own bars and notes are sent elsewhere
    return WorkBar(console, TaskProgressColumn(), "{what}: {done:,} of {total:,}")


def _needs_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed", fix="pip install 'openelm-framework[eval]'")
