"""mlx-lm computes with our adapters what we do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from openelm.adapters.adapter import save_adapter
from openelm.adapters.config import AdapterConfig
from openelm.adapters.mlx import save_mlx_adapter
from openelm.errors import ConfigError
from openelm.model.folder import save_model
from openelm.text.tokenizer import train_tokenizer

from .conftest import DORA, DORA_EVERYWHERE, LORA, TOKENS, adapted, quantized, small

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("default")
SOME = AdapterConfig(rank=4, alpha=8, targets=("out_proj", "proj_2"), layers=(1,))


@pytest.mark.parametrize(
    ("config", "bits"),
    [(LORA, None), (DORA, None), (SOME, None), (LORA, 4), (SOME, 4)],
    ids=["lora", "dora", "layers", "lora-4bit", "layers-4bit"],
)
def test_mlx_lm_computes_the_same_logits(config: AdapterConfig, bits: int | None, tmp_path: Path) -> None:
    plain = small() if bits is None else quantized(bits, small())
    tokenizer = train_tokenizer(["to be or not to be, that is the question"] * 9, vocab_size=280)
    save_model(tmp_path / "base", plain, tokenizer=tokenizer)
    model = adapted(config, plain).eval()
    save_adapter(tmp_path / "adapter", model, config, base=tmp_path / "base")
    save_mlx_adapter(tmp_path / "mlx", tmp_path / "adapter")
    other, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "mlx"))
    other.eval()
    found = torch.from_numpy(np.array(other(mx.array(TOKENS.numpy()))))
    with torch.no_grad():
        assert torch.allclose(found, model(TOKENS), atol=1e-4)


def test_doras_embedding_is_refused(tmp_path: Path, base: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(DORA_EVERYWHERE), DORA_EVERYWHERE, base=base)
    with pytest.raises(ConfigError, match="lengths of token_embeddings by rows"):
        save_mlx_adapter(tmp_path / "mlx", tmp_path / "adapter")


def test_dora_on_a_quantised_base_is_refused(tmp_path: Path) -> None:
    packed = quantized(4, small())
    save_model(tmp_path / "base", packed)
    save_adapter(tmp_path / "adapter", adapted(DORA, packed), DORA, base=tmp_path / "base")
    with pytest.raises(ConfigError, match="packed columns"):
        save_mlx_adapter(tmp_path / "mlx", tmp_path / "adapter")
