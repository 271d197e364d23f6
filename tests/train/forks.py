"""The command in forks of the test's process: as real and as killable as a started one, without seconds of imports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # FSDP2 would import it in every process, which takes seconds

from openelm.cli import main


class Fork:
    """One process that runs the command.

    Args:
        arguments: of the command.
        environment: variables to set.
        before: called in the process before the command; what it breaks is broken there alone.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.returncode: int | None = None
        descriptor, path = tempfile.mkstemp()
        self._errors = Path(path)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(descriptor, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update(environment or {})
                torch.set_num_threads(1)
                if before is not None:
                    before()
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(descriptor)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120.0) -> tuple[None, str]:
        """Wait for the end; returns what was said to stderr, in the second place."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"process {self.pid} did not end within {timeout} s")
            time.sleep(0.005)
        errors = self._errors.read_text() if self._errors.exists() else ""
        self._errors.unlink(missing_ok=True)
        return None, errors


class Launch:
    """Starts the processes of one run as torchrun does, by environment variables: forks on the CPU, which talk through
    gloo, or fresh interpreters on one GPU each, which talk through NCCL; CUDA does not survive a fork.
    """

    def __init__(self, bench: Any, backend: str = "gloo") -> None:
        self._bench, self._backend = bench, backend

    def start(
        self, folder: Path, count: int, *overrides: str, before: Mapping[int, Callable[[], object]] | None = None
    ) -> list[Any]:
        """Start `count` processes; `before` has what to do first in some of them, by rank."""
        if self._backend == "nccl":
            if torch.cuda.device_count() < count:
                pytest.skip(f"NCCL needs a GPU a process, {count}, and `pytest -m gpu`, which shows them to tests")
            assert not before, "what one process does first needs a fork"
            overrides = (*overrides, "train.device=cuda")
        folder.mkdir(exist_ok=True)
        recipe = folder.with_name(f"{folder.name}.json")
        recipe.write_text(json.dumps({"config": self._bench.values(*overrides), "model": {}}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
        places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        arguments = ["train", str(recipe), "--out", str(folder)]
        if self._backend == "gloo":
            return [Fork(arguments, place, (before or {}).get(rank)) for rank, place in enumerate(places)]
        command, pipe = [sys.executable, "-m", "openelm", *arguments], subprocess.PIPE
        return [
            subprocess.Popen(command, env={**os.environ, **place}, stdout=pipe, stderr=pipe, text=True)
            for place in places
        ]

    def run(self, folder: Path, count: int, *overrides: str, **options: Any) -> None:
        for process in self.start(folder, count, *overrides, **options):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
