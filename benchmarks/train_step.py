"""Measure training steps against the plain baseline: python -m benchmarks.train_step --case tiny [--json].

Both sides live in their own process with the same weights, batch and allocator, and step in turns, so that a slow
window of the machine meets both. Prints one JSON line, or a short table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """A size of `openelm.model.sizes`, fields that replace its own, and the batch of one step."""

    size: str
    rows: int
    length: int
    fields: dict[str, int]


DEMO = {"model_dim": 160, "head_dim": 16, "num_gqa_groups": 2, "ffn_dim_divisor": 32, "vocab_size": 4_096}
CASES = {
    "tiny": Case("tiny", 8, 512, {}),
    "small5m": Case("5m", 16, 256, {}),
    "demo": Case("5m", 8, 256, DEMO),  # the model and batch of openelm/recipes/demo.toml
    "270m": Case("270m", 1, 512, {"vocab_size": 32_128}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: bf16 where the CPU has units for it, else fp32 (without them the baseline's step takes minutes)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a side, after one untimed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options)
        return
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if native_bf16() else "fp32"
    result = compare(options.case, precision, options.repeats, options.threads)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:28} {value}" for name, value in result.items()))


def compare(case_name: str, precision: str, repeats: int, threads: int) -> dict[str, Any]:
    """Step both sides in turns and return the medians.

    Raises:
        SystemExit: the first losses differ, so the two sides do not do the same work.
    """
    case = CASES[case_name]
    workers = {side: Worker(side, case_name, precision, threads) for side in ("ours", "baseline")}
    first = {side: worker.ask("step") for side, worker in workers.items()}  # untimed: allocators and caches settle
    difference = abs(first["ours"]["loss"] - first["baseline"]["loss"])
    if not difference < (2e-2 if precision == "bf16" else 1e-4):
        sys.exit(f"the first losses differ: {first}")
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    gflops: list[float] = []
    for turn in range(repeats):
        order = list(workers) if turn % 2 == 0 else list(workers)[::-1]
        for side in order:
            seconds[side].append(workers[side].ask("step")["seconds"])
        gflops.append(workers["ours"].ask("matmul")["gflops"])
    facts = {side: worker.ask("stop") for side, worker in workers.items()}
    tokens = case.rows * case.length
    speed = {side: tokens / median(times) for side, times in seconds.items()}
    flops_per_token = facts["ours"]["flops_per_token"]
    return {
        "case": case_name,
        "precision": precision,
        "tokens_per_second": round(speed["ours"], 1),
        "baseline_tokens_per_second": round(speed["baseline"], 1),
        "ratio": round(speed["ours"] / speed["baseline"], 3),
        "mfu": round(speed["ours"] * flops_per_token / (median(gflops) * 1e9), 3),
        "baseline_mfu": round(speed["baseline"] * flops_per_token / (median(gflops) * 1e9), 3),
        "matmul_gflops": round(median(gflops), 1),
        "peak_bytes": facts["ours"]["peak_bytes"],
        "baseline_peak_bytes": facts["baseline"]["peak_bytes"],
        "seconds": [round(value, 3) for value in seconds["ours"]],
        "baseline_seconds": [round(value, 3) for value in seconds["baseline"]],
        "first_loss": first["ours"]["loss"],
        "baseline_first_loss": first["baseline"]["loss"],
        "allocator": os.environ.get("LD_PRELOAD") or platform.libc_ver()[0] or "system",
        "cpu": cpu_name(),
        "torch": facts["ours"]["torch"],
        "threads": threads,
        "repeats": repeats,
    }


class Worker:
    """One side of the comparison in a fresh process that answers one JSON line to each word."""

    def __init__(self, side: str, case: str, precision: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step", "--worker", side, "--case", case]
        command += ["--precision", precision, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a side of the comparison ended early, with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(options: argparse.Namespace) -> None:
    """Answer `step`, `matmul` and `stop` from standard input."""
    import torch

    torch.set_num_threads(options.threads)
    case = CASES[options.case]
    step = WORKERS[options.worker](case, options.precision)
    for line in sys.stdin:
        word = line.strip()
        if word == "step":
            start = time.perf_counter()
            loss = step()
            answer = {"seconds": time.perf_counter() - start, "loss": loss}
        elif word == "matmul":
            answer = {"gflops": matmul_gflops(case)}
        else:
            config = model_config(case)
            answer = {
                "peak_bytes": peak_bytes(),
                "torch": torch.__version__,
                "flops_per_token": config.plan.training_flops_per_token(config.vocab_size, case.length),
            }
        print(json.dumps(answer), flush=True)
        if word == "stop":
            return


def model_config(case: Case) -> Any:
    from openelm.model.sizes import model_size

    return model_size(case.size, **case.fields)


def fresh_model(case: Case) -> Any:
    """Return our model with weights that depend on the case alone."""
    import torch

    from openelm.model.transformer import OpenELM

    model = OpenELM(model_config(case))
    model.initialise(torch.Generator().manual_seed(0))
    return model


def batch(case: Case) -> Any:
    """Return inputs and targets (rows, length)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model_config(case).vocab_size, (case.rows, case.length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def our_step(case: Case, precision: str) -> Callable[[], float]:
    """Make the step of our trainer: the framework's model, loss and optimizer."""
    import torch

    from openelm.kernels.cross_entropy import linear_cross_entropy

    model, (inputs, targets) = fresh_model(case), batch(case)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = model.hidden(inputs).flatten(0, 1)
            loss_sum, _ = linear_cross_entropy(hidden, model.head_weight, targets.flatten(), z_loss=1e-4)
            loss = loss_sum / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as the training loop does: no fresh pages for gradients
        return float(loss.detach())

    return step


def baseline_step(case: Case, precision: str) -> Callable[[], float]:
    """Make the published step on the same weights and batch."""
    from benchmarks.baseline import PlainModel, PlainTrainer

    model, (inputs, targets) = fresh_model(case), batch(case)
    plan = model.config.plan
    plain = PlainModel(plan.dim, plan.head_dim, plan.query_heads, plan.kv_heads, plan.ffn_dims, model.config.vocab_size)
    plain.load_state_dict(model.state_dict())
    del model
    trainer = PlainTrainer(plain, precision)
    return lambda: trainer.step(inputs, targets)


def matmul_gflops(case: Case) -> float:
    """Time products of the model's own shapes into warm buffers, in the machine's better dtype, and return the speed.

    Forward, input-gradient and weight-gradient products of the first, middle and last layer and of one 256-row chunk
    of the head.
    """
    import torch

    config = model_config(case)
    plan, tokens = config.plan, case.rows * case.length
    layers = {0, plan.layers // 2, plan.layers - 1}
    shapes = [(tokens, plan.dim, 2 * plan.ffn_dims[layer]) for layer in layers]
    shapes += [(tokens, plan.ffn_dims[layer], plan.dim) for layer in layers]
    shapes += [(tokens, plan.query_heads[layer] * plan.head_dim, plan.dim) for layer in layers]
    shapes.append((256, plan.dim, config.vocab_size))
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16) if native_bf16() else (torch.float32,):
        flops = seconds = 0.0
        for rows, inputs, outputs in shapes:
            x, weight = torch.rand(rows, inputs).to(dtype), torch.rand(outputs, inputs).to(dtype)
            y = torch.rand(rows, outputs).to(dtype)
            x_out, weight_out = torch.empty_like(x), torch.empty_like(weight)
            for product in (
                lambda: torch.mm(x, weight.t(), out=y),  # noqa: B023
                lambda: torch.mm(y, weight, out=x_out),  # noqa: B023
                lambda: torch.mm(y.t(), x, out=weight_out),  # noqa: B023
            ):
                product()
                start = time.perf_counter()
                product()
                seconds += time.perf_counter() - start
                flops += 2.0 * rows * inputs * outputs
        best = max(best, flops / seconds / 1e9)
    return best


def native_bf16() -> bool:
    from openelm.kernels.precision import cpu_multiplies_bf16

    return cpu_multiplies_bf16()


def peak_bytes() -> int:
    """Return the most memory this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


WORKERS: dict[str, Callable[[Case, str], Callable[[], float]]] = {"ours": our_step, "baseline": baseline_step}

if __name__ == "__main__":
    main()
