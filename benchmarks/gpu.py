"""Check and time the model on one CUDA GPU in one short call: python -m benchmarks.gpu --out FOLDER.

First the kernels against float64, then training steps beside the plain baseline, then decoding. Writes gpu.json as it
goes and prints a table last. What does not fit in memory or in the minutes is named as skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import PlainModel, PlainTrainer
from openelm.kernels.attention import attention
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.kernels.linear import linear
from openelm.kernels.rms_norm import rms_norm
from openelm.kernels.rotary import qk_norm_rope
from openelm.kernels.swiglu import swiglu
from openelm.model.cache import KeyValueCache
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM

LENGTH = 2048
TRAINING = (("270m", 8), ("1.1b", 4), ("3b", 2))  # size and rows a step
SIDES = ("baseline", "ours")
COMPILED = "ours, compiled layers"
DENSE_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # vendor data sheets, SXM parts
TOLERANCES = {"fp32": 2e-5, "bf16": 0.04}  # largest error over the largest number of a tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="no new case starts after nine tenths of this")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device is available")
    deadline = time.monotonic() + options.minutes * 60 * 0.9
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "torch": torch.__version__,
        "length": LENGTH,
    }

    def keep(name: str, value: object) -> None:
        report[name] = value
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))

    keep("matmul_tflops", matmul_flops() / 1e12)
    keep("kernel_errors", kernel_errors())
    keep("loss", losses())
    keep("decode", attempt(decode_270m, deadline))
    keep("training", [])
    cases = [(size, rows, side) for size, rows in TRAINING for side in SIDES]
    for size, rows, side in [*cases, (*TRAINING[0], COMPILED)]:
        # Each layer has its own widths and is compiled apart: minutes for the small model, so it comes last and alone.
        latest = deadline - 180 if side == COMPILED else deadline
        result = attempt(lambda: train(size, rows, side, options.steps), latest)  # noqa: B023
        keep("training", [*report["training"], {"size": size, "rows": rows, "side": side, **result}])
    print(table(report))
    if any(not row["ok"] for row in report["kernel_errors"]) or not report["loss"]["ok"]:
        sys.exit("a kernel or the loss is wrong on this GPU: see above")


def attempt(work: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """Do a piece of work, or say why it was skipped."""
    if time.monotonic() > deadline:
        return {"skipped": "no time left"}
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        return {"skipped": "not enough GPU memory"}
    except Exception as error:  # a missing compiler must not cost the other results
        return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def kernel_errors() -> list[dict[str, Any]]:
    """Compare each kernel on the GPU, values and gradients, with itself in float64 on the CPU."""
    angles = torch.outer(torch.arange(96.0), 10000.0 ** (-torch.arange(32) / 32))
    documents = (torch.arange(96) // 37).expand(2, 96)
    targets = torch.where(torch.arange(300) % 5 > 0, torch.arange(300) * 13 % 1000, -100)

    def rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        tables = (table.to(qkv.device) for table in (angles.cos(), angles.sin()))
        return qk_norm_rope(qkv, q_weight, k_weight, *tables, 8, 2, 1e-6)

    heads = [(2, 8, 96, 64), (2, 2, 96, 64), (2, 2, 96, 64)]
    cases: list[tuple[str, Callable[..., Any], list[tuple[int, ...]]]] = [
        ("linear", linear, [(300, 256), (512, 256)]),
        ("rms_norm", lambda x, w: rms_norm(x, w, 1e-6), [(300, 256), (256,)]),
        ("swiglu", swiglu, [(300, 512)]),
        ("qk_norm_rope", rotated, [(2, 96, 12 * 64), (64,), (64,)]),
        ("attention", attention, heads),
        ("attention, one token", attention, [(2, 8, 1, 64), *heads[1:]]),
        ("attention, continued", attention, [(2, 8, 5, 64), *heads[1:]]),
        ("attention, documents", lambda q, k, v: attention(q, k, v, documents=documents.to(q.device)), heads),
        (
            "linear_cross_entropy",
            lambda h, w: linear_cross_entropy(h, w, targets.to(h.device), z_loss=1e-2)[0],
            [(300, 64), (1000, 64)],
        ),
    ]
    results = []
    for name, kernel, shapes in cases:
        inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
        exact = outputs_and_gradients(kernel, [x.double() for x in inputs])
        for precision, tolerance in TOLERANCES.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                found = outputs_and_gradients(kernel, [x.cuda() for x in inputs])
            errors = [
                float((ours.double().cpu() - truth).abs().max() / truth.abs().max())
                for ours, truth in zip(found, exact, strict=True)
            ]
            worst = max(errors)
            results.append({"kernel": name, "precision": precision, "error": worst, "ok": worst <= tolerance})
    return results


def outputs_and_gradients(kernel: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = kernel(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    total = sum((output.double() * weights_like(output)).sum() for output in outputs)
    with torch.autocast("cuda", enabled=False):
        total.backward()
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def weights_like(x: Tensor) -> Tensor:
    """Return fixed weights between 1 and 2, the same on every device."""
    return (1 + torch.arange(x.numel(), dtype=torch.float64) * 0.618 % 1).view(x.shape).to(x.device)


def losses() -> dict[str, Any]:
    """Compare the loss of one small model on the CPU and the GPU."""
    config = model_size("5m")
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))

    def loss() -> float:
        ids = tokens.to(model.head_weight.device)
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return float(linear_cross_entropy(hidden, model.head_weight, ids[:, 1:].flatten())[1]) / 128

    with torch.no_grad():
        cpu = loss()
        model.cuda()
        fp32 = loss()
        with torch.autocast("cuda", torch.bfloat16):
            bf16 = loss()
    return {"cpu": cpu, "fp32": fp32, "bf16": bf16, "ok": abs(fp32 - cpu) < 1e-3 and abs(bf16 - cpu) < 3e-2}


def matmul_flops() -> float:
    """Measure bf16 FLOP/s of one large product: the practical ceiling of this device."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = timed(lambda: torch.mm(a, b, out=out), warm=5, repeats=10)
    return 2 * 8192**3 / seconds


