"""The one training loop: batches and an objective in, checkpoints and a ledger out, resumable to the bit."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from openelm.data.stream import Batch
from openelm.errors import CheckpointError, NumericError, Stopped
from openelm.files import canonical_json, make_folder, set_aside, sha256_bytes
from openelm.model.device import matmul_flops_per_second
from openelm.model.transformer import OpenELM
from openelm.optim.adamw import build_adamw, optimizer_tensors, restore_optimizer
from openelm.optim.schedule import learning_rate
from openelm.train.checkpoint import (
    checkpoint_folder,
    clean_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    thin_checkpoints,
)
from openelm.train.ledger import Ledger, number
from openelm.train.objectives import Objective
from openelm.train.run import Run, environment

Event = Mapping[str, Any]
Observer = Callable[[Event], None]

SPIKE_WINDOW = 64
_SPIKE_WARMUP = 32


class Batches(Protocol):
    """An endless, resumable source of batches."""

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


@dataclass
class State:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    """Updates done, the skipped ones included."""
    tokens: int = 0
    """Input tokens seen."""
    seconds: float = 0.0
    """Wall time spent in the loop, over all starts of the run."""
    skips_in_a_row: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skips_in_a_row": self.skips_in_a_row,
            "recent_losses": [loss.hex() for loss in self.recent_losses],
        }

    @classmethod
    def from_json(cls, step: int, values: Mapping[str, Any]) -> State:
        losses = deque((number(loss) for loss in values["recent_losses"]), maxlen=SPIKE_WINDOW)
        return cls(step, values["tokens"], values["seconds"], values["skips_in_a_row"], losses)


def train(
    run: Run,
    *,
    open_batches: Callable[[list[dict[str, Any]] | None], Batches],
    objective: Objective,
    probes: Sequence[Probe] = (),
    observers: Sequence[Observer] = (),
) -> OpenELM:
    """Train to the run's last step, from its newest good checkpoint if it has one.

    The caller holds the run folder's lock.

    Args:
        open_batches: makes the batches from saved cursors, or from the beginning for None.
        observers: called with every ledger event of this start, in order.

    Raises:
        Stopped: a signal came; the state is saved.
        NumericError: a loss or gradient was not finite and the run's policy is to stop.
        CheckpointError: checkpoints exist and none of them is whole.
    """
    make_folder(run.folder / "checkpoints")
    clean_checkpoints(run.folder)
    with Ledger(run.ledger_path) as ledger:

        def record(event: Event) -> None:
            ledger.append(event)
            for observer in observers:
                observer(event)

        return _Trainer(run, objective, probes, record, ledger).train(open_batches)


class _Trainer:
    """The state of one start of a run."""

    def __init__(
        self, run: Run, objective: Objective, probes: Sequence[Probe], record: Observer, ledger: Ledger
    ) -> None:
        self.run, self.objective, self.probes, self.record, self.ledger = (
            run,
            objective,
            probes,
            record,
            ledger,
        )
        self.config = run.config.train
        self.model = OpenELM(run.model_config)
        self.model.initialise(torch.Generator().manual_seed(self.config.seed))
        self.model.to(run.device)
        self.model.recompute_layers = self.config.recompute_layers
        self.optimizer = build_adamw(run.config.optimizer, self.model)
        self.state = State()
        dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
        self.matmul_flops = matmul_flops_per_second(run.device, dtype)
        self.flops_per_token = run.model_config.plan.training_flops_per_token(
            run.model_config.vocab_size, self.config.length
        )

    def train(self, open_batches: Callable[[list[dict[str, Any]] | None], Batches]) -> OpenELM:
        cursors = self._restore()
        if self.state.step >= self.config.steps:
            if self.ledger.events[-1]["event"] != "finish":  # killed between the last checkpoint and the last line
                self._finish({})
            return self.model
        batches = open_batches(cursors)
        clock = _Clock(self.state.seconds)
        with _stop_requests() as stop_signals:
            while self.state.step < self.config.steps:
                batch = next(batches)
                event = self._step(batch)
                self.state.seconds = clock.seconds()
                self.record(event)
                last = self.state.step == self.config.steps
                for probe in self.probes:
                    if last or self.state.step % probe.every == 0:
                        self.model.eval()
                        self.record({"step": self.state.step, **probe.measure(self.model, self.state.step)})
                        self.model.train()
                self.state.seconds = clock.seconds()
                if stop_signals or last or self.state.step % self.run.config.checkpoints.every == 0:
                    self._save(batches.cursors())
                if stop_signals and not last:
                    self._stop(stop_signals[0])
        self._finish(batches.counts())
        return self.model

    def _finish(self, dropped: Mapping[str, Any]) -> None:
        seconds = round(self.state.seconds, 3)
        self.record({"event": "finish", "step": self.state.step, "seconds": seconds, "dropped": dropped})
        self.ledger.sync()

    def _stop(self, name: str) -> None:
        self.record({"event": "stop", "step": self.state.step, "reason": name})
        self.ledger.sync()
        raise Stopped(
            f"stopped by {name} after step {self.state.step}; everything is saved",
            fix="run the same command again to go on",
        )

    def _restore(self) -> list[dict[str, Any]] | None:
        """Load the newest good checkpoint and bring the ledger to it; returns the data cursors."""
        checkpoint, damage = newest_checkpoint(self.run.folder)
        if checkpoint is None and damage:
            raise damage[0][1]
        for step, error in damage:
            set_aside(checkpoint_folder(self.run.folder, step))
            self.record({"event": "damage", "step": checkpoint.step if checkpoint else 0, "reason": str(error)})
        recorded = max((event.get("step", 0) for event in self.ledger.events), default=0)
        if checkpoint is None:
            if self.ledger.events:
                self.record({"event": "rewind", "step": recorded, "to": 0})
            self.record({"event": "start", "step": 0, **self._surroundings()})
            return None
        if checkpoint.step > recorded:
            raise CheckpointError(
                f"the ledger ends at step {recorded}, before the checkpoint of step {checkpoint.step}",
                file=self.run.ledger_path,
                fix="restore the run's own ledger.jsonl",
            )
        self.model.load_state_dict(checkpoint.weights)
        restore_optimizer(self.optimizer, self.model, checkpoint.optimizer)
        self.state = State.from_json(checkpoint.step, checkpoint.state)
        if self.state.step < self.config.steps:
            self.record({"event": "rewind", "step": recorded, "to": checkpoint.step})
            digest = {"manifest_sha256": checkpoint.manifest_sha256}
            self.record({"event": "resume", "step": checkpoint.step, **digest, **self._surroundings()})
        cursors: list[dict[str, Any]] = checkpoint.state["cursors"]
        return cursors

    def _surroundings(self) -> dict[str, Any]:
        return {
            "config_sha256": sha256_bytes(canonical_json(self.run.config.model_dump(mode="json"))),
            "parameters": self.run.model_config.parameters,
            "matmul_flops_per_second": self.matmul_flops,
            "data_sha256": self.run.manifest.sha256,
            "tokenizer_sha256": self.run.tokenizer.sha256,
            "environment": environment(self.run.device, self.run.precision),
        }

    def _step(self, batch: Batch) -> Event:
        """Do one update; returns its ledger event."""
        began = time.perf_counter()
        rate = learning_rate(self.run.config.schedule, self.state.step, self.config.steps)
        targets = int((batch.targets != -100).sum())
        loss_sum, nll_sum = self._gradients(batch, max(1, targets))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        loss, nll, gradient_norm = (float(value) for value in (loss_sum, nll_sum, norm))
        reason = self._objection(nll, gradient_norm)
        skipped = reason is not None and self._policy(reason) == "skip"
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.state.step += 1
        self.state.tokens += batch.inputs.size
        self.state.skips_in_a_row = self.state.skips_in_a_row + 1 if skipped else 0
        if math.isfinite(nll) and not skipped:
            self.state.recent_losses.append(nll)
        if reason is not None:
            self._report(reason, nll, gradient_norm, batch, skipped)
        seconds = time.perf_counter() - began
        return {
            "event": "step",
            "step": self.state.step,
            "tokens": self.state.tokens,
            "target_tokens": targets,
            "target_bytes": batch.target_bytes,
            "loss": nll.hex(),
            "z_loss": (loss - nll).hex(),
            "gradient_norm": gradient_norm.hex(),
            "learning_rate": rate.hex(),
            "batch_sha256": batch.sha256,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(batch.inputs.size / seconds, 2),
            "mfu": round(batch.inputs.size * self.flops_per_token / seconds / self.matmul_flops, 4),
        }

    def _gradients(self, batch: Batch, targets: int) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the mean loss over the batch's targets; returns (mean loss, mean nats)."""
        device, micro_rows = self.run.device, self.config.micro_rows or len(batch.inputs)
        loss_sum = nll_sum = torch.zeros((), device=device)
        for start in range(0, len(batch.inputs), micro_rows):
            rows = slice(start, start + micro_rows)
            inputs, answers = (torch.from_numpy(array[rows]).to(device) for array in (batch.inputs, batch.targets))
            documents = None
            if self.config.document_mask and batch.documents[rows].any():  # 0 throughout: one document a row
                documents = torch.from_numpy(batch.documents[rows]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
                micro_loss, micro_nll = self.objective(self.model, inputs, answers, documents)
            torch.autograd.backward(micro_loss / targets)
            loss_sum, nll_sum = loss_sum + micro_loss.detach(), nll_sum + micro_nll
        return loss_sum / targets, nll_sum / targets

    def _objection(self, nll: float, gradient_norm: float) -> str | None:
        """Say what is wrong with this update, if anything is."""
        if not (math.isfinite(nll) and math.isfinite(gradient_norm)):
            return "nonfinite"
        recent = self.state.recent_losses
        if len(recent) < _SPIKE_WARMUP:
            return None
        limit = statistics.fmean(recent) + self.config.spike_sigmas * statistics.pstdev(recent)
        return "spike" if nll > limit else None

    def _policy(self, reason: str) -> str:
        return self.config.on_nonfinite if reason == "nonfinite" else self.config.on_spike

    def _report(self, reason: str, nll: float, gradient_norm: float, batch: Batch, skipped: bool) -> None:
        self.record(
            {
                "event": "skip" if skipped else reason,
                "step": self.state.step,
                "reason": reason,
                "loss": nll.hex(),
                "gradient_norm": gradient_norm.hex(),
                "batch_sha256": batch.sha256,
            }
        )
        if reason != "nonfinite" or (skipped and self.state.skips_in_a_row < self.config.max_skips):
            return
        self.ledger.sync()
        raise NumericError(
            f"loss {nll} and gradient norm {gradient_norm} at step {self.state.step}"
            + (f", the {self.state.skips_in_a_row}th skipped in a row" if skipped else ""),
            file=self.run.ledger_path,
            fix="lower schedule.peak or raise schedule.warmup_steps; the last checkpoint is intact",
        )

    def _save(self, cursors: list[dict[str, Any]]) -> None:
        self.ledger.sync()
        weights = self.model.state_dict()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise NumericError(
                f"weights are not finite at step {self.state.step}; no checkpoint was written",
                fix="the previous checkpoint is intact: go on from it with a lower schedule.peak",
            )
        state = {**self.state.to_json(), "cursors": cursors, "ledger_head": self.ledger.head}
        moments = optimizer_tensors(self.optimizer, self.model)
        digest = save_checkpoint(self.run.folder, self.state.step, weights, moments, state)
        folder = checkpoint_folder(self.run.folder, self.state.step).relative_to(self.run.folder)
        self.record({"event": "checkpoint", "step": self.state.step, "folder": str(folder), "manifest_sha256": digest})
        self.ledger.sync()
        thin_checkpoints(self.run.folder, self.run.config.checkpoints)


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
