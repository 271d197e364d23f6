"""Packed matrices against the same ones multiplied in float64: any shape, kind, company and number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openelm.kernels import native
from openelm.kernels.packed import Layout, PackedMatrix, memory_for
from openelm.kernels.quantized import pack

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

SHAPES = ((301, 128), (1, 64), (96, 320), (33, 192))
ODD_SHAPES = ((7, 1), (65, 37), (40, 100))
COUNTS = (1, 2, 4, 5, 6, 7, 12, 13, 29, 97, 103, 200)
"""Rows of inputs: one pass over a tile takes up to 4 or 6 of them, and a piece of a product up to 96."""


def made(layout: Layout) -> tuple[PackedMatrix, Tensor]:
    """Draw a matrix; returns it packed, and the numbers that it stands for in float64."""
    generator = torch.Generator().manual_seed(layout.rows + layout.columns + layout.bits)
    shape = (layout.rows, layout.columns)
    if not layout.bits:
        plain = torch.randn(shape, generator=generator).to(layout.dtype)
        return PackedMatrix(layout, plain), plain.double()
    numbers = torch.randint(0, 2**layout.bits, shape, generator=generator)
    groups = (layout.rows, layout.columns // layout.group)
    scales = (torch.rand(groups, generator=generator) - 0.5).to(layout.dtype)
    biases = torch.randn(groups, generator=generator).to(layout.dtype)
    grouped = numbers.view(*groups, layout.group) * scales.double()[..., None] + biases.double()[..., None]
    return PackedMatrix(layout, pack(numbers, layout.bits), scales, biases), grouped.view(shape)


LAYOUTS = [
    *(Layout(*shape, dtype) for shape in (*SHAPES, *ODD_SHAPES) for dtype in (torch.float32, torch.bfloat16)),
    *(Layout(*shape, torch.float32, halves=2) for shape in ((2, 5), (64, 32), (602, 40), (70, 64))),
    Layout(98, 64, torch.bfloat16, 4, 32, 2),
    *(
        Layout(*shape, dtype, bits, group)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for bits in (4, 8)
        for group in (32, 64)
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_products_are_those_of_the_numbers_for_any_rows_of_inputs(layout: Layout) -> None:
    matrix, numbers = made(layout)
    assert layout.is_known
    for count in COUNTS:
        x = torch.randn(count, layout.columns, generator=torch.Generator().manual_seed(count)).bfloat16()
        wanted = x.double() @ numbers.T
        found = matrix.product(x, torch.empty(count, layout.rows))
        # Of whole numbers the inputs are rounded to 16 bits of the largest in a group: bf16 has 8.
        tolerance = 1e-4 if layout.bits else 1e-6
        assert (found - wanted).abs().max() <= tolerance * (x.double().abs() @ numbers.abs().T).max()
        rounded = matrix.product(x)
        assert rounded.dtype == layout.dtype
        assert torch.equal(rounded, found.to(layout.dtype))
        assert torch.equal(matrix.product(x[count // 2], torch.empty(layout.rows)), found[count // 2])
        assert torch.equal(matrix.product(x.float(), torch.empty(count, layout.rows)), found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_are_the_numbers(layout: Layout) -> None:
    matrix, numbers = made(layout)
    indices = torch.tensor([[0, layout.rows - 1], [layout.rows // 2, 0]])
    assert torch.equal(matrix.rows(indices), numbers[indices].to(layout.dtype))


@pytest.mark.parametrize("layout", [Layout(301, 128, torch.float32), Layout(200, 128, torch.bfloat16, 4, 32)], ids=str)
def test_threads_and_places_change_no_bit(layout: Layout) -> None:
    """Rows of inputs and of results may be parts of longer ones; what lies beside them is not touched."""
    matrix, _ = made(layout)
    x = torch.randn(9, 3 * layout.columns, generator=torch.Generator().manual_seed(1))
    part = x[:, layout.columns : 2 * layout.columns]
    wanted = matrix.product(part.contiguous())
    out = torch.full((9, layout.rows + 10), 7.0, dtype=layout.dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        matrix.product(part, out[:, 4 : 4 + layout.rows])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out[:, 4 : 4 + layout.rows], wanted)
    assert (out[:, :4] == 7).all() and (out[:, 4 + layout.rows :] == 7).all()


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_own_row(bits: int, value: float) -> None:
    matrix, _ = made(Layout(40, 64, torch.float32, bits, 64 if bits else 0))
    x = torch.ones(3, 64)
    x[1, 5] = value
    finite = matrix.product(x).isfinite()
    assert finite[0].all() and not finite[1].any() and finite[2].all()


def test_zeros_are_multiplied_too() -> None:
    matrix, _ = made(Layout(40, 64, torch.float32, 4, 64))
    assert torch.equal(matrix.product(torch.zeros(2, 64)), torch.zeros(2, 40))


def test_memory_is_the_callers() -> None:
    layout = Layout(40, 64, torch.float32)
    memory = memory_for(3 * layout.bytes)
    assert memory.data_ptr() % 64 == 0
    numbers = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    matrix = PackedMatrix(layout, numbers, memory=memory[layout.bytes : 2 * layout.bytes])
    assert torch.equal(matrix.rows(torch.arange(40)), numbers)
    assert matrix.memory.data_ptr() == memory.data_ptr() + layout.bytes


def test_only_what_has_kernels_is_known() -> None:
    assert Layout(4, 64, torch.float32, 4, 64).is_known
    assert not Layout(4, 64, torch.float32, 2, 64).is_known
    assert not Layout(4, 128, torch.float32, 4, 128).is_known
    assert not Layout(4, 96, torch.float32, 4, 64).is_known
    assert not Layout(4, 64, torch.float16).is_known
    assert not Layout(4, 64, torch.float64).is_known
    assert not Layout(5, 64, torch.float32, halves=2).is_known
