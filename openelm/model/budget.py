"""What a training run needs: memory of each device, time and cost, by arithmetic from a layer plan.

Numbers are bytes, and seconds. Gradients and moments are fp32, as the training loop keeps them, and so are weights
unless the recipe says otherwise; under bf16 fp32 projections also exist as bf16 copies from the first forward pass to
the end of the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import get_args

from openelm.errors import ConfigError
from openelm.model.measured import DEVICES, MEASURED, Device, Measurement
from openelm.model.plan import LayerPlan
from openelm.model.sizes import model_size
from openelm.model.transformer import Recompute

_WIDE = 4  # bytes of an fp32 number
CHUNK_BYTES = {"fp32": 64 << 20, "bf16": 128 << 20, "gpu": 768 << 20}
"""Logits that the loss holds at once, wide ones on CPUs (kernels/cross_entropy*.py; a test compares them)."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass on one device.

    Attributes:
        rows, length: sequences that go through the model at once, and their tokens.
        precision: "bf16" under autocast with fp32 weights, or "fp32".
        kind: "cpu", whose C++ kernels keep less for the backward pass, or "gpu".
        recompute: what is computed again instead of kept, by all layers or by each.
        document_mask: rows hold several documents that are hidden from each other.
    """

    rows: int
    length: int
    precision: str = "bf16"
    kind: str = "gpu"
    recompute: Recompute | tuple[Recompute, ...] = "none"
    document_mask: bool = False

    def recompute_of(self, layer: int) -> Recompute:
        return self.recompute if isinstance(self.recompute, str) else self.recompute[layer]

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def narrow(self) -> int:
        """Bytes of a number that matrix products read."""
        return 2 if self.precision == "bf16" else _WIDE


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of most memory, the end of the forward pass."""

    weights: int
    gradients: int
    moments: int
    copies: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def layer_activation_bytes(plan: LayerPlan, layer: int, work: Work) -> int:
    """Count what one layer keeps for its backward pass, for all tokens of the pass.

    The residual stream is fp32. Kept are: the inputs of both norms; the inputs of the four projections; heads before
    and after their norm and rotation, and the output of attention; gate, up and silu(gate). On CPUs norms and gates are
    computed again, so what they give is not kept. A layer that is recomputed selectively keeps the inputs of both
    norms, heads before their norm, gate and up. Heads that are rotated only are not kept before it, but on GPUs, where
    the values are a part of what `qkv_proj` gives.
    """
    narrow, dim = work.narrow, plan.dim
    q, kv = plan.query_heads[layer] * plan.head_dim, plan.kv_heads[layer] * plan.head_dim
    if work.recompute_of(layer) == "full":
        return work.tokens * _WIDE * dim
    if work.recompute_of(layer) == "selective":
        return work.tokens * (2 * _WIDE * dim + narrow * (q + 2 * kv + 2 * plan.ffn_dims[layer]))
    norms = 2 * (_WIDE + narrow) * dim if work.kind == "gpu" else 2 * _WIDE * dim
    projected = narrow * (q + 2 * kv) if plan.normalizes_qk or work.kind == "gpu" else 0
    normed = narrow * (q + kv) if plan.normalizes_qk else 0
    turned = normed + narrow * (q + kv) if work.kind == "gpu" else narrow * (q + 2 * kv)
    attended = narrow * 2 * q if work.kind == "gpu" else narrow * q + 2 * _WIDE * plan.query_heads[layer]
    gated = narrow * plan.ffn_dims[layer] * (4 if work.kind == "gpu" else 2)
    masks = 0
    if work.document_mask and work.kind == "gpu" and work.precision != "bf16":
        groups = plan.query_heads[layer] // plan.kv_heads[layer]
        masks = work.rows * groups * work.length**2 * narrow
    return work.tokens * (norms + projected + turned + attended + gated) + masks


def activation_bytes(plan: LayerPlan, work: Work) -> int:
    """Count what all layers and the last norm keep, and the most that one layer computes again."""
    kept = [layer_activation_bytes(plan, layer, work) for layer in range(plan.layers)]
    whole = [layer_activation_bytes(plan, layer, replace(work, recompute="none")) for layer in range(plan.layers)]
    again = max(most - least for most, least in zip(whole, kept, strict=True))
    return sum(kept) + again + 2 * _WIDE * plan.dim * work.tokens


