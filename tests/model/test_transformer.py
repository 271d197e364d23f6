"""What must hold of any weights: no look ahead, rows and documents apart, one tied matrix, repeatable beginnings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openelm.errors import ConfigError
from openelm.kernels import linear, native
from openelm.model.config import ModelConfig
from openelm.model.device import choose_device
from openelm.model.folder import weights_sha256
from openelm.model.rotary import RotaryTable
from openelm.model.transformer import OpenELM, Recompute

MakeModel = Callable[..., OpenELM]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_changed_token_changes_nothing_before_it(make_model: MakeModel, tokens: Tensor, dtype: torch.dtype) -> None:
    model = make_model(dtype)
    with torch.no_grad():
        before = model(tokens)
        for position in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % 31
            after = model(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])


def test_another_document_in_the_row_changes_nothing(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    documents = torch.tensor([[0] * 5 + [1] * 5 + [2] * 3]).expand(3, -1)
    changed = tokens.clone()
    changed[:, :5] = (changed[:, :5] + 7) % 31
    with torch.no_grad():
        before, after = model(tokens, documents=documents), model(changed, documents=documents)
    assert torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("sizes", [(13,), (1, 12), (5, 8), (6, 1, 6), (3, 4, 2, 4), (1,) * 13])
def test_packed_documents_are_separate_documents(model: OpenELM, tokens: Tensor, sizes: tuple[int, ...]) -> None:
    documents = torch.repeat_interleave(torch.tensor(sizes)).int().expand(3, -1)
    with torch.no_grad():
        packed = model(tokens, documents=documents)
        apart = torch.cat([model(part) for part in torch.split(tokens, sizes, dim=1)], dim=1)
    # Positions count on through the row: only their differences matter, up to the tables' rounding to fp32.
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-6)


def test_documents_may_be_numbered_in_any_way(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    first = torch.tensor([[0] * 5 + [1] * 8]).expand(3, -1)
    second = torch.tensor([[77] * 5 + [-2] * 8], dtype=torch.int32).expand(3, -1)
    with torch.no_grad():
        assert torch.equal(model(tokens, documents=first), model(tokens, documents=second))


def test_rows_do_not_see_each_other(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    changed = tokens.clone()
    changed[0] = (changed[0] + 3) % 31
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_a_batch_is_its_rows(model: OpenELM, tokens: Tensor) -> None:
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in tokens])
        torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_recomputing_layers_gives_equal_bits(make_model: MakeModel, tokens: Tensor, dtype: torch.dtype) -> None:
    gradients = []
    for recompute in get_args(Recompute):
        model = make_model(dtype)
        model.recompute = recompute
        model(tokens).float().logsumexp(-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and torch.equal(gradient, gradients[2][name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["torch's products", "our products"])
def test_selective_recomputing_repeats_no_projection(
    make_model: MakeModel, tokens: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass of a product is two products; only whole layers take their forward products again."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return function(*args, **(kwargs or {}))

    def counted(name: str, *arguments: Any) -> None:
        products.count += name == "gemm"
        native.call(name, *arguments)

    monkeypatch.setattr(linear, "call", counted)
    monkeypatch.setattr(linear, "_beats_torch", lambda dtype: dtype == torch.float32)  # on CPUs where MKL does it too
    counts = {}
    for recompute in get_args(Recompute):
        model = make_model(dtype)
        model.recompute = recompute
        with Products() as products:
            model.hidden(tokens).sum().backward()
        counts[recompute] = products.count
    layers = len(model.transformer.layers)
    ours = dtype == torch.float32 and native.kernels_name() != "torch"
    assert counts["none"] == counts["selective"] == 3 * 4 * layers
    assert counts["full"] == counts["none"] + (4 if ours else 3) * layers, "torch's last product is not taken again"


def test_the_tied_matrix_learns_as_embedding_and_as_head(model: OpenELM, tokens: Tensor) -> None:
    embedding = model.transformer.token_embeddings.weight
    model(tokens).logsumexp(-1).sum().backward()
    tied, embedding.grad = embedding.grad, None
    head = embedding.detach().clone().requires_grad_()
    (model.hidden(tokens) @ head.T).logsumexp(-1).sum().backward()
    assert embedding.grad is not None and head.grad is not None
    assert float(embedding.grad.abs().max()) > 0.1
    assert float(head.grad.abs().max()) > 0.1
    torch.testing.assert_close(tied, embedding.grad + head.grad, rtol=0, atol=1e-10)


def test_the_head_is_the_embedding(model: OpenELM) -> None:
    assert model.head_weight is model.transformer.token_embeddings.weight
    assert "head_weight" not in model.state_dict()


def test_logits_of_hidden_are_the_forward_pass(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        assert torch.equal(model.logits(model.hidden(tokens)), model(tokens))


def test_too_many_positions_are_refused(make_model: MakeModel, odd_config: ModelConfig) -> None:
    model = make_model(config=odd_config.model_copy(update={"rope_max_length": 8}))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
        with pytest.raises(ConfigError, match="9 positions, but the model's rotary table ends at 8"):
            model(torch.zeros(1, 9, dtype=torch.int64))


def initialised(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> OpenELM:
    model = OpenELM(config).to(dtype)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def test_a_beginning_is_fixed_by_its_generator_alone(odd_config: ModelConfig) -> None:
    first = weights_sha256(initialised(odd_config, 5).state_dict())
    torch.manual_seed(99)
    torch.randn(7)
    assert weights_sha256(initialised(odd_config, 5).state_dict()) == first
    assert weights_sha256(initialised(odd_config, 6).state_dict()) != first


def test_initialising_leaves_the_global_generator_alone(odd_config: ModelConfig) -> None:
    before = torch.get_rng_state()
    initialised(odd_config, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_begin_with_the_same_draws_rounded(odd_config: ModelConfig, dtype: torch.dtype) -> None:
    wide, other = initialised(odd_config, 5).state_dict(), initialised(odd_config, 5, dtype).state_dict()
    assert all(torch.equal(wide[name].to(dtype), other[name]) for name in wide)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and `pytest -m gpu`")
def test_a_beginning_does_not_depend_on_the_device(odd_config: ModelConfig) -> None:
    there = OpenELM(odd_config).to("cuda")
    there.initialise(torch.Generator().manual_seed(5))
    assert weights_sha256(there.state_dict()) == weights_sha256(initialised(odd_config, 5).state_dict())


def test_spreads_are_the_published_ones() -> None:
    config = ModelConfig.parse(
        {
            "vocab_size": 400,
            "num_transformer_layers": 3,
            "model_dim": 96,
            "head_dim": 16,
            "num_query_heads": [4, 8, 12],
            "num_kv_heads": [1, 2, 3],
            "ffn_multipliers": [0.5, 1.0, 3.0],
            "ffn_dim_divisor": 16,
        }
    )
    dim, layers = 96, 3
    for name, weight in initialised(config, 0).state_dict().items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = name.endswith(("out_proj.weight", "proj_2.weight"))
        std = (2 * layers) ** -0.5 * dim**-0.5 if residual else dim**-0.5  # all other inputs are `dim` wide
        sampling_error = 5 / math.sqrt(2 * weight.numel())
        assert float(weight.std()) == pytest.approx(std, rel=sampling_error), name
        assert abs(float(weight.mean())) <= 5 * std / math.sqrt(weight.numel()), name


def test_rotary_tables_are_the_exact_values_rounded_once() -> None:
    cos, sin = RotaryTable(6, 10_000).at(2_990, 10, torch.device("cpu"))
    for row, position in enumerate(range(2_990, 3_000)):
        for i in range(3):
            angle = position * 10_000 ** (-2 * i / 6)
            assert float(cos[row, i]) == pytest.approx(math.cos(angle), abs=6e-8)
            assert float(sin[row, i]) == pytest.approx(math.sin(angle), abs=6e-8)


def test_a_grown_rotary_table_keeps_its_beginning() -> None:
    table, cpu = RotaryTable(6, 10_000), torch.device("cpu")
    before = [part.clone() for part in table.at(0, 2_048, cpu)]
    table.at(0, 5_000, cpu)
    assert all(torch.equal(old, new) for old, new in zip(before, table.at(0, 2_048, cpu), strict=True))


def test_stepping_past_a_rotary_tables_end_does_not_compute_it_anew_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, computed = RotaryTable(6, 10_000), []
    compute = table._compute
    monkeypatch.setattr(table, "_compute", lambda *given: computed.append(given) or compute(*given))
    for position in range(2_040, 2_140):
        table.at(position, 1, torch.device("cpu"))
    assert len(computed) <= 3


def test_a_table_made_while_sampling_serves_training(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="no device is called 'gpu'"):
        choose_device("gpu")


def test_a_device_that_is_absent_is_refused_with_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no cuda device; use one of: cpu"):
        choose_device("cuda")
