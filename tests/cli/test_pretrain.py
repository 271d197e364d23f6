"""A pre-training recipe, made small, trains through the command on files laid out as the recipe says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from openelm.cli import main
from openelm.config import read_toml
from openelm.data.stream import DataConfig
from openelm.text.tokenizer import train_tokenizer
from openelm.train.ledger import read_ledger

RECIPE = Path(__file__).parents[2] / "openelm" / "recipes" / "pretrain-270m.toml"
SMALL = (
    "model.size=5m",
    "data.lanes=4",
    "data.workers=0",
    "data.min_characters=20",
    "data.min_tokens=16",
    "train.steps=2",
    "train.rows=4",
    "train.micro_rows=2",
    "train.length=64",
    "train.precision=fp32",
    "train.device=cpu",
    "schedule.warmup_steps=1",
    "checkpoints.every=1",
)


def write_source(pattern: str, text_key: str, texts: list[str]) -> None:
    """Put texts where a glob of a recipe will find them, with other columns beside the text."""
    name = Path(pattern.replace("**", "deep").replace("*", "part-00000"))
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.suffix == ".parquet":
        table = {text_key: texts, "url": ["https://example.org"] * len(texts), "number": list(range(len(texts)))}
        pyarrow.parquet.write_table(pyarrow.table(table), name)
        return
    rows = "".join(
        json.dumps({"id": str(at), text_key: text, "meta": {"n": at}}) + "\n" for at, text in enumerate(texts)
    )
    name.write_bytes(gzip.compress(rows.encode()) if name.suffix == ".gz" else rows.encode())


def test_a_small_pretrain_recipe_trains(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train_tokenizer(texts, 400).save(tmp_path)
    sources = DataConfig.parse(read_toml(RECIPE)["data"]).sources
    for number, source in enumerate(sources):
        (pattern,) = source.paths
        write_source(pattern, source.text_key, texts[number : number + 3])
    assert main(["train", "pretrain-270m", "--out", "run", *SMALL]) == 0
    events = read_ledger(tmp_path / "run" / "ledger.jsonl")
    steps = [event for event in events if event["event"] == "step"]
    assert [event["tokens"] for event in steps] == [4 * 64, 8 * 64]
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [source["name"] for source in description["data"]["sources"]] == [source.name for source in sources]
    assert all(source["files"] == 1 for source in description["data"]["sources"])
