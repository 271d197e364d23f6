"""Saving checkpoints at once, or from a copy of the state while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from openelm.model.parts import parts
from openelm.train.checkpoint import Checkpoint, save_checkpoint
from openelm.train.distributed import Processes


class Saver:
    """Saves one checkpoint after the other.

    In the background the state is copied, the copy is complete when `save` returns, and at most one is being written.
    A model that several processes share is saved at once: writing its parts needs all of them.
    """

    def __init__(self, run: Path, processes: Processes, *, background: bool) -> None:
        self._run, self._processes = run, processes
        self._thread = ThreadPoolExecutor(1) if background else None
        self._writing: Future[Checkpoint | None] | None = None

    def save(
        self, step: int, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Save, or begin to; the checkpoint before must have been taken.

        Raises:
            DiskError, CheckpointError: see `save_checkpoint`.
        """
        assert self._writing is None
        if self._thread is None or parts(weights)[1] > 1:
            self._writing = Future()
            self._writing.set_result(save_checkpoint(self._run, step, weights, moments, state, self._processes))
        elif self._processes.leads:
            copies = _copy(weights), _copy(moments)
            self._writing = self._thread.submit(save_checkpoint, self._run, step, *copies, dict(state))

    def take(self, *, wait: bool) -> Checkpoint | None:
        """Return the checkpoint that was saved since the last call, if there is one and this is the first process.

        Args:
            wait: for one that is still being written.

        Raises:
            DiskError, CheckpointError: it could not be saved; older checkpoints are intact.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
