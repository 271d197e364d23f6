"""Packed models against the ones they were made of: the same numbers, and nothing but generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.kernels import native
from openelm.model.config import ModelConfig
from openelm.model.decoding import Decoder
from openelm.model.folder import load_model, save_model
from openelm.model.packed import is_packed, load_packed, pack_model
from openelm.model.transformer import Linear, OpenELM

from .conftest import MakeFolder, random_model, some_ids

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}
"""Between logits of about 5, as in test_decoding.py."""


def made_packed(model: OpenELM) -> OpenELM:
    found = pack_model(model)
    assert found is not None and is_packed(found) and not is_packed(model)
    return found


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def config(odd_config: ModelConfig, request: pytest.FixtureRequest) -> ModelConfig:
    return odd_config.model_copy(update={"share_input_output_layers": request.param})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_the_same(config: ModelConfig, dtype: torch.dtype) -> None:
    model = random_model(config, dtype)
    ids = some_ids(model, 2, 30)
    with torch.no_grad():
        found, wanted = made_packed(model)(ids), model(ids)
    assert found.dtype == wanted.dtype == dtype
    assert (found - wanted).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_is_packed_as_it_is(make_folder: MakeFolder, bits: int) -> None:
    folder = make_folder(bits)
    model, found = load_model(folder), load_packed(folder)
    ids = some_ids(model, 1, 20)
    with torch.no_grad():
        assert (found(ids) - model(ids)).abs().max() <= 2e-3  # inputs are rounded to 16 bits
    assert Decoder(found, 1, 4)._kernel is not None


def test_a_folder_is_packed_as_the_model_in_memory_is(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_model(tmp_path / "m", model)
    ids = some_ids(model, 1, 20)
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "m")(ids), made_packed(model)(ids))


def test_later_changes_of_the_weights_are_not_seen(odd_config: ModelConfig) -> None:
    model = random_model(odd_config)
    found, ids = made_packed(model), some_ids(model, 1, 5)
    with torch.no_grad():
        before = found(ids)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(found(ids), before)


class Doubled(Linear):
    """Stands for an adapter: it computes more than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wide(model: OpenELM) -> OpenELM:
    return model.double()


def elsewhere(model: OpenELM) -> OpenELM:
    return model.to("meta")


def adapted(model: OpenELM) -> OpenELM:
    projection = model.get_submodule("transformer.layers.1.attn.out_proj")
    assert isinstance(projection, Linear)
    doubled = Doubled(projection.in_features, projection.out_features)
    doubled.weight = projection.weight
    model.set_submodule("transformer.layers.1.attn.out_proj", doubled)
    return model


def with_other_norms(model: OpenELM) -> OpenELM:
    model.transformer.norm.half()
    return model


@pytest.mark.parametrize("change", [wide, elsewhere, adapted, with_other_norms])
def test_what_the_kernels_do_not_take_is_not_packed(
    odd_config: ModelConfig, change: Callable[[OpenELM], OpenELM]
) -> None:
    assert pack_model(change(random_model(odd_config))) is None


def test_biases_of_another_dtype_are_not_taken_for_scales(make_folder: MakeFolder) -> None:
    model = load_model(make_folder())
    projection = model.get_submodule("transformer.layers.1.attn.out_proj")
    projection.biases = projection.biases.bfloat16()
    assert pack_model(model) is None


def test_rows_that_are_not_there_are_an_error(odd_config: ModelConfig) -> None:
    found = made_packed(random_model(odd_config))
    for token in (-1, odd_config.vocab_size):
        with pytest.raises(IndexError, match="outside"):
            found(torch.tensor([[0, token]]))


def test_an_adapter_counts_in_generation(odd_config: ModelConfig) -> None:
    model = adapted(random_model(odd_config))
    ids = some_ids(model, 6)
    decoder = Decoder(model, 1, 10)
    decoder.prefill(0, ids[:5].tolist())
    with torch.no_grad():
        torch.testing.assert_close(decoder.step([int(ids[5])], [0])[0], model(ids[None])[0, -1], atol=2e-5, rtol=0)


def test_a_packed_model_is_neither_saved_nor_trained(odd_config: ModelConfig, tmp_path: Path) -> None:
    found = made_packed(random_model(odd_config))
    with pytest.raises(ConfigError, match="packed for generation"):
        save_model(tmp_path / "m", found)
    with pytest.raises(ConfigError, match="packed for generation"):
        _ = found.head_weight
    assert not (tmp_path / "m").exists()


def test_without_kernels_a_folder_is_loaded_as_it_is(
    odd_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", random_model(odd_config))
    monkeypatch.setattr("openelm.model.packed.kernels_name", lambda: "torch")
    assert not is_packed(load_packed(tmp_path / "m"))
