"""One side of a comparison of generation: python -m benchmarks.speakers SIDE FOLDER KIND THREADS.

A process of its own, which answers each line of standard input with one JSON line; `benchmarks.decode` starts these.
FOLDER has what the sides read: `bf16`, `int8` and `4-bit` (our folders), `hf`, GGUF in `bf16-gguf` and so on, `onnx`.
Lines:

    decode PROMPT TOKENS ROWS    seconds and number of tokens, once all prompts have been read
    prefill PROMPT               seconds to the first token of a prompt that was not seen before
    states PROMPT                seconds of the model's own pass over such a prompt, without the engine
    share PROMPT TOKENS          what a plain reading of all weights takes of a token's time, each token between two
                                 readings, and their bytes a second
    matmul ROWS                  seconds and FLOP of torch's products with all matrices of the layers
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

Answer = dict[str, float]
Speaker = dict[str, Callable[..., Answer]]
_SLOTS, _LENGTH = 16, 1152
_CONTROL = 259  # ids of the made-up tokenizer that are no words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=tuple(SPEAKERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=("bf16", "int8", "4-bit"))
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a package prints is no answer
    import torch

    torch.set_num_threads(options.threads)
    try:
        speaker = SPEAKERS[options.side](options.folder, options.kind, options.threads)
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        word, *numbers = line.split()
        print(json.dumps(speaker[word](*map(int, numbers))), file=answers)
    answers.flush()
    os._exit(0)


def prompts(count: int, length: int) -> list[list[int]]:
    """Draw prompts of words that nobody drew before."""
    import torch

    prompts.drawn = getattr(prompts, "drawn", 0) + 1  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(prompts.drawn)  # type: ignore[attr-defined]
    drawn: list[list[int]] = torch.randint(_CONTROL, 32_000, (count, length), generator=generator).tolist()
    return drawn


def ours(folder: Path, kind: str, threads: int) -> Speaker:
    """The engine, as `openelm generate` and `openelm serve` run it."""
    import torch

    from openelm.generate.engine import Engine
    from openelm.generate.request import Generation
    from openelm.generate.sampling import SamplingConfig
    from openelm.kernels.native import call
    from openelm.model.packed import PackedModule, load_packed
    from openelm.text.tokenizer import load_tokenizer

    model, tokenizer = load_packed(folder / kind), load_tokenizer(folder / kind)
    engine = Engine(model, tokenizer, slots=_SLOTS, length=_LENGTH)
    weights = [module.matrix for module in model.modules() if isinstance(module, PackedModule)]
    addresses = torch.tensor([part.memory.data_ptr() for part in weights])
    sizes = torch.tensor([part.memory.nbytes for part in weights])
    matrices = [
        torch.randn(part.layout.rows, part.layout.columns).to(part.layout.dtype)
        for part in weights
        if part.layout.rows != model.config.vocab_size
    ]

    def started(prompt: int, rows: int) -> list[Generation]:
        config = SamplingConfig(temperature=0, max_tokens=_LENGTH, logit_bias={2: -100})
        generations = [engine.submit(ids, config) for ids in prompts(rows, prompt)]
        while not all(generation.generated_tokens for generation in generations):
            engine.step()
        return generations

    def end(generations: list[Generation], least: int) -> None:
        assert sum(len(generation.take()) for generation in generations) >= least
        for generation in generations:
            engine.cancel(generation)

    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        generations = started(prompt, rows)
        began = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = time.perf_counter() - began
        end(generations, tokens * rows)
        return {"seconds": seconds, "tokens": tokens * rows}

    def share(prompt: int, tokens: int) -> Answer:
        generations, shares, rates = started(prompt, 1), list[float](), list[float]()
        for _ in range(tokens):
            times = [time.perf_counter()]
            for what in (read, engine.step, read):
                what()
                times.append(time.perf_counter())
            first, step, second = (end - start for start, end in pairwise(times))
            shares.append((first + second) / 2 / step)
            rates.append(2 * int(sizes.sum()) / (first + second))
        end(generations, tokens)
        return {"share": median(shares), "bytes_per_second": median(rates)}

    def prefill(prompt: int) -> Answer:
        (ids,) = prompts(1, prompt)
        began = time.perf_counter()
        tokens = list(engine.stream(ids, SamplingConfig(temperature=0, max_tokens=1)))
        assert len(tokens) == 1
        return {"seconds": time.perf_counter() - began, "tokens": prompt}

    def states(prompt: int) -> Answer:
        (ids,) = prompts(1, prompt)
        engine._decoder.truncate(0, 0)
        began = time.perf_counter()
        engine._decoder.prefill(0, ids)
        seconds = time.perf_counter() - began
        engine._decoder.truncate(0, 0)
        return {"seconds": seconds, "tokens": prompt}

    def read() -> None:
        call("read", len(sizes), addresses, sizes)

    def matmul(rows: int) -> Answer:
        left = {matrix.shape[1]: torch.randn(rows, matrix.shape[1], dtype=matrix.dtype) for matrix in matrices}
        out = {matrix.shape[0]: torch.empty(rows, matrix.shape[0], dtype=matrix.dtype) for matrix in matrices}
        began = time.perf_counter()
        for matrix in matrices:
            torch.mm(left[matrix.shape[1]], matrix.t(), out=out[matrix.shape[0]])
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "flop": 2 * rows * sum(matrix.numel() for matrix in matrices)}

    return {"decode": decode, "prefill": prefill, "share": share, "states": states, "matmul": matmul}


def plain(folder: Path, kind: str, threads: int) -> Speaker:
    """The published model as it is written down, which joins each new key to a copy of those before it."""
    import torch

    from benchmarks.baseline import PlainSpeaker
    from openelm.model.config import ModelConfig
    from openelm.model.weights import open_weights

    plan = (config := ModelConfig.from_file(folder / kind / "config.json")).plan
    widths = (plan.dim, plan.head_dim, plan.query_heads, plan.kv_heads, plan.ffn_dims, config.vocab_size)
    weights = {name: tensor.read() for name, tensor in open_weights(folder / kind).items()}
    model = PlainSpeaker(*widths).to(torch.bfloat16)
    model.load_state_dict(weights)

    @torch.inference_mode()
    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        ids = torch.tensor(prompts(rows, prompt))
        past = model.empty_past()
        token = model.next_logits(ids, past).argmax(-1)
        began = time.perf_counter()
        for _ in range(tokens):
            token = model.next_logits(token[:, None], past).argmax(-1)
        return {"seconds": time.perf_counter() - began, "tokens": tokens * rows}

    @torch.inference_mode()
    def prefill(prompt: int) -> Answer:
        ids = torch.tensor(prompts(1, prompt))
        began = time.perf_counter()
        model.next_logits(ids, model.empty_past()).argmax(-1)
        return {"seconds": time.perf_counter() - began, "tokens": prompt}

    return {"decode": decode, "prefill": prefill}


def transformers(folder: Path, kind: str, threads: int) -> Speaker:
    """`generate` of transformers on the exported folder, with its default cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True, dtype=torch.bfloat16).eval()

    def timed(ids: Any, tokens: int) -> float:
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - began

    @torch.inference_mode()
    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        ids = torch.tensor(prompts(rows, prompt))
        return {"seconds": timed(ids, tokens + 1) - timed(ids, 1), "tokens": tokens * rows}

    @torch.inference_mode()
    def prefill(prompt: int) -> Answer:
        return {"seconds": timed(torch.tensor(prompts(1, prompt)), 1), "tokens": prompt}

    return {"decode": decode, "prefill": prefill}


