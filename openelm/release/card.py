"""The model card: what the model is, what it learned from, what it reached, and how to use and repeat it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MEAN_OF = "the mean of the checkpoints of steps "


def _mean_of(steps: Sequence[int]) -> str:
    return f"{_MEAN_OF}{', '.join(map(str, steps))}."


def contradicts(card: str, averaged_steps: Sequence[int]) -> bool:
    """Tell whether a card says that the weights are the mean of other checkpoints; it need not say anything."""
    return card.count(_MEAN_OF) != card.count(_mean_of(averaged_steps))


def model_card(run: Path, averaged_steps: Sequence[int]) -> str:
    """Write the README of a model folder from its run folder.

    Args:
        run: folder with `run.json` and, if it was evaluated, `eval/final.json`.
        averaged_steps: steps of the checkpoints whose mean the weights are.
    """
    description = json.loads((run / "run.json").read_bytes())
    train, plan = description["config"]["train"], description["plan"]
    lines = [
        "---\nlibrary_name: openelm-framework\ntags: [openelm, text-generation]\n---\n",
        "# An OpenELM trained with openelm-framework\n",
        f"A decoder-only language model with layer-wise scaled widths: {description['parameters']:,} parameters, "
        f"{len(plan['query_heads'])} layers of width {plan['dim']}, "
        f"{plan['query_heads'][0]} to {plan['query_heads'][-1]} query heads, "
        f"feed-forward widths {plan['ffn_dims'][0]:,} to {plan['ffn_dims'][-1]:,}, "
        f"vocabulary {description['tokenizer']['vocab_size']:,}. It continues text; it was not tuned to chat.\n",
        "## Training\n",
        f"{train['steps']:,} steps of {train['rows']} × {train['length']} tokens, seed {description['seed']}, "
        f"{description['environment']['precision']}; the weights are {_mean_of(averaged_steps)}\n",
        "| source | files | bytes | SHA-256 of its manifest |\n|---|---:|---:|---|",
        *(_source_row(name, description[key]) for name, key in (("training", "data"), ("held out", "held_out"))),
        "",
        *_results(run / "eval" / "final.json"),
        "## Use\n",
        '```sh\nopenelm generate . --prompt "Once"\nopenelm chat .\n```\n',
        "## Limits\n",
        "A small model trained on little text: fluent fragments, no facts to rely on, and whatever the source texts "
        "say. `manifest.json` has the SHA-256 of every file of this folder.\n",
    ]
    return "\n".join(lines)


def _source_row(name: str, corpus: dict[str, Any] | None) -> str:
    if corpus is None:
        return f"| {name} | 0 | 0 | none |"
    files, size = (sum(source[key] for source in corpus["sources"]) for key in ("files", "bytes"))
    return f"| {name} | {files:,} | {size:,} | `{corpus['sha256'][:16]}…` |"


def _results(path: Path) -> list[str]:
    if not path.exists():
        return []
    result = json.loads(path.read_bytes())
    score = result["bits_per_byte"]
    rows = [(baseline["name"], baseline["bits_per_byte"]) for baseline in result.get("baselines", ())]
    interval = f" (95 % interval {score['low']:.3f} to {score['high']:.3f})" if score["low"] is not None else ""
    return [
        "## Held-out text\n",
        f"{score['value']:.3f} bits per byte{interval} on {score['documents']} documents it has never seen.\n",
        "| method | bits per byte |\n|---|---:|",
        *(f"| {name} | {value:.3f} |" for name, value in rows),
        f"| **this model** | **{score['value']:.3f}** |\n",
    ]
