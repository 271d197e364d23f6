"""Who follows which rule and is exempt from decay, AdamW's rule, and a state that goes out and back unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openelm.errors import CheckpointError, ConfigError
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.optim.config import OptimizerConfig
from openelm.optim.optimizer import Optimizer, clip_divisor

QKV = "transformer.layers.0.attn.qkv_proj.weight"


def make_model(dtype: torch.dtype = torch.float32, layers: int = 2) -> OpenELM:
    config = ModelConfig.parse(
        {
            "vocab_size": 17,
            "num_transformer_layers": layers,
            "model_dim": 12,
            "head_dim": 4,
            "num_gqa_groups": 1,
            "ffn_dim_divisor": 4,
        }
    )
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    return model.to(dtype)


def update(model: OpenELM, optimizer: Optimizer, step: int) -> None:
    tokens = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(tokens).logsumexp(-1).sum().backward()
    optimizer.step(0.01 / (1 + step), step=step)


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_the_defaults_are_the_published_ones() -> None:
    config = OptimizerConfig()
    assert (config.beta1, config.beta2, config.eps, config.weight_decay) == (0.9, 0.95, 1e-8, 0.1)


@pytest.mark.parametrize("field", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_impossible_coefficients_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        OptimizerConfig.parse({field: value})


def test_exactly_the_norm_scales_are_exempt_from_decay() -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(weight_decay=0.3), model)
    before = bits(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    for name, parameter in model.named_parameters():
        kept = 1.0 if name.endswith("norm.weight") else 1 - 0.5 * 0.3
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_a_frozen_parameter_is_left_to_itself() -> None:
    model = make_model()
    model.transformer.token_embeddings.weight.requires_grad_(False)
    before = bits(model.state_dict())
    optimizer = Optimizer(OptimizerConfig(), model)
    update(model, optimizer, 0)
    assert torch.equal(before["transformer.token_embeddings.weight"], model.transformer.token_embeddings.weight)
    assert not torch.equal(before[QKV], model.state_dict()[QKV])


def test_updates_follow_the_decoupled_rule() -> None:
    model = make_model(torch.float64)
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = Optimizer(config, model)
    expected = bits(dict(model.named_parameters()))
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(4):
        update(model, optimizer, step)
        rate = 0.01 / (1 + step)
        for name, parameter in model.named_parameters():
            gradient, decay = parameter.grad, 0.2 if parameter.ndim == 2 else 0.0
            assert gradient is not None
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            mean, spread = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            expected[name] = expected[name] * (1 - rate * decay) - rate * mean / (spread.sqrt() + 1e-6)
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-13)


def test_state_is_named_by_parameter() -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(), model)
    assert not any(tensor.any() for tensor in optimizer.state().values())
    update(model, optimizer, 0)
    tensors = optimizer.state()
    names = [name for name, _ in model.named_parameters()]
    assert set(tensors) == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {float(tensor) for path, tensor in tensors.items() if path.endswith("/step")} == {1.0}


def test_updates_after_a_restore_are_bitwise_those_without() -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(), model)
    for step in range(3):
        update(model, optimizer, step)
    weights, state = bits(model.state_dict()), bits(optimizer.state())
    for step in range(3, 6):
        update(model, optimizer, step)

    again = make_model()
    again.load_state_dict(weights)
    other = Optimizer(OptimizerConfig(), again)
    other.restore(state)
    assert all(torch.equal(tensor, state[path]) for path, tensor in other.state().items())
    for step in range(3, 6):
        update(again, other, step)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    final, restored = optimizer.state(), other.state()
    assert final.keys() == restored.keys()
    assert all(torch.equal(final[path], restored[path]) for path in final)


@pytest.fixture
def state() -> dict[str, Tensor]:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(), model)
    update(model, optimizer, 0)
    return bits(optimizer.state())


def restore(state: dict[str, Tensor], layers: int = 2) -> None:
    model = make_model(layers=layers)
    Optimizer(OptimizerConfig(), model).restore(state)


def test_the_whole_state_is_taken(state: dict[str, Tensor]) -> None:
    restore(state)


@pytest.mark.parametrize("path", ["nobody/exp_avg", "exp_avg", "", f"{QKV}/deep/exp_avg"])
def test_state_of_no_parameter_is_refused(state: dict[str, Tensor], path: str) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        restore({**state, path: torch.zeros(3)})


@pytest.mark.parametrize("shape", [(12, 36), (35, 12), (1,), (0,), ()], ids=str)
def test_a_moment_of_another_shape_is_refused(state: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="qkv_proj"):
        restore({**state, f"{QKV}/exp_avg": torch.zeros(shape)})


def test_the_state_of_a_deeper_model_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError):
        restore(state, layers=1)


def test_the_state_of_a_shallower_model_is_refused(state: dict[str, Tensor]) -> None:
    shallow = {path: tensor for path, tensor in state.items() if ".layers.1." not in path}
    with pytest.raises(CheckpointError):
        restore(shallow)


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_a_lost_moment_is_refused(state: dict[str, Tensor], lost: str) -> None:
    del state[f"{QKV}/{lost}"]
    with pytest.raises(CheckpointError, match="qkv_proj"):
        restore(state)


def test_a_restored_optimizer_does_not_write_into_what_it_was_given(state: dict[str, Tensor]) -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(), model)
    before = bits(state)
    optimizer.restore(state)
    update(model, optimizer, 1)
    assert all(torch.equal(tensor, before[path]) for path, tensor in state.items())


def test_dividing_on_the_way_is_dividing_before() -> None:
    """A power of two, so that no quotient is rounded."""
    found = []
    for divisor in (None, torch.tensor(4.0)):
        model = make_model()
        optimizer = Optimizer(OptimizerConfig(), model)
        model(torch.arange(9)[None]).logsumexp(-1).sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1 if divisor is not None else 0.25
        optimizer.step(0.01, divisor=divisor)
        found.append({**optimizer.weights(), **optimizer.state()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradients_within_the_limit_are_not_divided() -> None:
    assert clip_divisor(torch.tensor(0.999), 1.0) == 1.0
    assert float(clip_divisor(torch.tensor(3.0), 1.5)) == pytest.approx(2.0)


def test_a_divisor_of_one_leaves_the_gradients_as_they_are() -> None:
    model = make_model()
    optimizer = Optimizer(OptimizerConfig(), model)
    model(torch.arange(9)[None]).logsumexp(-1).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step(0.01, divisor=torch.tensor(1.0))
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
