"""Causal attention against a dense float64 formula; and what it promises to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openelm.kernels.attention import attention
from openelm.kernels.native import kernels_name

native = pytest.mark.skipif(kernels_name() == "torch", reason="no C++ kernels for this CPU")

# rows, query heads, key heads, queries, keys, head_dim
SHAPES = [
    (2, 3, 3, 1, 1, 8),
    (1, 2, 1, 2, 2, 16),
    (2, 4, 1, 63, 63, 20),
    (1, 6, 2, 65, 65, 64),
    (2, 4, 4, 129, 129, 16),
    (1, 5, 1, 129, 129, 80),
    (1, 4, 1, 300, 300, 8),
    (1, 2, 2, 97, 97, 128),
    (2, 4, 2, 1, 200, 64),
    (1, 3, 1, 2, 97, 7),
    (1, 8, 2, 40, 193, 20),
    (1, 100, 1, 3, 5, 4),
]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    rows: int, query_heads: int, kv_heads: int, length: int, keys: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    q = numbers(rows, query_heads, length, head_dim, dtype=dtype)
    k, v = (numbers(rows, kv_heads, keys, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    return q, k, v


def some_documents(kind: str, rows: int, keys: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(3)
    return {
        "one document": None,
        "runs": torch.randint(0, 2, (rows, keys), generator=generator).cumsum(-1, dtype=torch.int32) // 9,
        "a document a token": torch.arange(keys, dtype=torch.int32).expand(rows, keys),
        "mixed": torch.randint(-1, 2, (rows, keys), generator=generator) * 2**40 + 5,
        "long runs": (torch.arange(keys) // 96).expand(rows, keys).to(torch.int16),
    }[kind]


def oracle(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """The formula, one head at a time, with all scores written down."""
    rows, query_heads, length, head_dim = q.shape
    groups, keys = query_heads // k.shape[1], k.shape[2]
    heads = []
    for row in range(rows):
        for head in range(query_heads):
            scores = q[row, head] @ k[row, head // groups].T / head_dim**0.5
            for index in range(length):
                position = keys - length + index
                hidden = torch.arange(keys) > position
                if documents is not None:
                    hidden |= documents[row] != documents[row, position]
                scores[index] = scores[index].masked_fill(hidden, -torch.inf)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[row, head // groups])
    return torch.stack(heads).unflatten(0, (rows, query_heads)).transpose(1, 2).flatten(2)


def values_and_gradients(
    function: Callable[..., Tensor], leaves: tuple[Tensor, ...], documents: Tensor | None = None
) -> list[Tensor]:
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    out = function(*leaves, documents=documents)
    upstream = numbers(*out.shape, seed=9, dtype=torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def exact(leaves: tuple[Tensor, ...], documents: Tensor | None) -> list[Tensor]:
    wide = tuple(leaf.double() for leaf in leaves)
    return values_and_gradients(lambda q, k, v, documents: oracle(q, k, v, documents), wide, documents)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# bf16: the output is rounded once (2^-9) and read again by the backward pass; each gradient is rounded once.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("kind", ["one document", "runs", "a document a token", "mixed", "long runs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_formula(
    shape: tuple[int, int, int, int, int, int], kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    leaves = inputs(*shape, dtype)
    documents = some_documents(kind, shape[0], shape[4])
    found = values_and_gradients(attention, leaves, documents)
    for ours, expected in zip(found, exact(leaves, documents), strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape
        # A document a token: each weight is 1, so the gradients of q and k are what rounding leaves of zero.
        assert (ours.double() - expected).abs().max() <= tolerance * max(1, float(expected.abs().max()))


@native
def test_a_bf16_value_is_the_rounded_one_of_the_same_numbers_in_fp32() -> None:
    leaves = inputs(2, 6, 2, 130, 130, 64, torch.bfloat16)
    wide = attention(*(leaf.float() for leaf in leaves))
    assert torch.equal(attention(*leaves), wide.bfloat16())


@native
def test_autocast_rounds_the_inputs_first() -> None:
    leaves = inputs(1, 4, 2, 70, 70, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(attention, leaves)
    rounded = values_and_gradients(attention, tuple(leaf.bfloat16() for leaf in leaves))
    assert found[0].dtype == torch.bfloat16 and all(gradient.dtype == torch.float32 for gradient in found[1:])
    assert all(torch.equal(ours, expected.to(ours.dtype)) for ours, expected in zip(found, rounded, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 2, 200, 200, 64), (1, 4, 1, 300, 300, 20), (1, 2, 2, 500, 700, 16)], ids=str)
def test_results_have_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    leaves = inputs(*shape, dtype)
    documents = some_documents("runs", shape[0], shape[4])
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(values_and_gradients(attention, leaves) + values_and_gradients(attention, leaves, documents))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@native
@pytest.mark.parametrize("kind", ["one document", "runs"])
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(kind: str) -> None:
    leaves = inputs(3, 6, 2, 130, 130, 64, torch.float32)
    documents = some_documents(kind, 3, 130)
    upstream = numbers(3, 130, 6 * 64, seed=4)

    def run(rows: slice) -> list[Tensor]:
        parts = [leaf[rows].detach().requires_grad_() for leaf in leaves]
        out = attention(*parts, documents=None if documents is None else documents[rows])
        return [out.detach(), *torch.autograd.grad(out, parts, upstream[rows])]

    together = run(slice(None))
    for row in range(3):
        alone = run(slice(row, row + 1))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (2, 2, 20), (20, 1, 8)])
@pytest.mark.parametrize("kind", ["one document", "runs", "mixed"])
def test_the_last_queries_alone_have_the_bits_of_the_full_pass(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kind: str
) -> None:
    q, k, v = inputs(2, heads, kv_heads, 260, 260, head_dim, dtype)
    documents = some_documents(kind, 2, 260)
    whole = attention(q, k, v, documents=documents)
    for start, end in ((0, 1), (0, 97), (95, 96), (96, 98), (131, 200), (259, 260)):
        seen = None if documents is None else documents[:, :end]
        part = attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], documents=seen)
        assert torch.equal(part, whole[:, start:end])


@native
def test_layouts_change_no_bits() -> None:
    leaves = inputs(2, 4, 2, 100, 100, 64, torch.float32)
    expected = values_and_gradients(attention, leaves)
    by_position = tuple(leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves)
    by_component = tuple(leaf.transpose(2, 3).contiguous().transpose(2, 3) for leaf in leaves)
    offset = tuple(torch.cat([leaf.new_zeros(*leaf.shape[:3], 1), leaf], dim=-1)[..., 1:] for leaf in leaves)
    for layout in (by_position, by_component, offset):
        assert not any(leaf.is_contiguous() for leaf in layout)
        assert all(torch.equal(a, b) for a, b in zip(values_and_gradients(attention, layout), expected, strict=True))


def test_a_gradient_of_any_layout_is_read_right() -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(2, 2, 1, 9, 9, 16, torch.float32)]
    out = attention(*leaves)
    upstream = numbers(*out.shape, seed=5)
    expected = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    found = torch.autograd.grad(out, leaves, upstream.transpose(0, 2).contiguous().transpose(0, 2), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ones = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    expanded = torch.autograd.grad(out, leaves, torch.ones(()).expand(out.shape))
    assert all(torch.equal(a, b) for a, b in zip(ones, expanded, strict=True))


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_a_bad_number_stays_in_its_row_its_head_and_what_sees_it(place: str, bad: float) -> None:
    shape, row, head, position = (2, 4, 2, 230, 230, 16), 1, 1, 97
    clean = dict(zip("qkv", inputs(*shape, torch.float32), strict=True))
    dirty = {name: leaf.clone() for name, leaf in clean.items()}
    dirty[place][row, head, position, 3] = bad
    documents = (torch.arange(230) // 90).expand(2, 230)
    before, q_before, k_before, v_before = values_and_gradients(attention, tuple(clean.values()), documents)
    after, q_after, k_after, v_after = values_and_gradients(attention, tuple(dirty.values()), documents)

    def same(ours: Tensor, expected: Tensor, reached: list[tuple[int, slice]]) -> None:
        """Compare (rows, heads, positions, head_dim) but for some positions of some heads of the row."""
        ours, expected = ours.clone(), expected.clone()
        for reached_head, positions in reached:
            ours[row, reached_head, positions] = expected[row, reached_head, positions] = 0
        assert torch.equal(ours, expected)

    document = slice(90, 180)
    later = slice(position, 180)
    readers = [head] if place == "q" else [2 * head, 2 * head + 1]
    reached = slice(position, position + 1) if place == "q" else later
    kv_head = head // 2 if place == "q" else head
    heads = [tensor.unflatten(-1, (4, 16)).transpose(1, 2) for tensor in (after, before)]
    same(heads[0], heads[1], [(reader, reached) for reader in readers])
    same(q_after, q_before, [(reader, reached) for reader in readers])
    seen = slice(90, position + 1) if place == "q" else document
    same(k_after, k_before, [(kv_head, seen)])
    same(v_after, v_before, [(kv_head, seen)])
    assert not heads[0][row, readers[0], reached].isfinite().all()


@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_very_large_scores_choose_one_key(size: float) -> None:
    q, k, v = inputs(1, 2, 1, 200, 200, 64, torch.float32)
    found = values_and_gradients(attention, (q * size, k * size, v))
    assert all(tensor.isfinite().all() for tensor in found)
    best = (q.double() @ k.double().transpose(2, 3)).masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf)
    chosen = v[0, 0][best.argmax(-1)][0].transpose(0, 1).flatten(1)[None]
    torch.testing.assert_close(found[0], chosen)


@native
def test_equal_scores_share_their_weight_however_large_they_are() -> None:
    q, k = torch.full((1, 1, 4, 16), 1e9), torch.full((1, 1, 4, 16), 1e9)
    v = numbers(1, 1, 4, 16)
    out, _, _, v_gradient = values_and_gradients(attention, (q, k, v))
    torch.testing.assert_close(out[0], v[0, 0].cumsum(0) / torch.arange(1, 5)[:, None], rtol=1e-6, atol=1e-6)
    upstream = numbers(1, 4, 16, seed=9, dtype=torch.bfloat16).float()[0] / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(v_gradient[0, 0], upstream.flip(0).cumsum(0).flip(0), rtol=1e-6, atol=1e-6)


def test_a_checkpointed_call_and_a_second_backward_pass_give_the_same_bits() -> None:
    leaves = inputs(2, 4, 2, 70, 70, 32, torch.float32)
    once = values_and_gradients(attention, leaves)
    again = values_and_gradients(lambda *x, documents: checkpoint(attention, *x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    learning = [leaf.requires_grad_() for leaf in leaves]
    total = attention(*learning).square().sum()
    first = torch.autograd.grad(total, learning, retain_graph=True)
    second = torch.autograd.grad(total, learning)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_inputs_leave_the_other_gradients_alone() -> None:
    leaves = inputs(1, 4, 2, 70, 70, 32, torch.float32)
    expected = values_and_gradients(attention, leaves)
    for index in range(3):
        parts = [leaf.detach().requires_grad_(index == place) for place, leaf in enumerate(leaves)]
        out = attention(*parts)
        out.backward(numbers(*out.shape, seed=9, dtype=torch.bfloat16).float())
        assert [part.grad is None for part in parts] == [index != place for place in range(3)]
        gradient = parts[index].grad
        assert gradient is not None and torch.equal(gradient, expected[1 + index])


def test_no_rows_and_no_queries_are_fine() -> None:
    for rows, length in ((0, 5), (2, 0)):
        out = attention(*inputs(rows, 4, 2, length, 5, 8, torch.float32))
        assert out.shape == (rows, length, 32)
