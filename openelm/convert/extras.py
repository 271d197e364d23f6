"""Packages that only some targets need."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from openelm.errors import ConfigError


def needed(package: str, *, extra: str) -> Any:
    """Import a package.

    Raises:
        ConfigError: it is not installed; says how to get it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"this needs the package {package}", fix=f"pip install 'openelm-framework[{extra}]'")
    return importlib.import_module(package)
