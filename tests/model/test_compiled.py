"""Compiled layers: the gradients of plain ones, few graphs for many widths, nothing compiled outside of training.

Most tests let the compiler's own graphs run on plain kernels, which takes seconds; Inductor's code is slow to build.
"""

from __future__ import annotations

import functools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from openelm.model import transformer
from openelm.model.cache import KeyValueCache
from openelm.model.config import ModelConfig
from openelm.model.sizes import ModelChoice, model_size
from openelm.model.transformer import OpenELM, Recompute

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Four layers of four widths and two numbers of heads."""
    choice = ModelChoice(
        layers=4, dim=64, head_dim=16, gqa_groups=2, qkv_multipliers=(0.5, 1.0), ffn_dim_divisor=16, context=64
    )
    found = choice.config(97)
    assert len(set(found.plan.ffn_dims)) == 4 and len(set(found.plan.query_heads)) == 2
    return found


def gradients(model: OpenELM, documents: Tensor | None, precision: str) -> dict[str, Tensor]:
    tokens = torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 32, model.config.model_dim, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.hidden(tokens, documents=documents)
    (hidden.float() * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(config: ModelConfig, recompute: Any, precision: str, documents: Tensor | None) -> None:
    """Relative to each tensor's norm. fp32: 2e-5; bf16 keeps 8 bits and is rounded at other places: 5 %."""
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    expected = gradients(model, documents, precision)
    model.recompute, model.compiles = recompute, True
    found = gradients(model, documents, precision)
    tolerance = 2e-5 if precision == "fp32" else 0.05
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize(
    ("recompute", "documents"),
    [("none", True), pytest.param(("none", "full", "selective", "none"), False, marks=pytest.mark.slow)],
    ids=str,
)
def test_gradients_are_those_of_plain_layers(
    config: ModelConfig, compiler: Any, recompute: Recompute, documents: bool
) -> None:
    compiler("aot_eager")
    places = (torch.arange(32) // 11).expand(2, 32) if documents else None
    check(config, recompute, "fp32", places)
    if isinstance(recompute, str):
        assert counters["stats"]["unique_graphs"] <= 3 < len(config.plan.ffn_dims)


@pytest.mark.slow
def test_autocast_is_followed(config: ModelConfig, compiler: Any) -> None:
    compiler("aot_eager")
    check(config, "none", "bf16", None)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_inductors_code_are_those_of_plain_layers(
    config: ModelConfig, compiler: Any, recompute: Recompute, precision: str
) -> None:
    compiler("inductor")
    check(config, recompute, precision, (torch.arange(32) // 11).expand(2, 32))


def test_measuring_and_generating_compile_nothing(config: ModelConfig, compiler: Any) -> None:
    compiler("aot_eager")
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    model.compiles = True
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    cache = KeyValueCache(config.plan, 1, 8, dtype=torch.float32, device="cpu")
    model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    assert not counters["stats"]


def test_selective_recomputing_repeats_no_projection(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products in the graphs that are made: four forward, twice as many backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    found: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        found.append(sum(node.target == torch.ops.aten.mm.default for node in graph.graph.nodes))
        return graph

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    one = functools.cache(lambda function: torch.compile(function, backend=backend, fullgraph=True))
    monkeypatch.setattr(transformer, "compiled", one)
    model = OpenELM(model_size("5m", vocab_size=97))
    model.initialise(torch.Generator().manual_seed(0))
    model.recompute, model.compiles = "selective", True
    gradients(model, None, "fp32")
    assert set(found) == {4, 8}
    torch._dynamo.reset()
