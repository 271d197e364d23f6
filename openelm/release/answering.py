"""Measurements of a tuned run: how well it does on held-out examples, and on suites of questions."""

from __future__ import annotations

from typing import Any

import torch

from openelm.data.example_stream import ExampleStream
from openelm.errors import ConfigError
from openelm.kernels.attention_gpu import visible_documents
from openelm.model.transformer import OpenELM
from openelm.train.loop import Probe
from openelm.train.objectives import Rows
from openelm.train.run import Run
from openelm.train.update import Event
from openelm.train.work import HeldOut

_EXAMPLES_AT_ONCE = 16


def examples_probe(run: Run, held_out: HeldOut) -> Probe:
    """Make the `examples` event: the mean loss in nats (a token, or a pair) and the objective's statistics."""

    @torch.no_grad()
    def measure(model: OpenELM, step: int) -> Event:
        sums, weight = torch.zeros(1 + len(held_out.objective.statistics), dtype=torch.float64), 0
        for rows, share in _batches(run, held_out):
            dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
            with torch.autocast(run.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                _, found = held_out.objective(model, rows)
            sums += found.double().cpu()
            weight += share
        means = (sums / max(1, weight)).tolist()
        names = ("loss", *held_out.objective.statistics)
        numbers = {name: mean.hex() for name, mean in zip(names, means, strict=True)}
        return {"event": "examples", "examples": len(held_out.examples), **numbers}

    return Probe(run.config.evaluation.every, measure, at_start=True)


def _batches(run: Run, held_out: HeldOut) -> Any:
    """Yield (rows, weight) that hold every example once."""
    dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
    count = len(held_out.examples)
    at_once = max(size for size in range(1, min(count, _EXAMPLES_AT_ONCE) + 1) if count % size == 0)
    stream = ExampleStream(held_out.examples, seed=0, rows=at_once, length=run.config.train.length)
    for _ in range(count // at_once):
        batch = next(stream)
        assert batch.examples is not None
        documents = torch.from_numpy(batch.documents)
        yield (
            Rows(
                torch.from_numpy(batch.inputs).to(run.device),
                torch.from_numpy(batch.targets).to(run.device),
                visible_documents(documents, dtype, run.device),
                documents.to(run.device),
                torch.from_numpy(batch.examples).to(run.device),
            ),
            held_out.objective.weight(batch),
        )


def suite_probes(run: Run) -> list[Probe]:
    """Make the `suite` events: of every task its metric, and what each question was worth.

    Raises:
        ConfigError: the harness is not installed, or no suite or task has that name.
        DataError: the data cannot be loaded.
    """
    suites = run.config.evaluation.suites
    if suites is None:
        return []
    try:
        from openelm.evaluate.answers import Answers
        from openelm.evaluate.exam import examine
        from openelm.evaluate.examinees import OurTokenizer
        from openelm.evaluate.harness import Examinee
        from openelm.evaluate.run import load_suite
        from openelm.evaluate.trees import OurScores
    except ImportError:
        raise ConfigError(
            "evaluation.suites needs lm-evaluation-harness, which is not installed",
            fix="pip install 'openelm-framework[eval]', or leave evaluation.suites out",
        ) from None
    limit = suites.limit

    def probe(name: str) -> Probe:
        if name.startswith("bpb:"):
            what = f"evaluation.suites: {name!r} is text, not questions"
            raise ConfigError(what, fix="give it as [[held_out]], or openelm tune --text")
        tasks = load_suite(name, suites.data)

        def measure(model: OpenELM, step: int) -> Event:
            with Answers(None, "") as answers:
                scores = OurScores(model, run.tokenizer.vocab_size)
                examinee = Examinee(scores, OurTokenizer(run.tokenizer), answers)
                found = examine(examinee, tasks, limit=limit)
            return {"event": "suite", "suite": name, "tasks": [_task(task) for task in found]}

        return Probe(suites.every or run.config.evaluation.every, measure, at_start=measures_at_start(run))

    return [probe(name) for name in suites.names]


def measures_at_start(run: Run) -> bool:
    """Whether a run measures before its first step."""
    return run.config.tune is not None or run.config.evaluation.at_start


def _task(task: Any) -> dict[str, Any]:
    facts = task.to_json()
    values = [item.value for item in task.items]
    return {
        **{name: facts[name] for name in ("task", "metric", "shots", "n", "questions_sha256")},
        "value": float(task.value).hex(),
        "values": "".join(f"{value:.0f}" for value in values) if set(values) <= {0.0, 1.0} else None,
    }
