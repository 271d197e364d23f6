"""The model card: what the model is, what it learned from, what it reached, and how to use and repeat it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SOURCES = {"training": "data", "held out": "held_out", "held-out examples": "held_out_examples"}
"""Rows of the card's table by their keys in run.json."""
_USE = '```sh\nopenelm generate . --prompt "Once"\nopenelm chat .\n```\n'
_USE_ADAPTER = "```sh\nopenelm adapter merge . -o MODEL\nopenelm chat MODEL\n```\n"
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
    tune = description["config"].get("tune")
    unit = "examples" if tune else f"× {train['length']} tokens"
    lines = [
        "---\nlibrary_name: openelm-framework\ntags: [openelm, text-generation]\n---\n",
        "# An OpenELM trained with openelm-framework\n",
        f"A decoder-only language model with layer-wise scaled widths: {description['parameters']:,} parameters, "
        f"{len(plan['query_heads'])} layers of width {plan['dim']}, "
        f"{plan['query_heads'][0]} to {plan['query_heads'][-1]} query heads, "
        f"feed-forward widths {plan['ffn_dims'][0]:,} to {plan['ffn_dims'][-1]:,}, "
        f"vocabulary {description['tokenizer']['vocab_size']:,}. "
        + (_tuned(description["config"]) if tune else "It continues text; it was not tuned to chat.\n"),
        "## Training\n",
        f"{train['steps']:,} steps of {train['rows']} {unit}, "
        f"seed {description['seed']}, {description['environment']['precision']}; the weights are "
        f"{_mean_of(averaged_steps)}\n",
        "| source | files | bytes | SHA-256 of its manifest |\n|---|---:|---:|---|",
        *(_source_row(name, description[key]) for name, key in _SOURCES.items() if _says(description, key)),
        "",
        *_results(run / "eval" / "final.json"),
        "## Use\n",
        _USE_ADAPTER if description["config"].get("adapter") else _USE,
        "## Limits\n",
        "A small model trained on little text: fluent fragments, no facts to rely on, and whatever the source texts "
        "say. `manifest.json` has the SHA-256 of every file of this folder.\n",
    ]
    return "\n".join(lines)


def _says(description: dict[str, Any], key: str) -> bool:
    return description.get(key) is not None or key == "held_out"


def _tuned(config: dict[str, Any]) -> str:
    """Say what it was tuned from, to what end, and as what."""
    tune, adapter = config["tune"], config.get("adapter")
    preference = tune["preference"]
    what = "to give the answers of examples" if preference is None else "to prefer the chosen of two answers"
    how = f" ({preference['loss']}, beta {preference['beta']})" if preference else ""
    kinds = {"lora": "LoRA", "dora": "DoRA"}
    whole = f"This folder is a {kinds[adapter['kind']]} adapter of rank {adapter['rank']} for it. " if adapter else ""
    return f"It was tuned from `{Path(tune['base']).name}` {what}{how}. {whole}\n"


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
