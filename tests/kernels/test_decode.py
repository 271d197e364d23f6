"""The C++ step of generation against plain formulas: any shape, dtype and company."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from openelm.kernels import native
from openelm.kernels.decode import Block, DecodeKernel
from openelm.kernels.packed import Layout, PackedMatrix
from openelm.kernels.rotary import qk_norm_rope

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

EPS, VOCABULARY, GROUP = 1e-6, 301, 64
WIDTHS = ((2, 1, 96), (6, 2, 160), (5, 5, 200))  # query heads, KV heads and feed-forward width of each layer
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
"""Of the largest logit. The bf16 units of a CPU round what they multiply, without them nothing is rounded."""
OF_WHOLE_NUMBERS = 5e-4
"""The same where weights are quantised: inputs are rounded to 16 bits."""


class Case(NamedTuple):
    blocks: list[Block]
    norm: Tensor
    embedding: PackedMatrix
    head: PackedMatrix
    cos: Tensor
    sin: Tensor
    plain: Callable[[PackedMatrix], Tensor]
    """The numbers that a weight stands for."""

    def kernel(self) -> DecodeKernel:
        return DecodeKernel(self.blocks, self.norm, self.embedding, self.head, self.cos, self.sin, EPS)


def made(
    dim: int,
    head_dim: int,
    *,
    bits: int = 0,
    dtype: torch.dtype = torch.float32,
    widths: tuple[tuple[int, int, int], ...] = WIDTHS,
    length: int = 600,
) -> Case:
    """Draw a model of a few layers; with `bits` its matrices are quantised, and `dtype` is that of the scales."""
    generator = torch.Generator().manual_seed(dim + head_dim + bits)
    drawn: dict[int, Tensor] = {}

    def weight(rows: int, columns: int, halves: int = 1) -> PackedMatrix:
        if not bits:
            plain = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
            found = PackedMatrix(Layout(rows, columns, dtype, halves=halves), plain)
            drawn[id(found)] = plain.float()
            return found
        numbers = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        scales = (torch.rand(rows, columns // GROUP, generator=generator) / 2**bits / columns**0.5).to(dtype) * 4
        biases = scales * torch.randint(-(2**bits), 0, scales.shape, generator=generator)
        packed = numbers if bits == 8 else numbers[:, ::2] + 16 * numbers[:, 1::2]
        grouped = numbers.view(rows, -1, GROUP) * scales.float()[..., None] + biases.float()[..., None]
        words = packed.to(torch.uint8).view(torch.uint32)
        found = PackedMatrix(Layout(rows, columns, dtype, bits, GROUP, halves), words, scales, biases)
        drawn[id(found)] = grouped.view(rows, columns)
        return found

    def norm(width: int) -> Tensor:
        return torch.rand(width, generator=generator) + 0.5

    blocks = []
    for query_heads, kv_heads, ffn_dim in widths:
        cache = torch.zeros(2, 4, kv_heads, length, head_dim, dtype=torch.float32 if bits else dtype)
        blocks.append(
            Block(
                query_heads,
                kv_heads,
                ffn_dim,
                norm(dim),
                norm(head_dim),
                norm(head_dim),
                norm(dim),
                weight((query_heads + 2 * kv_heads) * head_dim, dim),
                weight(dim, query_heads * head_dim),
                weight(2 * ffn_dim, dim, halves=2),
                weight(dim, ffn_dim),
                *cache,
            )
        )
    angles = torch.outer(torch.arange(length), 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim))
    embedding, head = weight(VOCABULARY, dim), weight(VOCABULARY, dim)
    return Case(blocks, norm(dim), embedding, head, angles.cos(), angles.sin(), lambda weight: drawn[id(weight)])


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def some_ids(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def expected(case: Case, ids: Tensor) -> Tensor:
    """Logits (T, V) of all positions of one sequence of ids (T,), by the formulas."""
    x, length = case.plain(case.embedding)[ids], len(ids)
    for block in case.blocks:
        qkv = (normalised(x, block.attn_norm) @ case.plain(block.qkv).T)[None].double()
        heads = (block.query_heads, block.kv_heads, EPS)
        cos, sin = case.cos[:length].double(), case.sin[:length].double()
        q, k, v = (
            part[0] for part in qk_norm_rope(qkv, block.q_norm.double(), block.k_norm.double(), cos, sin, *heads)
        )
        k, v = (part.repeat_interleave(block.query_heads // block.kv_heads, 0) for part in (k, v))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1).float()
        x = x + attended @ case.plain(block.out).T
        gate, up = (normalised(x, block.ffn_norm) @ case.plain(block.gate_up).T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ case.plain(block.down).T
    return normalised(x, case.norm) @ case.plain(case.head).T


def stepped(case: Case, ids: Tensor, slots: list[int]) -> Tensor:
    """Logits (T, R, V) of sequences (T, R) side by side."""
    kernel = case.kernel()
    return torch.stack([kernel.step(row.tolist(), slots, [place] * len(slots)) for place, row in enumerate(ids)])


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "head_dim"), [(128, 64), (48, 16), (100, 24), (64, 128), (36, 6)])
def test_a_step_is_the_formulas(dim: int, head_dim: int, dtype: torch.dtype) -> None:
    """300 positions are more than one chunk of keys."""
    case = made(dim, head_dim, dtype=dtype)
    ids = some_ids(300, 3)
    found = stepped(case, ids, [2, 0, 3])
    for row in range(3):
        assert_close(found[:, row], expected(case, ids[:, row]), TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_the_numbers_they_stand_for(bits: int, scales: torch.dtype) -> None:
    widths = ((2, 1, 128), (4, 2, 64), (3, 3, 192))
    case = made(128, 64, bits=bits, dtype=scales, widths=widths)
    ids = some_ids(40, 2)
    found = stepped(case, ids, [0, 1])
    for row in range(2):
        assert_close(found[:, row], expected(case, ids[:, row]), OF_WHOLE_NUMBERS)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_threads_change_no_bit(bits: int, dtype: torch.dtype) -> None:
    widths = ((2, 1, 128), (6, 2, 192))
    ids = some_ids(270, 7)
    case = made(128, 64, bits=bits, dtype=dtype, widths=widths, length=280)
    alone = [stepped(case, ids[:, row : row + 1], [1])[:, 0] for row in range(4)]
    assert torch.equal(stepped(case, ids[:, :4], [3, 1, 0, 2]).transpose(0, 1), torch.stack(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 3 + 1)
        assert torch.equal(stepped(case, ids[:, :1], [0])[:, 0], alone[0])
    finally:
        torch.set_num_threads(threads)


def test_several_tokens_of_one_slot_are_as_one_after_the_other() -> None:
    case = made(128, 64, length=280)
    ids = some_ids(270, 1)
    one_by_one = stepped(case, ids, [0])[:, 0]
    kernel, at_once = case.kernel(), list[Tensor]()
    for start in range(0, 270, 7):
        part = ids[start : start + 7, 0].tolist()
        at_once.append(kernel.step(part, [3] * len(part), list(range(start, start + len(part)))))
    assert torch.equal(torch.cat(at_once), one_by_one)
