"""A tiny random model and the tokenizer of plain bytes."""

from __future__ import annotations

import pytest
import torch

from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer, Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, 256 is BOS, 257 is EOS."""
    return ByteTokenizer()


@pytest.fixture(scope="session")
def model() -> OpenELM:
    """Two layers, 48 wide, a context of 96, and two ids more than the tokenizer has."""
    config = ModelConfig.parse(
        {
            "vocab_size": 260,
            "max_context_length": 96,
            "num_transformer_layers": 2,
            "model_dim": 48,
            "head_dim": 8,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 16,
        }
    )
    made = OpenELM(config)
    made.initialise(torch.Generator().manual_seed(7))
    return made
