"""Work on many shards at once: in processes of this machine, or as tasks of a Ray cluster.

The work is a function of this package, named "module:function", and plain values for it: a worker process is
a fresh interpreter that imports that module only, so neither torch nor the caller's main module.
"""

from __future__ import annotations

import importlib
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

from openelm.data.process import CLOSE_SECONDS, WorkerProcess
from openelm.errors import ConfigError, DataError, OpenELMError

_PACKAGE = "openelm."


def run_tasks(function: str, tasks: Sequence[tuple[Any, ...]], *, workers: int) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of each task as it is done; a result may be the OpenELMError that the task raised.

    Args:
        function: "module:function" of this package.
        tasks: positional arguments, one tuple a call.
        workers: processes; 0 calls the function here, in order. They end when the iterator is closed.

    Raises:
        DataError: E_WORKER when a process ends before its work is done.
        RuntimeError: a task failed with anything but an OpenELMError; holds its traceback.
    """
    if not workers:
        call = _function(function)
        for index, task in enumerate(tasks):
            yield index, _result(call, task)
        return
    with ExitStack() as opened:
        waiting = iter(enumerate(tasks))
        pool: list[_Process] = []
        opened.callback(_end_all, pool)
        while len(pool) < min(workers, len(tasks)):
            pool.append(_Process(function))
        busy = {process.connection: process for process in pool}
        for process in pool:
            process.begin(*next(waiting))
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process = busy[connection]
                index, result = process.index, process.receive()
                if isinstance(result, str):
                    raise RuntimeError(f"work on a shard failed:\n{result}")
                following = next(waiting, None)
                if following is None:
                    del busy[connection]
                else:
                    process.begin(*following)
                yield index, result


def run_tasks_on_ray(function: str, tasks: Sequence[tuple[Any, ...]], *, address: str) -> Iterator[tuple[int, Any]]:
    """Do the same on a Ray cluster, whose machines have this package and the data under the same names.

    Args:
        address: of the cluster; "auto" is the one this machine belongs to, "local" one started for this call.

    Raises:
        ConfigError: ray is not installed, or there is no cluster.
        RuntimeError: a task failed with anything but an OpenELMError.
    """
    try:
        import ray
    except ImportError:
        fix = "install it: pip install 'openelm-framework[ray]'"
        raise ConfigError("--ray needs the package of the extra `ray`", fix=fix) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        fix = "give the address of a running cluster, or `local` for one on this machine"
        raise ConfigError(f"no Ray cluster at {address!r} ({str(error)[:120]})", fix=fix) from None
    try:
        remote = ray.remote(num_cpus=1, max_retries=3)(ray_task)
        pending = {remote.remote(function, task): index for index, task in enumerate(tasks)}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            for reference in done:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise DataError(
                        f"a Ray worker failed ({type(error).__name__})",
                        fix="run the same command again",
                        code="E_WORKER",
                    ) from None
                if isinstance(result, str):
                    raise RuntimeError(f"work on a shard failed:\n{result}")
                yield pending.pop(reference), result
    finally:
        ray.shutdown()


def ray_task(function: str, task: tuple[Any, ...]) -> Any:
    """Do one task on a machine of the cluster; a traceback is returned as text."""
    return _result_or_traceback(_function(function), task)


def main(descriptor: int) -> None:
    """Serve one worker process: the first message names the function, each later one is a task."""
    connection = Connection(descriptor)
    try:
        call = _function(connection.recv())
        while True:
            connection.send(_result_or_traceback(call, connection.recv()))
    except (EOFError, OSError):  # the caller hung up or is gone: nobody is left to tell
        return


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    assert module.startswith(_PACKAGE), f"{name} is not of this package"
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _result(call: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    try:
        return call(*task)
    except OpenELMError as error:
        return error


def _result_or_traceback(call: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    try:
        return _result(call, task)
    except Exception:  # a bug of ours: its traceback must not be lost with the process
        return traceback.format_exc()


class _Process(WorkerProcess):
    """A worker process that does one task after the other."""

    def __init__(self, function: str) -> None:
        fix = "is memory short? run the same command again; what was done is kept"
        super().__init__("openelm.data.pool", name="worker process", fix=fix)
        self.index = -1
        self.send(function)

    def begin(self, index: int, task: tuple[Any, ...]) -> None:
        self.index = index
        self.send(task)


def _end_all(pool: Sequence[_Process]) -> None:
    for process in pool:
        process.hang_up()
    deadline = time.monotonic() + CLOSE_SECONDS
    for process in pool:
        process.wait(max(0.0, deadline - time.monotonic()))
