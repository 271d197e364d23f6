"""The last bits that a CPU computes, and the profile that CPUs of different makers share. Loads no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PORTABLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""Environment variables that torch and its libraries read when they are loaded, or first used."""


def is_portable(environment: Mapping[str, str]) -> bool:
    """Tell whether a recorded environment is the profile."""
    return all(environment.get(name) == value for name, value in PORTABLE.items())


def adopt(run: Path) -> None:
    """Set the profile's variables as a published run records them, unless they are set; call it before torch is loaded.

    This is all of a publication that reaches the environment: these names, with these values.
    """
    if "torch" in sys.modules:
        return
    path = run / "run.json"
    try:
        recorded = json.loads(path.read_bytes())["environment"] if path.is_file() and not path.is_symlink() else {}
        found = [name for name, value in PORTABLE.items() if recorded.get(name) == value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # what is wrong with the file is told when it is verified
    for name in found:
        os.environ.setdefault(name, PORTABLE[name])


def maker(device: str) -> str:
    """Name the maker of a recorded CPU as far as its name tells."""
    return next((name for name in ("Intel", "AMD", "Hygon", "Zhaoxin") if name in device), device)
