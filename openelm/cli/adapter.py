"""`openelm adapter`: an adapter merged with its base, or as mlx-lm reads it."""

from __future__ import annotations

import argparse
from pathlib import Path

from openelm.cli.screen import Screen


def merge(arguments: argparse.Namespace) -> int:
    """Merge an adapter into the model that it was made for, and write that."""
    import torch

    from openelm.adapters.adapter import load_adapter, merge_adapter
    from openelm.adapters.description import base_named
    from openelm.model.folder import is_chat_tuned, load_model, save_weights
    from openelm.model.weights import in_memory
    from openelm.text.tokenizer import load_tokenizer

    adapter, out = Path(arguments.adapter), Path(arguments.out)
    base = Path(arguments.base or base_named(adapter))
    model = load_model(base)
    config = load_adapter(model, adapter)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    merge_adapter(model, dtype=dtype)
    has_tokenizer = any((base / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    save_weights(
        out,
        model.config,
        in_memory(model.state_dict()),
        tokenizer=load_tokenizer(base) if has_tokenizer else None,
        chat_tuned=is_chat_tuned(adapter) or is_chat_tuned(base),
        origin={"base": str(base), "adapter": str(adapter)},
    )
    Screen().print(f"{out}: {base} with {config.kind} of rank {config.rank} on {', '.join(config.targets)}")
    return 0


def mlx(arguments: argparse.Namespace) -> int:
    """Write an adapter for mlx-lm."""
    from openelm.adapters.mlx import save_mlx_adapter

    save_mlx_adapter(Path(arguments.out), Path(arguments.adapter))
    Screen().print(f"{arguments.out}: mlx_lm.generate --model BASE --adapter-path {arguments.out}")
    return 0
