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
_LAYERS = "transformers.modeling_layers"
"""What our classes need too, and what imports the Auto classes itself, in its middle."""


class _Registration(MetaPathFinder):
    """Registers OpenELM right after transformers defines its Auto classes, and imports nothing before."""

    _waiting: list[ModuleType] | None = None
    """Auto classes that are defined in the middle of what ours need, while that is so."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in (*_AUTO_CLASSES, _LAYERS):
            return None
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                if name == _LAYERS:
                    self._waiting = []
                    execute(module)
                    for defined in self._waiting:
                        _register(defined)
                    self._waiting = None
                    return
                execute(module)
                if self._waiting is None:
                    _register(module)
                else:
                    self._waiting.append(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(module: ModuleType) -> None:
    importlib.import_module("openelm.huggingface").register(module)


sys.meta_path.insert(0, _Registration())
for _name in _AUTO_CLASSES:
    if _name in sys.modules:
        _register(sys.modules[_name])
