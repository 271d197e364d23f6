"""A worker process: a fresh interpreter that serves one end of a pipe until the other end is closed.

Not multiprocessing.Process, whose children import the caller's main module, and with it torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from openelm.errors import DataError

CLOSE_SECONDS = 2.0
"""How long a process may take to end when its pipe is closed, before it is killed."""
# One thread each: the processes are the parallelism, and idle thread pools cost memory.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_NUM_THREADS", "RAYON_NUM_THREADS")
_ONE_THREAD = {**dict.fromkeys(_THREADS, "1"), "TOKENIZERS_PARALLELISM": "false"}

T = TypeVar("T")


class WorkerProcess:
    """A process that runs `main` of a module of this package, and this end of its pipe.

    Args:
        module: its `main` takes the descriptor of the other end; nothing but what it imports is loaded.
        name, fix: what errors call the process, and advise when it is gone.
    """

    def __init__(self, module: str, *, name: str, fix: str) -> None:
        self.connection, other = multiprocessing.Pipe()
        self._name, self._fix = name, fix
        start = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main({other.fileno()})"
        # Workers inherit the blocked signals: Ctrl-C or another stop signal to the group is for the caller alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()

    def send(self, value: Any) -> None:
        """Send plain data or a value of this package.

        Raises:
            DataError: E_WORKER if the process is gone.
        """
        self._talk(lambda: self.connection.send(value))

    def receive(self) -> Any:
        """Wait for an answer; raises what `send` does."""
        return self._talk(self.connection.recv)

    def _talk(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (EOFError, OSError):
            self.hang_up()
            code = self.wait(CLOSE_SECONDS)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise DataError(f"{self._name} {self._process.pid} {how}", fix=self._fix, code="E_WORKER")

    def hang_up(self) -> None:
        """Close the pipe; the process ends when it next looks at it."""
        self.connection.close()

    def wait(self, seconds: float) -> int:
        """Wait so long for the process to end, then kill it; returns its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
