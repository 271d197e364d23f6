"""Where a run computes: all that its numbers may depend on beside its config and data."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file
from openelm.kernels.native import kernels_name
from openelm.model.device import cpu_name


def environment(device: torch.device, precision: str) -> dict[str, str]:
    """Name what the numbers of a run may depend on."""
    return {
        "openelm": _version("openelm-framework"),
        "code": code_sha256(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels_name(),
        "threads": str(torch.get_num_threads()),
        "precision": precision,
        **{
            name: os.environ[name]
            for name in ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }


_PACKAGE = Path(__file__).parents[1]
_ROOMS = ("data", "kernels", "model", "optim", "text", "train")
_DECIDING = ("config.py", "kernels/cpp/*", *(f"{room}/**/*.py" for room in _ROOMS))
COMPARED = ("openelm", "code", "torch", "precision", "cpu_capability", "kernels")
"""What of an environment must not change between the starts of one run."""


@functools.cache
def code_sha256() -> str:
    """Hash the code that decides what a run computes, with or without a checkout."""
    files = [file for pattern in _DECIDING for file in _PACKAGE.glob(pattern)]
    listing = {file.relative_to(_PACKAGE).as_posix(): sha256_file(file) for file in files}
    return sha256_bytes(canonical_json(listing))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    """Return the commit of the code, with `+` when its working tree differs; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", _PACKAGE, *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
