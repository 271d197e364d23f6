"""Is a device right? Kernels against float64, compiled layers, equal repeats, steps that wait for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_steps import build_updater, random_batch, synchronize
from openelm.kernels.attention import attention
from openelm.kernels.attention_gpu import Documents, flash_varlen
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.kernels.linear import linear
from openelm.kernels.rms_norm import rms_norm
from openelm.kernels.rotary import qk_norm_rope
from openelm.kernels.swiglu import swiglu
from openelm.model.folder import weights_sha256

TOLERANCES = {"fp32": 2e-5, "bf16": 0.04}  # largest error over the largest number of a tensor
Heads = Callable[[Tensor, Tensor, Tensor], Tensor]


def kernel_errors(device: torch.device) -> list[dict[str, Any]]:
    """Compare each kernel on the device, values and gradients, with itself in float64 on the CPU."""
    angles = torch.outer(torch.arange(96.0), 10000.0 ** (-torch.arange(32) / 32))
    documents = (torch.arange(96) // 37).expand(2, 96).contiguous()
    targets = torch.where(torch.arange(300) % 5 > 0, torch.arange(300) * 13 % 1000, -100)

    def rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        tables = (table.to(qkv.device) for table in (angles.cos(), angles.sin()))
        return qk_norm_rope(qkv, q_weight, k_weight, *tables, 8, 2, 1e-6)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, documents=documents.to(q.device))

    heads = [(2, 8, 96, 64), (2, 2, 96, 64), (2, 2, 96, 64)]
    cases: list[tuple[str, Callable[..., Any], list[tuple[int, ...]]]] = [
        ("linear", linear, [(300, 256), (512, 256)]),
        ("rms_norm", lambda x, w: rms_norm(x, w, 1e-6), [(300, 256), (256,)]),
        ("swiglu", swiglu, [(300, 512)]),
        ("qk_norm_rope", rotated, [(2, 96, 12 * 64), (64,), (64,)]),
        ("attention", attention, heads),
        ("attention, one token", attention, [(2, 8, 1, 64), *heads[1:]]),
        ("attention, continued", attention, [(2, 8, 5, 64), *heads[1:]]),
        ("attention, documents", masked, heads),
        (
            "linear_cross_entropy",
            lambda h, w: linear_cross_entropy(h, w, targets.to(h.device), z_loss=1e-2)[0],
            [(300, 64), (1000, 64)],
        ),
    ]
    results = []
    for name, kernel, shapes in cases:
        for precision in TOLERANCES:
            results.append({"kernel": name, "precision": precision, **error(kernel, kernel, shapes, device, precision)})
    for name, kernel in document_kernels(documents, device).items():
        learns = device.type == "cuda"  # FlexAttention has no gradients on CPUs
        result = error(kernel, masked, heads, device, "bf16", learns=learns)
        results.append({"kernel": name, "precision": "bf16", **result})
    return results


def error(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    precision: str,
    *,
    learns: bool = True,
) -> dict[str, Any]:
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    exact = outputs_and_gradients(reference, [x.double() for x in inputs], "fp32", learns)
    try:
        found = outputs_and_gradients(kernel, [x.to(device) for x in inputs], precision, learns)
    except Exception as failure:
        return {"error": None, "ok": False, "why": f"{type(failure).__name__}: {str(failure)[:160]}"}
    worst = max(
        float((ours.double().cpu() - truth).abs().max() / truth.abs().max())
        for ours, truth in zip(found, exact, strict=True)
    )
    return {"error": worst, "ok": worst <= TOLERANCES[precision]}


def outputs_and_gradients(
    kernel: Callable[..., Any], inputs: Sequence[Tensor], precision: str, learns: bool
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(learns) for x in inputs]
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        outputs = kernel(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not learns:
        return list(outputs)
    total = sum((output.double() * weights_like(output)).sum() for output in outputs)
    total.backward()
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def weights_like(x: Tensor) -> Tensor:
    """Return fixed weights between 1 and 2, the same on every device."""
    return (1 + torch.arange(x.numel(), dtype=torch.float64) * 0.618 % 1).view(x.shape).to(x.device)


def document_kernels(ids: Tensor, device: torch.device) -> dict[str, Heads]:
    """Return what may take attention within documents (B, T) in bf16: the model's way first, then the other one."""
    found: dict[str, Heads] = {}
    kernel = flash_varlen() if device.type == "cuda" else None
    if kernel is not None:
        packed = Documents.of(ids.to(device), kernel)
        found["documents, flash varlen"] = lambda q, k, v: packed.attend(*(x.bfloat16() for x in (q, k, v)))
    found["documents, flex"] = flex(ids.to(device))
    return found


