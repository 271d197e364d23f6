"""LoRA and DoRA adapters inside a CoreNet checkpoint, merged into the matrices they adapt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import CheckpointError
from openelm.model.weights import LazyTensor

ADAPTER = "lora"
"""What the published configs call their adapter; it is a part of the names of its tensors."""
_BASE = ".base_layer.weight"
_LINEAR = (f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight")
_EMBEDDING = (f".lora_embedding_A.{ADAPTER}", f".lora_embedding_B.{ADAPTER}")
_MAGNITUDES = (f".lora_magnitude_vector.{ADAPTER}", f".lora_magnitude_vector.{ADAPTER}.weight")
_INPUT, _OUTPUT = "token_embeddings", "lm_head.weight"


def merged(weights: Mapping[str, LazyTensor], file: Path) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Merge adapters, if there are any, with scale 1 (alpha = rank, as all published ones have).

    A projection becomes W + BA (LoRA, arXiv 2106.09685), and m (W + BA) / |W + BA| by rows where it has magnitudes m
    (DoRA, arXiv 2402.09353). The embedding's adapter changes what goes in and not what comes out: its base becomes the
    output matrix, so that the model computes what it did.

    Returns:
        The plain model's tensors, and notes for the user.

    Raises:
        CheckpointError: a part of an adapter is missing.
    """
    left, plain, notes = dict(weights), dict[str, LazyTensor](), list[str]()
    for name in [name for name in weights if name.endswith(_BASE)]:
        module, base = name.removesuffix(_BASE), left.pop(name)
        is_input = module == _INPUT
        down, up = (left.pop(module + part, None) for part in (_EMBEDDING if is_input else _LINEAR))
        magnitude = next((left.pop(module + end) for end in _MAGNITUDES if module + end in left), None)
        if down is None or up is None:
            raise CheckpointError(f"the adapter of {module} is not whole", file=file, fix="copy the file again")
        if is_input:
            plain[_OUTPUT] = base
            notes.append("the embedding had an adapter: the output matrix, which had none, is one of its own now")
        plain[f"{module}.weight"] = _merged(base, down, up, magnitude, transposed=is_input)
    if plain:
        notes.insert(0, "adapters merged with scale 1 (alpha = rank)")
    return left | plain, tuple(notes)


def _merged(
    base: LazyTensor, down: LazyTensor, up: LazyTensor, magnitude: LazyTensor | None, *, transposed: bool
) -> LazyTensor:
    def read() -> Tensor:
        change = up.read().double() @ down.read().double()
        whole = base.read().double() + (change.t() if transposed else change)
        if magnitude is not None:
            whole *= magnitude.read().double().view(-1, 1) / torch.linalg.vector_norm(whole, dim=1, keepdim=True)
        return whole.to(base.dtype).contiguous()

    return LazyTensor(base.dtype, base.shape, read)