def recompute_within(plan: LayerPlan, work: Work, most_bytes: int) -> tuple[Recompute, ...]:
    """Choose what each layer computes again so that `activation_bytes` fits, greedily by bytes won for each FLOP.

    Raises:
        ConfigError: it does not fit even if every layer computes everything again.
    """
    if (least := activation_bytes(plan, replace(work, recompute="full"))) > most_bytes:
        raise ConfigError(
            f"train.activation_gb {most_bytes / 1e9:g} is too little for {work.rows} rows of {work.length} tokens: "
            f"computing all layers again needs {least / 1e9:.3g}",
            fix="set train.micro_rows lower, or train.activation_gb higher",
        )
    kinds: list[Recompute] = ["none"] * plan.layers

    def kept(layer: int, kind: Recompute) -> int:
        return layer_activation_bytes(plan, layer, replace(work, recompute=kind))

    steps: tuple[tuple[Recompute, Recompute], ...] = (("none", "selective"), ("selective", "full"))
    for before, after in steps:
        costs = _again_flops(plan, work.length, after)
        won = [(kept(n, before) - kept(n, after)) / cost for n, cost in enumerate(costs)]
        for layer in sorted(range(plan.layers), key=lambda n: -won[n]):
            if activation_bytes(plan, replace(work, recompute=tuple(kinds))) <= most_bytes:
                return tuple(kinds)
            kinds[layer] = after
    return tuple(kinds)


