"""The suites of the OpenELM paper (arXiv:2404.14619): tasks, shots and the metric of each.

The average of a suite is the unweighted mean of its columns. Two traps when comparing with other numbers:
the model card of OpenELM has the labels of the two few-shot tables swapped (its "LLM360" table is `openllm` here
and in the paper, its "OpenLLM" table is `llm360`), and the average of `llm360` takes the percentage of
stereotyped sentences on CrowS-Pairs in as if higher were better. Tasks and shots are those of the model card, which
does not name the metrics: they are the customary ones of both leaderboards.

`commonsense` has the tasks of the paper's section on parameter-efficient fine-tuning. Its models have learned from the
training splits of these very tasks: no examples stand before a question, and yet they are fine-tuned, not zero-shot.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """One column of a suite.

    Attributes:
        task: the name in lm-evaluation-harness.
        shots: solved examples before the question.
        metric: the harness's name: acc, acc_norm or pct_stereotype.
        title: the column's heading.
    """

    task: str
    shots: int
    metric: str
    title: str


@dataclass(frozen=True)
class Suite:
    """A named set of tasks; `title` heads its table."""

    name: str
    title: str
    tasks: tuple[TaskSpec, ...]


PRESETS: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "zero-shot",
            "Zero-shot",
            (
                TaskSpec("arc_challenge", 0, "acc_norm", "ARC-c"),
                TaskSpec("arc_easy", 0, "acc_norm", "ARC-e"),
                TaskSpec("boolq", 0, "acc", "BoolQ"),
                TaskSpec("hellaswag", 0, "acc_norm", "HellaSwag"),
                TaskSpec("piqa", 0, "acc_norm", "PIQA"),
                TaskSpec("sciq", 0, "acc", "SciQ"),
                TaskSpec("winogrande", 0, "acc", "WinoGrande"),
            ),
        ),
        Suite(
            "openllm",
            "OpenLLM leaderboard",
            (
                TaskSpec("arc_challenge", 25, "acc_norm", "ARC-c"),
                TaskSpec("hellaswag", 10, "acc_norm", "HellaSwag"),
                TaskSpec("mmlu", 5, "acc", "MMLU"),
                TaskSpec("truthfulqa_mc2", 0, "acc", "TruthfulQA"),
                TaskSpec("winogrande", 5, "acc", "WinoGrande"),
            ),
        ),
        Suite(
            "llm360",
            "LLM360",
            (
                TaskSpec("arc_challenge", 25, "acc_norm", "ARC-c"),
                TaskSpec("crows_pairs_english", 25, "pct_stereotype", "CrowS-Pairs"),
                TaskSpec("hellaswag", 10, "acc_norm", "HellaSwag"),
                TaskSpec("mmlu", 5, "acc", "MMLU"),
                TaskSpec("piqa", 0, "acc_norm", "PIQA"),
                TaskSpec("race", 0, "acc", "RACE"),
                TaskSpec("truthfulqa_mc2", 0, "acc", "TruthfulQA"),
                TaskSpec("winogrande", 5, "acc", "WinoGrande"),
            ),
        ),
        Suite(
            "commonsense",
            "Commonsense (fine-tuned, not zero-shot)",
            (
                TaskSpec("arc_challenge", 0, "acc_norm", "ARC-c"),
                TaskSpec("arc_easy", 0, "acc_norm", "ARC-e"),
                TaskSpec("boolq", 0, "acc", "BoolQ"),
                TaskSpec("hellaswag", 0, "acc_norm", "HellaSwag"),
                TaskSpec("piqa", 0, "acc_norm", "PIQA"),
                TaskSpec("social_iqa", 0, "acc", "SIQA"),
                TaskSpec("winogrande", 0, "acc", "WinoGrande"),
                TaskSpec("openbookqa", 0, "acc_norm", "OBQA"),
            ),
        ),
    )
}
"""Suites by name, in the order of the paper's tables."""
