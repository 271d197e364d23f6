"""Our scorer beside the harness's own class: python -m benchmarks.evaluate MODEL [--tasks …] [--limit N] [--json].

MODEL is a folder that transformers opens, in fp32. Both sides get the same weights, tasks and questions, in turns, and
each starts with nothing known. `ratio` is the median over turns of the harness's seconds over ours; `same_choices` the
part of questions in which both find the same answer likeliest; `largest_difference` that of two log-likelihoods of an
answer.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from openelm.evaluate.answers import Answers
from openelm.evaluate.exam import TaskScore, examine
from openelm.evaluate.examinees import TransformersTokenizer
from openelm.evaluate.foreign import TransformersScores
from openelm.evaluate.harness import Examinee
from openelm.evaluate.run import load_suite
from openelm.model.device import cpu_name

TASKS = "arc_easy,piqa,sciq,boolq,winogrande,hellaswag"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, default=40, help="questions of each task (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the harness's class (default: %(default)s)")
    parser.add_argument("--data", default="auto", choices=("auto", "hub", "local"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch, device="cpu")
    tasks = load_suite(f"lm-eval:{options.tasks}", options.data)

    def ours() -> tuple[TaskScore, ...]:
        with Answers(None, "") as answers:
            scores = TransformersScores(model)
            return examine(Examinee(scores, TransformersTokenizer(tokenizer), answers), tasks, limit=options.limit)

    seconds: list[tuple[float, float]] = []
    for _ in range(options.turns):
        times = [time.perf_counter()]
        found = ours()
        times.append(time.perf_counter())
        wanted = examine(theirs, tasks, limit=options.limit)
        times.append(time.perf_counter())
        seconds.append((times[1] - times[0], times[2] - times[1]))
    ratio = median(their / our for our, their in seconds)
    about = {
        "model": options.model.name,
        "seconds": round(median(our for our, _ in seconds), 1),
        "harness_seconds": round(median(their for _, their in seconds), 1),
        "ratio": round(ratio, 2),
        "turns": options.turns,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "date": str(date.today()),
    }
    for our, their in zip(found, wanted, strict=True):
        pairs = list(zip(our.items, their.items, strict=True))
        assert all(a.sha256 == b.sha256 for a, b in pairs)
        same = sum(a.choice == b.choice for a, b in pairs) / len(pairs)
        largest = max(abs(x - y) for a, b in pairs for x, y in zip(a.nats, b.nats, strict=True))
        result = {"task": our.task, "n": our.n, "value": round(our.value, 4), "harness_value": round(their.value, 4)}
        result |= {"same_choices": round(same, 5), "largest_difference": float(f"{largest:.2g}")} | about
        print(json.dumps(result) if options.json else result, flush=True)


if __name__ == "__main__":
    main()
