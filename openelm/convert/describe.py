"""What an opened model holds, and what it lacks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from openelm.convert.source import Source
from openelm.model.folder import weights_sha256


def described(source: Source, *, hashes: bool) -> dict[str, Any]:
    """Describe a model as plain data.

    Args:
        hashes: read all weights and hash them, as `final_weights_sha256` of a run does.
    """
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in source.weights.values())
    tokenizer = source.tokenizer
    found: dict[str, Any] = {
        "layout": source.layout,
        "weights": f"{', '.join(dtypes)}, {len(source.weights)} tensors",
        "bytes": source.stored_bytes or sum(tensor.bytes for tensor in source.weights.values()),
        "chat": "tuned to chat" if source.chat_tuned else "a base model",
        "notes": list(source.notes),
        "missing": _missing(source),
    }
    if source.packing is not None:
        found["quantised"] = f"{source.packing['bits']} bits by groups of {source.packing['group_size']}"
    if tokenizer is not None:
        found["tokenizer"] = f"{tokenizer.file_name}, {tokenizer.vocab_size:,} ids, SHA-256 {tokenizer.sha256}"
    if hashes:
        found["sha256"] = weights_sha256({name: tensor.read() for name, tensor in source.weights.items()})
    return found


def _missing(source: Source) -> list[str]:
    if source.tokenizer is None:
        return ["a tokenizer: openelm convert … --tokenizer FILE attaches one"]
    return []
