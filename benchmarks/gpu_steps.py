"""Training steps to be timed on one device: the project's own, as `openelm train` takes them, and those beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baseline import PlainModel, PlainTrainer
from benchmarks.peers import llama_config
from openelm.data.stream import Batch
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.model.float8 import check_float8
from openelm.model.plan import LayerPlan, matched_uniform_plan
from openelm.model.sizes import ModelChoice
from openelm.model.transformer import OpenELM
from openelm.train.objectives import NextToken
from openelm.train.run import Run, RunConfig
from openelm.train.update import Updater


@dataclass(frozen=True)
class Variant:
    """One way to train a size.

    Attributes:
        kind: "ours" goes through the Updater; "bf16 weights", "baseline" and the peers have steps of their own.
        train: settings of `[train]`.
        seconds: what it may take, compilation included: it is not begun later than that before the end.
    """

    name: str
    size: str
    rows: int
    kind: str = "ours"
    train: Mapping[str, Any] = field(default_factory=dict)
    attention: str | None = None
    documents: int = 1
    seconds: float = 40


@dataclass(frozen=True)
class Case:
    """What a variant is measured on."""

    choice: ModelChoice
    vocab_size: int
    length: int
    device: torch.device
    steps: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_batch(vocab_size: int, rows: int, length: int, *, documents: int = 1) -> Batch:
    """Make rows of `documents` documents each, which begin at other places in each row."""
    tokens = np.random.default_rng(1).integers(0, vocab_size, (rows, length + 1))
    ids = np.zeros((rows, length), np.int32)
    for row in range(rows if documents > 1 else 0):
        cuts = np.sort(np.random.default_rng(row).choice(np.arange(1, length), documents - 1, replace=False))
        ids[row] = np.searchsorted(cuts, np.arange(length), side="right")
    return Batch(tokens[:, :-1], tokens[:, 1:], ids, rows * length, np.zeros((rows, 32), np.uint8))


def build_updater(
    choice: ModelChoice, device: torch.device, rows: int, length: int, train: Mapping[str, Any], vocab_size: int = 97
) -> Updater:
    """Make the Updater of a run without data, with weights drawn on the device."""
    values = {"steps": 1000, "rows": rows, "length": length, "device": device.type, **train}
    config = RunConfig.parse(
        {
            "model": choice.model_dump(),
            "data": {"sources": [{"name": "none", "paths": ["none"]}]},
            "train": values,
            "schedule": {"peak": 1e-4},
        }
    )
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    if precision == "float8":
        check_float8(device)
    run = Run(Path(), config, choice.config(vocab_size), None, None, None, device, precision)  # type: ignore[arg-type]
    plain = OpenELM.initial_weights
    OpenELM.initial_weights = _drawn_on(device)  # type: ignore[method-assign]
    try:
        return Updater(run, NextToken())
    finally:
        OpenELM.initial_weights = plain  # type: ignore[method-assign]


def _drawn_on(device: torch.device) -> Any:
    """A CPU generator takes minutes for the largest size."""

    def weights(model: OpenELM, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        own = torch.Generator(device).manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                yield name, torch.ones(parameter.shape, device=device)
            else:
                drawn = torch.randn(parameter.shape, generator=own, device=device)
                yield name, drawn.mul_(parameter.shape[1] ** -0.5)

    return weights


@contextmanager
def attention_by(name: str | None) -> Iterator[None]:
    """Let torch prefer one attention kernel; what it cannot do the others do."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if name == "cudnn":
        order[:2] = reversed(order[:2])
    with sdpa_kernel(order, set_priority=True) if name else nullcontext():
        yield


