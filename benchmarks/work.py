"""The work that every side of a comparison does: a model's widths, its first weights, and one batch, in a folder.

Loads neither torch nor the framework until asked, so that other packages' interpreters can import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Layers = Literal["layer-wise", "uniform"]


class CannotCompare(Exception):
    """A package cannot do this work; the message says why."""


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
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
HYPERPARAMETERS = (LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM)
"""What all sides train with: the defaults of our recipes."""


@dataclass(frozen=True)
class Work:
    """One model and one batch.

    Attributes:
        gqa_groups, ffn_dim_divisor: of the rule that made the widths.
        parameters, flops_per_token: by the exact accounting of `openelm.model.plan`.
    """

    layers: Layers
    dim: int
    head_dim: int
    query_heads: list[int]
    kv_heads: list[int]
    ffn_dims: list[int]
    vocab_size: int
    gqa_groups: int
    ffn_dim_divisor: int
    rows: int
    length: int
    parameters: int
    flops_per_token: float

    @staticmethod
    def read(folder: Path) -> Work:
        return Work(**json.loads((folder / "work.json").read_text()))


Step = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Side:
    """What a side's maker gives.

    Attributes:
        step: does one update on the batch; returns `loss`, in nats a token what is minimised, and `cross_entropy` where
            that is less.
        facts: what to say of it besides the numbers.
    """

    step: Step
    parameters: int
    facts: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Path, Work, str], Side]


def tensors(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Return inputs and targets (rows, length) and the first weights by their published names."""
    from safetensors.torch import load_file

    weights = load_file(folder / "work.safetensors")
    batch = weights.pop("batch")
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), weights


def model_config(case: Case, layers: Layers = "layer-wise") -> Any:
    """Return a case's model, or the model of as many parameters whose layers are alike."""
    from openelm.model.config import ModelConfig
    from openelm.model.plan import matched_uniform_plan
    from openelm.model.sizes import model_size

    config = model_size(case.size, **case.fields)
    if layers == "layer-wise":
        return config
    return ModelConfig.from_plan(matched_uniform_plan(config.plan), vocab_size=config.vocab_size)


def write_work(folder: Path, case: Case, layers: Layers) -> Work:
    """Write a case's widths, weights and batch; both kinds of layers get the same tokens."""
    import torch
    from safetensors.torch import save_file

    from openelm.bench.step import random_tokens
    from openelm.model.transformer import OpenELM

    config = model_config(case, layers)
    plan, rule = config.plan, model_config(case)
    work = Work(
        layers,
        plan.dim,
        plan.head_dim,
        list(plan.query_heads),
        list(plan.kv_heads),
        list(plan.ffn_dims),
        config.vocab_size,
        rule.num_gqa_groups,
        rule.ffn_dim_divisor,
        case.rows,
        case.length,
        config.parameters,
        plan.training_flops_per_token(config.vocab_size, case.length),
    )
    weights = dict(OpenELM(config).initial_weights(torch.Generator().manual_seed(0)))
    folder.mkdir(parents=True)
    batch = random_tokens(config.vocab_size, case.rows, case.length)
    save_file({**weights, "batch": batch}, folder / "work.safetensors")
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    return work
