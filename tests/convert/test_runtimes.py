"""Other runtimes load what we export, and compute the same: whole rows at once, and token by token with a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.errors import CheckpointError
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model
from openelm.model.weights import open_weights

from .conftest import PUBLISHED, Publish, odd_config, shallow

pytestmark = pytest.mark.filterwarnings("default")

APART = 1e-3
FIRST_PIECE = 259  # of the tests' tokenizer; control ids and bytes stand before it
TOKENS = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
SHAPES = ("odd", *PUBLISHED)
WITHOUT_NORMS = "without head norms"
"""Of queries and keys: llama.cpp has no such OpenELM."""


def shaped(size: str) -> ModelConfig:
    if size == WITHOUT_NORMS:
        return odd_config(normalize_qk_projections=False)
    return odd_config() if size == "odd" else shallow(size)


def export(folder: Path, out: Path, to: str, **options: Any) -> Path:
    chosen = Options(to=to, **options)
    with open_source(folder) as source:
        write(prepared(source, chosen), out, chosen)
    return out


def ours(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(tokens)


def steps_of(config: ModelConfig, run: Callable[[dict[str, Any]], list[Any]]) -> Callable[..., Tensor]:
    """Return what feeds pieces of a row to an ONNX graph, each with the cache of the ones before it."""
    kinds = [(layer, kind) for layer in range(config.num_transformer_layers) for kind in ("key", "value")]
    empty = {
        f"past_key_values.{layer}.{kind}": np.zeros((1, config.plan.kv_heads[layer], 0, config.head_dim), np.float32)
        for layer, kind in kinds
    }

    def logits(*pieces: Tensor) -> Tensor:
        past, done, parts = dict(empty), 0, []
        for piece in pieces:
            feeds = {
                "input_ids": piece.numpy(),
                "position_ids": np.arange(done, done + piece.shape[1])[None],
                "attention_mask": np.ones((1, done + piece.shape[1]), np.int64),
            }
            found, *present = run(feeds | past)
            past, done = dict(zip(past, present, strict=True)), done + piece.shape[1]
            parts.append(torch.from_numpy(found))
        return torch.cat(parts, 1)

    return logits


def check_steps(logits: Callable[..., Tensor], folder: Path) -> None:
    """Whole rows, steps with a cache, and the greedy text are ours."""
    whole = logits(TOKENS)
    assert (whole - ours(folder)).abs().max() < APART
    assert (logits(TOKENS[:, :52], *TOKENS[:, 52:].split(1, dim=1)) - whole).abs().max() < APART
    text = TOKENS[:, :8]
    for _ in range(12):
        text = torch.cat((text, logits(*text.split([text.shape[1] - 1, 1], 1))[:, -1:].argmax(-1)), 1)
    assert torch.equal(ours(folder, text)[:, 7:-1].argmax(-1), text[:, 8:])


@pytest.mark.parametrize("size", [*SHAPES, WITHOUT_NORMS])
def test_onnxruntime(publish: Publish, tmp_path: Path, size: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    config = shaped(size)
    folder = publish(config)
    session = runtime.InferenceSession(export(folder, tmp_path / "onnx", "onnx") / "model.onnx")
    check_steps(steps_of(config, lambda feeds: session.run(None, feeds)), folder)


@pytest.mark.parametrize("size", ("odd", "270m"))
def test_openvino(publish: Publish, tmp_path: Path, size: str) -> None:
    openvino = pytest.importorskip("openvino")
    config = shaped(size)
    folder = publish(config)
    path = export(folder, tmp_path / "onnx", "onnx") / "model.onnx"
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check_steps(steps_of(config, lambda feeds: [np.array(tensor) for tensor in model(feeds).values()]), folder)


@pytest.mark.parametrize("size", [*SHAPES, WITHOUT_NORMS])
def test_mlx_lm(publish: Publish, tmp_path: Path, size: str) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.models.cache import make_prompt_cache

    folder = publish(shaped(size))
    model, tokenizer = mlx_lm.load(str(export(folder, tmp_path / "mlx", "mlx")))
    whole = torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()))))
    assert (whole - ours(folder)).abs().max() < APART
    cache, parts = make_prompt_cache(model), []
    for part in (TOKENS[:, :52], *TOKENS[:, 52:].split(1, dim=1)):
        parts.append(torch.from_numpy(np.array(model(mx.array(part.numpy()), cache=cache))))
    assert (torch.cat(parts, 1) - whole).abs().max() < APART
    with open_source(folder) as source:
        assert source.tokenizer is not None
        text = "The fox talks, naïvely."
        assert tokenizer.encode(text) == [source.tokenizer.bos_id, *source.tokenizer.encode(text)]


def llama_server(path: Path, length: int) -> Any:
    """llama.cpp with what its default rounds left as it is: an fp32 cache and no flash attention."""
    cpp = pytest.importorskip("xllamacpp")
    settings = cpp.CommonParams()
    settings.model.path = str(path)
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = length, 1, False, 0
    return cpp.Server(settings)


def llama_steps(path: Path, prompt: list[int], count: int) -> list[dict[str, Any]]:
    """Continue a prompt greedily, without control ids and bytes: the server holds back what is no whole character."""
    banned = [[number, False] for number in range(FIRST_PIECE)]
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "n_probs": 20, "logit_bias": banned}
    steps: list[dict[str, Any]] = llama_server(path, 128).handle_completions(request)["choices"][0]["logprobs"][
        "content"
    ]
    assert len(steps) == count
    return steps


@pytest.mark.parametrize("size", SHAPES)
def test_llama_cpp(publish: Publish, tmp_path: Path, size: str) -> None:
    folder = publish(shaped(size))
    prompt = TOKENS[0, :40].tolist()
    steps = llama_steps(export(folder, tmp_path / "gguf", "gguf") / "model.gguf", prompt, 12)
    ids = [step["id"] for step in steps]
    expected = ours(folder, torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
    for step, row in zip(steps, expected, strict=True):
        for entry in step["top_logprobs"]:
            assert abs(entry["logprob"] - row[entry["id"]]) < APART
        assert row[FIRST_PIECE:].max() - row[step["id"]] < APART, "the likeliest piece, or one as likely"


def test_llama_cpp_tokenizes_as_we_do(publish: Publish, tmp_path: Path) -> None:
    folder = publish()
    server = llama_server(export(folder, tmp_path / "gguf", "gguf") / "model.gguf", 64)
    with open_source(folder) as source:
        assert source.tokenizer is not None
        for text in ("The quick brown fox", "  two  spaces\n\nand lines ", "naïve 🦊 12"):
            usage = server.handle_completions({"prompt": text, "max_tokens": 1})["usage"]
            assert usage["prompt_tokens"] == 1 + len(source.tokenizer.encode(text))


@pytest.mark.parametrize(("kind", "apart"), [("bf16", 0.2), ("f16", 0.03), ("q8_0", 0.2), ("q4_0", 0.5)])
def test_rounded_matrices_are_near(publish: Publish, tmp_path: Path, kind: str, apart: float) -> None:
    """What llama.cpp computes with packed matrices is what we compute with the numbers that they stand for, nearly."""
    folder = publish(odd_config())
    packed = export(folder, tmp_path / "gguf", "gguf", quantize=kind) / "model.gguf"
    unpacked = export(packed, tmp_path / "unpacked", "hf", dtype="fp32")
    exact, rounded = ours(folder).log_softmax(-1), ours(unpacked).log_softmax(-1)
    assert 0 < (exact - rounded).abs().mean() < apart
    (step,) = llama_steps(packed, TOKENS[0, :20].tolist(), 1)
    for entry in step["top_logprobs"]:
        assert abs(entry["logprob"] - rounded[0, 19, entry["id"]]) < apart


@pytest.mark.parametrize("bits", ["2", "4", "8"])
def test_mlx_lm_computes_with_quantised_matrices(publish: Publish, tmp_path: Path, bits: str) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    packed = export(publish(shaped("270m")), tmp_path / "mlx", "mlx", quantize=bits)
    unpacked = export(packed, tmp_path / "unpacked", "hf")
    model, _ = mlx_lm.load(str(packed))
    theirs = torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()))))
    assert (theirs - ours(unpacked)).abs().max() < 5e-3, "the same numbers, by another order of sums"
    words = sum(tensor.dtype == torch.uint32 for tensor in open_weights(packed, packed=True).values())
    assert words == 4 * 3 + 1
    if bits == "2":
        with pytest.raises(CheckpointError, match="bits"):
            load_model(packed)
        return
    with torch.no_grad():
        assert torch.equal(load_model(packed)(TOKENS), ours(unpacked))
