"""The C++ step of generation against plain formulas: any shape, dtype and company."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from openelm.kernels import native
from openelm.kernels.decode import GROUP, Block, DecodeKernel, Weight
from openelm.kernels.rotary import qk_norm_rope

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

EPS = 1e-6
WIDTHS = ((2, 1, 96), (6, 2, 160), (5, 5, 200))  # query heads, KV heads and feed-forward width of each layer
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
"""Of the largest logit. The bf16 units of a CPU round what they multiply, without them nothing is rounded."""


class Case(NamedTuple):
    blocks: list[Block]
    norm: Tensor
    head: Weight
    cos: Tensor
    sin: Tensor
    plain: Callable[[Weight], Tensor]
    """The numbers that a weight stands for."""

    def kernel(self) -> DecodeKernel:
        return DecodeKernel(self.blocks, self.norm, self.head, self.cos, self.sin, EPS)


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

    def weight(rows: int, columns: int) -> Weight:
        if not bits:
            found = Weight((torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype))
            drawn[id(found.numbers)] = found.numbers.float()
            return found
        numbers = torch.randint(0, 2**bits, (rows, columns), generator=generator)
        scales = (torch.rand(rows, columns // GROUP, generator=generator) / 2**bits / columns**0.5).to(dtype) * 4
        biases = scales * torch.randint(-(2**bits), 0, scales.shape, generator=generator)
        packed = numbers if bits == 8 else numbers[:, ::2] + 16 * numbers[:, 1::2]
        grouped = numbers.view(rows, -1, GROUP) * scales.float()[..., None] + biases.float()[..., None]
        found = Weight(packed.to(torch.uint8).view(torch.int32), scales, biases)
        drawn[id(found.numbers)] = grouped.view(rows, columns)
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
                weight(2 * ffn_dim, dim),
                weight(dim, ffn_dim),
                *cache,
            )
        )
    angles = torch.outer(torch.arange(length), 10_000 ** -(torch.arange(0, head_dim, 2) / head_dim))
    head = weight(301, dim)
    return Case(blocks, norm(dim), head, angles.cos(), angles.sin(), lambda weight: drawn[id(weight.numbers)])


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def expected(case: Case, x: Tensor) -> Tensor:
    """Logits (T, V) of all positions of one sequence of embeddings (T, D), by the formulas."""
    length = len(x)
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


def stepped(case: Case, x: Tensor, slots: list[int]) -> Tensor:
    """Logits (T, R, V) of sequences (T, R, D) side by side."""
    kernel = case.kernel()
    return torch.stack([kernel.step(row.clone(), slots, [position] * len(slots)) for position, row in enumerate(x)])


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "head_dim"), [(128, 64), (48, 16), (100, 24), (64, 128), (36, 6)])
def test_a_step_is_the_formulas(dim: int, head_dim: int, dtype: torch.dtype) -> None:
    """300 positions are more than one chunk of keys."""
    case = made(dim, head_dim, dtype=dtype)
    x = torch.randn(300, 3, dim, generator=torch.Generator().manual_seed(1))
    found = stepped(case, x, [2, 0, 3])
    for row in range(3):
        assert_close(found[:, row], expected(case, x[:, row]), dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_quantised_weights_are_the_numbers_they_stand_for(bits: int, scales: torch.dtype) -> None:
    widths = ((2, 1, 128), (4, 2, 64), (3, 3, 192))
    case = made(128, 64, bits=bits, dtype=scales, widths=widths)
    x = torch.randn(40, 2, 128, generator=torch.Generator().manual_seed(2))
    found = stepped(case, x, [0, 1])
    for row in range(2):
        assert_close(found[:, row], expected(case, x[:, row]), torch.bfloat16)


def test_long_rows_of_few_bits_have_more_scales_than_are_widened_at_a_time() -> None:
    case = made(4096 + 128, 64, bits=4, widths=((1, 1, 64),))
    x = torch.randn(2, 1, 4096 + 128, generator=torch.Generator().manual_seed(3))
    assert_close(stepped(case, x, [0])[:, 0], expected(case, x[:, 0]), torch.bfloat16)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_and_threads_change_no_bit(bits: int, dtype: torch.dtype) -> None:
    widths = ((2, 1, 128), (6, 2, 192))
    x = torch.randn(270, 7, 128, generator=torch.Generator().manual_seed(4))
    case = made(128, 64, bits=bits, dtype=dtype, widths=widths, length=280)
    alone = [stepped(case, x[:, row : row + 1], [1])[:, 0] for row in range(4)]
    assert torch.equal(stepped(case, x[:, :4], [3, 1, 0, 2]).transpose(0, 1), torch.stack(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 3 + 1)
        assert torch.equal(stepped(case, x[:, :1], [0])[:, 0], alone[0])
    finally:
        torch.set_num_threads(threads)


def test_several_tokens_of_one_slot_are_as_one_after_the_other() -> None:
    case = made(128, 64, length=280)
    x = torch.randn(270, 1, 128, generator=torch.Generator().manual_seed(5))
    one_by_one = stepped(case, x, [0])[:, 0]
    kernel = case.kernel()
    at_once = [
        kernel.step(
            x[start : start + 6, 0].clone(), [3] * len(x[start : start + 6]), list(range(start, min(start + 6, 270)))
        )
        for start in range(0, 270, 6)
    ]
    assert torch.equal(torch.cat(at_once), one_by_one)


def test_only_known_weights_are_taken() -> None:
    words, scales = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, 1)
    assert Weight(words, scales, scales).bits == 4 and Weight(words, scales, scales).is_known()
    of_groups_of_32 = torch.zeros(4, 2)
    assert not Weight(words, of_groups_of_32, of_groups_of_32).is_known()
    assert not Weight(torch.zeros(4, 8, dtype=torch.float16)).is_known()
    assert not Weight(torch.zeros(8, 4).T).is_known()
