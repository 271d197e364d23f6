"""What a recipe says about the work: its shape, what to do when it goes wrong, and what to measure meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from openelm.config import Config
from openelm.model.budget import Work, recompute_within
from openelm.model.plan import LayerPlan
from openelm.model.transformer import Recompute

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class TrainConfig(Config):
    """The shape of the work and what to do when it goes wrong."""

    steps: Positive
    rows: Positive
    """Sequences per optimizer step."""
    length: Positive
    """Tokens per sequence."""
    micro_rows: Positive | None = None
    """Sequences per forward and backward pass; gradients are averaged over all target tokens of the step."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the initial weights and the document order."""
    precision: Literal["auto", "fp32", "bf16", "float8"] = "auto"
    """`auto`: bf16 on GPUs and on CPUs that multiply it natively, otherwise fp32. `float8`: bf16, and the layers'
    projections in float8 (extra `float8`, CUDA capability 8.9 or more)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    numerics: Literal["fast", "exact"] = "fast"
    """`exact`: gradients are added in one fixed order, so 1, 2 and 4 processes give the same weights to the bit."""
    shards: Positive = 8
    """With `exact`: into how many parts each batch is cut; a power of two, at least the number of processes."""
    shard_processes: Positive = 1
    """How many processes share one copy of weights, gradients and optimizer state (FSDP2); 1: each holds a whole
    copy (data parallel), all of them: fully sharded, fewer: hybrid. Where fewer are started, all of them share."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long a process waits for the others before it stops."""
    document_mask: bool = True
    """Whether the documents packed into one row are hidden from each other."""
    recompute: Recompute = "none"
    """Activation checkpointing: "full" keeps each layer's input only and computes the rest again in the backward pass,
    "selective" computes everything but the projections again."""
    activation_gb: Annotated[float, Field(gt=0)] | None = None
    """In place of `recompute`: what layers may keep for the backward pass, in units of 1e9 bytes; as few layers as
    possible compute again, the cheapest ones."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether layers go through torch.compile; `auto`: on CUDA, where Triton is installed."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-4
    recheck_every: Count = 0
    """Compute the gradients of the steps that are multiples of this twice, and stop if they differ; 0: never."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What to do with an update whose loss or gradient is not finite."""
    max_skips: Positive = 5
    """Stop when this many updates in a row were skipped."""
    on_spike: Literal["warn", "skip"] = "warn"
    """What to do with an update whose loss is far above the recent ones."""
    spike_sigmas: Annotated[float, Field(gt=0)] = 6.0
    """A spike is this many standard deviations above the mean of the last 64 losses."""

    @model_validator(mode="after")
    def _micro_rows_divide(self) -> Self:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}")
        if self.numerics == "exact" and (self.shards & (self.shards - 1) or self.rows % self.shards):
            raise ValueError(f"shards {self.shards} must be a power of two that divides rows {self.rows}")
        if self.numerics == "exact" and self.shard_processes > 1:
            raise ValueError("numerics 'exact' adds up whole gradients: it needs shard_processes 1")
        if self.recheck_every and self.shard_processes > 1:
            raise ValueError("recheck_every compares whole gradients: it needs shard_processes 1")
        if self.precision == "float8" and self.shard_processes > 1:
            raise ValueError("precision 'float8' needs shard_processes 1")
        if self.activation_gb is not None and self.recompute != "none":
            raise ValueError("activation_gb chooses what to compute again: leave recompute at 'none'")
        return self

    def work(self, plan: LayerPlan, processes: int, precision: str, device: str) -> Work:
        """Describe what goes through a model at once in each of some processes, on a "cpu" or another device.

        Raises:
            ConfigError: activation_gb is too little.
        """
        rows = self.rows // (self.shards if self.numerics == "exact" else processes)
        work = Work(
            min(rows, self.micro_rows or rows),
            self.length,
            "fp32" if precision == "fp32" else "bf16",
            "cpu" if device == "cpu" else "gpu",
            self.recompute,
            self.document_mask,
        )
        if self.activation_gb is None:
            return work
        return replace(work, recompute=recompute_within(plan, work, int(self.activation_gb * 1e9)))


class SuitesConfig(Config):
    """Suites of questions to answer while training goes on."""

    names: tuple[str, ...] = Field(min_length=1)
    """As `openelm eval --suite` takes them: `zero-shot`, `lm-eval:arc_easy,piqa`, `choices:questions.jsonl`."""
    every: Positive | None = None
    """Steps between them; None: at every evaluation. The last step is always measured."""
    limit: Positive | None = 100
    """Questions of each task, the first ones; None: all."""
    data: Literal["auto", "hub", "local"] = "auto"


class EvaluationConfig(Config):
    """Measurements on held-out text while training goes on."""

    every: Positive = 500
    """Steps between measurements; the last step is always measured."""
    max_bytes: Positive = 65_536
    """Held-out text read each time, the beginnings of its documents."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the model continues each time, to be read by people."""
    questions: tuple[str, ...] = ()
    """What a user says, for the model to answer in the chat format."""
    sample_tokens: Positive = 80
    suites: SuitesConfig | None = None
    at_start: bool = False
    """Whether to measure before the first step too; a tuned model always is."""
