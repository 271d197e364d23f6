"""What the C++ kernels of norm, rotation and gate promise beside the formula, which test_kernels.py has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from openelm.kernels import native
from openelm.kernels.rms_norm import rms_norm
from openelm.kernels.rotary import qk_norm_rope
from openelm.kernels.swiglu import swiglu

pytestmark = pytest.mark.skipif(native.kernels_name() == "torch", reason="no C++ kernels were built for this CPU")

EPS = 1e-6
HEAD_DIM = 20
Function = Callable[..., Tensor]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def rotation(qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None) -> Tensor:
    """Three query heads and one key head, one behind the other in the last axis."""
    half = qkv.shape[-1] // 10
    angles = torch.arange(qkv.shape[1], dtype=torch.float64)[:, None] * 10.0 ** -torch.arange(half)
    tables = angles.cos().float(), angles.sin().float()
    parts = qk_norm_rope(qkv, q_weight, k_weight, *tables, 3, 1, EPS)
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1)


# More than the numbers that are worth a second thread, several stretches, sizes that fill no vector.
CASES: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "rms_norm": (norm, [(3, 131, 101), (101,)]),
    "qk_norm_rope": (rotation, [(3, 67, 5 * HEAD_DIM), (HEAD_DIM,), (HEAD_DIM,)]),
    "rope": (rotation, [(3, 67, 5 * HEAD_DIM)]),
    "swiglu": (swiglu, [(3, 131, 2 * 77)]),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(name: str, dtype: torch.dtype) -> tuple[Function, list[Tensor]]:
    function, shapes = CASES[name]
    return function, [numbers(*shape, seed=index, dtype=dtype) for index, shape in enumerate(shapes)]


def values_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, numbers(*out.shape, seed=9).to(out.dtype))
    return [out.detach(), *gradients]


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    function, inputs = drawn(name, dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(values_and_gradients(function, inputs))
    for others in found[1:]:
        assert all(torch.equal(ours, other) for ours, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_row_alone_gives_the_same_bits_as_among_others(name: str, dtype: torch.dtype) -> None:
    function, (x, *weights) = drawn(name, dtype)
    leaf = x.clone().requires_grad_()
    out = function(leaf, *weights)
    given = numbers(*out.shape, seed=9).to(out.dtype)
    (gradient,) = torch.autograd.grad(out, leaf, given)
    for row in range(len(x)):
        alone = x[row : row + 1].clone().requires_grad_()
        out_alone = function(alone, *weights)
        (gradient_alone,) = torch.autograd.grad(out_alone, alone, given[row : row + 1])
        assert torch.equal(out_alone[0], out[row])
        assert torch.equal(gradient_alone[0], gradient[row])


@pytest.mark.parametrize("name", CASES)
def test_every_length_of_a_row_is_the_formula(name: str) -> None:
    function, shapes = CASES[name]
    for size in range(1, 70):
        last = {"rms_norm": size, "qk_norm_rope": 10 * size, "rope": 10 * size, "swiglu": 2 * size}[name]
        weight = {"rms_norm": size, "qk_norm_rope": 2 * size}.get(name)
        inputs = [numbers(2, 3, last), *(numbers(weight or 0, seed=i) for i in range(1, len(shapes)))]
        exact = values_and_gradients(function, [x.double() for x in inputs])
        for ours, expected in zip(values_and_gradients(function, inputs), exact, strict=True):
            assert (ours - expected).abs().max() <= 5e-6 * max(1, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_fallback_rounds_where_the_kernel_does(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, inputs = drawn(name, dtype)
    ours = function(*inputs)
    monkeypatch.setattr(native, "_library", lambda: None)
    plain = function(*inputs)
    torch.testing.assert_close(ours.float(), plain.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if dtype == torch.bfloat16:  # the order of a sum, or the last bit of exp, may flip a rounding
        assert (ours == plain).float().mean() > 0.995


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_may_differ(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    for function, (x, *weights) in (drawn(name, dtype) for name in ("rms_norm", "qk_norm_rope")):
        inputs = [x, *(weight.to(weight_dtype) for weight in weights)]
        found = values_and_gradients(function, inputs)
        exact = values_and_gradients(function, [part.double() for part in inputs])
        assert found[0].dtype == (dtype if function is rotation else torch.promote_types(dtype, weight_dtype))
        assert [gradient.dtype for gradient in found[1:]] == [part.dtype for part in inputs]
        for ours, expected in zip(found, exact, strict=True):
            assert (ours - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_in_another_dtype_is_the_norm_and_then_a_cast(dtype: torch.dtype) -> None:
    inputs = drawn("rms_norm", dtype)[1]
    for wanted in DTYPES:
        at_once = values_and_gradients(lambda x, weight: rms_norm(x, weight, EPS, wanted), inputs)  # noqa: B023
        after = values_and_gradients(lambda x, weight: rms_norm(x, weight, EPS).to(wanted), inputs)  # noqa: B023
        assert at_once[0].dtype == wanted
        assert torch.equal(at_once[0], after[0])
        if wanted == torch.bfloat16:  # what reaches the norm is bf16 either way
            assert all(torch.equal(ours, other) for ours, other in zip(at_once, after, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_no_rows_give_none_and_zero_gradients_of_the_weights(name: str) -> None:
    function, (x, *weights) = drawn(name, torch.float32)
    out, x_gradient, *weight_gradients = values_and_gradients(function, [x[:0], *weights])
    assert out.shape[0] == 0
    assert x_gradient.shape == x[:0].shape
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in weight_gradients)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_strange_number_reaches_what_the_formula_says_and_nothing_else(
    name: str, dtype: torch.dtype, strange: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, (x, *weights) = drawn(name, dtype)
    bad = x.clone()
    bad[1, 5, 3] = strange
    sane, found = (values_and_gradients(function, [part, *weights])[:2] for part in (x, bad))
    monkeypatch.setattr(native, "_library", lambda: None)
    for ours, before, plain in zip(found, sane, values_and_gradients(function, [bad, *weights]), strict=False):
        assert torch.equal(ours.isfinite(), plain.isfinite())
        hit = torch.zeros(x.shape[:2], dtype=torch.bool)
        hit[1, 5] = True
        assert torch.equal(ours[~hit], before[~hit])


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_any_layout_are_taken(name: str) -> None:
    function, inputs = drawn(name, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    given = numbers(*out.shape[::-1], seed=9).permute(2, 1, 0)
    strided = torch.autograd.grad(out, leaves, given, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, given.contiguous(), retain_graph=True)
    assert all(torch.equal(ours, other) for ours, other in zip(strided, dense, strict=True))
    one = torch.autograd.grad(out.sum(), leaves, retain_graph=True)  # one number, expanded
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(ours, other) for ours, other in zip(one, ones, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_the_operands_that_it_needs_is_kept_for_the_backward_pass(name: str) -> None:
    function, inputs = drawn(name, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(*leaves)
    tables = 67 * HEAD_DIM if name in ("qk_norm_rope", "rope") else 0
    operands = 0 if name == "rope" else sum(leaf.numel() for leaf in leaves)
    assert sum(tensor.numel() for tensor in kept) == operands + tables


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_rather_than_wrong(name: str) -> None:
    function, inputs = drawn(name, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()