def llama_cpp(folder: Path, kind: str, threads: int) -> Speaker:
    """The server inside xllamacpp with its defaults; the times are those that llama.cpp takes of itself."""
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path = str(folder / f"{kind}-gguf" / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.verbosity = _LENGTH, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = cpp.Server(settings)

    def timings(prompt: int, tokens: int) -> dict[str, float]:
        request: dict[str, Any] = {"prompt": prompts(1, prompt)[0], "max_tokens": tokens, "temperature": 0}
        request |= {"ignore_eos": True, "cache_prompt": False, "samplers": ["top_k"], "top_k": 1}
        found: dict[str, float] = server.handle_completions(request)["timings"]
        return found

    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        assert rows == 1
        found = timings(prompt, tokens)
        return {"seconds": found["predicted_ms"] / 1e3, "tokens": found["predicted_n"]}

    def prefill(prompt: int) -> Answer:
        found = timings(prompt, 1)
        return {"seconds": found["prompt_ms"] / 1e3, "tokens": found["prompt_n"]}

    return {"decode": decode, "prefill": prefill}


def onnxruntime(folder: Path, kind: str, threads: int) -> Speaker:
    """Our ONNX graph in fp32. Its cache goes in and out as onnxruntime's own tensors, which nobody copies.

    The graph computes the logits of all positions of a prompt.
    """
    import onnxruntime as runtime

    if not (folder / "onnx").exists():
        raise ImportError("there is no exported graph, as onnx is not installed")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"])
    start, step = onnx_steps(session)

    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        assert rows == 1
        token = start(prompts(1, prompt)[0])
        began = time.perf_counter()
        for _ in range(tokens):
            token = step(token)
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    def prefill(prompt: int) -> Answer:
        (ids,) = prompts(1, prompt)
        began = time.perf_counter()
        start(ids)
        return {"seconds": time.perf_counter() - began, "tokens": prompt}

    return {"decode": decode, "prefill": prefill}


def onnx_steps(session: Any) -> tuple[Callable[[list[int]], int], Callable[[int], int]]:
    """Return what starts a text with a prompt, and what goes a token on; both return the likeliest next token."""
    import numpy as np
    import onnxruntime as runtime

    value = runtime.OrtValue.ortvalue_from_numpy
    outputs = [entry.name for entry in session.get_outputs()]
    shapes = {entry.name: entry.shape for entry in session.get_inputs() if entry.name.startswith("past")}
    empty = {name: value(np.zeros((1, heads, 0, size), np.float32)) for name, (_, heads, _, size) in shapes.items()}
    past, done = empty, 0

    def feed(ids: list[int]) -> int:
        nonlocal past, done
        feeds = {
            "input_ids": value(np.array([ids])),
            "position_ids": value(np.arange(done, done + len(ids))[None]),
            "attention_mask": value(np.ones((1, done + len(ids)), np.int64)),
        }
        logits, *present = session.run_with_ort_values(outputs, feeds | past)
        past, done = dict(zip(past, present, strict=True)), done + len(ids)
        return int(logits.numpy()[0, -1].argmax())

    def start(ids: list[int]) -> int:
        nonlocal past, done
        past, done = empty, 0
        return feed(ids)

    return start, lambda token: feed([token])


def mlx_lm(folder: Path, kind: str, threads: int) -> Speaker:
    """mlx-lm's own loop of generation, on the folder as it is; MLX knows no number of threads."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder / kind)

    def arrivals(ids: list[int], tokens: int) -> list[float]:
        """Return when the call and each token came; then wait for the token that MLX computes ahead of those asked."""
        times = [time.perf_counter()]
        for _ in generate_step(mx.array(ids), model, max_tokens=tokens):
            times.append(time.perf_counter())
        mx.synchronize()
        return times

    def decode(prompt: int, tokens: int, rows: int) -> Answer:
        assert rows == 1
        _, first, *_, last = arrivals(prompts(1, prompt)[0], tokens + 1)
        return {"seconds": last - first, "tokens": tokens}

    def prefill(prompt: int) -> Answer:
        began, first = arrivals(prompts(1, prompt)[0], 1)
        return {"seconds": first - began, "tokens": prompt}

    return {"decode": decode, "prefill": prefill}


SPEAKERS: dict[str, Callable[[Path, str, int], Speaker]] = {
    "ours": ours,
    "plain": plain,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime,
    "mlx-lm": mlx_lm,
}

if __name__ == "__main__":
    main()
