"""An implementation of its own, in fp64, computes the same: of small models, and of real ones at full length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openelm.convert.convert import modelling_files
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, save_weights
from openelm.model.sizes import model_size
from openelm.model.weights import in_memory

from .conftest import Publish, odd_config, randomised, shallow
from .plain import plain_logits

LENGTH, TOP = 2048, 20
TIE = 2e-5
"""Logits nearer than this are as good as equal in fp32: rounding alone moves them by up to 1.5e-5."""
SIZES = {size: (0, model_size(size).num_transformer_layers // 2, -1) for size in ("450m", "1.1b", "3b")}
ALONE = """
import sys
sys.modules["openelm"] = None  # as if it were not installed
import torch, transformers
torch.set_num_threads(2)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])[None]).logits[0], sys.argv[3])
"""


@pytest.fixture
def two_threads() -> None:
    """These models are large enough to share; `one_thread` restores the number."""
    torch.set_num_threads(2)


def alone(folder: Path, tokens: Tensor, temporary: Path) -> Tensor:
    """Logits of transformers in a process of its own that has no openelm."""
    torch.save(tokens, temporary / "tokens.pt")
    command = [sys.executable, "-c", ALONE, str(folder), str(temporary / "tokens.pt"), str(temporary / "out.pt")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env={"HF_HOME": str(temporary), "PATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(temporary / "out.pt")


def top(logits: Tensor) -> Tensor:
    return logits.topk(TOP).indices.sort().values


@pytest.mark.parametrize("size", ["odd", "270m"])
def test_a_few_layers_are_the_published_computation(publish: Publish, size: str) -> None:
    folder = publish(odd_config() if size == "odd" else shallow(size))
    tokens = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(folder)(tokens[None])[0]
    assert (ours.double() - plain_logits(folder, tokens)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", ["270m", *SIZES])
def test_all_positions_of_a_context_are_the_published_computation(size: str, tmp_path: Path) -> None:
    """2,048 positions: the 20 likeliest tokens are the same ones at each, but where the 20th and 21st nearly tie.

    The real 270M whole; of every other size the first, the middle and the last layer.
    """
    pytest.importorskip("transformers")
    config: ModelConfig = model_size(size) if size == "270m" else shallow(size, SIZES[size], vocab_size=4096)
    folder = tmp_path / "model"
    save_weights(folder, config, in_memory(randomised(config).state_dict()), code=modelling_files())
    tokens = torch.randint(0, config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(folder)(tokens[None])[0]
    theirs, exact = alone(folder, tokens, tmp_path), plain_logits(folder, tokens)
    twentieth, next_one = exact.topk(TOP + 1).values[:, TOP - 1 :].unbind(1)
    clear = twentieth - next_one > TIE
    report = {
        "size": size,
        "from transformers": float((ours - theirs).abs().max()),
        "from fp64": float((ours.double() - exact).abs().max()),
        "transformers from fp64": float((theirs.double() - exact).abs().max()),
        "positions with a tie": int((~clear).sum()),
        "positions of another top 20": [int((top(logits) != top(exact)).any(1).sum()) for logits in (ours, theirs)],
    }
    print(report)
    assert exact.std() > 0.5, "a model whose logits are all alike would agree with anything"
    assert report["from transformers"] < 1e-4 and report["from fp64"] < 1e-4, report
    assert clear.sum() > 0.99 * LENGTH, report
    for logits in (ours, theirs):
        assert torch.equal(top(logits)[clear], top(exact)[clear]), report
