"""The one training loop: batches and an objective in, checkpoints and a ledger out, resumable to the bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from openelm.data.document import Drops, add_drops
from openelm.data.stream import Batch
from openelm.errors import CheckpointError, ConfigError, NumericError, Stopped, VerificationError
from openelm.files.atomic import make_folder, set_aside
from openelm.files.hashes import canonical_json, sha256_bytes
from openelm.model.device import matmul_flops_per_second
from openelm.model.folder import weights_sha256
from openelm.model.parts import own_part, parts
from openelm.model.transformer import OpenELM
from openelm.train.checkpoint import (
    checkpoint_folder,
    clean_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    thin_checkpoints,
)
from openelm.train.distributed import ALONE, Processes
from openelm.train.environment import environment
from openelm.train.ledger import Ledger
from openelm.train.objectives import Objective
from openelm.train.run import Run
from openelm.train.saving import Saver
from openelm.train.update import Event, Launched, Updater

Observer = Callable[[Event], None]


class Batches(Protocol):
    """An endless, resumable source of this process's rows of the batches."""

    def __next__(self) -> Batch: ...

    def cursors(self) -> list[dict[str, Any]]:
        """Return the state after the last batch given."""

    def counts(self) -> Mapping[str, Any]:
        """Count the documents dropped so far: source -> reason -> documents."""


@dataclass(frozen=True)
class Probe:
    """Something to measure now and then; `measure` returns the event for the ledger."""

    every: int
    measure: Callable[[OpenELM, int], Event]
    at_start: bool = False
    """Whether to measure before the first step too."""


