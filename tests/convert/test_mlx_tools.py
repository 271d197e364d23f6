"""mlx-lm's own commands take our folders, and what they write opens here: convert, lora and fuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from openelm.convert.convert import open_source
from openelm.convert.source import Source
from openelm.model.folder import load_model, weights_sha256
from openelm.model.transformer import OpenELM

from .conftest import Command, Publish

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.filterwarnings("default")

TOKENS = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))


def theirs(folder: Path) -> torch.Tensor:
    model, _ = mlx_lm.load(str(folder))
    return torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()))))


def model_of(source: Source) -> OpenELM:
    model = OpenELM(source.config)
    model.load_state_dict({name: tensor.read() for name, tensor in source.weights.items()})
    return model


def ours(folder: Path) -> torch.Tensor:
    with open_source(folder) as source, torch.no_grad():
        return model_of(source)(TOKENS)


def test_a_converted_folder_is_the_same_model(publish: Publish, tmp_path: Path, mlx_command: Command) -> None:
    folder = publish()
    mlx_command("mlx_lm.convert", "--hf-path", folder, "--mlx-path", tmp_path / "mlx")
    assert weights_sha256(load_model(tmp_path / "mlx").state_dict()) == weights_sha256(load_model(folder).state_dict())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantised_folder_is_read(publish: Publish, tmp_path: Path, mlx_command: Command, bits: int) -> None:
    mlx_command("mlx_lm.convert", "--hf-path", publish(), "--mlx-path", tmp_path / "mlx", "-q", "--q-bits", bits)
    assert (theirs(tmp_path / "mlx") - ours(tmp_path / "mlx")).abs().max() < 1e-3


@pytest.mark.parametrize(("kind", "base"), [("lora", "plain"), ("dora", "plain"), ("full", "plain"), ("lora", "4bit")])
def test_tuned_folders_are_read(publish: Publish, tmp_path: Path, mlx_command: Command, kind: str, base: str) -> None:
    """Of three layers of three widths the last two learn; fused, they are the model that was tuned."""
    folder, data = publish(), tmp_path / "data"
    if base == "4bit":
        mlx_command("mlx_lm.convert", "--hf-path", folder, "--mlx-path", tmp_path / base, "-q", "--q-bits", 4)
        folder = tmp_path / base
    data.mkdir()
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog"})
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text(f"{line}\n" * 4)
    schedule = ["--iters", 10, "--batch-size", 2, "--num-layers", 2, "--learning-rate", 1e-2, "--val-batches", 1]
    adapter = ["--adapter-path", tmp_path / "adapter"]
    mlx_command(
        "mlx_lm.lora", "--model", folder, "--train", "--data", data, "--fine-tune-type", kind, *schedule, *adapter
    )
    mlx_command("mlx_lm.fuse", "--model", folder, *adapter, "--save-path", tmp_path / "fused")

    fused = tmp_path / "fused"
    assert (theirs(fused) - ours(fused)).abs().max() < 1e-3
    tuned, _ = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "adapter"))
    apart = np.abs(np.array(tuned(mx.array(TOKENS.numpy()))) - theirs(fused).numpy()).max()
    assert apart < (1 if base == "4bit" else 1e-3), "fused 4-bit matrices are rounded to 4 bits again"
    with open_source(folder) as before, open_source(fused) as after:
        assert after.tokenizer is not None
        changed = {
            name for name in before.weights if not torch.equal(before.weights[name].read(), after.weights[name].read())
        }
        text = torch.tensor([[after.tokenizer.bos_id, *after.tokenizer.encode("the quick brown fox jumps over")]])
        losses = [
            torch.nn.functional.cross_entropy(model_of(source)(text)[0, :-1], text[0, 1:]).item()
            for source in (before, after)
        ]
    assert changed and all(name.startswith(("transformer.layers.1.", "transformer.layers.2.")) for name in changed)
    assert losses[1] < losses[0] - 0.5
