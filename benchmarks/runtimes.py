"""Compare what runtimes compute with one model: python -m benchmarks.runtimes --model runs/demo/model [--json].

Exports the model (or, with --size, random well-scaled weights of a published size) to each runtime that is installed,
in fp32, and prints for each: the largest difference of a logit over all positions (llama.cpp and vLLM give
log-probabilities of the 20 likeliest tokens), at how many positions those 20 are other ones and how far apart our
logits of the tokens that changed places are, the largest difference of decoding token by token with a cache, and where
its greedy text leaves ours first, with the gap between our two likeliest logits there. With --size, llama.cpp and vLLM
continue half the length. vLLM is asked where OPENELM_VLLM_PYTHON names an interpreter that has it (docs/vllm.md).

mlx-lm on Linux computes with the reference BLAS, 1 GFLOP/s: a 270M at 2,048 positions takes half an hour. With
`LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libopenblas.so.0` (Debian: libopenblas0-pthread) the same calls take two minutes;
then choose `--runtimes mlx-lm`, because PyTorch's products go there too.

openelm-pytorch appears three times. Its norm divides by max(|x|, 1e-6) where the published one adds 1e-6 under the
root: "+ eps" has the published norm. Its angles are products in fp32, as Apple's and MLX's are: "+ eps + angles" has
ours, which are products in fp64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Logits = Callable[[Sequence[Sequence[int]]], Tensor]
"""Feeds the ids in the given pieces, one after the other with a cache; returns logits (all tokens, vocabulary)."""
Steps = list[tuple[int, dict[int, float]]]
"""What a runtime says: each token, with the log-probabilities of the likeliest at that place."""
VLLM_PYTHON = os.environ.get("OPENELM_VLLM_PYTHON")
_TOP = 20
_FIRST_PIECE = 259  # of the made-up tokenizer; control ids and bytes stand before it
_CHUNK = 256
"""Positions that MLX computes at a time, so that its graph stays small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="model folder")
    what.add_argument("--size", help="a published size with random weights")
    parser.add_argument("--prompt", default="HAMLET.\nTo be, or not to be", help="of the greedy text of --model")
    parser.add_argument("--length", type=int, help="positions (default: the context)")
    parser.add_argument("--tokens", type=int, default=256, help="of the greedy text, as far as the context reaches")
    parser.add_argument("--runtimes", nargs="+", choices=tuple(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or random_model(Path(temporary) / "model", options.size)
        for result in compare(folder, Path(temporary), options):
            print(json.dumps(result) if options.json else result, flush=True)


def random_model(folder: Path, size: str) -> Path:
    """Publish weights of a size under which every part of the model matters."""
    from openelm.model.folder import save_model
    from openelm.model.sizes import model_size
    from openelm.model.transformer import OpenELM

    model, generator = OpenELM(model_size(size)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    save_model(folder, model, tokenizer=made_up_tokenizer(model.config.vocab_size))
    return folder


def made_up_tokenizer(rows: int) -> Any:
    """Give every row a piece of its own, because llama.cpp loads no model without a tokenizer."""
    import sentencepiece.sentencepiece_model_pb2 as protobuf

    from openelm.text.spm import SentencePieceTokenizer

    model = protobuf.ModelProto()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1]  # of the format: unknown, control, byte, normal
    for number in range(rows):
        piece = names[number] if number < len(names) else f"▁word{number}"
        model.pieces.add(piece=piece, score=-float(number), type=kinds[number] if number < len(kinds) else 1)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.trainer_spec.vocab_size = rows
    model.normalizer_spec.name, model.normalizer_spec.remove_extra_whitespaces = "identity", False
    return SentencePieceTokenizer(model.SerializeToString())


def compare(folder: Path, temporary: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from openelm.model.folder import load_model
    from openelm.text.tokenizer import load_tokenizer

    model = load_model(folder, dtype=torch.float32)
    context = model.config.max_context_length
    length = min(options.length or context, context)
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt: list[int] = []
    if options.model:
        tokenizer = load_tokenizer(folder)
        assert tokenizer.bos_id is not None
        prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    ours = ours_of(model)
    expected = ours([ids])
    text = greedy(ours, prompt, min(options.tokens, context - len(prompt))) if prompt else []
    pieces = [ids[: length // 2], *([token] for token in ids[length // 2 :][:32])]
    about = {
        "model": str(options.model or options.size),
        "date": str(date.today()),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
    }
    for name in options.runtimes:
        package, make = RUNTIMES[name]
        if importlib.util.find_spec(package) is None and not (package == "vllm" and VLLM_PYTHON):
            continue
        if name in TALKERS:
            start, count = (prompt, len(text)) if prompt else (ids[: length // 2], length - length // 2)
            steps = make(folder, temporary / name, start, count, made_up=not prompt)
            yield {"runtime": name} | along_its_text(steps, ours, start, text) | about
            continue
        logits = make(folder, temporary / name)
        found = logits([ids])
        result = {"runtime": name, "positions": length, "largest difference": float((found - expected).abs().max())}
        result |= other_likeliest(found, expected)
        stepped = logits(pieces)
        result["decoding against the whole"] = float((stepped - found[: len(stepped)]).abs().max())
        if prompt:
            result |= divergence(greedy(logits, prompt, len(text)), text, ours, prompt)
        yield result | about


def other_likeliest(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Count the positions whose 20 likeliest tokens are other ones, and say how near our logits of those that left are.

    Args:
        found, expected: logits (positions, vocabulary).
    """
    rows = (top(found) != top(expected)).any(1).nonzero().flatten().tolist()
    gaps = []
    for row in rows:
        theirs, mine = (set(logits[row].topk(_TOP).indices.tolist()) for logits in (found, expected))
        left, came = sorted(mine - theirs), sorted(theirs - mine)
        gaps.append(float(expected[row, left].max() - expected[row, came].min()))
    return {"positions of another top 20": len(rows), "widest gap in them": max(gaps, default=None)}


def top(logits: Tensor) -> Tensor:
    return logits.topk(_TOP).indices.sort().values


def greedy(logits: Logits, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt; every token is computed from all before it, in two pieces so that the cache is used."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits([ids[:-1], ids[-1:]] if len(ids) > 1 else [ids])[-1].argmax()))
    return ids[len(prompt) :]


def divergence(found: list[int], text: list[int], ours: Logits, prompt: list[int]) -> dict[str, Any]:
    pairs = enumerate(zip(found, text, strict=True))
    first = next((place for place, (theirs, mine) in pairs if theirs != mine), None)
    if first is None:
        return {"greedy tokens": len(text), "first other token": None}
    best, second = ours([[*prompt, *text[:first]]])[-1].topk(2).values.tolist()
    return {"greedy tokens": len(text), "first other token": first, "gap": best - second}


def ours_of(model: Any) -> Logits:
    from openelm.model.cache import KeyValueCache

    @torch.no_grad()
    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        cache = KeyValueCache(model.config.plan, 1, sum(map(len, pieces)))
        return torch.cat([model(torch.tensor([list(piece)]), cache=cache)[0] for piece in pieces])

    return logits


def export(folder: Path, out: Path, to: str, **options: Any) -> Path:
    from openelm.convert.convert import Options, open_source, prepared, write

    chosen = Options(to=to, dtype="fp32", **options)
    with open_source(folder) as source:
        write(prepared(source, chosen), out, chosen)
    return out


def transformers_of(folder: Path, out: Path) -> Logits:
    import transformers

    path = export(folder, out, "hf", self_contained=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()

    @torch.no_grad()
    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        past, found = None, []
        for piece in pieces:
            output = model(torch.tensor([list(piece)]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits[0])
        return torch.cat(found)

    return logits


def onnxruntime_of(folder: Path, out: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(export(folder, out, "onnx") / "model.onnx")
    past = {entry.name: tuple(entry.shape) for entry in session.get_inputs() if entry.name.startswith("past")}
    return stepping(past, lambda feeds: session.run(None, feeds))


def openvino_of(folder: Path, out: Path) -> Logits:
    """Run OpenVINO in fp32; by default it computes in bf16 where the processor has units for it."""
    import openvino

    path, settings = export(folder, out, "onnx") / "model.onnx", {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", settings)
    shapes = {entry.any_name: entry.partial_shape for entry in model.inputs if entry.any_name.startswith("past")}
    past = {name: (1, shape[1].get_length(), 0, shape[3].get_length()) for name, shape in shapes.items()}
    return stepping(past, lambda feeds: [np.array(tensor) for tensor in model(feeds).values()])


def stepping(past: dict[str, tuple[int, ...]], run: Callable[[dict[str, Any]], list[Any]]) -> Logits:
    """Feed pieces to an ONNX graph and carry its cache.

    Args:
        past: the shape of each input that is a part of the cache, in the order of the outputs.
    """

    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        kept = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in past.items()}
        done, found = 0, []
        for piece in pieces:
            feeds = {
                "input_ids": np.array([list(piece)]),
                "position_ids": np.arange(done, done + len(piece))[None],
                "attention_mask": np.ones((1, done + len(piece)), np.int64),
            }
            output, *present = run(feeds | kept)
            kept, done = dict(zip(kept, present, strict=True)), done + len(piece)
            found.append(torch.from_numpy(output[0]))
        return torch.cat(found)

    return logits


def mlx_of(folder: Path, out: Path) -> Logits:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(export(folder, out, "mlx"))

    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        cache, found = make_prompt_cache(model), []
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                part = model(mx.array([list(piece[start : start + _CHUNK])]), cache=cache)[0]
                found.append(torch.from_numpy(np.array(part)))  # which computes it
        return torch.cat(found)

    return logits


def openelm_pytorch_of(folder: Path, out: Path, *, eps: bool = False, angles: bool = False) -> Logits:
    """Run openelm-pytorch.

    Args:
        eps: with the published norm, x / sqrt(mean(x²) + 1e-6), instead of its own.
        angles: with cosines and sines of fp64 angles instead of its own.
    """
    from openelm_pytorch import openelm as theirs
    from openelm_pytorch.config import ModelConfig

    from openelm.model.config import ModelConfig as Ours
    from openelm.model.weights import open_weights

    config = Ours.from_file(folder / "config.json")
    names = ("vocab_size", "num_transformer_layers", "model_dim", "head_dim", "ffn_dim_divisor", "num_gqa_groups")
    model = theirs.OpenELM.from_config(ModelConfig(**{name: getattr(config, name) for name in names})).eval()
    weights = open_weights(folder).items()
    model.load_state_dict({name.removeprefix("transformer."): tensor.read().float() for name, tensor in weights})
    turns = torch.outer(
        torch.arange(config.rope_max_length, dtype=torch.float64),
        config.rope_freq_constant ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim),
    )
    for module in model.modules():
        if eps and isinstance(module, theirs.RMSNorm):
            module.forward = partial(published_norm, module.weight, config.rms_norm_eps)
        if angles and isinstance(module, theirs.RoPE):
            module._sin, module._cos = turns.sin().float(), turns.cos().float()

    @torch.no_grad()
    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        """It rotates queries and keys only where a cache is wanted."""
        cache, found = None, []
        for piece in pieces:
            output = model(torch.tensor([list(piece)]), kv_cache=cache, use_kv_cache=True)
            cache = output["kv_cache"]
            found.append(output["logits"][0])
        return torch.cat(found)

    return logits


def published_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def llama_cpp(folder: Path, out: Path, prompt: list[int], count: int, *, made_up: bool) -> Steps:
    """Run llama.cpp with an fp32 cache and without flash attention.

    Args:
        made_up: whether the tokenizer is; then no byte is said, for the server holds back what is no whole character.
    """
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path = str(export(folder, out, "gguf") / "model.gguf")
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_ctx = len(prompt) + count + 1
    settings.n_parallel, settings.warmup, settings.verbosity = 1, False, 0
    request: dict[str, Any] = {"prompt": prompt, "max_tokens": count, "temperature": 0, "n_probs": _TOP}
    request["ignore_eos"] = True
    if made_up:
        request["logit_bias"] = [[number, False] for number in range(_FIRST_PIECE)]
    choice = cpp.Server(settings).handle_completions(request)["choices"][0]
    return [
        (step["id"], {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]})
        for step in choice["logprobs"]["content"]
    ]


def vllm(folder: Path, out: Path, prompt: list[int], count: int, *, made_up: bool) -> Steps:
    """Run vLLM in the environment that has it."""
    out.mkdir()
    options = {"model": str(folder.absolute()), "dtype": "float32", "enforce_eager": True}
    options |= {"max_model_len": len(prompt) + count, "kv_cache_memory_bytes": 1 << 29}
    request = {"temperature": 0, "max_tokens": count, "logprobs": _TOP, "ignore_eos": True}
    question = {"options": options, "asked": [{"prompts": [prompt], "options": request}]}
    (out / "question.json").write_text(json.dumps(question))
    program, python = Path(__file__).with_name("ask_vllm.py"), VLLM_PYTHON or sys.executable
    with (out / "log").open("wb") as log:
        done = subprocess.run([python, program, out / "question.json", out / "answers.json"], stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit((out / "log").read_text()[-4000:])
    answer = json.loads((out / "answers.json").read_text())["answers"][0][0]
    return [(number, dict(step)) for number, step in zip(answer["ids"], answer["steps"], strict=True)]


def along_its_text(steps: Steps, ours: Logits, prompt: list[int], text: list[int]) -> dict[str, Any]:
    """Compare log-probabilities along a runtime's own greedy text.

    Args:
        text: our greedy text, to compare with where it is not empty.
    """
    found = [number for number, _ in steps]
    rows = ours([[*prompt, *found[:-1]]])[len(prompt) - 1 :].log_softmax(-1)
    apart, gaps = [], []
    for row, (_, likeliest) in zip(rows, steps, strict=True):
        apart += [abs(float(row[token]) - value) for token, value in likeliest.items()]
        left = sorted(set(row.topk(_TOP).indices.tolist()) - likeliest.keys())
        if left:
            gaps.append(float(row[left].max()) - min(float(row[token]) for token in likeliest))
    result: dict[str, Any] = {"positions": len(steps), "largest difference": max(apart)}
    result |= {"positions of another top 20": len(gaps), "widest gap in them": max(gaps, default=None)}
    if text:
        return result | divergence(found, text[: len(found)], ours, prompt)
    return result | {"last position": len(prompt) + len(steps) - 1}


RUNTIMES: dict[str, tuple[str, Callable[..., Any]]] = {
    "transformers": ("transformers", transformers_of),
    "onnxruntime": ("onnxruntime", onnxruntime_of),
    "openvino": ("openvino", openvino_of),
    "mlx-lm": ("mlx_lm", mlx_of),
    "openelm-pytorch": ("openelm_pytorch", openelm_pytorch_of),
    "openelm-pytorch + eps": ("openelm_pytorch", partial(openelm_pytorch_of, eps=True)),
    "openelm-pytorch + eps + angles": ("openelm_pytorch", partial(openelm_pytorch_of, eps=True, angles=True)),
    "llama.cpp": ("xllamacpp", llama_cpp),
    "vllm": ("vllm", vllm),
}
TALKERS = ("llama.cpp", "vllm")
"""They give no logits, but log-probabilities of what they say."""


if __name__ == "__main__":
    main()