def train(
    run: Run,
    *,
    open_batches: Callable[[list[dict[str, Any]] | None], Batches],
    objective: Objective,
    probes: Sequence[Probe] = (),
    observers: Sequence[Observer] = (),
    processes: Processes = ALONE,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> OpenELM:
    """Train to the run's last step, from its newest good checkpoint if it has one.

    The caller holds the run folder's lock. With several processes each calls this; the first one writes the folder.

    Args:
        open_batches: makes this process's batches from saved cursors, or from the beginning for None.
        observers: called with every ledger event of this start, in order, in the first process.
        facts: what the ledger records of this start besides.

    Raises:
        Stopped: a signal came; the state is saved.
        NumericError: a loss or gradient was not finite and the run's policy is to stop.
        CheckpointError: checkpoints exist and none of them is whole.
        ProcessError: another process died or does not answer.
    """
    _check_processes(run, processes)
    with ExitStack() as opened:
        opened.enter_context(processes.name_the_missing())
        ledger = None
        if processes.leads:
            make_folder(run.folder / "checkpoints")
            clean_checkpoints(run.folder)
            ledger = opened.enter_context(Ledger(run.ledger_path))
        saver = opened.enter_context(Saver(run.folder, processes, background=run.config.checkpoints.background))
        trainer = _Trainer(run, objective, probes, observers, ledger, saver, processes, facts)
        return trainer.train(open_batches)


def _check_processes(run: Run, processes: Processes) -> None:
    settings = run.config.train
    if settings.numerics == "exact" and settings.shards % processes.count:
        raise ConfigError(
            f"{processes.count} processes for {settings.shards} shards",
            fix=f"start at most {settings.shards} processes, a power of two",
        )


class _Trainer:
    """The state of one start of a run."""

    def __init__(
        self,
        run: Run,
        objective: Objective,
        probes: Sequence[Probe],
        observers: Sequence[Observer],
        ledger: Ledger | None,
        saver: Saver,
        processes: Processes,
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.run, self.probes, self.observers, self.facts = run, probes, observers, facts
        self.ledger, self.saver, self.processes = ledger, saver, processes
        self.config = run.config.train
        self.updater = Updater(run, objective, processes)
        self.state = self.updater.state
        self.launched: tuple[Launched, float, float] | None = None
        """An update that is to be recorded, when its batch was asked for, and when it began."""
        self.recorded = 0.0
        dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
        self.matmul_flops = matmul_flops_per_second(run.device, dtype) * processes.count
        self.flops_per_token = run.model_config.plan.training_flops_per_token(
            run.model_config.vocab_size, self.config.length
        )

    def train(self, open_batches: Callable[[list[dict[str, Any]] | None], Batches]) -> OpenELM:
        cursors = self._restore()
        if self.state.step >= self.config.steps:
            if self.ledger and self.ledger.last_event != "finish":  # killed before the last line
                self._finish({})
            return self.updater.model
        batches = open_batches(cursors)
        clock = _Clock(self.state.seconds)
        with _stop_requests() as stop_signals:
            if cursors is None:
                self._measure(lambda probe: probe.at_start)
            while self.state.step < self.config.steps:
                self._step(batches)
                last = self.state.step == self.config.steps
                saving = last or self.state.step % self.run.config.checkpoints.every == 0
                measuring = last or any(self.state.step % probe.every == 0 for probe in self.probes)
                if saving or measuring or not self.updater.runs_ahead:
                    self._record_launched()
                self.state.seconds = clock.seconds()
                self._measure(lambda probe: last or self.state.step % probe.every == 0)  # noqa: B023
                self.state.seconds = clock.seconds()
                self._take(wait=False)
                stopping = self.processes.any_true(bool(stop_signals))
                if stopping or saving:
                    self._record_launched()
                    self._save(self._all_cursors(batches))
                if (stopping or last) and self.run.config.checkpoints.background:
                    self._take(wait=True)
                if stopping and not last:
                    self._stop(stop_signals[0] if stop_signals else "another process")
        self._finish(self._all_drops(batches))
        return self.updater.model

    def _record(self, event: Event) -> None:
        """Write an event to the ledger and show it; only the first process does."""
        if self.ledger is None:
            return
        self.ledger.append(event)
        for observer in self.observers:
            observer(event)

    def _sync(self) -> None:
        if self.ledger is not None:
            self.ledger.sync()

    def _step(self, batches: Batches) -> None:
        """Take a batch, begin an update with it, and meanwhile record the one before, if that is still to do.

        Raises:
            NumericError: see `_record_launched`.
        """
        asked = time.perf_counter()
        try:
            batch = next(batches)
            began = time.perf_counter()
            launched = self.updater.launch(batch)
        finally:
            self._record_launched()
        self.launched = launched, asked, began

    def _record_launched(self) -> None:
        """Wait for the update that was begun last, unless that was recorded, and record it.

        Raises:
            NumericError: the policy is to stop, or too many updates in a row were skipped.
        """
        if self.launched is None:
            return
        (launched, asked, began), self.launched = self.launched, None
        events, error = self.updater.finish(launched)
        done = time.perf_counter()
        seconds, self.recorded = done - max(began, self.recorded), done
        tokens = launched.totals.tokens
        speed = {
            "seconds": round(seconds, 6),
            "wait_seconds": round(began - asked, 6),
            "tokens_per_second": round(tokens / seconds, 2),
        }
        if self.run.config.tune is None:  # what is not learned, and what an adapter saves, has other costs
            speed["mfu"] = round(tokens * self.flops_per_token / seconds / self.matmul_flops, 4)
        for event in events:
            self._record({**event, **speed} if event["event"] == "step" else event)
        if error is not None:
            self._sync()
            raise error

    def _measure(self, due: Callable[[Probe], bool]) -> None:
        """Take the measurements that are due: in the first process, or in all of them that share the model."""
        step = self.state.step
        for probe in self.probes if self.processes.leads or self.updater.sharded else ():
            if due(probe):
                with self.updater.measuring() as model:
                    self._record({"step": step, **probe.measure(model, step)})

    def _finish(self, dropped: Mapping[str, Any]) -> None:
        seconds = round(self.state.seconds, 3)
        self._record({"event": "finish", "step": self.state.step, "seconds": seconds, "dropped": dropped})
        self._sync()

    def _stop(self, name: str) -> None:
        self._record({"event": "stop", "step": self.state.step, "reason": name})
        self._sync()
        raise Stopped(
            f"stopped by {name} after step {self.state.step}; everything is saved",
            fix="run the same command again to go on",
        )

    def _restore(self) -> list[dict[str, Any]] | None:
        """Load the newest good checkpoint and bring the ledger to it; returns the data cursors."""
        if self.ledger is None:
            return self._follow()
        checkpoint, damage = newest_checkpoint(self.run.folder)
        if checkpoint is None and damage:
            raise damage[0][1]
        for step, error in damage:
            set_aside(checkpoint_folder(self.run.folder, step))
            self._record({"event": "damage", "step": checkpoint.step if checkpoint else 0, "reason": str(error)})
        recorded = self.ledger.furthest_step
        if checkpoint is not None and checkpoint.step > recorded:
            raise CheckpointError(
                f"the ledger ends at step {recorded}, before the checkpoint of step {checkpoint.step}",
                file=self.run.ledger_path,
                fix="restore the run's own ledger.jsonl",
            )
        self.processes.gather_json(checkpoint.step if checkpoint else None)
        if checkpoint is None:
            if self.ledger.last_event is not None:
                self._record({"event": "rewind", "step": recorded, "to": 0})
            self._record({"event": "start", "step": 0, **self._surroundings()})
            return None
        self.updater.restore(checkpoint)
        self.state = self.updater.state
        if self.state.step < self.config.steps:
            self._record({"event": "rewind", "step": recorded, "to": checkpoint.step})
            digest = {"manifest_sha256": checkpoint.manifest_sha256}
            self._record({"event": "resume", "step": checkpoint.step, **digest, **self._surroundings()})
        cursors: list[dict[str, Any]] = checkpoint.state["cursors"]
        return cursors

    def _follow(self) -> list[dict[str, Any]] | None:
        """Load the checkpoint that the first process chose."""
        step = self.processes.gather_json(None)[0]
        if step is None:
            return None
        checkpoint = load_checkpoint(self.run.folder, step)
        self.updater.restore(checkpoint)
        self.state = self.updater.state
        cursors: list[dict[str, Any]] = checkpoint.state["cursors"]
        return cursors

    def _surroundings(self) -> dict[str, Any]:
        return {
            "config_sha256": sha256_bytes(canonical_json(self.run.config.model_dump(mode="json"))),
            "parameters": self.run.model_config.parameters,
            "matmul_flops_per_second": self.matmul_flops,
            "data_sha256": self.run.manifest.sha256,
            "tokenizer_sha256": self.run.tokenizer.sha256,
            "processes": self.processes.count,
            "environment": environment(self.run.device, self.run.precision),
            **self.facts,
        }

    def _all_cursors(self, batches: Batches) -> list[dict[str, Any]]:
        """Put the lanes' cursors together: lane l is read by process l % count."""
        shares = self.processes.gather_json(batches.cursors())
        return [shares[0][0], *(shares[lane % len(shares)][1 + lane] for lane in range(len(shares[0]) - 1))]

    def _all_drops(self, batches: Batches) -> Drops:
        total: Drops = {}
        for part in self.processes.gather_json(batches.counts()):
            add_drops(total, part)
        return total

    def _save(self, cursors: list[dict[str, Any]]) -> None:
        """Publish a checkpoint; all processes take part.

        Raises:
            NumericError: a weight is not finite.
            VerificationError: processes that must hold the same weights do not.
        """
        weights, moments, step = self.updater.weights(), self.updater.moments(), self.state.step
        self._compare(weights)
        if self.processes.any_true(not all(bool(torch.isfinite(own_part(value)).all()) for value in weights.values())):
            raise NumericError(
                f"weights are not finite at step {step}; no checkpoint was written",
                fix="the previous checkpoint is intact: go on from it with a lower schedule.peak",
            )
        self._sync()
        head = self.ledger.head if self.ledger else ""
        self._take(wait=True)
        self.saver.save(step, weights, moments, {**self.state.to_json(), "cursors": cursors, "ledger_head": head})
        self._take(wait=not self.run.config.checkpoints.background)

    def _compare(self, weights: Mapping[str, Tensor]) -> None:
        """Compare the weights of processes that hold the same ones."""
        if self.processes.count == 1:
            return
        _, count = parts(weights)
        digest = weights_sha256({name: own_part(value) for name, value in weights.items()})
        digests = self.processes.gather_json(digest)
        for rank, found in enumerate(digests):
            if found != digests[rank % count]:
                raise VerificationError(
                    f"the weights of process {rank} differ from those of process {rank % count} at step "
                    f"{self.state.step}; no checkpoint was written",
                    fix="a machine computes wrongly: the same command goes on from the last checkpoint without it",
                )

    def _take(self, *, wait: bool) -> None:
        """Record a checkpoint that was saved, and thin the older ones."""
        saved = self.saver.take(wait=wait)
        if saved is None:
            return
        self._record(saved)
        self._sync()
        thin_checkpoints(self.run.folder, self.run.config.checkpoints, finished=saved["step"] == self.config.steps)


class _Clock:
    """Seconds since the run began, not counting the time between its starts."""

    def __init__(self, seconds_before: float) -> None:
        self._origin = time.perf_counter() - seconds_before

    def seconds(self) -> float:
        return time.perf_counter() - self._origin


@contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """Collect the names of stop signals; a second one of a kind acts as if nobody listened."""
    received: list[str] = []

    def remember(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {}
    try:
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            previous[kind] = signal.signal(kind, remember)
    except ValueError:  # signals can only be caught in the main thread
        pass
    try:
        yield received
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)
