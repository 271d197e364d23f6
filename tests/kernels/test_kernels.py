"""Every kernel against an obvious float64 formula: values, gradients, dtypes, layouts and autograd's corners."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from openelm.kernels import native
from openelm.kernels.attention import attention
from openelm.kernels.linear import linear
from openelm.kernels.rms_norm import rms_norm
from openelm.kernels.rotary import qk_norm_rope
from openelm.kernels.swiglu import swiglu

EPS = 1e-6


@pytest.fixture(params=["native", "plain"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C++ kernels, then as on a machine without them."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif native.kernels_name() == "torch":
        pytest.skip("no C++ kernels were built for this CPU")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) ** 0.5 * weight


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.split(gate_up.shape[-1] // 2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def rotary_tables(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def plain_qk_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads and one KV head, turned as complex numbers."""
    heads = qkv.unflatten(-1, (6, -1)).transpose(1, 2)
    length, head_dim = heads.shape[2:]
    turn = torch.complex(*rotary_tables(length, head_dim))

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        first, second = plain_rms_norm(x, weight).split(head_dim // 2, dim=-1)
        result = torch.complex(first, second) * turn
        return torch.cat((result.real, result.imag), dim=-1)

    return turned(heads[:, :4], q_weight), turned(heads[:, 4:5], k_weight), heads[:, 5:]


def fast_qk_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tables = rotary_tables(qkv.shape[1], qkv.shape[2] // 6)
    cos, sin = (table.to(torch.float64 if qkv.dtype == torch.float64 else torch.float32) for table in tables)
    return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, 4, 1, EPS)


def plain_rope(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.unflatten(-1, (6, -1)).transpose(1, 2)
    turn = torch.complex(*rotary_tables(*heads.shape[2:]))
    result = torch.complex(*heads[:, :5].chunk(2, dim=-1)) * turn
    turned = torch.cat((result.real, result.imag), dim=-1)
    return turned[:, :4], turned[:, 4:], heads[:, 5:]


def fast_rope(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tables = rotary_tables(qkv.shape[1], qkv.shape[2] // 6)
    cos, sin = (table.to(torch.float64 if qkv.dtype == torch.float64 else torch.float32) for table in tables)
    return qk_norm_rope(qkv, None, None, cos, sin, 4, 1, EPS)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    rows, query_heads, length, head_dim = q.shape
    keys = k.shape[2]
    out = torch.zeros(rows, length, query_heads, head_dim, dtype=q.dtype)
    groups = query_heads // k.shape[1]
    parts = []
    for row in range(rows):
        for head in range(query_heads):
            for index in range(length):
                position = keys - length + index
                seen = [
                    j for j in range(position + 1) if documents is None or documents[row, j] == documents[row, position]
                ]
                scores = k[row, head // groups, seen] @ q[row, head, index] / head_dim**0.5
                parts.append(torch.exp(scores) / torch.exp(scores).sum() @ v[row, head // groups, seen])
    out = torch.stack(parts).view(rows, query_heads, length, head_dim)
    return out.transpose(1, 2).flatten(2)


def fast_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


CASES: dict[str, tuple[Callable[..., object], Callable[..., object], list[tuple[int, ...]]]] = {
    "linear": (linear, plain_linear, [(3, 5, 7), (9, 7)]),
    "linear, many rows": (linear, plain_linear, [(1100, 7), (9, 7)]),
    "linear, one row": (linear, plain_linear, [(7,), (9, 7)]),
    "rms_norm": (fast_rms_norm, plain_rms_norm, [(3, 5, 7), (7,)]),
    "rms_norm, several stretches": (fast_rms_norm, plain_rms_norm, [(700, 200), (200,)]),
    "swiglu": (swiglu, plain_swiglu, [(3, 5, 14)]),
    "swiglu, many rows": (swiglu, plain_swiglu, [(300, 2 * 77)]),
    "qk_norm_rope": (fast_qk_norm_rope, plain_qk_norm_rope, [(2, 5, 6 * 8), (8,), (8,)]),
    "qk_norm_rope, several stretches": (fast_qk_norm_rope, plain_qk_norm_rope, [(3, 23, 6 * 72), (72,), (72,)]),
    "qk_norm_rope without norms": (fast_rope, plain_rope, [(3, 23, 6 * 72)]),
    "attention": (attention, plain_attention, [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)]),
    "attention, ungrouped": (attention, plain_attention, [(1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)]),
    "attention, one more token": (attention, plain_attention, [(2, 8, 1, 8), (2, 2, 5, 8), (2, 2, 5, 8)]),
    "attention, three more tokens": (attention, plain_attention, [(2, 8, 3, 8), (2, 2, 7, 8), (2, 2, 7, 8)]),
}


def tensors(result: object) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


def values_and_gradients(function: Callable[..., object], inputs: Sequence[Tensor], precision: str) -> list[Tensor]:
    """Return the outputs and the gradients of a fixed random weighting of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        outputs = tensors(function(*leaves))
    total = sum((output.double() * numbers(*output.shape, seed=7)).sum() for output in outputs)
    total.backward()  # type: ignore[union-attr]
    return [*(output.detach() for output in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


# Largest error relative to the largest number of each tensor. bf16 keeps 8 bits: half a unit is 2^-9 a rounding,
# and a value meets up to a handful of them on its way.
TOLERANCES = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 0.03, "autocast": 0.03}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_formula(name: str, precision: str) -> None:
    fast, plain, shapes = CASES[name]
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    inputs = [numbers(*shape, seed=index, dtype=dtype) for index, shape in enumerate(shapes)]
    found = values_and_gradients(fast, inputs, precision)
    expected = values_and_gradients(plain, [x.double() for x in inputs], "float64")
    assert len(found) == len(expected)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).abs().max() <= TOLERANCES[precision] * exact.abs().max()


@pytest.mark.parametrize("name", [name for name in CASES if "stretches" not in name and "many" not in name])
def test_gradcheck_in_float64(name: str) -> None:
    fast, _, shapes = CASES[name]
    inputs = [numbers(*shape, seed=index).requires_grad_() for index, shape in enumerate(shapes)]
    assert gradcheck(fast, inputs, fast_mode=True)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_give_the_same_as_contiguous_ones(name: str) -> None:
    fast, _, shapes = CASES[name]
    inputs = [numbers(*shape, seed=index, dtype=torch.float32) for index, shape in enumerate(shapes)]
    strided = [torch.stack((x, -x), dim=-1)[..., 0] for x in inputs]
    assert all(x.dim() == 0 or not x.is_contiguous() for x in strided)
    for ours, again in zip(tensors(fast(*inputs)), tensors(fast(*strided)), strict=True):
        torch.testing.assert_close(ours, again, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_recomputation_and_reruns_are_bitwise_the_same(name: str, precision: str) -> None:
    fast, _, shapes = CASES[name]
    inputs = [numbers(*shape, seed=index, dtype=torch.float32) for index, shape in enumerate(shapes)]
    once = values_and_gradients(fast, inputs, precision)
    again = values_and_gradients(lambda *leaves: checkpoint(fast, *leaves, use_reentrant=False), inputs, precision)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", CASES)
def test_without_gradients_the_values_are_the_same_and_no_graph_is_kept(name: str) -> None:
    fast, _, shapes = CASES[name]
    inputs = [numbers(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate(shapes)]
    with torch.no_grad():
        silent = tensors(fast(*inputs))
    for ours, learning in zip(silent, tensors(fast(*inputs)), strict=True):
        assert ours._is_view() or not ours.requires_grad  # a view of a leaf says what the leaf says
        assert torch.equal(ours, learning)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("name", ["linear", "rms_norm", "qk_norm_rope"])
def test_frozen_weights_get_no_gradient_and_inputs_the_same_one(name: str) -> None:
    fast, _, shapes = CASES[name]
    for precision in ("float32", "autocast"):
        x, *weights = (numbers(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes))
        frozen = values_and_gradients(lambda leaf: fast(leaf, *weights), [x], precision)  # noqa: B023
        learning = values_and_gradients(fast, [x, *weights], precision)
        assert all(torch.equal(a, b) for a, b in zip(frozen, learning, strict=False))


def test_gradients_accumulate_over_two_backward_passes() -> None:
    x, weight = numbers(4, 6, dtype=torch.float32), numbers(5, 6, dtype=torch.float32).requires_grad_()
    for _ in range(2):
        linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * x.sum(0).expand(5, 6))


@pytest.mark.parametrize("length", [1, 5])
def test_positions_see_only_their_own_document(length: int) -> None:
    q, k, v = numbers(2, 4, length, 8), numbers(2, 2, 5, 8, seed=1), numbers(2, 2, 5, 8, seed=2)
    documents = torch.tensor([[0, 0, 0, 1, 1], [3, 4, 4, 4, 9]], dtype=torch.int32)
    expected = plain_attention(q, k, v, documents)
    torch.testing.assert_close(attention(q, k, v, documents=documents), expected, rtol=1e-12, atol=1e-12)


def test_a_packed_row_equals_its_documents_apart() -> None:
    q, k, v = numbers(1, 4, 7, 8), numbers(1, 1, 7, 8, seed=1), numbers(1, 1, 7, 8, seed=2)
    packed = attention(q, k, v, documents=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    apart = torch.cat([attention(*(x[:, :, part] for x in (q, k, v))) for part in (slice(3), slice(3, 7))], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-12, atol=1e-12)


def test_rotation_keeps_scores_when_all_positions_shift() -> None:
    qkv = numbers(1, 1, 6 * 8).expand(1, 9, 6 * 8)
    q, k, _ = fast_qk_norm_rope(qkv, torch.ones(8), torch.ones(8))
    scores = q[0, 0] @ k[0, 0].T  # equal vectors everywhere: a score depends on the distance alone
    for distance in range(9):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("either_way")
def test_rms_norm_rounds_before_the_weight_in_bf16() -> None:
    x, weight = numbers(64, 96, dtype=torch.bfloat16), numbers(96, seed=1, dtype=torch.bfloat16)
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16() * weight
    assert (rms_norm(x, weight, EPS) == expected).float().mean() > 0.999  # the sum's order may flip a rounding
    assert rms_norm(x, weight.float(), EPS).dtype == torch.float32


@pytest.mark.usefixtures("either_way")
def test_norms_of_zero_rows_are_zero_with_finite_gradients() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), EPS)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(out, torch.zeros(2, 8))
    assert x.grad.isfinite().all()
