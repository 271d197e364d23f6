"""A tiny language, a tiny recipe, and a bench that trains it in the test's own process."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from openelm.config import apply_overrides
from openelm.files.atomic import make_folder
from openelm.files.locks import folder_lock
from openelm.model.folder import weights_sha256
from openelm.model.transformer import OpenELM
from openelm.train.checkpoint import load_checkpoint
from openelm.train.ledger import read_ledger, valid_events
from openelm.train.loop import train
from openelm.train.objectives import NextToken
from openelm.train.run import Run, RunConfig, open_run
from openelm.train.work import Work

from ..conftest import tiny_recipe
from .forks import Launch

EXACT = (
    "step",
    "tokens",
    "target_tokens",
    "target_bytes",
    "loss",
    "z_loss",
    "gradient_norm",
    "learning_rate",
    "batch_sha256",
)
NOUNS = ["cat", "dog", "king", "river", "house", "storm", "garden", "letter", "window", "sailor"]
VERBS = ["sees", "finds", "loves", "fears", "follows", "paints", "remembers"]
ADJECTIVES = ["old", "red", "quiet", "small", "bright", "broken"]


def sentences(seed: int, count: int) -> str:
    """English-like text: few words, a fixed grammar, so that a tiny model has something to learn."""
    draw = random.Random(seed)
    return " ".join(
        f"The {draw.choice(ADJECTIVES)} {(noun := draw.choice(NOUNS))} {draw.choice(VERBS)} "
        f"the {draw.choice(NOUNS)}, and the {noun} {draw.choice(VERBS)} it."
        for _ in range(count)
    )


class Interrupted(Exception):
    """What a test throws into the loop instead of pulling the plug."""


class Bench:
    """Makes configs and runs of the tiny recipe, and reads what they left behind."""

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus

    def values(self, *overrides: str) -> dict[str, Any]:
        return apply_overrides(tiny_recipe(self.corpus), overrides)

    def config(self, *overrides: str) -> RunConfig:
        return RunConfig.parse(self.values(*overrides))

    def open(self, folder: Path, *overrides: str, **options: Any) -> Run:
        return open_run(folder, self.config(*overrides), **options)

    def train(
        self,
        folder: Path,
        *overrides: str,
        objective: Any = None,
        observers: Sequence[Any] = (),
        probes: Sequence[Any] = (),
        allow_change: Sequence[str] = (),
    ) -> OpenELM:
        """Start a run, or go on with it, as the command line does."""
        make_folder(folder)
        with folder_lock(folder):
            run = self.open(folder, *overrides, allow_change=allow_change)
            settings = run.config.train
            with contextlib.ExitStack() as streams:

                def open_batches(cursors: list[dict[str, Any]] | None) -> Any:
                    return streams.enter_context(Work(run).open_batches(cursors))

                return train(
                    run,
                    open_batches=open_batches,
                    objective=objective or NextToken(settings.z_loss),
                    observers=observers,
                    probes=probes,
                )

    def train_until(self, folder: Path, step: int, *overrides: str, kind: str = "step", **options: Any) -> None:
        """Train until the event of a kind at a step, and break off there without any chance to save."""

        def interrupt(event: Mapping[str, Any]) -> None:
            if event["event"] == kind and event["step"] == step:
                raise Interrupted

        with pytest.raises(Interrupted):
            self.train(folder, *overrides, observers=(interrupt,), **options)

    def history(self, folder: Path) -> list[tuple[Any, ...]]:
        """Everything of the valid steps that must repeat to the bit."""
        events = valid_events(read_ledger(folder / "ledger.jsonl"))
        return [tuple(event[key] for key in EXACT) for event in events if event["event"] == "step"]

    def events(self, folder: Path, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_ledger(folder / "ledger.jsonl") if event["event"] == kind]

    def fingerprint(self, folder: Path, step: int = 12) -> tuple[Any, ...]:
        """Weights, optimizer moments, data cursors and spike statistics of a checkpoint."""
        checkpoint = load_checkpoint(folder, step)
        return (
            weights_sha256(checkpoint.weights),
            weights_sha256(checkpoint.optimizer),
            json.dumps(checkpoint.state["cursors"], sort_keys=True),
            tuple(checkpoint.state["recent_losses"]),
            checkpoint.state["tokens"],
        )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty documents of the tiny language."""
    path = tmp_path_factory.mktemp("corpus") / "tiny.jsonl"
    path.write_text("".join(json.dumps({"text": sentences(seed, 4 + seed % 9)}) + "\n" for seed in range(50)))
    return path


@pytest.fixture(scope="session")
def bench(corpus: Path) -> Bench:
    return Bench(corpus)


@pytest.fixture(scope="session")
def launch(bench: Bench) -> Launch:
    return Launch(bench)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing happened to, with checkpoints at 3, 6, 9 and 12. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    bench.train(folder)
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a subprocess: one thread, like this process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
