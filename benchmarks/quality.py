"""What quantised weights lose: python -m benchmarks.quality --model runs/demo/model --text HELD-OUT … [--json].

Bits per byte of held-out text with the weights rounded to bf16; with those packed to 8 and 4 bits by `openelm quantize`
and with those packed as llama.cpp's Q8_0 and Q4_0, every matrix and the embedding too, by the `gguf` package, whose
blocks are llama.cpp's. All are unpacked and scored by our scorer in fp32, so that the loss is that of the
weights' format alone: llama.cpp rounds what it multiplies to 8 bits besides. "bits a weight" counts scales and biases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from openelm.convert.convert import open_source, with_dtype
from openelm.convert.source import Source
from openelm.evaluate.score import bits_per_byte
from openelm.evaluate.suites import read_texts
from openelm.generate.quantize import quantize
from openelm.model.folder import load_model, save_weights
from openelm.model.transformer import OpenELM
from openelm.model.weights import open_weights
from openelm.text.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--text", nargs="+", required=True, help="held-out documents")
    parser.add_argument("--calibration", nargs="+", required=True, help="training documents")
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 32], help="of our formats")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts, names = read_texts(options.text)
    tokenizer = load_tokenizer(options.model)
    exact = None
    about = {"model": str(options.model), "date": str(date.today())}
    for case, model, bits in cases(options):
        value = bits_per_byte(model, tokenizer, texts, names).value
        exact = value if exact is None else exact
        loss_percent = 100 * (value / exact - 1)
        result = {"case": case, "bits_per_byte": round(value, 5), "loss_percent": round(loss_percent, 4)}
        result |= {"bits_a_weight": round(bits, 3)} | about
        print(json.dumps(result) if options.json else result, flush=True)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, OpenELM, float]]:
    """Yield names, models in fp32, and how many bits of a file stand for a weight of a matrix."""
    with tempfile.TemporaryDirectory() as temporary, open_source(options.model) as opened:
        source, folder = with_dtype(opened, torch.bfloat16), Path(temporary) / "bf16"
        save_weights(folder, source.config, source.weights, tokenizer=source.tokenizer)
        yield "bf16", load_model(folder, dtype=torch.float32), 16.0
        for kind in ("Q8_0", "Q4_0"):
            yield f"llama.cpp's {kind}", *through_gguf(source, kind)
        texts, _ = read_texts(options.calibration)
        for group in options.groups:
            for bits, method in ((8, "rtn"), (4, "rtn"), (4, "gptq")):
                name, out = f"{bits} bits, groups of {group}, {method}", Path(temporary) / f"{bits}-{group}-{method}"
                quantize(folder, out, bits=bits, group=group, method=method, calibration=texts)  # type: ignore[arg-type]
                yield name, load_model(out, dtype=torch.float32), bits_a_weight(out, source)


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


if __name__ == "__main__":
    main()