def timed(work: Callable[[], object], *, warm: int, repeats: int) -> float:
    """Return the median seconds of `work`, device included."""
    for _ in range(warm):
        work()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def gpu_model(size: str) -> OpenELM:
    model = OpenELM(model_size(size, vocab_size=32_128)).cuda()
    with torch.no_grad():  # drawn on the device: the largest model would take minutes from a CPU generator
        generator = torch.Generator("cuda").manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


def train(size: str, rows: int, side: str, steps: int) -> dict[str, Any]:
    """Time training steps of one side: bf16 autocast over fp32 weights, the same batch and weights on each side."""
    model = gpu_model(size)
    plan, vocab_size = model.config.plan, model.config.vocab_size
    tokens = torch.randint(0, vocab_size, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cuda()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    step: Callable[[], float]
    if side == "baseline":
        with torch.device("cuda"):
            plain = PlainModel(plan.dim, plan.head_dim, plan.query_heads, plan.kv_heads, plan.ffn_dims, vocab_size)
        plain.load_state_dict(model.state_dict())
        del model
        trainer = PlainTrainer(plain, "bf16")
        step = lambda: trainer.step(inputs, targets)  # noqa: E731
    else:
        step = our_step(model, inputs, targets)
        if side == COMPILED:
            torch._dynamo.config.recompile_limit = 256
            for layer in model.transformer.layers:
                layer.compile(dynamic=False)
    torch.cuda.reset_peak_memory_stats()
    first_loss = step()
    seconds = timed(step, warm=2, repeats=steps)
    speed = rows * LENGTH / seconds
    flops = speed * plan.training_flops_per_token(vocab_size, LENGTH)
    ceiling = next((value for name, value in DENSE_BF16_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return {
        "tokens_per_second": round(speed),
        "tflops": round(flops / 1e12, 1),
        "mfu": round(flops / ceiling, 3) if ceiling else None,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_loss": first_loss,
    }


def our_step(model: OpenELM, inputs: Tensor, targets: Tensor) -> Callable[[], float]:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model.hidden(inputs).flatten(0, 1)
            loss_sum, _ = linear_cross_entropy(hidden, model.head_weight, targets.flatten(), z_loss=1e-4)
            loss = loss_sum / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


@torch.inference_mode()
def decode_270m() -> dict[str, Any]:
    """Time greedy decoding, one row, bf16 weights: 64 tokens after a prompt of 256."""
    model = gpu_model("270m").bfloat16()
    plan = model.config.plan
    prompt = torch.randint(0, 32_000, (1, 256), generator=torch.Generator().manual_seed(2)).cuda()
    cache = KeyValueCache(plan, 1, 512, dtype=torch.bfloat16, device="cuda")

    def decode() -> None:
        cache.truncate(0)
        token = model.logits(model.hidden(prompt, cache=cache)[:, -1:]).argmax(-1)
        for _ in range(63):
            token = model(token, cache=cache).argmax(-1)

    seconds = timed(decode, warm=2, repeats=5)
    return {"tokens_per_second": round(64 / seconds, 1), "prompt_tokens": 256, "tokens": 64}


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['device']}, torch {report['torch']}, bf16 matmul {report['matmul_tflops']:.0f} TFLOP/s"]
    for row in report["kernel_errors"]:
        verdict = "ok" if row["ok"] else "WRONG"
        lines.append(f"{row['kernel']:24} {row['precision']:5} error {row['error']:.1e} {verdict}")
    lines.append("loss " + " ".join(f"{name}={value}" for name, value in report["loss"].items()))
    lines.append("decode 270m " + " ".join(f"{name}={value}" for name, value in report["decode"].items()))
    lines.append(f"{'size':5} {'rows':>4} {'side':22} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'peak GB':>8}  ratio")
    baseline = {row["size"]: row.get("tokens_per_second") for row in report["training"] if row["side"] == "baseline"}
    for row in report["training"]:
        start = f"{row['size']:5} {row['rows']:>4} {row['side']:22} "
        if "skipped" in row:
            lines.append(start + f"skipped: {row['skipped']}")
            continue
        ratio = f"{row['tokens_per_second'] / baseline[row['size']]:.2f}" if baseline.get(row["size"]) else "-"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
        peak = row["peak_bytes"] / 1e9
        lines.append(start + f"{row['tokens_per_second']:>9} {row['tflops']:>8} {mfu:>6} {peak:>8.1f}  {ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
