"""What a recipe says about the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from openelm.config import Config

Kind: TypeAlias = Literal["adamw", "muon"]
Weights: TypeAlias = Literal["fp32", "bf16", "bf16-stochastic"]


class OptimizerConfig(Config):
    """AdamW with the published coefficients (decoupled weight decay, arXiv 1711.05101), alone or beside Muon."""

    kind: Kind = "adamw"
    """`muon`: the matrices of the layers follow Muon, scaled as in arXiv 2502.16982 so that AdamW's learning rate and
    weight decay carry over; the embedding and the norm scales follow AdamW."""
    weights: Weights = "fp32"
    """How the matrices of the layers are held. `bf16`: in bf16, beside fp32 ones that take the updates.
    `bf16-stochastic`: in bf16 only; updates are rounded at random (arXiv 2010.06192)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """For matrices, the embedding among them; vectors (norm scales) are not decayed."""
