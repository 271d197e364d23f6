"""A suite from its name to results in a folder: what `openelm eval` and `openelm compare` do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from openelm.errors import ConfigError
from openelm.evaluate.answers import Answers
from openelm.evaluate.exam import Exam, examine, items_jsonl
from openelm.evaluate.examinees import Candidate
from openelm.evaluate.harness import Examinee, Progress
from openelm.evaluate.presets import PRESETS
from openelm.evaluate.questions import read_questions
from openelm.evaluate.tasks import DataFrom, LoadedTask, Wanted, load_tasks, multiple_choice
from openelm.files.atomic import make_folder, write_atomic
from openelm.files.hashes import canonical_json, sha256_bytes

_SCORER = 1
"""Counts changes of the scorer after which older answers are no longer taken."""


@dataclass(frozen=True)
class ExamOptions:
    """How a suite is run.

    Attributes:
        limit: questions of each task; None is all of them.
        batch_tokens: tokens that pass the model together; None finds out. It changes no choice.
    """

    limit: int | None = None
    batch_tokens: int | None = None


def load_suite(suite: str, data: DataFrom) -> list[LoadedTask]:
    """Load the tasks that a suite's name stands for.

    Raises:
        ConfigError: no such suite or task.
        DataError: the data cannot be loaded.
    """
    kind, _, argument = suite.partition(":")
    if suite in PRESETS:
        return load_tasks([Wanted(spec.task, spec.shots, spec.metric) for spec in PRESETS[suite].tasks], data)
    if kind == "lm-eval" and argument:
        return load_tasks([_wanted(text) for text in argument.split(",")], data)
    if kind == "choices" and argument:
        return [multiple_choice(Path(argument).stem, read_questions(Path(argument)))]
    names = ", ".join((*PRESETS, "lm-eval:TASKS", "choices:PATH"))
    raise ConfigError(f"no suite is called {suite!r}", fix=f"suites: {names}, bpb:PATH")


def default_folder(candidate: Candidate) -> Path:
    """Name the folder for a model's results: another model's is another one."""
    return Path("evaluations", f"{Path(candidate.name).resolve().name}-{candidate.sha256[:8]}")


def run_suite(
    candidate: Candidate,
    suite: str,
    tasks: list[LoadedTask],
    folder: Path,
    options: ExamOptions = ExamOptions(),
    progress: Progress | None = None,
) -> Exam:
    """Let a model answer a suite's tasks, and keep what it answered and its results in a folder.

    `answers.jsonl` has every log-likelihood, so that a second start computes only what is missing;
    `SUITE.json` the results, and `SUITE.items.jsonl` each question's.

    Raises:
        ConfigError: another process is at work in the folder; see `examine` for the rest.
        DiskError: the folder cannot be written.
    """
    make_folder(folder)
    computed_by = sha256_bytes(canonical_json([_SCORER, candidate.sha256, candidate.numerics]))
    with Answers(folder / "answers.jsonl", computed_by) as answers:
        examinee = Examinee(
            candidate.scores,
            candidate.tokenizer,
            answers,
            writes=candidate.writes,
            most_tokens=options.batch_tokens,
            progress=progress,
        )
        exam = Exam(suite, candidate.name, candidate.sha256, examine(examinee, tasks, limit=options.limit))
    results = folder / result_file(suite, options.limit)
    write_atomic(results, canonical_json(exam.to_json()) + b"\n")
    write_atomic(results.with_suffix(".items.jsonl"), items_jsonl(exam.tasks))
    return exam


def result_file(suite: str, limit: int | None) -> str:
    """Name the file of a suite's results, or of a part of its questions."""
    name = re.sub(r"[^A-Za-z0-9.@_-]+", "-", suite)
    if len(name) > 80:
        name = f"{name[:60]}-{sha256_bytes(suite.encode())[:8]}"
    return f"{name}.json" if limit is None else f"{name}-first-{limit}.json"


def _wanted(text: str) -> Wanted:
    """Read TASK or TASK@SHOTS; the metric is that of the paper's suites, or the task's first one."""
    task, at, shots = text.strip().partition("@")
    if not task or (at and not shots.isdigit()):
        raise ConfigError(f"a task is called {text!r}", fix="write TASK or TASK@SHOTS, as in arc_easy,winogrande@5")
    known = {spec.task: spec.metric for suite in PRESETS.values() for spec in suite.tasks}
    return Wanted(task, int(shots) if at else None, known.get(task))
