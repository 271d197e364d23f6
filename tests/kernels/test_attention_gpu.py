"""Attention within packed documents on CUDA; plain attention stands in for the flash kernel, which is CUDA's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels import linear
from openelm.kernels.attention import attention
from openelm.kernels.attention_gpu import Documents, flash_varlen, visible_documents
from openelm.model import transformer
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM, Recompute


def one_after_the_other(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """What the flash kernel is documented to compute: (positions, heads, hd), each sequence for itself."""
    parts = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert 0 <= end - start <= longest
        if end > start:
            own = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(
    "lengths",
    [[[16]], [[5, 11], [16]], [[1] * 16, [7, 9], [15, 1]], [[1] * 16] * 5],
    ids=["one", "two rows", "three rows", "eighty"],
)
def test_values_and_gradients_are_those_of_a_mask(lengths: list[list[int]]) -> None:
    ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    shapes = [(len(lengths), heads, 16, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(i)).double() for i, s in enumerate(shapes)]
    results = []
    for documents in (ids, Documents.of(ids, one_after_the_other)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attention(*leaves, documents=documents)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for masked, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, masked, rtol=1e-10, atol=1e-8)


def test_the_number_of_documents_is_rounded_up_so_that_compiled_code_meets_few() -> None:
    sizes = {
        len(Documents.of((torch.arange(256) // size).expand(2, 256), one_after_the_other).starts)
        for size in (256, 100, 50, 10)
    }
    assert sizes == {65}
    starts = Documents.of(torch.tensor([[0, 0, 1], [1, 1, 1]]), one_after_the_other).starts
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2, 3, *[6] * 62]
    assert len(Documents.of(torch.arange(65)[None], one_after_the_other).starts) == 129


def test_rows_of_one_document_number_are_still_rows() -> None:
    assert Documents.of(torch.zeros(3, 4, dtype=torch.int32), one_after_the_other).starts[:4].tolist() == [0, 4, 8, 12]


def test_the_model_gives_all_layers_the_same_documents() -> None:
    model = OpenELM(model_size("5m", vocab_size=97))
    model.initialise(torch.Generator().manual_seed(0))
    ids = (torch.arange(24) // 7).expand(2, 24)
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        masked, packed = (
            model.hidden(tokens, documents=ids),
            model.hidden(tokens, documents=Documents.of(ids, one_after_the_other)),
        )
    torch.testing.assert_close(packed, masked, rtol=0, atol=2e-5)


def test_elsewhere_documents_stay_a_tensor() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int32)
    assert visible_documents(ids, torch.bfloat16, torch.device("cpu")) is ids


def test_this_pytorch_has_the_flash_kernel_for_documents() -> None:
    """Its argument names changed between versions; a missing one would quietly cost a dense mask."""
    assert flash_varlen() is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_flash_kernel_stays_whole_in_compiled_layers(monkeypatch: pytest.MonkeyPatch, recompute: Recompute) -> None:
    """On the meta device, where only shapes are computed: one kernel a layer forward, one backward, no mask."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs: list[list[str]] = []

    def note(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "attn" in str(node.target)])
        return graph

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    one = functools.cache(lambda function: torch.compile(function, backend=backend, fullgraph=True))
    monkeypatch.setattr(transformer, "compiled", one)
    for module in (transformer, linear):  # autocast knows no meta device
        monkeypatch.setattr(module, "matmul_dtype", lambda *operands: torch.bfloat16)
    torch._dynamo.reset()
    kernel = flash_varlen()
    assert kernel is not None
    with torch.device("meta"):
        model = OpenELM(model_size("5m", vocab_size=97)).bfloat16()
        documents = Documents(torch.zeros(65, dtype=torch.int32), 24, kernel)
        model.recompute, model.compiles = recompute, True
        model.hidden(torch.zeros(2, 24, dtype=torch.long), documents=documents).sum().backward()
    torch._dynamo.reset()
    again = ["torch_attn._varlen_attn.default"] if recompute == "selective" else []
    assert set(map(tuple, graphs)) == {
        ("torch_attn._varlen_attn.default",),
        (*again, "torch_attn._varlen_attn_backward.default"),
    }
