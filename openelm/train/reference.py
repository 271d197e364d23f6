"""What the model that preference tuning begins with thinks of both answers of every pair, computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openelm.data.example_stream import ExampleStream
from openelm.data.examples import Examples
from openelm.files.atomic import write_atomic
from openelm.files.hashes import canonical_json, sha256_bytes
from openelm.kernels.attention_gpu import visible_documents
from openelm.model.folder import load_model
from openelm.train.distributed import Processes
from openelm.train.objectives import Rows, answer_log_likelihoods
from openelm.train.run import Run

_PAIRS_AT_ONCE = 16
_TABLE, _KEY = "log_likelihoods", "made_from"

Told = Callable[[int, int], None]


@torch.no_grad()
def reference_log_likelihoods(
    run: Run, examples: Examples, path: Path | None, processes: Processes, told: Told = lambda done, total: None
) -> Tensor:
    """Return the base model's log-likelihoods in nats (pairs, 2), from a file where they are there already.

    They depend on the base, the pairs, the length of rows and the precision alone, so that a run that goes on, at any
    number of processes, and a stranger who repeats it, take the same numbers. Processes share the work.

    Args:
        path: the file that keeps them; None: they are computed, and kept nowhere.
        told: is called with the pairs done and all of them.

    Raises:
        CheckpointError: the base model cannot be read.
        DiskError: the file cannot be written.
    """
    key = _made_from(run, examples)
    known = _read(path, key) if processes.leads and path is not None else None
    if any(processes.gather_json(known is not None)):
        return _added_up(torch.zeros(len(examples), 2) if known is None else known, processes, run.device)
    table = _computed(run, examples, processes, told)
    if processes.leads and path is not None:
        write_atomic(path, save({_TABLE: table}, {_KEY: key}))
    return table


def _computed(run: Run, examples: Examples, processes: Processes, told: Told) -> Tensor:
    assert run.config.tune is not None
    model = load_model(Path(run.config.tune.base), device=run.device).eval()
    if model.quantization is None:
        model = model.float()
    dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
    table = torch.zeros(len(examples), 2)
    done = torch.zeros(len(examples), dtype=torch.bool)
    stream = ExampleStream(examples, seed=0, rows=_PAIRS_AT_ONCE, length=run.config.train.length)
    for count in range(-(-len(examples) // _PAIRS_AT_ONCE)):
        batch = next(stream)
        assert batch.examples is not None
        if count % processes.count != processes.rank:  # whole batches are shared: rows would depend on the count
            done[batch.examples[batch.examples >= 0]] = True
            continue
        documents = torch.from_numpy(batch.documents)
        rows = Rows(
            torch.from_numpy(batch.inputs).to(run.device),
            torch.from_numpy(batch.targets).to(run.device),
            visible_documents(documents, dtype, run.device),
            documents.to(run.device),
            torch.from_numpy(batch.examples).to(run.device),
        )
        with torch.autocast(run.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            values, _ = answer_log_likelihoods(model, rows)
        there = torch.from_numpy(batch.examples) >= 0
        places, found = torch.from_numpy(batch.examples)[there], values.cpu().float()[there]
        new = ~done[places]  # the last batch runs on into pairs that the first ones had
        table[places[new]] = found[new]
        done[places] = True
        told(min((count + 1) * _PAIRS_AT_ONCE, len(examples)), len(examples))
    return _added_up(table, processes, run.device)


def _added_up(table: Tensor, processes: Processes, device: torch.device) -> Tensor:
    """Put the processes' parts together: every number is in one of them, and zero in the others."""
    own = table.to(device)
    processes.add(own)
    return own.cpu()


def _made_from(run: Run, examples: Examples) -> str:
    facts: dict[str, Any] = {
        "base": run.base_sha256,
        "examples": examples.sha256,
        "length": run.config.train.length,
        "precision": run.precision,
    }
    return sha256_bytes(canonical_json(facts))


def _read(path: Path, key: str) -> Tensor | None:
    """Read the file, unless it is missing, damaged or made from something else; then it is made again."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(_TABLE) if (file.metadata() or {}).get(_KEY) == key else None
    except (OSError, SafetensorError):
        return None