def flex(ids: Tensor) -> Heads:
    """FlexAttention with a mask of blocks that is made once; compiled on CUDA, where it is slow otherwise."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, length = ids.shape

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[row, query] == ids[row, key])

    mask = create_block_mask(visible, rows, None, length, length, device=ids.device)
    attend: Any = torch.compile(flex_attention, dynamic=False) if ids.is_cuda else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        narrow = (x.bfloat16() if q.is_cuda else x for x in (q, k, v))
        out: Tensor = attend(*narrow, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return run


def attention_times(device: torch.device, *, rows: int, length: int, heads: tuple[int, int]) -> list[dict[str, Any]]:
    """Time one layer's attention, forward and backward, bf16, by every kernel there is."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids = torch.stack([torch.arange(length) // (length // 4 + 7 * row) for row in range(rows)])
    q, k, v = (
        torch.randn(rows, length, n, 64, device=device, dtype=torch.bfloat16) for n in (heads[0], *heads[1:] * 2)
    )
    inputs = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(rows, length, heads[0] * 64, device=device, dtype=torch.bfloat16)
    kernels: dict[str, Heads] = {}

    def causal(backend: SDPBackend) -> Heads:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads[0] != heads[1])
            return out.transpose(1, 2).flatten(2)

        return run

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        kernels[f"causal, {name.split('_')[0].lower()}"] = causal(getattr(SDPBackend, name))
    results = []
    for name, kernel in {**kernels, **document_kernels(ids, device)}.items():
        try:
            seconds = timed(lambda: kernel(*inputs).backward(upstream), device)  # noqa: B023
            results.append({"kernel": name, "milliseconds": round(seconds * 1e3, 3)})
        except Exception as failure:
            results.append(
                {"kernel": name, "skipped": f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"}
            )
    return results


def timed(work: Callable[[], object], device: torch.device, *, warm: int = 3, repeats: int = 10) -> float:
    """Return the median seconds of `work`, device included."""
    seconds = []
    for _ in range(warm + repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[warm:])[repeats // 2]


def compiled_gradients(device: torch.device, choice: Any, rows: int, length: int) -> dict[str, Any]:
    """Compare gradients of compiled layers with plain ones, bf16, with documents: relative to each tensor's norm."""
    batch = random_batch(choice.config(97).vocab_size, rows, length, documents=3)
    found = []
    for compile in ("off", "on"):
        updater = build_updater(choice, device, rows, length, {"compile": compile})
        began = time.perf_counter()
        losses = updater._accumulate(batch, rows * length).tolist()
        gradients = {name: p.grad.clone() for name, p in updater.model.named_parameters() if p.grad is not None}
        found.append((losses, gradients, time.perf_counter() - began))
    (plain_losses, plain, _), (losses, gradients, seconds) = found
    worst = max(float((gradients[name] - g).norm() / g.norm()) for name, g in plain.items())
    apart = abs(losses[1] - plain_losses[1])
    return {"error": worst, "loss": apart, "seconds": round(seconds, 1), "ok": worst < 0.08 and apart < 0.02}


def repeats(device: torch.device, choice: Any, rows: int, length: int) -> dict[str, Any]:
    """Do three updates twice: are the weights equal to the bit, by default and with deterministic algorithms?"""
    batch = random_batch(choice.config(97).vocab_size, rows, length, documents=3)
    result = {}
    for name, deterministic in (("default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        hashes = []
        for _ in range(2):
            updater = build_updater(choice, device, rows, length, {"compile": "off"})
            for _ in range(3):
                updater.update(batch)
            hashes.append(weights_sha256(updater.model.state_dict()))
        result[name] = hashes[0] == hashes[1]
    torch.use_deterministic_algorithms(False)
    return result


def steady_step(device: torch.device, choice: Any, rows: int, length: int) -> dict[str, Any]:
    """Does an update wait for the device anywhere? Only CUDA can tell."""
    result: dict[str, Any] = {}
    for name, documents in (("one document a row", 1), ("documents", 3)):
        batch = random_batch(choice.config(97).vocab_size, rows, length, documents=documents)
        updater = build_updater(choice, device, rows, length, {"compile": "off"})
        for _ in range(3):
            updater.update(batch)
        launched = updater.launch(batch)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            later = updater.launch(batch)
            updater.finish(launched)
            updater.finish(later)
            result[name] = "waits for nothing" if device.type == "cuda" else "only CUDA can tell"
        except RuntimeError as failure:
            result[name] = str(failure).splitlines()[0][:200]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return result
