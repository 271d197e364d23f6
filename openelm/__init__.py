"""OpenELM: train, check, adapt and run layer-wise scaled language models, and repeat them to the bit.

Importing this makes the Auto classes of transformers know the model, as soon as somebody imports them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__version__ = "0.1.0"

_AUTO_CLASSES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


class _Registration(MetaPathFinder):
    """Registers OpenELM right after transformers defines its Auto classes, and imports nothing before."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _AUTO_CLASSES:
            return None
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    importlib.import_module("openelm.huggingface").register(module)


sys.meta_path.insert(0, _Registration())
for _name in _AUTO_CLASSES:
    if _name in sys.modules:
        _register(sys.modules[_name])
