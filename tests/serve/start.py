"""Serve a model folder with limits given as JSON: what the command does, but with numbers a test can wait for."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import torch

from openelm.model.folder import load_model
from openelm.serve.budgets import Budget
from openelm.serve.limits import Limits
from openelm.serve.run import Place, Served, serve
from openelm.text.tokenizer import load_tokenizer


def main() -> None:
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    budget = given.pop("budget", {})
    if "clock" in budget:  # a file of nanoseconds: what a test writes there is the time
        clock = Path(budget["clock"])
        budget["clock"] = lambda: int(clock.read_text())
    served = Served(
        model=load_model(folder),
        tokenizer=load_tokenizer(folder),
        name="tiny",
        budget=Budget(**budget),
        limits=Limits(**given.pop("limits", {})),
        **{"chat_tuned": False, **given.pop("served", {})},
    )
    asyncio.run(serve(served, Place(port=0, **given), lambda address: print(address, flush=True)))


main()
