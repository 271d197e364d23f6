"""Muon beside the definition: singular value decomposition, and one step written down in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openelm.optim.config import OptimizerConfig
from openelm.optim.muon import orthogonalised
from openelm.optim.optimizer import Optimizer

from .test_optimizer import bits, make_model, update

MUON = OptimizerConfig(kind="muon", weight_decay=0.2)


@pytest.mark.parametrize("shape", [(8, 8), (5, 64), (64, 5), (1, 7), (96, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_go_to_the_band_around_one_and_directions_stay(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Those above a hundredth of the norm: 0.65 to 1.25 with fp32's and bf16's rounding."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    values = values.clamp(min=0.02 * float(values.square().sum().sqrt()))
    matrix = u @ values.diag() @ vt
    found = orthogonalised(matrix.to(dtype)[None])[0].float()
    assert found.shape == matrix.shape
    rotated = u.T @ found @ vt.T  # nearly diagonal: the singular vectors are those of the matrix
    assert float(rotated.diagonal().min()) > 0.65 and float(rotated.diagonal().max()) < 1.25
    loose = 1e-3 if dtype == torch.float32 else 0.1
    assert float((rotated - rotated.diagonal().diag()).abs().max()) < loose
    polar = u @ vt
    assert float((found - polar).norm() / polar.norm()) < 0.35


def test_its_scale_does_not_matter_and_zero_stays_zero() -> None:
    matrices = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    scaled = matrices * torch.tensor([1e-4, 1e3])[:, None, None]
    torch.testing.assert_close(orthogonalised(scaled), orthogonalised(matrices))
    assert not orthogonalised(torch.zeros(1, 3, 4)).any()


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """The published iteration, from its formula."""
    turned = x.shape[0] > x.shape[1]
    x = (x.T if turned else x) / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def test_updates_follow_the_published_rule_part_by_part() -> None:
    model = make_model(torch.float64)
    optimizer = Optimizer(MUON, model)
    matrices = model.layer_matrices()
    expected = {name: tensor.numpy() for name, tensor in bits(dict(model.named_parameters())).items()}
    momentum = {name: np.zeros_like(expected[name]) for name in matrices}
    for step in range(3):
        update(model, optimizer, step)
        rate = 0.01 / (1 + step)
        for name in matrices:
            gradient = dict(model.named_parameters())[name].grad
            assert gradient is not None
            g = gradient.numpy()
            momentum[name] = 0.95 * momentum[name] + g  # Jordan's is this times a constant, which makes no difference
            ahead = g + 0.95 * momentum[name]
            pieces = np.split(ahead, matrices[name])
            steps = [0.2 * math.sqrt(max(piece.shape)) * newton_schulz(piece) for piece in pieces]
            expected[name] = expected[name] * (1 - rate * 0.2) - rate * np.concatenate(steps)
            found = dict(model.named_parameters())[name].detach().numpy()
            np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-12)


def test_heads_gate_and_up_are_matrices_of_their_own() -> None:
    model = make_model()
    for layer in range(model.config.plan.layers):
        attention = model.transformer.layers[layer].attn
        heads = attention.query_heads + 2 * attention.kv_heads
        counts = {"attn.qkv_proj": heads, "attn.out_proj": 1, "ffn.proj_1": 2, "ffn.proj_2": 1}
        for name, count in counts.items():
            assert model.layer_matrices()[f"transformer.layers.{layer}.{name}.weight"] == count
        assert len(attention.qkv_proj.weight) == 4 * heads  # heads of four rows
    assert len(model.layer_matrices()) == 4 * model.config.plan.layers


def test_the_embedding_and_the_norm_scales_follow_adamw() -> None:
    models = [make_model(), make_model()]
    for model, config in zip(models, (MUON, OptimizerConfig(weight_decay=0.2)), strict=True):
        update(model, Optimizer(config, model), 0)
    muon, adamw = (model.state_dict() for model in models)
    for name in muon:
        assert torch.equal(muon[name], adamw[name]) == (name not in models[0].layer_matrices()), name


def test_its_state_is_one_tensor_a_matrix_and_restores_to_the_bit() -> None:
    model = make_model()
    optimizer = Optimizer(MUON, model)
    for step in range(3):
        update(model, optimizer, step)
    weights, state = bits(model.state_dict()), bits(optimizer.state())
    keys = {name: {path.rpartition("/")[2] for path in state if path.startswith(f"{name}/")} for name in weights}
    for name, found in keys.items():
        assert found == ({"momentum"} if name in model.layer_matrices() else {"step", "exp_avg", "exp_avg_sq"})
    again = make_model()
    other = Optimizer(MUON, again)
    other.load(weights.items())
    other.restore(state)
    for step in range(3, 5):
        update(model, optimizer, step)
        update(again, other, step)
    assert all(torch.equal(value, other.weights()[name]) for name, value in optimizer.weights().items())
    assert all(torch.equal(value, other.state()[path]) for path, value in optimizer.state().items())


def test_an_update_is_as_large_as_adamws() -> None:
    """Root mean square 0.2 of a matrix whose gradient has full rank, times the rate (arXiv 2502.16982, eq. 4)."""
    for shape in ((32, 128), (128, 32), (64, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        scaled = orthogonalised(matrix[None])[0] * 0.2 * math.sqrt(max(shape))
        assert float(scaled.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
