"""Our own matrix product against float64, for every layout, and what its order of sums promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openelm.kernels import linear as linear_module
from openelm.kernels import native, precision
from openelm.kernels.linear import linear, product

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="the C++ kernels are not built for this CPU")

BF16 = torch.bfloat16
SHAPES = [
    (1, 1, 1),
    (1, 100, 70),
    (6, 16, 512),
    (7, 17, 513),
    (5, 3, 1025),
    (130, 33, 64),
    (33, 300, 1600),
    (250, 64, 9),
]


@pytest.fixture(autouse=True)
def always_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_beats_torch", lambda dtype: True)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)  # with bf16 units torch's product is taken


def numbers(rows: int, columns: int, seed: int, layout: str = "rows", dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers (rows, columns) that lie in memory row by row, column by column, or apart."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "rows":
        return torch.randn(rows, columns, generator=generator).to(dtype)
    if layout == "columns":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    return torch.randn(rows, 3 * columns + 1, generator=generator).to(dtype)[:, 1::3]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, BF16), (BF16, torch.float32)], ids=str
)
@pytest.mark.parametrize(
    "layouts", [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("apart", "apart")], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_float64_for_every_layout(
    shape: tuple[int, int, int], layouts: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    m, n, k = shape
    a = numbers(m, k, 0, layouts[0], dtypes[0])
    b = numbers(k, n, 1, layouts[1], dtypes[1])
    exact = a.double() @ b.double()
    # Each of k fused steps rounds once: far less than k·2^-24 of the sum of sizes.
    bound = (a.double().abs() @ b.double().abs()) * k**0.5 * 2**-23
    assert ((product(a, b).double() - exact).abs() <= bound).all()
    start = numbers(m, n, 2)
    total = product(a, b, out=start.clone(), add=True)
    assert ((total.double() - start.double() - exact).abs() <= bound + 2**-23 * total.abs()).all()


def test_a_part_of_a_larger_result_is_written_and_nothing_beside_it() -> None:
    whole = torch.full((9, 40), 7.0)
    a, b = numbers(7, 20, 0), numbers(20, 19, 1)
    product(a, b, out=whole[1:8, 5:24])
    torch.testing.assert_close(whole[1:8, 5:24], a @ b)
    whole[1:8, 5:24] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)], ids=str)
def test_empty_operands(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    assert torch.equal(product(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))
    assert torch.equal(product(torch.ones(m, k), torch.ones(k, n), out=torch.ones(m, n), add=True), torch.ones(m, n))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_row_is_the_same_alone_in_a_batch_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    weight, rows = numbers(700, 1100, 1), numbers(300, 1100, 0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.autocast("cpu", BF16, enabled=dtype == BF16):
                results.append(linear(rows, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        for first, last in ((0, 1), (5, 12), (100, 300), (299, 300)):
            assert torch.equal(linear(rows[first:last], weight), results[0][first:last])


def test_a_number_that_is_not_finite_stays_in_its_row() -> None:
    x, weight = numbers(20, 40, 0), numbers(30, 40, 1)
    x[3, 7], x[11, 0] = float("nan"), float("inf")
    found = linear(x, weight)
    broken = [3, 11]
    assert not found[broken].isfinite().any()
    kept = [row for row in range(20) if row not in broken]
    assert torch.equal(found[kept], linear(x[kept], weight))
