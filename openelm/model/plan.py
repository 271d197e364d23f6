"""Layer plans: how many heads and how wide a feed-forward each layer gets, and exactly what that costs.

The `openelm` rule is layer-wise scaling (arXiv 2404.14619, section 2) as the released models obey it: the
per-layer multipliers are rounded to two decimals, and widths to the nearest multiple of a divisor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


def round_to_multiple(value: float, divisor: int) -> int:
    """Round to the nearest multiple of `divisor` (halves up), at least one, never below 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def multipliers(first: float, last: float, layers: int) -> tuple[float, ...]:
    """Spread multipliers evenly from the first layer to the last, rounded to two decimals.

    The rounding changes shapes (1.1B, layers 3, 10, 13, 14, 17) and the released weights have it.
    """
    step = (last - first) / (layers - 1) if layers > 1 else 0.0
    return tuple(round(index * step + first, 2) for index in range(layers))


@dataclass(frozen=True)
class LayerPlan:
    """The widths of every layer.

    Attributes:
        dim: width of the residual stream.
        head_dim: size of one attention head.
        query_heads, kv_heads: heads of each layer; query heads are a multiple of the layer's KV heads.
        ffn_dims: inner width of each layer's gated feed-forward.
        normalizes_qk: whether queries and keys have norms, of head_dim numbers each; no width, so no field.
    """

    dim: int
    head_dim: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]
    normalizes_qk: ClassVar[bool] = True

    @property
    def layers(self) -> int:
        return len(self.query_heads)

    @property
    def attention_parameters(self) -> int:
        heads = sum(2 * q + 2 * kv for q, kv in zip(self.query_heads, self.kv_heads, strict=True))
        return heads * self.head_dim * self.dim  # qkv: q + 2 kv heads in; out: q heads

    @property
    def ffn_parameters(self) -> int:
        return 3 * self.dim * sum(self.ffn_dims)  # gate, up, down

    @property
    def norm_parameters(self) -> int:
        of_heads = 2 * self.head_dim if self.normalizes_qk else 0
        return self.layers * (2 * self.dim + of_heads) + self.dim

    @property
    def non_embedding_parameters(self) -> int:
        return self.attention_parameters + self.ffn_parameters + self.norm_parameters

    def parameters(self, vocab_size: int) -> int:
        """Count every weight of a model whose head is tied to its embedding."""
        return self.non_embedding_parameters + vocab_size * self.dim

    def matmul_parameters(self, vocab_size: int) -> int:
        """Count the weights that multiply every token: the projections and the tied head once, no norms."""
        return self.attention_parameters + self.ffn_parameters + vocab_size * self.dim

    def forward_flops_per_token(self, vocab_size: int, length: int) -> float:
        """FLOPs of one forward pass over `length` tokens, per token; causal attention counts half the square."""
        return 2 * self.matmul_parameters(vocab_size) + self._attention_flops((length + 1) / 2)

    def training_flops_per_token(self, vocab_size: int, length: int) -> float:
        """FLOPs of forward and backward (twice the forward), per token; recomputation is not counted."""
        return 3 * self.forward_flops_per_token(vocab_size, length)

    def decode_flops_per_token(self, vocab_size: int, context: int) -> float:
        """FLOPs to compute one more token that attends to `context` positions, its own included."""
        return 2 * self.matmul_parameters(vocab_size) + self._attention_flops(context)

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes that one token occupies in the key/value caches of all layers."""
        return 2 * sum(self.kv_heads) * self.head_dim * dtype_bytes

    def _attention_flops(self, keys: float) -> float:
        return 4 * sum(self.query_heads) * self.head_dim * keys  # scores and weighted values: 2 FLOPs each


@dataclass(frozen=True)
class PlanWithoutHeadNorms(LayerPlan):
    """The widths of a model that rotates queries and keys as they are, such as a Llama."""

    normalizes_qk: ClassVar[bool] = False


def openelm_plan(
    dim: int,
    head_dim: int,
    layers: int,
    *,
    qkv_multipliers: tuple[float, float] = (0.5, 1.0),
    ffn_multipliers: tuple[float, float] = (0.5, 4.0),
    gqa_groups: int = 4,
    ffn_dim_divisor: int = 256,
) -> LayerPlan:
    """Apply the published layer-wise scaling rule; `gqa_groups` is the number of query heads per KV head."""
    query_heads = tuple(
        round_to_multiple(dim * alpha, head_dim * gqa_groups) // head_dim
        for alpha in multipliers(*qkv_multipliers, layers)
    )
    return LayerPlan(
        dim=dim,
        head_dim=head_dim,
        query_heads=query_heads,
        kv_heads=tuple(heads // gqa_groups for heads in query_heads),
        ffn_dims=tuple(
            round_to_multiple(dim * beta, ffn_dim_divisor) for beta in multipliers(*ffn_multipliers, layers)
        ),
    )


def uniform_plan(
    dim: int, head_dim: int, layers: int, *, query_heads: int, ffn_dim: int, gqa_groups: int = 4
) -> LayerPlan:
    """Give every layer the same widths."""
    return LayerPlan(
        dim=dim,
        head_dim=head_dim,
        query_heads=(query_heads,) * layers,
        kv_heads=(query_heads // gqa_groups,) * layers,
        ffn_dims=(ffn_dim,) * layers,
    )


def nearest_plan(plan_at: Callable[[int], LayerPlan], parameters: int, *, largest: int) -> LayerPlan:
    """Find the plan whose non-embedding parameters are nearest to a budget.

    Args:
        plan_at: makes a plan from a size step (1, 2, …); more steps, more parameters.
        parameters: the budget, without embeddings.
        largest: the largest step to consider.
    """
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if plan_at(middle).non_embedding_parameters < parameters:
            low = middle + 1
        else:
            high = middle
    candidates = [plan_at(step) for step in (max(1, low - 1), low)]
    return min(candidates, key=lambda plan: abs(plan.non_embedding_parameters - parameters))


def matched_openelm_plan(dim: int, head_dim: int, layers: int, parameters: int, **rule: Any) -> LayerPlan:
    """Apply the published rule with its feed-forward multipliers scaled to meet a parameter budget.

    Args:
        parameters: the budget, without embeddings.
        rule: `qkv_multipliers`, `gqa_groups` and `ffn_dim_divisor` of `openelm_plan`.
    """

    def plan_at(percent: int) -> LayerPlan:
        ends = (0.5 * percent / 100, 4.0 * percent / 100)
        return openelm_plan(dim, head_dim, layers, ffn_multipliers=ends, **rule)

    return nearest_plan(plan_at, parameters, largest=1600)


def matched_uniform_plan(plan: LayerPlan, *, ffn_dim_multiple: int = 16) -> LayerPlan:
    """Make the uniform plan of equal depth and width that is nearest to `plan` in parameters.

    Heads are the layers' mean, rounded to whole groups; the feed-forward width takes up the rest.
    """
    groups = plan.query_heads[0] // plan.kv_heads[0]
    heads = round_to_multiple(sum(plan.query_heads) / plan.layers, groups)

    def plan_at(step: int) -> LayerPlan:
        return uniform_plan(
            plan.dim,
            plan.head_dim,
            plan.layers,
            query_heads=heads,
            ffn_dim=step * ffn_dim_multiple,
            gqa_groups=groups,
        )

    return nearest_plan(plan_at, plan.non_embedding_parameters, largest=64 * plan.dim // ffn_dim_multiple)
