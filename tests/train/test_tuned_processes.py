"""Several processes tune the model that one process tunes, to the bit with exact numerics; dropout and pairs too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.config import apply_overrides
from openelm.model.folder import weights_sha256
from openelm.train.checkpoint import load_checkpoint
from openelm.train.ledger import read_ledger

from ..conftest import save_tiny_base
from .forks import Launch

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

EXACT = ("train.numerics=exact", "train.shards=4")
KINDS = {
    "adapter with dropout": ('adapter={ kind = "lora", rank = 2, dropout = 0.3 }',),
    "preferences": ("tune.preference.loss=sigmoid",),
}


class Recipe:
    """What a launch starts from."""

    def __init__(self, folder: Path) -> None:
        self.base, self.pairs = save_tiny_base(folder / "base"), folder / "pairs.jsonl"
        rows = ({"prompt": f"{n} is ", "chosen": f"number {n}", "rejected": f"no {n * n}"} for n in range(20))
        self.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def values(self, *overrides: str) -> dict[str, Any]:
        recipe = {
            "tune": {"base": str(self.base)},
            "data": {"sources": [{"name": "pairs", "paths": [str(self.pairs)]}]},
            "train": {
                "steps": 4,
                "rows": 8,
                "length": 64,
                "device": "cpu",
                "precision": "fp32",
                "timeout_seconds": 30,
            },
            "schedule": {"peak": 0.003},
            "checkpoints": {"every": 2},
        }
        return apply_overrides(recipe, overrides)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(Recipe(tmp_path_factory.mktemp("recipe")))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_tune_to_the_bits_of_one(launch: Launch, tmp_path: Path, kind: str) -> None:
    for count in (1, 2):
        launch.run(tmp_path / str(count), count, *EXACT, *KINDS[kind])
    one, two = (load_checkpoint(tmp_path / name, 4) for name in ("1", "2"))
    assert weights_sha256(one.weights) == weights_sha256(two.weights)
    assert weights_sha256(one.optimizer) == weights_sha256(two.optimizer)
    names = ("loss", "gradient_norm", "batch_sha256", "preference_margin")
    losses = [
        [[event.get(name) for name in names] for event in read_ledger(path) if event["event"] == "step"]
        for path in (tmp_path / "1/ledger.jsonl", tmp_path / "2/ledger.jsonl")
    ]
    assert losses[0] == losses[1]


def test_with_fast_numerics_they_see_the_same_batches(launch: Launch, tmp_path: Path) -> None:
    for count in (1, 2):
        launch.run(tmp_path / str(count), count, "train.steps=2")
    losses = [
        [float.fromhex(event["loss"]) for event in read_ledger(path) if event["event"] == "step"]
        for path in (tmp_path / "1/ledger.jsonl", tmp_path / "2/ledger.jsonl")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
