"""The chunked loss against the float64 formula on full logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from openelm.kernels import cross_entropy, precision
from openelm.kernels.cross_entropy import linear_cross_entropy, linear_log_likelihoods

Z_LOSS = 1e-2


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_targets(rows: int, vocabulary: int) -> Tensor:
    targets = torch.arange(rows) * 7 % vocabulary
    targets[::3] = -100
    return targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    loss, nll = hidden.new_zeros(()), hidden.new_zeros(())
    for row, target in zip(hidden, targets.tolist(), strict=True):
        if target != -100:
            logits = weight @ row
            log_sum = torch.log(torch.exp(logits - logits.max()).sum()) + logits.max()
            nll = nll + log_sum - logits[target]
            loss = loss + log_sum - logits[target] + z_loss * log_sum**2
    return loss, nll


def run(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, *, autocast: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, nll = linear_cross_entropy(hidden, weight, targets, z_loss=z_loss)
    (loss / 3).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), nll, hidden.grad, weight.grad


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, nll = plain(hidden, weight, targets, z_loss)
    gradients = torch.autograd.grad(loss / 3, (hidden, weight))
    return loss.detach(), nll.detach(), *gradients


# bf16: the rounded operands move a logit of size 5 by about 2^-8 of it, and each gradient by its own rounding.
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float32, False, 5e-6),
        (torch.float32, True, 0.03),
        (torch.bfloat16, False, 0.03),
    ],
    ids=["float64", "float32", "autocast", "bfloat16"],
)
@pytest.mark.parametrize("units", [False, True], ids=["fp32 units", "bf16 units"])
@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("chunk_rows", [2, 5, 100])
def test_loss_and_gradients_equal_the_formula(
    dtype: torch.dtype,
    autocast: bool,
    tolerance: float,
    units: bool,
    z_loss: float,
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: units)
    vocabulary = 37
    wide_bytes = 8 if dtype == torch.float64 else 4
    bytes_held = chunk_rows * vocabulary * wide_bytes
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", dict.fromkeys(("fp32", "bf16", "gpu"), bytes_held))
    hidden, weight = numbers(13, 6, dtype=dtype), numbers(vocabulary, 6, seed=1, dtype=dtype)
    targets = some_targets(13, vocabulary)
    found = run(hidden, weight, targets, z_loss, autocast=autocast)
    for ours, expected in zip(found, exact(hidden, weight, targets, z_loss), strict=True):
        assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_gradcheck_in_float64() -> None:
    hidden, weight = numbers(5, 3).requires_grad_(), numbers(7, 3, seed=1).requires_grad_()
    targets = some_targets(5, 7)
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, z_loss=Z_LOSS)[0], (hidden, weight))


def test_without_any_target_sums_and_gradients_are_zero() -> None:
    for autocast in (False, True):
        targets = torch.full((4,), -100)
        hidden, weight = numbers(4, 6, dtype=torch.float32), numbers(9, 6, dtype=torch.float32)
        assert all((found == 0).all() for found in run(hidden, weight, targets, Z_LOSS, autocast=autocast))


def test_ignored_rows_change_nothing_not_even_the_z_loss() -> None:
    hidden, weight = numbers(8, 6), numbers(9, 6, seed=1)
    targets = some_targets(8, 9)
    kept = targets != -100
    with_ignored = run(hidden, weight, targets, Z_LOSS)
    without = run(hidden[kept], weight, targets[kept], Z_LOSS)
    for index in (0, 1, 3):
        assert torch.equal(with_ignored[index], without[index])
    assert torch.equal(with_ignored[2][kept], without[2])
    assert not with_ignored[2][~kept].any()


def test_equal_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    loss, nll = linear_cross_entropy(torch.zeros(3, 4), numbers(50, 4), torch.tensor([1, 2, -100]), z_loss=0.5)
    assert float(nll) == pytest.approx(2 * math.log(50))
    assert float(loss) == pytest.approx(2 * math.log(50) + 2 * 0.5 * math.log(50) ** 2)


def test_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]])
    found = run(hidden, torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 2]), Z_LOSS)
    assert all(tensor.isfinite().all() for tensor in found)
    assert float(found[1]) == pytest.approx(2e4)


def test_a_second_backward_of_a_kept_graph_gives_the_same_gradients() -> None:
    hidden, weight = numbers(6, 4).requires_grad_(), numbers(9, 4, seed=1).requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, torch.arange(6), z_loss=Z_LOSS)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tied_weight_gets_both_gradients_and_they_accumulate() -> None:
    weight = numbers(9, 4).requires_grad_()
    tokens, targets = torch.tensor([1, 2, 1]), torch.tensor([2, 1, 3])

    def loss_of(embedding: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(torch.nn.functional.embedding(tokens, embedding), head, targets)[0]

    for _ in range(2):
        loss_of(weight, weight).backward()
    embedding, head = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss_of(embedding, head).backward()
    assert weight.grad is not None and embedding.grad is not None and head.grad is not None
    torch.testing.assert_close(weight.grad, 2 * (embedding.grad + head.grad))


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = numbers(6, 4).requires_grad_(), numbers(9, 4, seed=1).requires_grad_(), torch.arange(6)
    learning = linear_cross_entropy(hidden, weight, targets, z_loss=Z_LOSS)
    with torch.no_grad():
        silent = linear_cross_entropy(hidden, weight, targets, z_loss=Z_LOSS)
    assert not silent[0].requires_grad and not learning[1].requires_grad
    assert torch.equal(silent[0], learning[0]) and torch.equal(silent[1], learning[1])


def test_frozen_operands_get_no_gradient() -> None:
    hidden, weight, targets = numbers(6, 4).requires_grad_(), numbers(9, 4, seed=1), torch.arange(6)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert weight.grad is None
    expected = exact(hidden.detach(), weight, targets, 0.0)[2] * 3
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-12)


def test_one_thread_gives_the_same_as_two() -> None:
    hidden, weight = numbers(300, 32, dtype=torch.float32), numbers(500, 32, seed=1, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(hidden, weight, some_targets(300, 500), Z_LOSS))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wrong", [9, -1, 2**40])
def test_a_target_outside_the_vocabulary_is_an_error_and_writes_nowhere(wrong: int) -> None:
    hidden, weight = numbers(3, 4, dtype=torch.float32), numbers(9, 4, seed=1, dtype=torch.float32)
    with pytest.raises(IndexError, match=f"target {wrong} .* of 9 tokens"):
        run(hidden, weight, torch.tensor([1, wrong, 2]), Z_LOSS)


def test_a_whole_number_as_z_loss_is_the_number() -> None:
    hidden, weight = numbers(3, 4, dtype=torch.float32), numbers(9, 4, seed=1, dtype=torch.float32)
    for whole in (0, 1):
        found = run(hidden, weight, torch.tensor([1, 0, 2]), whole)
        for mine, wanted in zip(found, run(hidden, weight, torch.tensor([1, 0, 2]), float(whole)), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_targets_of_any_layout_and_kind_give_the_same(dtype: torch.dtype) -> None:
    hidden, weight = numbers(6, 4, dtype=dtype), numbers(9, 4, seed=1, dtype=dtype)
    targets = torch.tensor([3, 0, 8, 1, 2, 5])
    apart = torch.stack((targets, torch.full_like(targets, 7)), 1)[:, 0]
    assert not apart.is_contiguous()
    expected = run(hidden, weight, targets, Z_LOSS)
    for other in (apart, targets.int()):
        assert all(torch.equal(a, b) for a, b in zip(run(hidden, weight, other, Z_LOSS), expected, strict=True))


def log_likelihoods(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.t(), dim=1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
def test_log_likelihoods_of_targets_and_their_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", dict.fromkeys(("fp32", "bf16", "gpu"), chunk_bytes))
    hidden, weight, shares = numbers(7, 6), numbers(9, 6, seed=1), numbers(7, seed=2)
    targets, found = torch.arange(7) % 9, []
    for formula in (linear_log_likelihoods, log_likelihoods):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = formula(*leaves, targets)
        found.append((values.detach(), *torch.autograd.grad((values * shares).sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_log_likelihoods_under_bf16_autocast_are_near_those_of_float64() -> None:
    hidden, weight, targets = numbers(64, 32), numbers(50, 32, seed=1), torch.arange(64) % 50
    leaves = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        values = linear_log_likelihoods(*leaves, targets)
    values.sum().backward()
    exact = log_likelihoods(*(wide := (hidden.requires_grad_(), weight.requires_grad_())), targets)
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), exact, atol=0.1)
    for leaf, gradient in zip(leaves, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert leaf.grad is not None
        assert float((leaf.grad - gradient).norm() / gradient.norm()) < 0.02


def test_a_frozen_weight_gets_no_gradient_and_the_states_get_theirs() -> None:
    hidden, weight = numbers(5, 4).requires_grad_(), numbers(9, 4, seed=1)
    targets = torch.arange(5)
    linear_log_likelihoods(hidden, weight, targets).sum().backward()
    (exact,) = torch.autograd.grad(log_likelihoods(hidden, weight, targets).sum(), hidden)
    assert hidden.grad is not None and torch.allclose(hidden.grad, exact)
