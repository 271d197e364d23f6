"""float8 projections: which, under which names, and that a model learns with them; CPUs emulate the rounding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.errors import ConfigError
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.model.float8 import check_float8, use_float8
from openelm.model.sizes import ModelChoice
from openelm.model.transformer import OpenELM

needs_torchao = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("torchao"), reason="torchao is not installed"
)


def test_a_device_without_float8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs CUDA capability 8\.9"):
        check_float8(torch.device("cpu"))


def small_model() -> OpenELM:
    """Two layers; the second one's feed-forward width is no multiple of 16."""
    choice = ModelChoice(layers=2, dim=32, head_dim=16, gqa_groups=1, ffn_dim_divisor=8, ffn_multipliers=(0.5, 1.25))
    model = OpenELM(choice.config(97))
    assert model.config.plan.ffn_dims == (16, 40)
    model.initialise(torch.Generator().manual_seed(0))
    return model


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_only_projections_that_fit_are_converted_and_names_stay() -> None:
    model = small_model()
    names, weights = list(model.state_dict()), dict(model.named_parameters())
    chosen = use_float8(model, emulate=True)
    attention = [f"{layer}.attn.{name}_proj" for layer in (0, 1) for name in ("qkv", "out")]
    assert sorted(chosen) == sorted([*attention, "0.ffn.proj_1", "0.ffn.proj_2", "1.ffn.proj_1"])
    assert list(model.state_dict()) == names
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert type(model.transformer.layers[1].ffn.proj_2).__name__ == "Linear"


@needs_torchao
@pytest.mark.filterwarnings("ignore")
def test_a_model_learns_as_in_bf16() -> None:
    """Emulated: gradients point where bf16's do (cosine above 0.95), losses of eight updates are within 5 % of bf16's.

    Three bits of mantissa are too few for more: where both know their four rows by heart they drift apart.
    """
    tokens = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(1)) % 7

    def train(model: OpenELM) -> tuple[list[float], dict[str, Tensor]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses, gradients = [], {}
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
                loss, _ = linear_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten())
            optimizer.zero_grad()
            (loss / 128).backward()
            losses.append(float(loss) / 128)
            gradients = gradients or {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and parameter.ndim > 1
            }
            optimizer.step()
        return losses, gradients

    model = small_model()
    other = copy.deepcopy(model)
    use_float8(other, emulate=True)
    (wide, expected), (narrow, found) = train(model), train(other)
    assert wide[-1] < wide[0] / 2
    assert narrow == pytest.approx(wide, rel=0.05)
    for name, gradient in expected.items():
        assert float(F.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0)) > 0.95, name
        assert not torch.equal(gradient, found[name]), "rounded at all"
