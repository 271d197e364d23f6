"""Levels 2 to 4: derive the batches of a run again, and do its updates again. Nothing is written anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.data.document import list_bad_rows
from openelm.data.reading import read_documents
from openelm.errors import VerificationError
from openelm.model.folder import weights_sha256
from openelm.model.transformer import OpenELM
from openelm.release.answering import examples_probe
from openelm.release.findings import Findings, Progress
from openelm.release.ground import WEIGHTS_TOLERANCE, Ground, compare_numbers, use_threads
from openelm.release.integrity import compare_tensors
from openelm.release.probes import answerer, sampler
from openelm.release.publication import (
    BadRows,
    Evaluation,
    Finish,
    HeldOutExamples,
    Line,
    Objection,
    Publication,
    Sample,
    Step,
)
from openelm.release.rescore import compare_score, is_tolerant
from openelm.release.segments import Segment
from openelm.text.tokenizer import train_tokenizer
from openelm.train.checkpoint import STATE, Checkpoint, load_checkpoint
from openelm.train.update import Event, Updater

_NUMBERS = frozenset({"loss", "z_loss", "gradient_norm", "learning_rate"})


def check_batches(publication: Publication, ground: Ground, progress: Progress) -> str:
    """Derive every batch from the data and the seed; returns what was compared.

    Raises:
        VerificationError: names the first step whose batch, or the first checkpoint whose cursors, do not follow.
    """
    tokens, last = 0, max(publication.updates, default=0)
    with ground.work.open_batches(None) as stream:
        for update in range(1, last + 1):
            batch = next(stream)
            tokens += batch.inputs.size
            derived = {
                "batch_sha256": batch.sha256,
                "tokens": tokens,
                "target_tokens": int((batch.targets != -100).sum()),
                "target_bytes": batch.target_bytes,
            }
            listed = [line.raw for line in publication.updates[update] if isinstance(line, BadRows)]
            found = [list_bad_rows(batch.bad_rows)] if batch.bad_rows else []
            _same(f"step {update}: rows passed over", [_listing(line) for line in listed], found, publication.ledger)
            for line in publication.updates[update]:
                if isinstance(line, BadRows):
                    continue
                names = derived if isinstance(line, Step) else ("batch_sha256",)
                for name in names:
                    _same(f"step {update}: {name}", line.raw[name], derived[name], publication.ledger)
            if update in publication.checkpoints:
                _compare_cursors(publication, load_checkpoint(publication.folder, update), stream.cursors())
            progress("batches", update, last)
        for line in publication.valid:
            if isinstance(line, Finish) and line.dropped and line.step == last:
                _same("dropped documents", line.dropped, stream.counts(), publication.ledger)
    return f"the batches of {last:,} steps and the cursors of {len(publication.checkpoints)} checkpoints"


def _listing(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": line["count"], "rows": line["rows"]}


def _same(what: str, recorded: object, derived: object, file: Path) -> None:
    if recorded != derived:
        raise VerificationError(f"{what} is {derived!r}, recorded is {recorded!r}", file=file)


def _compare_cursors(publication: Publication, checkpoint: Checkpoint, derived: list[dict[str, Any]]) -> None:
    recorded, path = checkpoint.state["cursors"], publication.checkpoint(checkpoint.step) / STATE
    for lane, (theirs, mine) in enumerate(zip(recorded, _plain(derived), strict=False)):
        _same(f"step {checkpoint.step}: cursors[{lane}]", theirs, mine, path)
    _same(f"step {checkpoint.step}: number of cursors", len(recorded), len(derived), path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def replay_segments(
    publication: Publication,
    ground: Ground,
    segments: Sequence[Segment],
    findings: Findings,
    progress: Progress,
) -> None:
    """Replay segments, each as one check.

    Raises:
        VerificationError: names the first step and field, or the tensor at a segment's end, that differs.
    """
    total = sum(segment.end - segment.start for segment in segments)
    done = 0
    for segment in segments:
        if not all(publication.same_settings(update) for update in range(segment.start + 1, segment.end + 1)):
            done += segment.end - segment.start
            continue  # noted at level 0
        replay = _Replay(publication, ground, findings)
        before = done

        def advance(update: int, segment: Segment = segment, before: int = before) -> None:
            progress("replay", before + update - segment.start, total)

        why = f" ({', '.join(segment.reasons)})" if segment.reasons else ""
        findings.run(f"steps {segment.start + 1} to {segment.end}{why}", lambda: replay.run(segment, advance))  # noqa: B023
        done += segment.end - segment.start


class _Replay:
    """One segment, done again."""

    def __init__(self, publication: Publication, ground: Ground, findings: Findings) -> None:
        self._publication, self._ground, self._findings = publication, ground, findings
        self._updater = Updater(ground.run, ground.work.objective)
        self._measured: dict[int, list[Line]] = {}
        for line in publication.valid:
            if isinstance(line, Evaluation | HeldOutExamples | Sample):
                self._measured.setdefault(line.step, []).append(line)
        self._tolerant = False

    def run(self, segment: Segment, advance: Any) -> str:
        publication, cursors = self._publication, None
        if segment.start:
            checkpoint = load_checkpoint(publication.folder, segment.start)
            self._updater.restore(checkpoint)
            cursors = checkpoint.state["cursors"]
        else:
            self._compare_measurements(0)
        with self._ground.work.open_batches(cursors) as stream:
            for update in range(segment.start + 1, segment.end + 1):
                start = publication.start_of[update]
                self._tolerant = is_tolerant(self._ground, start, self._findings) or self._tolerant
                use_threads(start)
                events, error = self._updater.update(next(stream))
                self._compare_events(update, events)
                if error is None:
                    self._compare_saved(update)
                    self._compare_measurements(update)
                advance(update)
        how = "within tolerances" if self._tolerant else "bit by bit"
        if segment.end not in publication.checkpoints:
            return f"every line, {how}; no checkpoint at the end"
        return f"every line, and the weights, moments and counters at the end, {how}"

    def _compare_events(self, update: int, events: Sequence[Event]) -> None:
        recorded, ledger = self._publication.updates[update], self._publication.ledger
        mine, theirs = [event["event"] for event in events], [line.event for line in recorded]
        _same(f"step {update}: events", theirs, mine, ledger)
        for event, line in zip(events, recorded, strict=True):
            for name in sorted(event.keys() - {"event"}):
                what = f"step {update}: {name}" + (f" of the {line.event}" if isinstance(line, Objection) else "")
                if name in _NUMBERS or name in self._ground.work.objective.statistics:
                    scale = line.raw["loss"] if name == "z_loss" else None  # a small share of the loss
                    compare_numbers(what, line.raw[name], event[name], self._tolerant, ledger, scale)
                else:
                    _same(what, line.raw.get(name), event[name], ledger)

    def _compare_measurements(self, update: int) -> None:
        with self._updater.measuring() as model:
            for line in self._measured.get(update, ()):
                if isinstance(line, HeldOutExamples):
                    self._compare_examples(line, model)
                elif isinstance(line, Evaluation):
                    compare_score(self._publication, self._ground, line, model, self._findings)
                elif isinstance(line, Sample) and not self._tolerant:
                    run = self._ground.run
                    asks = sampler(run, line.prompt) if line.question is None else answerer(run, line.question)
                    found = asks(model, update)
                    _same(f"step {update}: text of the sample", line.text, found["text"], self._publication.ledger)

    def _compare_examples(self, line: HeldOutExamples, model: OpenELM) -> None:
        held_out = self._ground.work.held_out
        if held_out is None:
            raise VerificationError("held-out examples that the run does not name", file=self._publication.ledger)
        found = examples_probe(self._ground.run, held_out).measure(model, line.step)
        for name in sorted(found.keys() - {"event"}):
            what = f"step {line.step}: {name} of held-out examples"
            if name == "examples":
                _same(what, line.examples, found[name], self._publication.ledger)
            else:
                compare_numbers(what, line.raw[name], found[name], self._tolerant, self._publication.ledger)

    def _compare_saved(self, update: int) -> None:
        """Compare with a checkpoint, or with its hashes in the ledger if it is not there any more."""
        if update in self._publication.checkpoints:
            return self._compare_state(update)
        saved = self._publication.saved.get(update)
        if saved is None or self._tolerant:
            return
        for name, recorded, tensors in (
            ("weights_sha256", saved.weights_sha256, self._updater.weights()),
            ("optimizer_sha256", saved.optimizer_sha256, self._updater.moments()),
        ):
            _same(f"step {update}: {name}", recorded, weights_sha256(tensors), self._publication.ledger)

    def _compare_state(self, step: int) -> None:
        checkpoint, folder = load_checkpoint(self._publication.folder, step), self._publication.checkpoint(step)
        pairs = (
            ("the replayed weights", self._updater.weights(), checkpoint.weights, folder),
            ("the replayed moments", self._updater.moments(), checkpoint.optimizer, folder),
        )
        for what, mine, theirs, file in pairs:
            try:
                (_compare_roughly if self._tolerant else compare_tensors)(what, mine, theirs, file)
            except VerificationError as error:
                raise VerificationError(f"step {step}: {error.what}", file=error.file) from None
        mine = self._updater.state.to_json()
        for name in ("tokens", "skips_in_a_row", *(() if self._tolerant else ("recent_losses",))):
            _same(f"step {step}: {name}", checkpoint.state[name], mine[name], folder / STATE)


def _compare_roughly(what: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in mine.items():
        if name not in theirs or tensor.shape != theirs[name].shape:
            raise VerificationError(f"tensor {name} is missing or has another shape", file=file)
        found, recorded = tensor.detach().cpu().double(), theirs[name].double()
        size = float(torch.linalg.vector_norm(recorded))
        apart = float(torch.linalg.vector_norm(found - recorded))
        if not apart <= WEIGHTS_TOLERANCE * size:
            raise VerificationError(f"tensor {name} is {apart / (size or 1):.2%} away from {what}", file=file)


def check_tokenizer(publication: Publication, ground: Ground) -> str:
    """Train the tokenizer again, as the recipe says.

    Raises:
        VerificationError: it is another one.
    """
    config = publication.config
    documents = read_documents(ground.run.manifest, on_bad_row=config.data.on_bad_row)
    tokenizer = train_tokenizer((document.text for document in documents), config.tokenizer.vocab_size)
    recorded = publication.description.tokenizer.sha256
    _same("SHA-256 of the trained tokenizer", recorded, tokenizer.sha256, publication.folder / "tokenizer")
    return f"trained again on the run's text: SHA-256 {recorded[:12]}…"