def measure(variant: Variant, case: Case) -> dict[str, Any]:
    """Time a variant: the mean seconds of a step, the best of three stretches of steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plan = case.choice.config(case.vocab_size).plan
    cuda = case.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with attention_by(variant.attention):
        batch = random_batch(case.vocab_size, variant.rows, case.length, documents=variant.documents)
        run, plan = _stretch(variant, case, plan, batch)
        began = time.perf_counter()
        first = run(1)
        synchronize(case.device)
        first_seconds = time.perf_counter() - began
        run(2)
        times = []
        for _ in range(3):
            synchronize(case.device)
            began = time.perf_counter()
            run(case.steps)
            synchronize(case.device)
            times.append((time.perf_counter() - began) / case.steps)
    speed = variant.rows * case.length / min(times)
    return {
        "tokens_per_second": round(speed),
        "tflops": round(speed * plan.training_flops_per_token(case.vocab_size, case.length) / 1e12, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "first_loss": first,
        "first_step_seconds": round(first_seconds, 1),
        "graphs": int(torch._dynamo.utils.counters["stats"]["unique_graphs"]),
    }


def _stretch(variant: Variant, case: Case, plan: LayerPlan, batch: Batch) -> tuple[Callable[[int], float], LayerPlan]:
    """Return what does n steps and tells the last loss, and the plan whose FLOPs they are."""
    if variant.kind == "ours":
        train = {"document_mask": variant.documents > 1, **variant.train}
        updater = build_updater(case.choice, case.device, variant.rows, case.length, train, case.vocab_size)
        return lambda steps: _updates(updater, batch, steps), plan
    inputs, targets = (torch.from_numpy(x).to(case.device) for x in (batch.inputs, batch.targets))
    if variant.kind == "baseline":
        with torch.device(case.device):
            plain = PlainModel(plan.dim, plan.head_dim, plan.query_heads, plan.kv_heads, plan.ffn_dims, case.vocab_size)
        for parameter in plain.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        trainer = PlainTrainer(plain, "bf16")
        step: Callable[[], Any] = lambda: trainer.step(inputs, targets)  # noqa: E731
    elif variant.kind == "bf16 weights":
        step = _narrow_step(case, inputs, targets)
    else:
        plan = matched_uniform_plan(plan)
        step = PEERS[variant.kind](plan, case, inputs, targets)

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = step()
        return float(loss)

    return run, plan


def _updates(updater: Updater, batch: Batch, steps: int) -> float:
    """Do updates as the training loop does: the numbers of one are read when the next one was launched."""
    before, events = None, []
    for _ in range(steps):
        launched = updater.launch(batch)
        if before is not None:
            updater.finish(before)
        before = launched
        if not updater.runs_ahead:
            events, before = updater.finish(before)[0], None
    if before is not None:
        events = updater.finish(before)[0]
    return float.fromhex(events[-1]["loss"])


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = _adamw(model)

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def _narrow_step(case: Case, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """bf16 weights, gradients and moments without any fp32 copy: no way to train, but how fast it could be."""
    updater = build_updater(case.choice, case.device, len(inputs), case.length, {}, case.vocab_size)
    model = OpenELM(updater.run.model_config).to(case.device)
    model.load_state_dict(updater.model.state_dict())
    del updater
    model.bfloat16()
    model.compiles = True

    def loss() -> Tensor:
        hidden = model.hidden(inputs).flatten(0, 1)
        return linear_cross_entropy(hidden, model.head_weight, targets.flatten(), z_loss=1e-4)[0] / targets.numel()

    return _stepper(model, loss)


def _llama(
    plan: LayerPlan, case: Case, inputs: Tensor, targets: Tensor, *, liger: bool = False
) -> Callable[[], Tensor]:
    """transformers' Llama of equal parameters with equal layers, its layers compiled, its loss its own."""
    from transformers import LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = llama_config(plan, case.vocab_size, case.length)
    config._attn_implementation = "sdpa"
    with torch.device(case.device):
        model = LlamaForCausalLM(config).float()
    if not liger:
        for layer in model.model.layers:
            layer.compile()

    def loss() -> Tensor:
        with torch.autocast(case.device.type, torch.bfloat16):
            value: Tensor = model(input_ids=inputs, labels=inputs).loss
        return value

    return _stepper(model, loss)


def _litgpt(plan: LayerPlan, case: Case, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    from litgpt import GPT, Config

    config = Config(
        name="equal parameters",
        block_size=case.length,
        padded_vocab_size=case.vocab_size,
        n_layer=plan.layers,
        n_embd=plan.dim,
        n_head=plan.query_heads[0],
        n_query_groups=plan.kv_heads[0],
        head_size=plan.head_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=plan.ffn_dims[0],
    )
    with torch.device(case.device):
        model = GPT(config)
    for layer in model.transformer.h:
        layer.compile()

    def loss() -> Tensor:
        with torch.autocast(case.device.type, torch.bfloat16):
            logits = model(inputs)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return _stepper(model, loss)


PEERS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "transformers": _llama,
    "transformers, Liger": lambda *arguments: _llama(*arguments, liger=True),
    "litgpt": _litgpt,
}
