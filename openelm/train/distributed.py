"""Processes that train one model together, started by torchrun; every collective call is in this file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from openelm.errors import ConfigError, ProcessError

T = TypeVar("T")
Sum: TypeAlias = "dist.Work | None"
"""A sum over processes that was begun."""
_SEEN, _FAILED = "openelm/seen", "openelm/failed"
_REPORT_SECONDS = 2.0


class Processes:
    """This process among the ones that train together; one alone needs no process group.

    Process `rank` of `count` owns the rows r of every batch with r % count == rank.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count = rank, count
        self._device = device or torch.device("cpu")
        self._calls = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """Collect int64 values (n,) of every process: (count, n) on the CPU, in the order of ranks.

        Raises:
            ProcessError: a process died or does not answer.
        """
        if self.count == 1:
            return values[None].cpu()
        mine = values.to(self._device)
        out = [torch.empty_like(mine) for _ in range(self.count)]
        self._call(lambda: dist.all_gather(out, mine))
        return torch.stack(out).cpu()

    def any_true(self, claim: bool) -> bool:
        """Tell whether any process claims it; all of them must ask."""
        return bool(self.gather(torch.tensor([int(claim)])).any())

    def gather_json(self, value: Any) -> list[Any]:
        """Collect plain data of every process, in the order of ranks."""
        data = json.dumps(value, allow_nan=False).encode()
        sizes = self.gather(torch.tensor([len(data)]))[:, 0]
        padded = torch.zeros((int(sizes.max()) + 7) // 8 * 8, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.gather(padded.view(torch.int64)).view(torch.uint8)
        return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        self.gather(torch.zeros(1, dtype=torch.int64))

    def add(self, values: Tensor) -> None:
        """Add up a tensor over all processes, in place; the order of the sum is the backend's."""
        if self.count > 1:
            self._call(lambda: dist.all_reduce(values))

    def begin_to_add(self, values: Tensor) -> Sum:
        """Begin to `add`; all processes begin the same sums in the same order, and `finish` them."""
        return None if self.count == 1 else dist.all_reduce(values, async_op=True)

    def finish(self, sums: Sequence[Sum]) -> None:
        """Wait for sums that were begun."""
        if self.count > 1:
            self._call(lambda: [work.wait() for work in sums if work is not None])

    def add_in_tree(self, values: Tensor) -> None:
        """Add up a tensor over all processes, in place, in one fixed binary tree: the same bits at every count.

        Ranks that differ in their highest bit are added first, so process r holds the subtree of the leaves
        g with g % count == r (see `openelm.train.gradients`). `count` must be a power of two.
        """
        half = self.count // 2
        while half:
            other = torch.empty_like(values)
            self._call(lambda: _exchange(values, other, self.rank ^ half))  # noqa: B023
            values += other  # two numbers: the order of an addition does not change its bits
            half //= 2

    def _call(self, collective: Callable[[], T]) -> T:
        """Run a collective; if it fails, name the processes that did not come."""
        store = dist.distributed_c10d._get_default_store()
        self._calls += 1
        try:
            store.set(f"{_SEEN}/{self.rank}", str(self._calls))
            return collective()
        except (RuntimeError, dist.DistError) as error:
            raise self._failure(error) from None

    @contextlib.contextmanager
    def name_the_missing(self) -> Iterator[None]:
        """Name the processes that did not come when a collective call fails inside, such as FSDP2's own.

        Raises:
            ProcessError: a process died or does not answer.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.count == 1 or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
                raise
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> ProcessError:
        store = dist.distributed_c10d._get_default_store()
        return ProcessError(
            f"process {self.rank} waited for {self._missing(store)}: {str(error).splitlines()[0][:200]}",
            fix="see that process's own message; the same command goes on from the last checkpoint",
        )

    def _missing(self, store: Any) -> str:
        """Name the processes that did not begin this call; if all did, those that do not report its failure either."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            silent = [rank for rank in others if int(store.get(f"{_SEEN}/{rank}")) < self._calls]
            store.set(f"{_FAILED}/{self.rank}", "")
            deadline = time.monotonic() + _REPORT_SECONDS
            while not silent and time.monotonic() < deadline:
                time.sleep(0.05)
                if store.check([f"{_FAILED}/{rank}" for rank in others]):
                    break
            else:
                silent = silent or [rank for rank in others if not store.check([f"{_FAILED}/{rank}"])]
        except (RuntimeError, ValueError):  # the store went with the first process
            silent = [0]
        return f"process {', '.join(map(str, silent))}" if silent else "another process"


def _exchange(mine: Tensor, other: Tensor, rank: int) -> None:
    sent, received = dist.P2POp(dist.isend, mine, rank), dist.P2POp(dist.irecv, other, rank)
    for work in dist.batch_isend_irecv([sent, received]):
        work.wait()


ALONE = Processes()


@contextlib.contextmanager
def open_processes(device: str, timeout_seconds: float) -> Iterator[Processes]:
    """Join the processes that torchrun started, by its environment variables; without them, be alone.

    Args:
        device: the recipe's choice; with CUDA each process takes the GPU of its local rank.
        timeout_seconds: how long to wait for another process.

    Raises:
        ConfigError: an environment that torchrun would not have made, or a count that is no power of two.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    rank, count, local_rank = _torchrun_numbers()
    if count & (count - 1):
        raise ConfigError(f"{count} processes", fix="start a power of two, such as torchrun --nproc-per-node 4")
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    place = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Processes(rank, count, place)
    finally:
        dist.destroy_process_group()


def _torchrun_numbers() -> tuple[int, int, int]:
    """Read this process's rank, the number of processes, and its rank on this machine."""
    try:
        rank, count, local_rank, port = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        if os.environ["MASTER_ADDR"] and 0 <= rank < count and local_rank >= 0 and 0 <= port < 1 << 16:
            return rank, count, local_rank
    except (KeyError, ValueError):
        pass
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in names)
    fix = "start a power of two with: torchrun --nproc-per-node 2 -m openelm train …, or unset WORLD_SIZE"
    raise ConfigError(f"the environment is not torchrun's: {given}", fix=fix)
