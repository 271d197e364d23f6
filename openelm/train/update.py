"""One update of the model: batch in, new weights and the ledger's line out. Training and replay share it."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from openelm.data.document import BadRow, list_bad_rows
from openelm.data.stream import Batch, batch_sha256
from openelm.errors import NumericError, VerificationError
from openelm.files.hashes import sha256_bytes
from openelm.kernels.attention_gpu import visible_documents
from openelm.kernels.transfer import Returning, send
from openelm.model.float8 import use_float8
from openelm.model.transformer import OpenELM
from openelm.optim.optimizer import Optimizer, clip_divisor
from openelm.optim.schedule import learning_rate
from openelm.train.checkpoint import Checkpoint, check_names
from openelm.train.distributed import ALONE, Processes
from openelm.train.gradients import FlatGradients, Tree, leaf_order
from openelm.train.ledger import number
from openelm.train.objectives import Objective, Rows
from openelm.train.run import Run
from openelm.train.sharding import ShardedGradients
from openelm.train.start import starting_model, starting_weights

Event = Mapping[str, Any]

SPIKE_WINDOW = 64
_SPIKE_WARMUP = 32


@dataclass
class State:
    """What a checkpoint holds besides tensors."""

    step: int = 0
    """Updates done, the skipped ones included."""
    tokens: int = 0
    """Input tokens seen, by all processes."""
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


@dataclass(frozen=True)
class Totals:
    """A batch over all processes."""

    tokens: int
    targets: int
    target_bytes: int
    weight: int
    """By what sums over the batch are divided."""
    sha256: str
    bad_rows: list[BadRow]


@dataclass(frozen=True)
class Launched:
    """An update that was given to the device, which may not have done it yet.

    Attributes:
        numbers: the mean loss, the mean nats, the means of the objective's statistics, and the norm of the gradients.
        step, tokens: as in `State`, after it.
    """

    numbers: Returning
    rate: float
    totals: Totals
    step: int
    tokens: int

    def nats_and_norm(self) -> tuple[float, float]:
        """Wait for the mean nats and the norm."""
        _, nats, *_, norm = self.numbers.numbers()
        return nats, norm


class Updater:
    """The weights, the optimizer and the counters of a run; `update` takes the next batch.

    Freshly made it is at step 0, with the weights that the run begins with.
    """

    def __init__(self, run: Run, objective: Objective, processes: Processes = ALONE) -> None:
        self.run, self.objective, self.processes = run, objective, processes
        self.config = run.config.train
        size = min(self.config.shard_processes, processes.count)
        self.model = starting_model(run, processes, size)
        if run.precision == "float8":
            use_float8(self.model)
        work = self.config.work(run.model_config.plan, processes.count, run.precision, run.device.type)
        self.model.recompute = work.recompute
        self.model.compiles = run.compiles
        self.optimizer = Optimizer(run.config.optimizer, self.model, seed=self.config.seed)
        self.optimizer.load(starting_weights(run, self.model))
        sums = 2 + len(objective.statistics)
        self.gradients: FlatGradients | ShardedGradients = (
            ShardedGradients(self.model, processes, run.device, sums=sums)
            if size > 1
            else FlatGradients(self.model.parameters(), processes, sums=sums)
        )
        self.state = State()

    @property
    def runs_ahead(self) -> bool:
        """Whether the host launches an update before it knows how the last one went; the device skips by itself."""
        device_decides = self.run.device.type == "cuda" and self.optimizer.skips_on_device
        return device_decides and self.processes.count == 1 and self.config.on_spike == "warn"

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of the model only, so that a forward pass needs all of them."""
        return isinstance(self.gradients, ShardedGradients)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's weights, moments and counters.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        check_names(checkpoint.weights, self.weights())
        self.optimizer.load(checkpoint.weights.items())
        self.optimizer.restore(checkpoint.optimizer)
        self.state = State.from_json(checkpoint.step, checkpoint.state)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint holds, by name."""
        return self.optimizer.weights()

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name."""
        return self.optimizer.state()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[OpenELM]:
        """Give the model for measurements, with the weights that a checkpoint holds, as it would be published."""
        self.model.eval()
        with self.optimizer.wide_weights():
            yield self.model
        self.model.train()

    def update(self, batch: Batch) -> tuple[list[Event], NumericError | None]:
        """Do one update with this process's rows of the batch; see `finish`."""
        return self.finish(self.launch(batch))

    def launch(self, batch: Batch) -> Launched:
        """Begin an update; `finish` must take it before the next but one begins, and before anybody reads the state.

        Raises:
            VerificationError: see `_recheck`.
        """
        totals = self._totals(batch)
        rate = learning_rate(self.run.config.schedule, self.state.step, self.config.steps)
        losses = self._accumulate(batch, max(1, totals.weight))
        if self.config.recheck_every and (self.state.step + 1) % self.config.recheck_every == 0:
            losses = self._recheck(batch, max(1, totals.weight))
        norm = self.gradients.norm()
        numbers = torch.cat([losses, norm.to(losses.dtype)[None]])
        self.state.step += 1
        self.state.tokens += totals.tokens
        launched = Launched(Returning(numbers), rate, totals, self.state.step, self.state.tokens)
        skip = None
        if self.runs_ahead:
            skip = 1 - torch.isfinite(numbers[1:]).all().float()
        if self.runs_ahead or not self._skips(self._objection(*launched.nats_and_norm())):
            divisor = clip_divisor(norm, self.config.clip_norm)
            self.optimizer.step(rate, step=self.state.step, divisor=divisor, skip=skip)
        self.gradients.clear()
        return launched

    def finish(self, launched: Launched) -> tuple[list[Event], NumericError | None]:
        """Wait for an update.

        Returns:
            The ledger's events, all of them functions of the run and the step alone, and the error with which
            training must stop, if it must.
        """
        loss, nll, *statistics, norm = launched.numbers.numbers()
        totals, reason = launched.totals, self._objection(nll, norm)
        skipped = self._skips(reason)
        self.state.skips_in_a_row = self.state.skips_in_a_row + 1 if skipped else 0
        if math.isfinite(nll) and not skipped:
            self.state.recent_losses.append(nll)
        seen = {"step": launched.step, "loss": nll.hex(), "gradient_norm": norm.hex(), "batch_sha256": totals.sha256}
        events: list[Event] = []
        if totals.bad_rows:
            events.append({"event": "bad_rows", "step": launched.step, **list_bad_rows(totals.bad_rows)})
        if reason is not None:
            events.append({"event": "skip" if skipped else reason, "reason": reason, **seen})
        if (error := self._failure(launched.step, reason, skipped, nll, norm)) is not None:
            return events, error
        step = {
            "tokens": launched.tokens,
            "target_tokens": totals.targets,
            "target_bytes": totals.target_bytes,
            "z_loss": (loss - nll).hex(),
            "learning_rate": launched.rate.hex(),
            **{name: mean.hex() for name, mean in zip(self.objective.statistics, statistics, strict=True)},
        }
        return [*events, {"event": "step", **seen, **step}], None

    def _totals(self, batch: Batch) -> Totals:
        targets = int((batch.targets != -100).sum())
        digests = torch.from_numpy(batch.row_sha256.view("<i8").reshape(-1))
        weight = self.objective.weight(batch)
        counts = torch.tensor([batch.inputs.size, targets, batch.target_bytes, weight, len(batch.bad_rows)])
        everywhere = self.processes.gather(torch.cat([counts, digests]))
        tokens, targets, target_bytes, weight, bad = everywhere[:, :5].sum(0).tolist()
        rows = everywhere[:, 5:].reshape(self.processes.count, -1, 4).transpose(0, 1)  # row r is with r % count
        bad_rows = chain.from_iterable(self.processes.gather_json(batch.bad_rows)) if bad else ()
        return Totals(tokens, targets, target_bytes, weight, batch_sha256(rows.contiguous().numpy()), list(bad_rows))

    def _accumulate(self, batch: Batch, weight: int) -> Tensor:
        """Add up the gradients of the mean loss over the batch; returns that, the mean nats and other means."""
        if self.config.numerics == "fast":
            self._add_rows(batch, slice(None), weight)
            self.gradients.add_up()
        else:
            assert isinstance(self.gradients, FlatGradients)
            mine = self.config.shards // self.processes.count
            tree = Tree()
            for leaf in leaf_order(mine):
                self.gradients.clear()
                self._add_rows(batch, slice(leaf, None, mine), weight)
                tree.add(self.gradients.values)
            self.gradients.values.copy_(tree.total())
            self.processes.add_in_tree(self.gradients.values)
        return self.gradients.losses

    def _recheck(self, batch: Batch, weight: int) -> Tensor:
        """Compute the gradients once more and compare them bit for bit.

        Raises:
            VerificationError: they differ, so this machine does not compute reliably.
        """
        assert isinstance(self.gradients, FlatGradients)
        before = self.gradients.values.clone()
        self.gradients.clear()
        losses = self._accumulate(batch, weight)
        if torch.equal(before.view(torch.int32), self.gradients.values.view(torch.int32)):
            return losses
        raise VerificationError(
            f"the gradients of step {self.state.step + 1} came out differently the second time",
            fix="this machine, or a kernel it uses, does not compute the same twice; the last checkpoint is intact",
        )

    def _add_rows(self, batch: Batch, part: slice, weight: int) -> None:
        """Add the gradients and the mean losses of some rows, a few rows at a time."""
        device, dtype = self.run.device, torch.float32 if self.run.precision == "fp32" else torch.bfloat16
        micros = list(self._micros(batch, part))
        for index, (inputs, targets, documents, examples) in enumerate(micros, start=1):
            masked = self.config.document_mask and bool(documents.any())  # 0 throughout: one document a row
            rows = Rows(
                send(inputs, device),
                send(targets, device),
                visible_documents(documents, dtype, device) if masked else None,
                documents.to(device) if examples is not None else documents,
                None if examples is None else examples.to(device),
            )
            with self._draws_of(part.start or 0, index):
                with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss_sum, sums = self.objective(self.model, rows)
                mean = loss_sum / weight
                self.gradients.expect(last=index == len(micros) and self.config.numerics == "fast")
                torch.autograd.backward(mean * self.gradients.scale)
            self.gradients.losses += torch.cat([mean.detach()[None], sums / weight])

    def _micros(self, batch: Batch, part: slice) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield (inputs, targets, documents, examples or None) of as many rows as go through the model at once."""
        arrays: list[Any] = [batch.inputs, batch.targets, batch.documents]
        if batch.examples is not None:
            arrays.append(batch.examples)
        parts = [torch.from_numpy(array[part]) for array in arrays]
        micro_rows = self.config.micro_rows or max(1, len(parts[0]))
        for inputs, targets, documents, *examples in zip(
            *(torch.split(all_, micro_rows) for all_ in parts), strict=True
        ):
            yield inputs, targets, documents, examples[0] if examples else None

    @contextlib.contextmanager
    def _draws_of(self, part: int, micro: int) -> Iterator[None]:
        """Let dropout depend on nothing but the run's seed, the step and which of the batch's rows these are."""
        adapter = self.run.config.adapter
        if adapter is None or not adapter.dropout:
            yield
            return
        first_row = part * self.processes.count + self.processes.rank
        place = f"{self.config.seed}/{self.state.step}/{first_row}/{micro}"
        with torch.random.fork_rng([self.run.device] if self.run.device.type == "cuda" else []):
            torch.manual_seed(int(sha256_bytes(place.encode())[:15], 16))
            yield

    def _objection(self, nll: float, gradient_norm: float) -> str | None:
        """Say what is wrong with this update, if anything is."""
        if not (math.isfinite(nll) and math.isfinite(gradient_norm)):
            return "nonfinite"
        recent = self.state.recent_losses
        if len(recent) < _SPIKE_WARMUP:
            return None
        limit = statistics.fmean(recent) + self.config.spike_sigmas * statistics.pstdev(recent)
        return "spike" if nll > limit else None

    def _skips(self, reason: str | None) -> bool:
        """Tell whether the policy is to leave an update out for that reason."""
        policies = {"nonfinite": self.config.on_nonfinite, "spike": self.config.on_spike}
        return reason is not None and policies[reason] == "skip"

    def _failure(
        self, step: int, reason: str | None, skipped: bool, nll: float, gradient_norm: float
    ) -> NumericError | None:
        if reason != "nonfinite" or (skipped and self.state.skips_in_a_row < self.config.max_skips):
            return None
        return NumericError(
            f"loss {nll} and gradient norm {gradient_norm} at step {step}"
            + (f", the {self.state.skips_in_a_row}th skipped in a row" if skipped else ""),
            file=self.run.ledger_path,
            fix="lower schedule.peak or raise schedule.warmup_steps; the last checkpoint is intact",
        )
