"""Compare what runtimes compute with one model: python -m benchmarks.runtimes --model runs/demo/model [--json].

Exports the model (or, with --size, random well-scaled weights of a published size) to each runtime that is installed,
in fp32, and prints for each: the largest difference of a logit over all positions (llama.cpp gives log-probabilities of
the 20 likeliest tokens), whether those 20 are the same ones, the largest difference of decoding token by token with a
cache, and where its greedy text leaves ours first, with the gap between our two likeliest logits there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Logits = Callable[[Sequence[Sequence[int]]], Tensor]
"""Feeds the ids in the given pieces, one after the other with a cache; returns logits (all tokens, vocabulary)."""
_TOP = 20


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
    save_model(folder, model)
    return folder


def compare(folder: Path, temporary: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from openelm.model.folder import load_model
    from openelm.text.tokenizer import load_tokenizer

    model = load_model(folder, dtype=torch.float32)
    context, has_text = model.config.max_context_length, (folder / "tokenizer_config.json").exists()
    length = min(options.length or context, context)
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = []
    if has_text:
        tokenizer = load_tokenizer(folder)
        prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
    ours = ours_of(model)
    expected = ours([ids])
    text = greedy(ours, prompt, min(options.tokens, context - len(prompt))) if prompt else []
    pieces = [ids[: length // 2], *([token] for token in ids[length // 2 :][:32])]
    about = {"model": str(options.model or options.size), "date": str(date.today())}
    for name in options.runtimes:
        if importlib.util.find_spec(RUNTIMES[name][0]) is None:
            continue
        logits = RUNTIMES[name][1](folder, temporary / name)
        found = logits([ids])
        result = {"runtime": name, "positions": length, "largest difference": float((found - expected).abs().max())}
        result["same top 20"] = bool(torch.equal(top(found), top(expected)))
        stepped = logits(pieces)
        result["decoding against the whole"] = float((stepped - found[: len(stepped)]).abs().max())
        if prompt:
            result |= divergence(greedy(logits, prompt, len(text)), text, ours, prompt)
        yield result | about
    if prompt and importlib.util.find_spec("xllamacpp") is not None:
        yield llama_cpp(folder, temporary / "llama.cpp", ours, prompt, text, context) | about


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
    inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past")]

    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        past = {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in inputs}
        done, found = 0, []
        for piece in pieces:
            feeds = {
                "input_ids": np.array([list(piece)]),
                "position_ids": np.arange(done, done + len(piece))[None],
                "attention_mask": np.ones((1, done + len(piece)), np.int64),
            }
            output, *present = session.run(None, feeds | past)
            past, done = dict(zip(past, present, strict=True)), done + len(piece)
            found.append(torch.from_numpy(output[0]))
        return torch.cat(found)

    return logits


def mlx_of(folder: Path, out: Path) -> Logits:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(export(folder, out, "mlx"))

    def logits(pieces: Sequence[Sequence[int]]) -> Tensor:
        cache = make_prompt_cache(model)
        return torch.cat(
            [torch.from_numpy(np.array(model(mx.array([list(piece)]), cache=cache)[0])) for piece in pieces]
        )

    return logits


def openelm_pytorch_of(folder: Path, out: Path) -> Logits:
    from openelm_pytorch.config import ModelConfig
    from openelm_pytorch.openelm import OpenELM

    from openelm.model.config import ModelConfig as Ours
    from openelm.model.weights import open_weights

    config = Ours.from_file(folder / "config.json")
    names = ("vocab_size", "num_transformer_layers", "model_dim", "head_dim", "ffn_dim_divisor", "num_gqa_groups")
    model = OpenELM.from_config(ModelConfig(**{name: getattr(config, name) for name in names})).eval()
    weights = open_weights(folder).items()
    model.load_state_dict({name.removeprefix("transformer."): tensor.read().float() for name, tensor in weights})

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


def llama_cpp(folder: Path, out: Path, ours: Logits, prompt: list[int], text: list[int], length: int) -> dict[str, Any]:
    """Compare llama.cpp, with an fp32 cache and without flash attention, along its own greedy text."""
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path = str(export(folder, out, "gguf") / "model.gguf")
    settings.cache_type_k = settings.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = length + 1, 1, False, 0
    request = {"prompt": prompt, "max_tokens": len(text), "temperature": 0, "n_probs": _TOP, "ignore_eos": True}
    choice = cpp.Server(settings).handle_completions(request)["choices"][0]
    steps = choice["logprobs"]["content"]
    found = [step["id"] for step in steps]
    rows = ours([[*prompt, *found]])[len(prompt) - 1 :].log_softmax(-1)
    entries = [(row, entry) for step, row in zip(steps, rows, strict=False) for entry in step["top_logprobs"]]
    largest = max(abs(float(row[entry["id"]]) - entry["logprob"]) for row, entry in entries)
    likeliest = [{entry["id"] for entry in step["top_logprobs"]} for step in steps]
    same = all(set(row.topk(_TOP).indices.tolist()) == ids for row, ids in zip(rows, likeliest, strict=False))
    result = {"runtime": "llama.cpp", "positions": len(steps), "largest difference": largest, "same top 20": same}
    return result | divergence(found, text[: len(found)], ours, prompt)


RUNTIMES: dict[str, tuple[str, Callable[[Path, Path], Logits]]] = {
    "transformers": ("transformers", transformers_of),
    "onnxruntime": ("onnxruntime", onnxruntime_of),
    "mlx-lm": ("mlx_lm", mlx_of),
    "openelm-pytorch": ("openelm_pytorch", openelm_pytorch_of),
}


if __name__ == "__main__":
    main()
