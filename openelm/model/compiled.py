"""Layers through torch.compile: few graphs, whatever the layers' widths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_GRAPHS = 64
"""Most graphs of one function; layers need one for each number of heads, and one more."""


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of a layer, compiled at its first call for each kind of input, once a process.

    The first layer is compiled for its own widths, the next one with as many heads for any. Call it inside
    `widths_may_vary`.
    """
    import torch._dynamo

    result: Callable[..., Tensor] = torch.compile(function, fullgraph=True)
    return result


def widths_may_vary() -> AbstractContextManager[None]:
    """Let one graph serve weights of other shapes; by default each shape has its own.

    Numbers of heads stay constants of their graph: there are few, and attention must be chosen for them.
    """
    context: AbstractContextManager[None] = torch._dynamo.config.patch(
        force_parameter_static_shapes=False,
        force_nn_module_property_static_shapes=False,
        specialize_int=True,  # else those of a module that FSDP2 holds are symbols
        specialize_float=True,
        recompile_limit=_GRAPHS,
    )
    return context


def keep_products(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function inside a compiled one, so that its backward pass computes all but matrix products again."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    result: Tensor = checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, kept),
    )
    return result
