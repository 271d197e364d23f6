"""What a run begins with: weights drawn from its seed, or a trained model, maybe with an adapter that learns alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from openelm.adapters.adapter import add_adapter
from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, open_model
from openelm.model.transformer import OpenELM
from openelm.train.distributed import Processes
from openelm.train.run import Run, RunConfig
from openelm.train.sharding import sharded_model


def starting_model(run: Run, processes: Processes, size: int) -> OpenELM:
    """Make the run's model on its device; what learns has undefined weights, unless it is an adapter.

    Args:
        size: how many processes share one copy.

    Raises:
        CheckpointError: the base model cannot be read.
    """
    if run.config.adapter is not None:
        return adapted_base(run.config, run.device)
    if size > 1:
        return sharded_model(run.model_config, processes, size, run.device)
    return OpenELM(run.model_config).to(run.device)


def starting_weights(run: Run, model: OpenELM) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole fp32 weight on the CPU) of what learns, one after the other; an adapter has its own already.

    Raises:
        CheckpointError: the base model cannot be read.
        ConfigError: its matrices are quantised, so that only an adapter can learn.
    """
    if run.config.tune is None:
        yield from model.initial_weights(torch.Generator().manual_seed(run.config.train.seed))
    elif run.config.adapter is None:
        base, weights = open_model(Path(run.config.tune.base))
        if base.quantization is not None:
            what = f"the base has {base.quantization.bits} bits a number, and cannot be trained as a whole"
            raise ConfigError(what, fix="train an adapter (--adapter lora), or give the model it was made from")
        for name, weight in weights.items():
            yield name, weight.read().float()


def adapted_base(config: RunConfig, device: torch.device | str = "cpu") -> OpenELM:
    """Load the base of a run that trains an adapter, and put the adapter as it begins on it."""
    assert config.tune is not None and config.adapter is not None
    model = load_model(Path(config.tune.base), device=device)
    if model.quantization is None:
        model = model.float()
    add_adapter(model, config.adapter, seed=config.train.seed)
    return model.train()


def model_of_checkpoint(config: RunConfig, model_config: ModelConfig, weights: Mapping[str, Tensor]) -> OpenELM:
    """Make a run's model with the weights of a checkpoint, on the CPU; an adapter's on its base."""
    if config.adapter is not None:
        model = adapted_base(config)
        model.load_state_dict(dict(weights), strict=False)
        return model.eval()
    model = OpenELM(model_config)
    model.load_state_dict(dict(weights))
    return model.eval()
