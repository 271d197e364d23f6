"""Attention within packed documents on CUDA; plain attention stands in for the flash kernel, which is CUDA's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels import attention_gpu
from openelm.kernels.attention import attention
from openelm.kernels.attention_gpu import Documents, flash_varlen, visible_documents
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM


def one_after_the_other(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """What the flash kernel is documented to compute: (positions, heads, hd), each sequence for itself."""
    parts = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert 0 <= end - start <= longest
        if end > start:
            own = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_gpu, "flash_varlen", lambda: one_after_the_other)
    yield


@pytest.mark.parametrize(
    "lengths",
    [[[16]], [[5, 11], [16]], [[1] * 16, [7, 9], [15, 1]], [[1] * 16] * 5],
    ids=["one", "two rows", "three rows", "eighty"],
)
def test_values_and_gradients_are_those_of_a_mask(stand_in: None, lengths: list[list[int]]) -> None:
    ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    shapes = [(len(lengths), heads, 16, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(i)).double() for i, s in enumerate(shapes)]
    results = []
    for documents in (ids, Documents.of(ids)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves, documents=documents)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for masked, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, masked, rtol=1e-10, atol=1e-8)


def test_the_number_of_documents_is_rounded_up_so_that_compiled_code_meets_few() -> None:
    sizes = {len(Documents.of((torch.arange(256) // size).expand(2, 256)).starts) for size in (256, 100, 50, 10)}
    assert sizes == {65}
    starts = Documents.of(torch.tensor([[0, 0, 1], [1, 1, 1]])).starts
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2, 3, *[6] * 62]
    assert len(Documents.of(torch.arange(65)[None]).starts) == 129


def test_rows_of_one_document_number_are_still_rows() -> None:
    assert Documents.of(torch.zeros(3, 4, dtype=torch.int32)).starts[:4].tolist() == [0, 4, 8, 12]


def test_the_model_gives_all_layers_the_same_documents(stand_in: None) -> None:
    model = OpenELM(model_size("5m", vocab_size=97))
    model.initialise(torch.Generator().manual_seed(0))
    ids = (torch.arange(24) // 7).expand(2, 24)
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        masked, packed = model.hidden(tokens, documents=ids), model.hidden(tokens, documents=Documents.of(ids))
    torch.testing.assert_close(packed, masked, rtol=0, atol=2e-5)


def test_elsewhere_documents_stay_a_tensor() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int32)
    assert visible_documents(ids, torch.bfloat16, torch.device("cpu")) is ids


def test_this_pytorch_has_the_flash_kernel_for_documents() -> None:
    """Its argument names changed between versions; a missing one would quietly cost a dense mask."""
    assert flash_varlen() is not None
