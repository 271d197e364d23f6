"""One side of a comparison, in a process of its own: python -m benchmarks.sides SIDE FOLDER PRECISION THREADS.

Answers each word of standard input, `step` or `stop`, with one JSON line. `benchmarks.turns` starts these.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import answer, side_options
from benchmarks.work import HYPERPARAMETERS, CannotCompare, Maker, Side, Work, tensors
from openelm.bench.machine import allocator, peak_bytes


def main() -> None:
    options, answers = side_options(__doc__)
    import torch

    torch.set_num_threads(options.threads)
    from benchmarks.peers import PEERS

    makers: dict[str, Maker] = {
        "ours": lambda *work: our_side(*work, keep_freed_memory=True),
        "ours-untouched": lambda *work: our_side(*work, keep_freed_memory=False),
        "plain": plain_side,
        "matmul": matmul_side,
        **PEERS,
    }
    try:
        side = makers[options.side](options.folder, Work.read(options.folder), options.precision)
    except (ImportError, CannotCompare) as error:
        first, *_ = str(error).splitlines() or [""]
        print(json.dumps({"skipped": f"{type(error).__name__}: {first}"}), file=answers)
        return
    facts = {"parameters": side.parameters, **side.facts, "torch": torch.__version__, "allocator": allocator()}
    print(json.dumps(facts), file=answers)
    answer(side.step, answers, peak_bytes)


def our_side(folder: Path, work: Work, precision: Any, *, keep_freed_memory: bool) -> Side:
    """Make what `openelm train` runs: its updater with its defaults, and its setting of the allocator."""
    import torch

    from openelm import __version__
    from openelm.bench import step as our
    from openelm.model.config import ModelConfig
    from openelm.model.device import reuse_freed_memory
    from openelm.model.plan import LayerPlan

    if keep_freed_memory:
        reuse_freed_memory()
    plan = LayerPlan(work.dim, work.head_dim, tuple(work.query_heads), tuple(work.kv_heads), tuple(work.ffn_dims))
    config = ModelConfig.from_plan(plan, vocab_size=work.vocab_size)
    updater = our.trainer(config, work.rows, work.length, precision=precision, device=torch.device("cpu"))
    rule = updater.run.config.optimizer
    betas, clip_norm = (rule.beta1, rule.beta2), updater.config.clip_norm
    defaults = (our.LEARNING_RATE, betas, rule.eps, rule.weight_decay, clip_norm)
    assert defaults == HYPERPARAMETERS, "peers must train with the same"
    inputs, targets, _ = tensors(folder)  # the weights are those that the updater draws; the first losses tell
    batch = our.fixed_batch(torch.cat([inputs, targets[:, -1:]], dim=1))

    def step() -> dict[str, float]:
        losses = our.update(updater, batch)
        return {"loss": losses.cross_entropy + losses.z_loss, "cross_entropy": losses.cross_entropy}

    keeps = keep_freed_memory and allocator().startswith("glibc")
    facts = {
        "packages": {"openelm-framework": __version__},
        "optimizer": "AdamW, fused",
        "allocator_settings": "mallopt" if keeps else None,
    }
    return Side(step, sum(p.numel() for p in updater.model.parameters()), facts)


def plain_side(folder: Path, work: Work, precision: str) -> Side:
    """Make the published step, written plainly."""
    from benchmarks.baseline import PlainModel, PlainTrainer

    inputs, targets, weights = tensors(folder)
    model = PlainModel(work.dim, work.head_dim, work.query_heads, work.kv_heads, work.ffn_dims, work.vocab_size)
    model.load_state_dict(weights)
    trainer = PlainTrainer(model, precision)
    facts = {"packages": {}, "optimizer": "AdamW"}
    return Side(lambda: {"loss": trainer.step(inputs, targets)}, sum(p.numel() for p in model.parameters()), facts)


def matmul_side(folder: Path, work: Work, precision: str) -> Side:
    """Make the yardstick of MFU: products of the model's own shapes into warm buffers, in the machine's better dtype.

    Forward, input-gradient and weight-gradient products of the first, middle and last layer and of one 256-row chunk
    of the head.
    """
    tokens, layers = work.rows * work.length, len(work.ffn_dims)
    chosen = sorted({0, layers // 2, layers - 1})
    shapes = [(tokens, work.dim, 2 * work.ffn_dims[layer]) for layer in chosen]
    shapes += [(tokens, work.ffn_dims[layer], work.dim) for layer in chosen]
    shapes += [(tokens, work.query_heads[layer] * work.head_dim, work.dim) for layer in chosen]
    shapes.append((256, work.dim, work.vocab_size))
    return Side(lambda: {"gflops": matmul_gflops(shapes)}, 0)


def matmul_gflops(shapes: list[tuple[int, int, int]]) -> float:
    import torch

    from openelm.kernels.precision import cpu_multiplies_bf16

    best = 0.0
    for dtype in (torch.float32, torch.bfloat16) if cpu_multiplies_bf16() else (torch.float32,):
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


if __name__ == "__main__":
    main()
