"""What one process holds of a tensor that several processes share: its rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded: each process takes its rows."""
    own_part(tensor).copy_(own_rows(whole, tensor))


def own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """Return the rows of a whole tensor that this process holds of `like`, which may be sharded."""
    if not isinstance(like, DTensor):
        return whole
    first = _first_row(like)
    return whole[first : first + len(like.to_local())]


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Put a tensor together of which each process holds the rows that it holds of `like`; all of them must ask."""
    if not isinstance(like, DTensor):
        return part
    mesh, places, shape, stride = like.device_mesh, like.placements, like.shape, like.stride()
    return DTensor.from_local(part, mesh, places, run_check=False, shape=shape, stride=stride).full_tensor()


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: its rows, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(parameters: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (which part this process holds, of how many), (0, 1) where nothing is sharded."""
    for tensor in parameters.values():
        if isinstance(tensor, DTensor):
            return tensor.device_mesh.get_local_rank("shard"), tensor.device_mesh.size(1)
    return 0, 1


def _first_row(tensor: DTensor) -> int:
    """Rows are dealt as torch.chunk cuts them: all parts as large as the first, but for the last ones."""
    part, count = tensor.device_mesh.get_local_rank("shard"), tensor.device_mesh.size(1)
    return min(len(tensor), part * -(-len(tensor) // count))
