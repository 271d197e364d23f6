"""Work on many shards at once: in processes of this machine, or as tasks of a Ray cluster.

The work is a function of this package, named "module:function", and plain values for it: a worker process is
a fresh interpreter that imports that module only, so neither torch nor the caller's main module.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from typing import Any

from openelm.errors import ConfigError, DataError, OpenELMError

_CLOSE_SECONDS = 2.0
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
                index, result = process.index, process.result()
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


class _Process:
    """A worker process and this end of its pipe; the process ends when the pipe is closed, so none is orphaned."""

    def __init__(self, function: str) -> None:
        self.connection, other = multiprocessing.Pipe()
        self.index = -1
        start = f"from openelm.data.pool import main; main({other.fileno()})"
        # Ctrl-C reaches the whole group, but only the caller is to act on it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {start}"],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=_one_thread(os.environ),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()
        self._talk(lambda: self.connection.send(function))

    def begin(self, index: int, task: tuple[Any, ...]) -> None:
        self.index = index
        self._talk(lambda: self.connection.send(task))

    def result(self) -> Any:
        return self._talk(self.connection.recv)

    def _talk(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (EOFError, OSError):
            self.connection.close()
            code = self.end(_CLOSE_SECONDS)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        fix = "is memory short? run the same command again; what was done is kept"
        raise DataError(f"worker process {self._process.pid} {how}", fix=fix, code="E_WORKER")

    def end(self, seconds: float) -> int:
        """Wait so long for the process to end, then kill it; returns its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _end_all(pool: Sequence[_Process]) -> None:
    for process in pool:
        process.connection.close()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for process in pool:
        process.end(max(0.0, deadline - time.monotonic()))


def _one_thread(environment: Mapping[str, str]) -> dict[str, str]:
    """The processes are the parallelism: thread pools in each would only cost memory."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**environment, **dict.fromkeys(names, "1")}
