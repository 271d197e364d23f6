"""Time decoding on one CUDA GPU: python -m benchmarks.gpu_decode

Greedy tokens after prompts of 256, bf16 and 4 bits, one text and 64 side by side; the ids are read after every step,
as the engine does. Beside tokens a second stands what a step must read, weights and the keys and values in use, as a
share of the memory bandwidth that the vendor gives. With --smoke a tiny model runs on any device, which says nothing
about speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_steps import _drawn_on, synchronize
from openelm.model.config import ModelConfig
from openelm.model.decoding import Decoder
from openelm.model.quantized import Quantization, QuantizedMatrix, hold_quantized
from openelm.model.sizes import ModelChoice, model_size
from openelm.model.transformer import OpenELM

BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}  # vendor data sheets, SXM parts of 80 GB and more
PLAIN = ((None, "plain"), (None, "recorded"))
SIDES = (*PLAIN, (None, "recorded, compiled"), (4, "recorded, compiled"))  # bits, and how
TINY = ModelChoice(layers=2, dim=64, head_dim=16, gqa_groups=2, ffn_dim_divisor=64, context=64)


def decode_times(
    device: torch.device, size: str | None, sides: Sequence[tuple[int | None, str]] = SIDES
) -> list[dict[str, Any]]:
    """Time every side, at one text and at many; a tiny model where no size is given."""
    config = model_size(size) if size else TINY.config(97)
    prompt, steps, batches = (256, 64, (1, 64)) if size else (8, 3, (1, 3))
    found = []
    for bits, side in sides:
        model = random_model(config, device, bits)
        for rows in batches:
            row: dict[str, Any] = {"size": size or "tiny", "bits": bits or 16, "side": side, "rows": rows}
            try:
                row |= measured(model, rows, side, prompt, steps)
            except Exception as error:  # one side must not cost the others
                row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            found.append(row)
    return found


def random_model(config: ModelConfig, device: torch.device, bits: int | None) -> OpenELM:
    """Make a bf16 model on the device, with random numbers or words."""
    with torch.device(device):
        model = OpenELM(config)
        if bits:
            hold_quantized(model, Quantization(bits=bits))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in _drawn_on(device)(model, None):
            model.get_parameter(name).copy_(weight)
        for module in model.modules():
            if isinstance(module, QuantizedMatrix):
                module.weight.view(torch.int32).random_()
                module.scales.fill_(1e-3)
                module.biases.fill_(-8e-3)
    return model.bfloat16()


@torch.inference_mode()
def measured(model: OpenELM, rows: int, side: str, prompt: int, steps: int) -> dict[str, Any]:
    """Time steps of one side: the median of three stretches, after one in which shapes are compiled and recorded."""
    decoder = Decoder(model, rows, prompt + 4 * steps, compiles="compiled" in side)
    decoder._kernel = None  # on a CPU the same code is to run as on a GPU
    decoder._static._records &= "recorded" in side
    generator = torch.Generator().manual_seed(2)
    for slot in range(rows):
        decoder.prefill(slot, torch.randint(0, 97, (prompt,), generator=generator).tolist())
    ids, slots, seconds = [1] * rows, list(range(rows)), []
    for _ in range(4):
        synchronize(decoder.device)
        began = time.perf_counter()
        for _ in range(steps):
            ids = decoder.step(ids, slots).argmax(-1).tolist()
        seconds.append(time.perf_counter() - began)
        for slot in slots:
            decoder.truncate(slot, prompt)
    step_seconds = median(seconds[1:]) / steps
    held = 2 * model.config.head_dim * sum(model.config.plan.kv_heads) * 2 * rows * (prompt + steps // 2)
    read = held + sum(part.nbytes for part in {id(part): part for part in model.state_dict().values()}.values())
    name = torch.cuda.get_device_name() if decoder.device.type == "cuda" else "cpu"
    peak = next((rate for part, rate in BYTES_PER_SECOND.items() if part in name), None)
    return {
        "tokens_per_second": round(rows / step_seconds, 1),
        "first_seconds": round(seconds[0], 1),
        "bytes_per_step": read,
        "of_bandwidth": round(read / step_seconds / peak, 3) if peak else None,
    }


def decode_line(row: dict[str, Any]) -> str:
    start = f"decode {row['size']:5} {row['bits']:>2} bits {row['rows']:>3} rows {row['side']:20} "
    if "skipped" in row:
        return start + f"skipped: {row['skipped']}"
    share = "-" if row["of_bandwidth"] is None else f"{row['of_bandwidth']:.3f}"
    return start + f"{row['tokens_per_second']:>9} tokens/s, {share} of bandwidth, first {row['first_seconds']} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps: does everything run?")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available")
    for row in decode_times(torch.device(options.device), None if options.smoke else options.size):
        print(decode_line(row), flush=True)


if __name__ == "__main__":
    main()
