"""CoreNet's checkpoints: bare, of a trainer, with adapters; and what a hostile one is not given."""

from __future__ import annotations

import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openelm.convert.convert import open_source
from openelm.errors import CheckpointError

from .conftest import odd_config, randomised


def bare(seed: int = 0) -> dict[str, Tensor]:
    """A state dict under CoreNet's names."""
    return {n.removeprefix("transformer."): t.clone() for n, t in randomised(odd_config(), seed).state_dict().items()}


def opened(path: Path) -> dict[str, Tensor]:
    with open_source(path) as source:
        return {name: tensor.read() for name, tensor in source.weights.items()}


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def test_a_bare_state_dict_and_a_training_checkpoint_hold_the_same_model(tmp_path: Path) -> None:
    training = {
        "iterations": 5,
        "epoch": 0,
        "model_state_dict": bare(),
        "optim_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "best_metric": 0.5,
        "is_interval_ckpt": False,
    }
    found = [opened(saved(value, tmp_path / f"{n}.pt")) for n, value in enumerate((bare(), training))]
    assert found[0].keys() == found[1].keys() == randomised(odd_config()).state_dict().keys()
    for name, tensor in randomised(odd_config()).state_dict().items():
        assert torch.equal(found[0][name], tensor) and torch.equal(found[1][name], tensor)


def test_names_of_a_data_parallel_model_are_understood(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in bare().items()}
    assert opened(saved(wrapped, tmp_path / "w.pt")).keys() == randomised(odd_config()).state_dict().keys()


def adapted(rank: int, *, dora: bool) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A checkpoint with adapters on every matrix, and the logits that it stands for, computed with them apart."""
    generator = torch.Generator().manual_seed(3)
    plain, wrapped = bare(), dict[str, Tensor]()
    whole = {f"transformer.{name}": tensor.clone() for name, tensor in plain.items()}

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 1:
            wrapped[name] = weight
            continue
        wrapped[f"{module}.base_layer.weight"] = weight
        if name == "token_embeddings.weight":
            down, up = drawn(rank, len(weight)), drawn(weight.shape[1], rank)
            wrapped |= {f"{module}.lora_embedding_A.lora": down, f"{module}.lora_embedding_B.lora": up}
            whole[f"transformer.{name}"] = weight + (up @ down).t()
            continue
        down, up = drawn(rank, weight.shape[1]), drawn(weight.shape[0], rank)
        wrapped |= {f"{module}.lora_A.lora.weight": down, f"{module}.lora_B.lora.weight": up}
        changed = weight + up @ down
        if dora:
            magnitude = torch.rand(len(weight), generator=generator) + 0.5
            wrapped[f"{module}.lora_magnitude_vector.lora"] = magnitude
            changed = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        whole[f"transformer.{name}"] = changed
    model = randomised(odd_config())
    model.load_state_dict(whole)

    def logits(tokens: Tensor) -> Tensor:
        return model.hidden(tokens) @ plain["token_embeddings.weight"].t()  # the output matrix has no adapter

    return wrapped, logits


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_so_that_the_model_computes_the_same(tmp_path: Path, dora: bool) -> None:
    from openelm.model.transformer import OpenELM

    wrapped, expected = adapted(4, dora=dora)
    with open_source(saved(wrapped, tmp_path / "lora.pt")) as source:
        assert any("adapters merged" in note for note in source.notes)
        model = OpenELM(source.config)
        model.load_state_dict({name: tensor.read() for name, tensor in source.weights.items()})
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(tokens) - expected(tokens)).abs().max() < 1e-4


def test_a_part_of_an_adapter_is_not_left_out_in_silence(tmp_path: Path) -> None:
    wrapped, _ = adapted(4, dora=False)
    del wrapped["layers.1.attn.qkv_proj.lora_B.lora.weight"]
    with pytest.raises(CheckpointError, match=r"adapter of layers\.1\.attn\.qkv_proj is not whole"):
        opened(saved(wrapped, tmp_path / "half.pt"))


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, exec, open, socket.create_connection, __import__], ids=lambda f: f.__name__
)
def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, function: Any) -> None:
    canary = tmp_path / "canary"
    arguments = {
        os.system: (f"touch {canary}",),
        exec: (f"open({str(canary)!r}, 'w')",),
        open: (str(canary), "w"),
        socket.create_connection: (("127.0.0.1", 9),),
        __import__: ("antigravity",),
    }[function]
    hostile = saved({**bare(), "extra": Runs(function, *arguments)}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of weights"):
        opened(hostile)
    assert not canary.exists()


def test_a_view_that_repeats_a_few_bytes_without_end_is_refused(tmp_path: Path) -> None:
    huge = {**bare(), "norm.weight": torch.zeros(1).expand(1 << 40)}
    with pytest.raises(CheckpointError, match="larger than the file"):
        opened(saved(huge, tmp_path / "huge.pt"))


@pytest.mark.parametrize(
    "value", [[1, 2], 7, {"a": 1}, {"a": torch.zeros(2, dtype=torch.int64)}, {3: torch.zeros(2)}], ids=str
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError):
        opened(saved(value, tmp_path / "odd.pt"))


def test_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    whole = saved(bare(), tmp_path / "whole.pt").read_bytes()
    for number, data in enumerate(
        (b"", b"PK", whole[:1000], whole[: len(whole) // 2], pickle.dumps(bare()), b"x" * 999)
    ):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            opened(path)


def test_a_compressed_checkpoint_cannot_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    small, bomb = saved(bare(), tmp_path / "small.pt"), tmp_path / "bomb.pt"
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = b"\0" * (1 << 30) if entry.filename.endswith("data/0") else source.read(entry)
            target.writestr(entry.filename, data)
    with pytest.raises(CheckpointError):
        opened(bomb)
