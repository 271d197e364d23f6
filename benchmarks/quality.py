"""What quantised weights lose: python -m benchmarks.quality --model runs/demo/model --text HELD-OUT … [--json].

Bits per byte of held-out text with the weights rounded to bf16; with those packed to 8 and 4 bits by `openelm quantize`
and with those packed as llama.cpp's Q8_0 and Q4_0, every matrix and the embedding too, by the `gguf` package, whose
blocks are llama.cpp's. These are unpacked and scored by our scorer in fp32, so that the loss is that of the
weights' format alone. "llama.cpp itself" computes the same documents in the same windows with its defaults, which round
the other factor of each product too, to 8 bits or to bf16, and the cache to fp16. "bits a weight" counts scales and
biases.

llama.cpp's server tells the log-probability of what it chooses, from before its samplers. A grammar of token ids leaves
it no choice but the document. It holds characters back of which a token is only a part, so a document must not need
such tokens: those of the demo do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, with_dtype, with_rows, write
from openelm.convert.source import Source
from openelm.evaluate.likelihood import windows
from openelm.evaluate.score import bits_per_byte, utf8_documents
from openelm.evaluate.suites import read_texts
from openelm.generate.quantize import quantize
from openelm.model.folder import load_model, save_weights
from openelm.model.transformer import OpenELM
from openelm.model.weights import open_weights
from openelm.text.tokenizer import Tokenizer, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--text", nargs="+", required=True, help="held-out documents")
    parser.add_argument("--calibration", nargs="+", required=True, help="training documents")
    parser.add_argument("--groups", nargs="*", type=int, default=[64, 32], help="of our formats; none leaves them out")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp; a small model gains nothing from more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    exact = None
    about = {"model": str(options.model), "date": str(date.today())}
    for case, value, bits in cases(options):
        exact = value if exact is None else exact
        loss_percent = 100 * (value / exact - 1)
        result = {"case": case, "bits_per_byte": round(value, 5), "loss_percent": round(loss_percent, 4)}
        result |= {"bits_a_weight": round(bits, 3)} | about
        print(json.dumps(result) if options.json else result, flush=True)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, float, float]]:
    """Yield names, bits per byte, and how many bits of a file stand for a weight of a matrix."""
    tokenizer, (texts, names) = load_tokenizer(options.model), read_texts(options.text)

    def scored(model: OpenELM) -> float:
        return bits_per_byte(model, tokenizer, texts, names).value

    with tempfile.TemporaryDirectory() as temporary, open_source(options.model) as opened:
        source, folder = with_dtype(opened, torch.bfloat16), Path(temporary) / "bf16"
        save_weights(folder, source.config, source.weights, tokenizer=source.tokenizer)
        yield "bf16", scored(load_model(folder, dtype=torch.float32)), 16.0
        bits_of = {"BF16": 16.0}
        for kind in ("Q8_0", "Q4_0"):
            model, bits_of[kind] = through_gguf(source, kind)
            yield f"llama.cpp's {kind}", scored(model), bits_of[kind]
        if importlib.util.find_spec("xllamacpp") is None:
            print("llama.cpp itself is skipped: pip install xllamacpp", file=sys.stderr)
        else:
            window = source.config.max_context_length
            for kind in bits_of:
                path = for_llama_cpp(source, tokenizer, Path(temporary) / kind, kind)
                value = forced_bits(llama_cpp(path, window, options.threads), tokenizer, texts, names, window)
                yield f"llama.cpp itself, {kind}", value, bits_of[kind]
        calibration, _ = read_texts(options.calibration)
        for group in options.groups:
            for bits, method in ((8, "rtn"), (4, "rtn"), (4, "gptq")):
                name, out = f"{bits} bits, groups of {group}, {method}", Path(temporary) / f"{bits}-{group}-{method}"
                quantize(folder, out, bits=bits, group=group, method=method, calibration=calibration)  # type: ignore[arg-type]
                yield name, scored(load_model(out, dtype=torch.float32)), bits_a_weight(out, source)


def bits_a_weight(folder: Path, source: Source) -> float:
    matrices = sum(tensor.bytes // 2 for tensor in source.weights.values() if len(tensor.shape) == 2)
    return 8 * sum(t.bytes for t in open_weights(folder, packed=True).values() if len(t.shape) == 2) / matrices


def through_gguf(source: Source, kind: str) -> tuple[OpenELM, float]:
    """Pack every matrix as llama.cpp does, and unpack it again."""
    import gguf

    quantisation, used, numbers = gguf.GGMLQuantizationType[kind], 0, 0

    def through(tensor: Tensor) -> Tensor:
        nonlocal used, numbers
        if tensor.ndim == 1:
            return tensor.float()
        block = gguf.GGML_QUANT_SIZES[quantisation][0]
        chosen = gguf.GGMLQuantizationType.F16 if tensor.shape[1] % block else quantisation
        blocks = gguf.quantize(tensor.float().numpy(), chosen)
        used, numbers = used + blocks.nbytes, numbers + tensor.numel()
        return torch.from_numpy(gguf.dequantize(blocks, chosen)).float()

    model = OpenELM(source.config)
    model.load_state_dict({name: through(tensor.read()) for name, tensor in source.weights.items()})
    return model, 8 * used / numbers


def for_llama_cpp(source: Source, tokenizer: Tokenizer, out: Path, kind: str) -> Path:
    """Write a GGUF file without rows that stand for no token, as our scorer leaves them out.

    It says that it reads twice the context: the server chooses no token behind a whole window of what the file says.
    """
    window = source.config.max_context_length
    longer = source.config.model_copy(update={"max_context_length": 2 * window, "rope_max_length": 4 * window})
    source = with_rows(replace(source, config=longer), tokenizer.vocab_size)
    write(source, out, Options(to="gguf", quantize=kind.lower()))
    return out / "model.gguf"


def llama_cpp(path: Path, window: int, threads: int) -> Any:
    """Start the server inside xllamacpp with its defaults and room for a window and the token behind it."""
    import xllamacpp as cpp

    settings = cpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 2 * window, 1, False, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    return cpp.Server(settings)


def forced_bits(server: Any, tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str], window: int) -> float:
    """Compute bits per byte as `openelm.evaluate.score.bits_per_byte` does: the same ids in the same windows."""
    assert tokenizer.bos_id is not None
    nats = 0.0
    for text, name in zip(texts, names, strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        for start, end, scored in windows(len(ids) - 1, window, max(1, window // 2)):
            nats -= math.fsum(forced(server, ids[start : end + 1], scored, name))
    return nats / math.log(2) / sum(map(len, utf8_documents(texts, names)))


def forced(server: Any, ids: list[int], scored: int, name: str) -> list[float]:
    """Return the log-probability of each of the last ids, given those before it."""
    prompt, said = ids[:-scored], ids[-scored:]
    request = {"prompt": prompt, "max_tokens": scored, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    request["grammar"] = "root ::= " + " ".join(f"<[{token}]>" for token in said)
    answer = server.handle_completions(request)
    steps = answer["choices"][0]["logprobs"]["content"] if "choices" in answer else []
    if [step["id"] for step in steps] != said:
        raise SystemExit(f"{name}: llama.cpp's server does not say it token by token; leave out what is not ASCII")
    return [step["logprob"] for step in steps]


if __name__ == "__main__":
    main()
