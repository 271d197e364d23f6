"""Sharded training on PyTorch's FSDP2: processes that share one copy of weights, gradients and optimizer state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.train.distributed import Processes


def sharded_model(config: ModelConfig, processes: Processes, size: int, device: torch.device) -> OpenELM:
    """Make a model of which each process holds 1/`size`, with undefined weights; nothing is allocated whole.

    The processes form a mesh (count / size, size): neighbours share a copy, and the copies are replicas (with
    size == count there is one copy). Every layer is gathered for itself, forward and backward.

    Raises:
        ConfigError: `size` does not divide the number of processes.
    """
    if processes.count % size:
        raise ConfigError(
            f"train.shard_processes {size} does not divide {processes.count} processes", fix="use a power of two"
        )
    mesh = init_device_mesh(device.type, (processes.count // size, size), mesh_dim_names=("replica", "shard"))
    with torch.device("meta"):
        model = OpenELM(config)
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("hidden", "last_state", "next_states"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device=device)
    return model


class ShardedGradients:
    """Gradients that FSDP2 adds up while the backward pass goes on, and the means of the losses beside them.

    FSDP2 takes the mean over the processes; the loss is multiplied by their count first, a power of two, so no bit
    is lost.
    """

    def __init__(self, model: nn.Module, processes: Processes, device: torch.device, *, sums: int = 2) -> None:
        assert isinstance(model, FSDPModule)
        self._model, self._processes = model, processes
        self.losses = torch.zeros(sums, device=device)
        self.scale = processes.count

    def expect(self, *, last: bool) -> None:
        """Say whether the next backward pass is the last one of the step; only that one communicates."""
        self._model.set_requires_gradient_sync(last)

    def add_up(self) -> None:
        """Add up what the backward passes left to do: the losses."""
        self._processes.add(self.losses)

    def norm(self) -> Tensor:
        """Return the norm of all gradients, those of the other processes too."""
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def clear(self) -> None:
        self._model.zero_grad(set_to_none=True)
        self.losses.zero_()
