"""A step of many sequences in fixed shapes, for devices without our C++ kernels: what CUDA can record and repeat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openelm.kernels.transfer import send
from openelm.model.cache import KeyValueCache
from openelm.model.compiled import compiled, widths_may_vary
from openelm.model.transformer import OpenELM, block

_SHORTEST = 256
"""Attention reads as many positions of a slot at least; more of them are a power of two, or the whole slot."""
_GATHERING = 3
"""Keys and values that are gathered first are read, written and read again."""
_WRITES, _ORDER = 3, 4  # lines of a table


class Shape(NamedTuple):
    """What is fixed of a step; numbers are rounded up to powers of two, so that few shapes serve all steps.

    Attributes:
        rows: slots that take part; those without a token of their own change nothing.
        tokens: of each slot, one after the other.
        length: positions of a slot that attention reads.
        gathers: rows stand for any slots, whose keys and values are copied together; otherwise for the first ones,
            which are read where they are.
    """

    rows: int
    tokens: int
    length: int
    gathers: bool


@dataclass(frozen=True)
class _Slots:
    """A layer's cache as the tokens of one step see it: `rows` times `tokens` of them, in this order.

    Attributes:
        keys, values: (slots, KV heads, positions, head_dim).
        slots, positions: (rows · tokens,), where each token belongs; no two are at one place.
        writes: (rows · tokens,), whether it is kept; what stands at the place of another one stays.
        bias: (rows, 1, tokens, length), 0 where a token may look and -inf elsewhere.
        gathers: see `Shape`.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    positions: Tensor
    writes: Tensor
    bias: Tensor
    gathers: bool

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep keys and values (1, heads, rows · tokens, head_dim) where they belong; each query sees its own slot.

        Query heads that share a key head become further queries of that head. With a mask, PyTorch's `enable_gqa` would
        leave fused kernels on CUDA, and repeat the keys.
        """
        rows, _, tokens, length = self.bias.shape
        kv_heads, head_dim = key.shape[1], key.shape[3]
        groups = query.shape[1] // kv_heads
        keys, values = self._with(self.keys, key), self._with(self.values, value)
        query = query.view(kv_heads, groups, rows, tokens, head_dim).permute(2, 0, 1, 3, 4)
        query = query.reshape(rows, kv_heads, groups * tokens, head_dim)
        bias = self.bias[:, :, None].expand(-1, -1, groups, -1, -1).reshape(rows, 1, groups * tokens, length)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias)
        out = out.view(rows, kv_heads, groups, tokens, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(1, rows * tokens, kv_heads * groups * head_dim)

    def _with(self, held: Tensor, new: Tensor) -> Tensor:
        """Put new keys or values where they belong, and return what the rows see."""
        rows, _, tokens, length = self.bias.shape
        new = new[0].transpose(0, 1).to(held.dtype)
        held[self.slots, :, self.positions] = torch.where(
            self.writes[:, None, None], new, held[self.slots, :, self.positions]
        )
        seen = held[:, :, :length]
        return seen[self.slots.view(rows, tokens)[:, 0]] if self.gathers else seen[:rows]


class StaticStep:
    """Appends tokens to slots of a cache by the same few operators, whatever is in them and how many are in use.

    On CUDA every shape is recorded once as a CUDA graph, and then repeated: a launch a step instead of hundreds. The
    host waits for nothing. Weights and cache must stay where they are in memory.

    Args:
        compiles: whether layers and output matrix go through torch.compile, in few graphs for all shapes.
    """

    def __init__(self, model: OpenELM, cache: KeyValueCache, *, compiles: bool) -> None:
        self._model, self._cache, self._compiles = model, cache, compiles
        self._device = cache.keys[0].device
        plain = all(type(parameter) is nn.Parameter for parameter in model.parameters())  # not shared by processes
        self._records = self._device.type == "cuda" and plain
        self._recorded = dict[Shape, _Recorded]()

    def step(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Write each token's keys and values to its slot and position, and predict the next one.

        Tokens of one slot are at positions one after the other. The caller answers for ids, slots and positions.

        Returns:
            Logits (R, V), fp32.
        """
        shape, table = self._laid_out(ids, slots, positions)
        table = send(table, self._device)
        if self._records:
            if shape not in self._recorded:
                self._recorded[shape] = _Recorded(functools.partial(self._logits, shape), table, self._pool())
            logits = self._recorded[shape].repeat(table)
        else:
            logits = self._logits(shape, table)
        return logits.index_select(0, table[_ORDER, : len(ids)])

    def _laid_out(self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> tuple[Shape, Tensor]:
        """Choose the shape of a step and fill its table, see `_logits`."""
        mine: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            mine.setdefault(slot, []).append(index)
        shape = self._shape(len(mine), max(slots), max(map(len, mine.values())), max(positions))
        others = (slot for slot in range(len(self._cache.keys[0])) if slot not in mine)
        rows = [*mine, *others][: shape.rows] if shape.gathers else range(shape.rows)
        columns, order = list[tuple[int, int, int, bool]](), [0] * (shape.rows * shape.tokens)
        for slot in rows:
            indices = mine.get(slot, [])
            start = positions[indices[0]] if indices else 0
            for step in range(shape.tokens):
                place = (start + step) % self._cache.length  # behind the end too, no two tokens are at one place
                is_one = step < len(indices)
                if is_one:
                    order[indices[step]] = len(columns)
                columns.append((ids[indices[step]] if is_one else 0, slot, place, is_one))
        return shape, torch.tensor([*zip(*columns, strict=True), order], dtype=torch.int64)

    def _shape(self, count: int, last: int, tokens: int, position: int) -> Shape:
        """Choose a shape for `count` slots up to `last`, with up to `tokens` each, up to a position."""
        room, longest = len(self._cache.keys[0]), self._cache.length
        few, first = (min(_rounded_up(rows), room) for rows in (count, last + 1))
        gathers = _GATHERING * few < first
        length = max(_rounded_up(position + 1), _SHORTEST)
        return Shape(few if gathers else first, min(_rounded_up(tokens), longest), min(length, longest), gathers)

    def _logits(self, shape: Shape, table: Tensor) -> Tensor:
        """Compute fp32 logits (rows · tokens, V) from a table (5, rows · tokens) on the device.

        Its lines are ids, slots, positions, whether the token is one, and, for the caller, where each result is.
        """
        ids, slots, positions, writes, _ = table.unbind()
        shown = torch.arange(shape.length, device=table.device) <= positions.view(shape.rows, 1, shape.tokens, 1)
        bias = torch.zeros(shown.shape, dtype=self._cache.keys[0].dtype, device=table.device)
        bias.masked_fill_(~shown, float("-inf"))
        layers = [
            _Slots(keys, values, slots, positions, writes.bool(), bias, shape.gathers)
            for keys, values in zip(self._cache.keys, self._cache.values, strict=True)
        ]
        with widths_may_vary() if self._compiles else nullcontext():
            states = self._model.next_states(ids, positions, layers, self._with(block))
            logits: Tensor = self._with(_predicted)(self._model, states)
        return logits

    def _with(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return compiled(function) if self._compiles else function

    def _pool(self) -> Any:
        """Return the memory that all graphs share: they run one after the other."""
        return next((recorded.graph.pool() for recorded in self._recorded.values()), None)


def _predicted(model: OpenELM, states: Tensor) -> Tensor:
    return model.logits(states).float()


def _rounded_up(number: int) -> int:
    return 1 << (number - 1).bit_length()


class _Recorded:
    """One shape as a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

    First it is computed as usual, with a table of which no token is kept: compilers compile, libraries allocate.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], table: Tensor, pool: Any) -> None:
        self._table = table.clone()
        self._table[_WRITES].zero_()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compute(self._table)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self._logits = compute(self._table)

    def repeat(self, table: Tensor) -> Tensor:
        """Compute for another table; the result is overwritten by the next call, and by that of any other graph."""
        self._table.copy_(table)
        self.graph.replay()
        return self._logits
