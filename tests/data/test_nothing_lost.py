"""No token is lost or comes twice, however often a run is killed and resumed with another number of processes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from openelm.data.lanes import DocumentOrder
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.stream import BatchStream, DataConfig
from openelm.text.tokenizer import ByteTokenizer

Corpora = list[tuple[SourceConfig, Manifest, list[str]]]


@dataclass(frozen=True)
class Start:
    """One start of a run: so many processes, the steps they do, and how many of those are in its last checkpoint."""

    processes: int
    steps: int
    kept: int
    workers: int = 0
    """Worker processes of each process."""


@dataclass(frozen=True)
class Case:
    corpus: int
    seed: int
    rows: int
    lanes: int
    length: int
    starts: tuple[Start, ...]


@st.composite
def cases(draw: st.DrawFn, workers: int = 0, most_starts: int = 4) -> Case:
    rows, lanes = draw(st.sampled_from([(4, 4), (8, 4), (4, 8), (8, 8), (4, 16)]))
    starts = []
    for _ in range(draw(st.integers(1, most_starts))):
        steps = draw(st.integers(0, 6))
        processes, kept = draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, steps))
        starts.append(Start(processes, steps, kept, draw(st.integers(0, min(workers, 4 // processes)))))
    shape = (draw(st.integers(0, 2)), draw(st.integers(0, 3)), rows, lanes, draw(st.integers(1, 60)))
    return Case(*shape, tuple(starts))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Three bodies of text: 3, 40 and 150 documents of 4 to about 300 bytes, each with its own number in it."""
    made = []
    random = np.random.Generator(np.random.PCG64(3))
    for documents in (3, 40, 150):
        path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
        texts = [f"{at:03d} " + f"<{at}>" * int(random.integers(0, 60)) for at in range(documents)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = SourceConfig(name="text", paths=(str(path),))
        made.append((source, build_manifest([source]), texts))
    return made


def run(case: Case, source: SourceConfig, manifest: Manifest, folder: Path) -> list[list[list[int]]]:
    """Go through all starts; returns the rows of inputs that each lane gave in steps that were kept."""
    config = DataConfig(sources=(source,), lanes=case.lanes, min_characters=0, min_tokens=0)
    lanes: list[list[list[int]]] = [[] for _ in range(case.lanes)]
    state: list[dict[str, Any]] | None = None
    done = 0
    for start in case.starts:
        streams = [
            BatchStream(
                config.model_copy(update={"workers": start.workers}), manifest, ByteTokenizer(), folder, seed=case.seed,
                rows=case.rows, length=case.length, part=(rank, start.processes), cursors=json.loads(json.dumps(state)),
            )
            for rank in range(start.processes)
        ]  # fmt: skip
        for step in range(start.steps + 1):
            if step == start.kept:  # the checkpoint: each process has the cursors of its own lanes
                parts = [stream.cursors() for stream in streams]
                saved = [parts[0][0], *(parts[lane % start.processes][1 + lane] for lane in range(case.lanes))]
            if step == start.steps:
                break  # killed; what came after the checkpoint is forgotten
            batches = [next(stream) for stream in streams]
            for row in range(case.rows if step < start.kept else 0):
                place = (done + step) * case.rows + row
                inputs = batches[row % start.processes].inputs[row // start.processes]
                lanes[place % case.lanes].append(inputs.tolist())
        state, done = saved, done + start.kept
        for stream in streams:
            stream.close()
    assert state is not None and state[0]["batches"] == done
    return lanes


def undisturbed(case: Case, manifest: Manifest, texts: list[str], lane: int) -> itertools.chain[tuple[Any, int]]:
    """Yield (place, token) of a lane without end, by the order alone; a place is (epoch, document, index in it)."""
    order, tokenizer = DocumentOrder(manifest.sources[0], seed=case.seed, lanes=case.lanes), ByteTokenizer()

    def documents(epoch: int) -> Any:
        for _, row in order.documents(lane, epoch):
            ids = [tokenizer.bos_id, *tokenizer.encode(texts[row]), tokenizer.eos_id]
            yield from (((epoch, row, index), token) for index, token in enumerate(ids))

    return itertools.chain.from_iterable(documents(epoch) for epoch in itertools.count())


def check(case: Case, corpora: Corpora, folder: Path) -> None:
    source, manifest, texts = corpora[case.corpus]
    steps = sum(start.kept for start in case.starts)
    counts: Counter[Any] = Counter()
    for lane, rows in enumerate(run(case, source, manifest, folder)):
        found = [token for row in rows for token in row]
        expected = list(itertools.islice(undisturbed(case, manifest, texts, lane), len(found)))
        assert found == [token for _, token in expected], f"lane {lane}"
        counts.update(place for place, _ in expected)
    assert sum(counts.values()) == steps * case.rows * case.length
    assert set(counts.values()) <= {1}, "a place of an epoch belongs to one lane"


@pytest.mark.parametrize("count", [60, pytest.param(940, marks=pytest.mark.faults)])
def test_each_token_comes_once_over_kills_resumes_and_changes_of_the_number_of_processes(
    count: int, corpora: Corpora, tokenizer_path: Path, check_distinct: Callable[..., None]
) -> None:
    check_distinct(cases(), count, lambda case: check(case, corpora, tokenizer_path))


@pytest.mark.faults
def test_each_token_comes_once_over_changes_of_the_number_of_worker_processes_too(
    corpora: Corpora, tokenizer_path: Path, check_distinct: Callable[..., None]
) -> None:
    """With the 940 above a thousand histories; starting workers takes nearly all of the time of these."""
    drawn = cases(workers=2, most_starts=3)
    with_workers = drawn.filter(lambda case: any(start.steps and start.workers for start in case.starts))
    check_distinct(with_workers, 60, lambda case: check(case, corpora, tokenizer_path))


def test_the_check_sees_a_token_that_is_lost(
    corpora: Corpora, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = BatchStream.cursors

    def late(stream: BatchStream) -> list[dict[str, Any]]:
        cursors = plain(stream)
        return [cursors[0], *({**lane, "offset": lane["offset"] + 1} if lane else lane for lane in cursors[1:])]

    monkeypatch.setattr(BatchStream, "cursors", late)
    with pytest.raises(AssertionError, match="lane"):
        check(Case(2, 0, 4, 4, 7, (Start(2, 3, 2), Start(1, 4, 4))), corpora, tokenizer_path)
