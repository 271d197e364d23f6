"""Saving checkpoints while training waits, or from a copy of the state while it goes on.

Every process writes its part in a thread of its own. When all parts are there the first process publishes the folder,
reads it again and verifies it, in its thread too. What the processes have to tell each other they tell between two
steps in their main threads: collective calls of two threads would come in another order in every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from openelm.errors import OpenELMError, ProcessError
from openelm.files.published import publish_folder
from openelm.model.folder import weights_sha256
from openelm.model.parts import own_part, parts
from openelm.train.checkpoint import checkpoint_folder, load_checkpoint, write_part, write_state
from openelm.train.distributed import Processes

_BUSY, _DONE, _FAILED = range(3)
_ASK_SECONDS = 0.05


class Saver:
    """Saves one checkpoint after the other; every process calls its methods at the same steps.

    In the background the state is copied, the copy is complete when `save` returns, and at most one is being written.
    """

    def __init__(self, run: Path, processes: Processes, *, background: bool) -> None:
        self._run, self._processes, self._background = run, processes, background
        self._thread = ThreadPoolExecutor(1)
        self._unpublished = ExitStack()
        self._stages: Iterator[Future[Any]] = iter(())
        self._stage: Future[Any] | None = None

    def save(
        self, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Begin to save; the checkpoint before must have been taken.

        Raises:
            DiskError: see `publish_folder`.
        """
        assert self._stage is None
        self._stages = self._save(step, weights, moments, dict(state))
        self._stage = next(self._stages)

    def take(self, *, wait: bool) -> dict[str, Any] | None:
        """Return the ledger's event of the checkpoint that was saved since the last call, in the first process.

        Args:
            wait: for one that is still being written.

        Raises:
            DiskError, CheckpointError: it could not be saved; older checkpoints are intact.
            ProcessError: another process could not save its part.
        """
        done = None
        while self._stage is not None:
            if not self._all_done(self._stage):
                if not wait:
                    return None
                futures.wait([self._stage], _ASK_SECONDS)
                continue
            done, self._stage = self._stage, next(self._stages, None)
        return done.result() if done else None

    def _save(
        self, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Iterator[Future[Any]]:
        """Yield what the thread does, one stage after the other; a stage begins when all processes did the one before.

        The first `count` processes hold one copy of the model: they write, from copies if training goes on.
        """
        rank, (part, count) = self._processes.rank, parts(weights)
        folder = checkpoint_folder(self._run, step)
        if self._processes.leads:
            folder = self._unpublished.enter_context(publish_folder(folder, replace=True))
        folder = folder.with_name(self._processes.gather_json(folder.name)[0])
        if rank < count:
            held = self._held(weights), self._held(moments)
            write = self._thread.submit(write_part, folder, part, count, *held)
            del held  # the copies go when they are written
        yield write if rank < count else _nothing()
        yield self._thread.submit(self._publish, folder, step, count, state) if rank == 0 else _nothing()

    def _held(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: own_part(value).detach() for name, value in tensors.items()}
        return {name: value.to("cpu", copy=True) for name, value in own.items()} if self._background else own

    def _publish(self, folder: Path, step: int, count: int, state: Mapping[str, Any]) -> dict[str, Any]:
        with self._unpublished:
            write_state(folder, step, count, state)
        saved = load_checkpoint(self._run, step)
        return {
            "event": "checkpoint",
            "step": step,
            "folder": str(checkpoint_folder(self._run, step).relative_to(self._run)),
            "manifest_sha256": saved.manifest_sha256,
            "weights_sha256": weights_sha256(saved.weights),
            "optimizer_sha256": weights_sha256(saved.optimizer),
        }

    def _all_done(self, stage: Future[Any]) -> bool:
        """Tell whether every process has done its stage; when one failed, all of them raise.

        Nobody waits in the collective call for another's disk, which may take longer than the processes' timeout.
        """
        mine = _BUSY if not stage.done() else _FAILED if stage.exception() else _DONE
        everyone = self._processes.gather(torch.tensor([mine]))[:, 0].tolist()
        if mine == _FAILED:
            stage.result()
        if _FAILED in everyone:
            raise ProcessError(
                f"process {everyone.index(_FAILED)} could not save the checkpoint",
                fix="see that process's own message; the same command goes on from the last checkpoint",
            )
        return _BUSY not in everyone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert error is not None or self._stage is None, "what was begun must be taken"
        if self._processes.count == 1 and isinstance(error, Exception):
            with contextlib.suppress(OpenELMError):  # the first error says more
                self.take(wait=True)
        self._thread.shutdown()
        self._unpublished.__exit__(kind, error, traceback)  # after an error, what is not published goes


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done
