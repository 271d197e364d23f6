"""The layouts that a model can be written in; loads nothing, so that help is instant."""

from __future__ import annotations

TARGETS = {"hf": None, "mlx": None, "gguf": "gguf", "onnx": "onnx", "corenet": None}
"""Each with the package that writing it needs, which is also the name of the extra that brings it."""
