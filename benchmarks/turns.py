"""Start the sides of a comparison, each in a process of its own, and let them step in turns."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def side_options(about: str | None) -> tuple[argparse.Namespace, TextIO]:
    """Read a side's command line, in its own process; also returns where its answers go."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("side")
    parser.add_argument("folder", type=Path)
    parser.add_argument("precision", choices=("fp32", "bf16"))
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a package prints is no answer
    return options, answers


def answer(step: Callable[[], Mapping[str, Any]], answers: TextIO, peak_bytes: Callable[[], int]) -> None:
    """Step at each word, and at "stop" say what memory it took and end this process."""
    for line in sys.stdin:
        if line.strip() == "stop":
            print(json.dumps({"peak_bytes": peak_bytes()}), file=answers)
            break
        began, cpu_began = time.perf_counter(), time.process_time()
        result = step()
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
        print(json.dumps({**spent, **result}), file=answers)
    answers.flush()
    os._exit(0)  # a peer's own loop may still wait in a thread for its next turn


class SideEnded(Exception):
    """A side's process ended before it was told to."""


class Worker:
    """One side in a fresh process that answers one JSON line to each word.

    Args:
        folder: of `benchmarks.work`, or what the module takes; what the process says on standard error is kept in it.
        module: what runs in the process.
        preload: a library to be loaded before all others, such as another allocator.
    """

    def __init__(
        self,
        side: str,
        folder: Path,
        precision: str,
        threads: int,
        *,
        python: str = sys.executable,
        preload: str | None = None,
        module: str = "benchmarks.sides",
    ) -> None:
        command = [python, "-m", module, side, str(folder), precision, str(threads)]
        # As the command line does: threads that wait without end slow a step down as soon as others want a core.
        environment = {**os.environ, **QUIET, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}
        if preload:
            environment["LD_PRELOAD"] = preload
        self._errors = folder / f"{side}.log"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer; the first one comes unasked and says what the side is, or why it is skipped."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code, said = self._process.wait(), self._errors.read_text().strip().splitlines()
            raise SideEnded(f"ended with code {code}" + (f": {said[-1]}" if said else ""))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word and wait for the answer.

        Raises:
            SideEnded: the process is gone.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            self._process.stdin.write(word + "\n")
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def in_turn(names: list[str], turn: int) -> list[str]:
    """Order the sides of a turn: each turn another one begins, and every second turn goes backwards."""
    start = turn // 2 % len(names)
    order = names[start:] + names[:start]
    return order if turn % 2 == 0 else order[::-1]
