"""What an adapter is: which matrices it changes, and by how much it may."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from openelm.config import Config

EMBEDDING = "token_embeddings"
PROJECTIONS = ("qkv_proj", "out_proj", "proj_1", "proj_2")
TARGETS = (EMBEDDING, *PROJECTIONS)
"""The matrices that adapters of OpenELM change; where the embedding is the output matrix too, both change."""


class AdapterConfig(Config):
    """LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353); the defaults are those of OpenELM's published adapters."""

    kind: Literal["lora", "dora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Annotated[float, Field(gt=0)] = 32
    """The change counts alpha / rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Which part of a projection's input its adapter does not see in training; the embedding's sees all."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = TARGETS
    """Modules that are adapted; by default all of them, for DoRA the projections alone."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Layers whose projections are adapted, counted from 0; all of them unless this says otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _default_targets(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("targets") is None:
            return {**values, "targets": PROJECTIONS if values.get("kind") == "dora" else TARGETS}
        return values

    @field_validator("targets")
    @classmethod
    def _are_known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in targets if name not in TARGETS]:
            raise ValueError(f"{unknown[0]!r} is no matrix with adapters; these are: {', '.join(TARGETS)}")
        return tuple(name for name in TARGETS if name in targets)

    @property
    def scale(self) -> float:
        """By what the change is multiplied."""
        return self.alpha / self.rank
