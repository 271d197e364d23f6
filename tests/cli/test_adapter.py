"""`openelm adapter`: what it writes is what the adapter computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openelm.cli import main
from openelm.model.folder import is_chat_tuned, load_model, save_weights
from openelm.model.weights import in_memory
from openelm.text.tokenizer import load_tokenizer, train_tokenizer

from ..adapters.conftest import LORA, TOKENS, adapted, small

pytest.importorskip("peft")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter on a chat-tuned base with a tokenizer; the base's folder is beside it."""
    from openelm.adapters.adapter import save_adapter

    model = small()
    tokenizer = train_tokenizer(["to be or not to be, that is the question"] * 9, vocab_size=280)
    weights = in_memory(model.state_dict())
    save_weights(tmp_path / "base", model.config, weights, tokenizer=tokenizer, chat_tuned=True)
    save_adapter(tmp_path / "adapter", adapted(LORA, model), LORA, base=tmp_path / "base")
    return tmp_path / "adapter"


def test_a_merged_folder_is_the_adapted_model(adapter: Path, tmp_path: Path) -> None:
    assert main(["adapter", "merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    with torch.no_grad():
        found, expected = load_model(tmp_path / "merged")(TOKENS), adapted(LORA)(TOKENS)
    assert torch.allclose(found, expected, atol=1e-5)
    assert is_chat_tuned(tmp_path / "merged")
    assert load_tokenizer(tmp_path / "merged").vocab_size == 280


def test_the_merged_dtype_can_be_chosen(adapter: Path, tmp_path: Path) -> None:
    main(["adapter", "merge", str(adapter), "-o", str(tmp_path / "merged"), "--dtype", "bfloat16"])
    assert {parameter.dtype for parameter in load_model(tmp_path / "merged").parameters()} == {torch.bfloat16}


def test_a_base_that_moved_is_named(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    merge = ["adapter", "merge", str(adapter), "-o", str(tmp_path / "merged")]
    assert main(merge) == 4
    assert "no such model folder" in capsys.readouterr().err
    assert main([*merge, "--base", str(tmp_path / "moved")]) == 0


def test_mlx_gets_a_folder_of_its_own(adapter: Path, tmp_path: Path) -> None:
    assert main(["adapter", "mlx", str(adapter), "-o", str(tmp_path / "mlx")]) == 0
    names = {file.name for file in (tmp_path / "mlx").iterdir()}
    assert names == {"adapter_config.json", "adapters.safetensors", "manifest.json"}