def loss_bytes(plan: LayerPlan, vocab_size: int, work: Work) -> int:
    """Count what the chunked loss holds at once: a chunk of logits, the head's copy, gradients of head and states."""
    held = work.narrow if work.kind == "gpu" else _WIDE
    rows = max(1, min(work.tokens, CHUNK_BYTES["gpu" if work.kind == "gpu" else work.precision] // (vocab_size * held)))
    logits = rows * vocab_size * (_WIDE + work.narrow if work.kind == "cpu" and work.precision == "bf16" else held)
    states = work.tokens * plan.dim * (_WIDE + (work.narrow if work.precision == "bf16" else 0))
    head = vocab_size * plan.dim * (_WIDE + (2 * work.narrow if work.precision == "bf16" else 0))
    return logits + states + head


@dataclass(frozen=True)
class Held:
    """What training holds of the projections (see `OptimizerConfig`); of all else it is fp32 weights and two moments.

    Attributes:
        kind: "adamw" keeps two moments, "muon" one.
        weights: "fp32", "bf16" with fp32 ones beside them, or "bf16-stochastic" without.
    """

    kind: str = "adamw"
    weights: str = "fp32"

    @property
    def weight_bytes(self) -> int:
        return {"fp32": 4, "bf16": 6, "bf16-stochastic": 2}[self.weights]

    @property
    def moment_bytes(self) -> int:
        return _WIDE if self.kind == "muon" else 2 * _WIDE


def memory(
    plan: LayerPlan,
    vocab_size: int,
    work: Work,
    *,
    shards: int = 1,
    keeps_gradients: bool = True,
    held: Held = Held(),
) -> Memory:
    """Count the memory of one device.

    Args:
        shards: over how many devices weights, gradients and moments are spread (arXiv 1910.02054, stage 3); a layer
            and the embedding are then gathered while they are used. 1: every device holds all of them.
        keeps_gradients: the training loop's gradients live in one buffer throughout; otherwise they replace the
            activations.
    """
    parameters = plan.parameters(vocab_size)
    projections = plan.attention_parameters + plan.ffn_parameters
    rest = parameters - projections
    copies = work.narrow * projections if work.precision == "bf16" and held.weights == "fp32" else 0
    if shards > 1:
        gathered = max(_layer_parameters(plan)) + vocab_size * plan.dim
        copies = work.narrow * gathered
    return Memory(
        weights=_share(held.weight_bytes * projections + _WIDE * rest, shards),
        gradients=_share(_WIDE * parameters, shards) if keeps_gradients else 0,
        moments=_share(held.moment_bytes * projections + 2 * _WIDE * rest, shards),
        copies=copies,
        activations=activation_bytes(plan, work),
        loss=loss_bytes(plan, vocab_size, work),
    )


def _share(size: int, shards: int) -> int:
    return -(-size // shards)


def _layer_parameters(plan: LayerPlan) -> list[int]:
    heads = zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)
    return [plan.dim * (plan.head_dim * 2 * (q + kv) + 3 * ffn) for q, kv, ffn in heads]


def _again_flops(plan: LayerPlan, length: int, recompute: Recompute | tuple[Recompute, ...]) -> list[float]:
    """Count what each layer computes again, in FLOPs a token: nothing, attention, or all of its forward pass."""
    kinds = (recompute,) * plan.layers if isinstance(recompute, str) else recompute
    again: list[float] = []
    for kind, heads, parameters in zip(kinds, plan.query_heads, _layer_parameters(plan), strict=True):
        attention = 2 * heads * plan.head_dim * (length + 1)
        again.append({"none": 0, "selective": attention, "full": attention + 2 * parameters}[kind])
    return again


@dataclass(frozen=True)
class Time:
    """How long a run takes."""

    flops_per_token: float
    tokens_per_second: float
    seconds: float
    device_hours: float


def run_time(
    plan: LayerPlan,
    vocab_size: int,
    *,
    tokens: int,
    length: int,
    devices: int,
    flops_per_second: float,
    mfu: float,
    recompute: Recompute | tuple[Recompute, ...] = "none",
) -> Time:
    """Predict the time of `tokens` training tokens on `devices` that each reach `mfu` of `flops_per_second`.

    Recomputing repeats the forward pass of the layers or their attention only; MFU does not count it.
    """
    flops = plan.training_flops_per_token(vocab_size, length)
    again = sum(_again_flops(plan, length, recompute))
    speed = devices * flops_per_second * mfu / (flops + again)
    seconds = tokens / speed
    return Time(flops, speed, seconds, devices * seconds / 3600)


def measured_mfu(measurement: Measurement) -> float:
    """Return the MFU of a measurement by this project's count of FLOPs."""
    config = model_size(measurement.size, vocab_size=32_128)
    flops = config.plan.training_flops_per_token(config.vocab_size, measurement.length)
    return measurement.tokens_per_second * flops / measurement.flops_per_second


def nearest_measurement(
    parameters: int, device: Device, *, side: str = "ours", without: Measurement | None = None
) -> Measurement | None:
    """Choose the measurement whose size is nearest in ratio: on the device itself, else on an H100.

    Args:
        parameters: with embeddings.
        without: a measurement to leave out, so that it can be predicted from the others.
    """
    for name in (device.name, "h100"):
        found = [m for m in MEASURED if m.device == name and m.side == side and m != without]
        if found:
            return min(found, key=lambda m: abs(math.log(measured_parameters(m) / parameters)))
        if name == "cpu":
            return None
    return None


def measured_parameters(measurement: Measurement) -> int:
    """Count the weights of a measured size."""
    return model_size(measurement.size, vocab_size=32_128).parameters


def layouts(
    plan: LayerPlan,
    vocab_size: int,
    work: Work,
    devices: int,
    held: Held = Held(),
) -> dict[str, Memory]:
    """Count the memory of a device for each way to lay a run out, by name; only fp32 weights can be sharded.

    What `work` computes again is among them if it differs from layer to layer.
    """
    found = {}
    both = devices > 1 and held.weights == "fp32"
    by_layer = () if isinstance(work.recompute, str) else (work.recompute,)
    for name, shards in (("replicated", 1), ("sharded", devices))[: 1 + both]:
        for recompute in (*get_args(Recompute), *by_layer):
            label = name if recompute == "none" else f"{name}, {recompute} recompute"
            if recompute in by_layer:
                label = f"{name}, recompute by layer"
            found[label] = memory(plan, vocab_size, replace(work, recompute=recompute), shards=shards, held=held)
    return found


@dataclass(frozen=True)
class Check:
    """One measured number beside what the arithmetic says; `predicted` is None where nothing else was measured."""

    run: str
    what: str
    measured: float
    predicted: float | None
    how: str

    @property
    def error(self) -> float | None:
        """The prediction over the measurement, less one."""
        return None if self.predicted is None else self.predicted / self.measured - 1


def predicted_again() -> list[Check]:
    """Predict every measured run as if it had not been measured."""
    checks = []
    for run in MEASURED:
        name = f"{run.size} {run.precision} on {run.device}, {run.side}, {run.date}"
        config = model_size(run.size, vocab_size=32_128)
        device = Device(run.device, run.flops_per_second, None, "")
        other = nearest_measurement(config.parameters, device, side=run.side, without=run)
        predicted, how = None, "nothing else like it was measured"
        if other is not None:
            flops = config.plan.training_flops_per_token(config.vocab_size, run.length)
            predicted, how = measured_mfu(other) * run.flops_per_second / flops, f"the MFU of {other.size}"
        checks.append(Check(name, "tokens/s", run.tokens_per_second, predicted, how))
        if run.peak_bytes is not None:
            counted = memory(config.plan, 32_128, Work(run.rows, run.length, run.precision), keeps_gradients=False)
            checks.append(Check(name, "peak GB", run.peak_bytes / 1e9, counted.total / 1e9, "the accounting of memory"))
    return [*checks, *_published_runs()]


def _published_runs() -> list[Check]:
    """Runs of which less is known: a whole demo, and the published 3B (by other code, with recomputation)."""
    demo = Check("demo bf16 on two Xeon cores, README", "seconds", 239, None, "its rate of products was not recorded")
    model = model_size("3b", vocab_size=32_128)
    plain = nearest_measurement(model.parameters, DEVICES["h100"], side="baseline")
    assert plain is not None
    time = run_time(
        model.plan, model.vocab_size, tokens=350_000 * 2048 * 2048, length=2048, devices=128,
        flops_per_second=989e12, mfu=measured_mfu(plain), recompute="full",
    )  # fmt: skip
    how = "the plain implementation's MFU, and recomputation"
    return [demo, Check("3b published on 128 h100", "days", 13, time.seconds / 86_400, how)]
