"""The actions of `openelm adapter` and their options; imports nothing that reads models, so help is instant."""

from __future__ import annotations

import argparse
from typing import Any

_MERGE_EXAMPLE = "openelm adapter merge runs/tuned/adapter -o runs/tuned/merged"
_MLX_EXAMPLE = "openelm adapter mlx runs/tuned/adapter -o runs/tuned/mlx-adapter"


def add_adapter_actions(verbs: Any) -> None:
    """Describe the verb and its actions; `main.py` names their handlers."""
    summary = "make a model of an adapter and its base, or hand the adapter to mlx-lm"
    parser = verbs.add_parser("adapter", help=summary, description=summary[0].upper() + summary[1:] + ".")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = _action(actions, "merge", "add an adapter to the matrices of its base: a model folder", _MERGE_EXAMPLE)
    merge.add_argument("--base", metavar="DIR", help="the model that it was made for (default: the one it names)")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights (default: the base's)"
    )
    mlx = _action(actions, "mlx", "write an adapter as mlx_lm.load(…, adapter_path=…) reads it", _MLX_EXAMPLE)
    for action in (merge, mlx):
        action.add_argument("adapter", help="adapter folder, of ours or of peft")
        action.add_argument("-o", "--out", required=True, help="folder to write, which must not exist")


def _action(actions: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
