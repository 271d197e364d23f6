"""An adapter's folder is peft's: each loads what the other saves, and both compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openelm.adapters.adapter import adapter_weights, load_adapter, save_adapter
from openelm.adapters.config import TARGETS, AdapterConfig
from openelm.errors import CheckpointError
from openelm.files.published import verify_folder
from openelm.model.folder import load_model, read_tensors, save_model, write_tensors

from .conftest import (
    ANSWERS,
    DORA,
    DORA_EVERYWHERE,
    LORA,
    TOKENS,
    adapted,
    furthest,
    gradients,
    loss_and_gradients,
    quantized,
    small,
)  # fmt: skip

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")
KINDS = pytest.mark.parametrize("config", [LORA, DORA, DORA_EVERYWHERE], ids=["lora", "dora", "dora-everywhere"])
PLACES = AdapterConfig(rank=4, alpha=8, dropout=0.0, targets=TARGETS[1:], layers=(0, 2))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library asks the Hub about folders that are here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def theirs(base: Path, adapter: Path) -> Any:
    """The adapter as users of transformers load it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


def plain_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("config", [LORA, DORA, DORA_EVERYWHERE, PLACES], ids=["lora", "dora", "all", "layers"])
def test_peft_computes_the_same_logits_loss_and_gradients(config: AdapterConfig, base: Path, tmp_path: Path) -> None:
    model = adapted(config)
    save_adapter(tmp_path / "adapter", model, config, base=base)
    other = theirs(base, tmp_path / "adapter").train()
    logits = other(TOKENS).logits
    expected_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ANSWERS.flatten(), reduction="sum")
    expected = plain_names(gradients(expected_loss, other))

    loss, found = loss_and_gradients(model)
    assert torch.allclose(model(TOKENS), logits, atol=1e-5)
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert furthest(found, expected) < 1e-5


def test_doras_dropout_is_pefts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped numbers are missing in the product with the frozen matrix too; which ones, each draws in its own way."""

    def every_third(x: Tensor, dropout: float) -> tuple[Tensor, float]:
        return (torch.arange(x.numel()) % 3 > 0).view(x.shape), 1.5

    class EveryThird(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept, scale = every_third(x, 1 / 3)
            return x * kept * scale

    config = DORA.model_copy(update={"dropout": 1 / 3})
    model = adapted(config).train()
    save_adapter(tmp_path / "adapter", model, config, base=base)
    other = theirs(base, tmp_path / "adapter").train()
    for module in other.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = EveryThird()
    monkeypatch.setattr("openelm.kernels.adapted.draw_kept", every_third)
    logits = other(TOKENS).logits
    expected_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ANSWERS.flatten(), reduction="sum")
    loss, found = loss_and_gradients(model)
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    assert furthest(found, plain_names(gradients(expected_loss, other))) < 1e-5


@KINDS
def test_peft_merges_the_head_with_the_embedding(config: AdapterConfig, base: Path, tmp_path: Path) -> None:
    model = adapted(config)
    save_adapter(tmp_path / "adapter", model, config, base=base)
    merged = theirs(base, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(TOKENS).logits, model(TOKENS), atol=1e-5)


@KINDS
def test_what_peft_saves_is_loaded(config: AdapterConfig, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(config.targets), use_dora=config.kind == "dora", init_lora_weights=False
    )
    other = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings).eval()
    other.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    assert load_adapter(model, tmp_path / "adapter") == config
    with torch.no_grad():
        expected = other(TOKENS).logits
        assert (model(TOKENS) - expected).abs().max() < 1e-5 * expected.abs().max(), "of logits as large as 50"


@pytest.mark.parametrize("config", [LORA, DORA, DORA_EVERYWHERE, PLACES], ids=["lora", "dora", "all", "layers"])
def test_saved_is_loaded(config: AdapterConfig, base: Path, tmp_path: Path) -> None:
    model = adapted(config)
    save_adapter(tmp_path / "adapter", model, config, base=base, origin={"run": "a run"})
    verify_folder(tmp_path / "adapter")
    again = load_model(base)
    assert load_adapter(again, tmp_path / "adapter") == config
    found, expected = adapter_weights(again), adapter_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "adapter" / "origin.json").read_text())["run"] == "a run"


def test_an_adapter_of_quantised_matrices_is_loaded_on_those(tmp_path: Path) -> None:
    save_model(tmp_path / "base", quantized(4, small()))
    model = adapted(LORA, load_model(tmp_path / "base"))
    save_adapter(tmp_path / "adapter", model, LORA, base=tmp_path / "base")
    load_adapter(again := load_model(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))


def test_a_bf16_copy_of_the_base_is_the_base(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(LORA), LORA, base=base)
    load_adapter(load_model(base, dtype=torch.bfloat16), tmp_path / "adapter")


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(LORA), LORA, base=base)
    other = small()
    with torch.no_grad():
        other.transformer.norm.weight *= 1.1
    with pytest.raises(CheckpointError, match="made for other weights than this model's"):
        load_adapter(other, tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_named_and_the_model_is_left_alone(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, adapted(LORA), LORA, base=base)
    (folder / "manifest.json").unlink()
    tensors = read_tensors(folder / "adapter_model.safetensors")
    wrong = "base_model.model.transformer.layers.1.attn.qkv_proj.lora_A.weight"
    tensors[wrong] = tensors[wrong][:, :-1]
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    model = small()
    with pytest.raises(CheckpointError, match=r"unexpected base_model.model.lm_head.*qkv_proj.lora_A.weight has shape"):
        load_adapter(model, folder)
    assert not model.adapted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA can be read"),
        ({"use_rslora": True}, "use_rslora is True; only False"),
        ({"rank_pattern": {"qkv_proj": 8}}, "rank_pattern is"),
        ({"r": "four"}, "rank: a number is expected"),
    ],
)
def test_settings_that_we_have_not_are_refused(base: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = tmp_path / "adapter"
    save_adapter(folder, adapted(LORA), LORA, base=base)
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(Exception, match=words):
        load_adapter(small(), folder)


def test_a_damaged_file_is_named(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(LORA), LORA, base=base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors.*damaged"):
        load_adapter(small(), tmp_path / "adapter")


def test_a_folder_is_replaced_only_if_asked(base: Path, tmp_path: Path) -> None:
    model = adapted(LORA)
    save_adapter(tmp_path / "adapter", model, LORA, base=base)
    with pytest.raises(CheckpointError, match="exists already"):
        save_adapter(tmp_path / "adapter", model, LORA, base=base)
    save_adapter(tmp_path / "adapter", model, LORA, base=base, replace=True)
