"""Training learns: the loss falls far below what single-token frequencies can give."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from openelm.data.reading import read_documents
from openelm.train.ledger import number


def test_sixty_steps_beat_the_unigram_entropy_clearly(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path, "train.steps=60", "train.rows=8", "train.length=32", "checkpoints.every=60")
    run = bench.open(tmp_path, "train.steps=60", "train.rows=8", "train.length=32", "checkpoints.every=60")
    counts: Counter[int] = Counter()
    for document in read_documents(run.manifest):
        counts.update([*run.tokenizer.encode(document.text), run.tokenizer.eos_id])
    total = counts.total()
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    losses = [number(event["loss"]) for event in bench.events(tmp_path, "step")]
    assert losses[0] > entropy
    assert sum(losses[-5:]) / 5 < 0.75 * entropy
