"""Check and time everything on one CUDA GPU in one call of at most ten minutes: python -m benchmarks.gpu.

First whether the arithmetic is right, then attention and decoding, then training steps at length 2048 by every way
there is, the most telling first. Results are written as they come, to --out, to $OUT, or to benchmarks/results; what
does not fit in memory or in the minutes is named as skipped, and a table comes last. With --smoke everything runs in
small on any device, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks
from benchmarks.gpu_decode import PLAIN, decode_line, decode_times
from benchmarks.gpu_steps import Case, Variant, measure
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.model.sizes import ModelChoice, model_size
from openelm.model.transformer import OpenELM

DENSE_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # vendor data sheets, SXM parts
ROWS = {"270m": 16, "1.1b": 8, "3b": 2}
SMOKE = ModelChoice(layers=2, dim=64, head_dim=64, gqa_groups=1, ffn_dim_divisor=16, context=64)
ON = {"compile": "on"}
OFF = {"compile": "off"}


def variants(rows: dict[str, int]) -> list[Variant]:
    """List what to time, in the order of what is wanted most; seconds are guesses for an H100."""

    def every(name: str, seconds: float, **options: Any) -> list[Variant]:
        return [Variant(name, size, rows[size], seconds=seconds, **options) for size in rows]

    first, *others = every("compiled, cuDNN attention", 60, train=ON, attention="cudnn")
    small = {"size": first.size, "rows": first.rows}
    last = list(rows)[-1]
    return [
        *every("ours", 25, train=OFF),
        *every("ours, compiled", 75, train=ON),
        first,
        Variant("compiled, documents", **small, train=ON, documents=5, seconds=60),
        Variant("compiled, float8", **small, train={**ON, "precision": "float8"}, seconds=60),
        *every("baseline", 30, kind="baseline"),
        Variant("compiled, bf16 weights", **small, kind="bf16 weights", seconds=50),
        Variant("exact", **small, train={**ON, "numerics": "exact", "shards": 8}, seconds=60),
        *others,
        Variant("compiled, twice the rows", last, 2 * rows[last], train={**ON, "recompute": "selective"}, seconds=75),
        *(Variant(kind, **small, kind=kind, seconds=60) for kind in ("transformers", "transformers, Liger", "litgpt")),
        *(
            Variant("compiled, float8", size, rows[size], train={**ON, "precision": "float8"}, seconds=75)
            for size in list(rows)[1:]
        ),
        Variant("compiled, half the rows", first.size, max(1, first.rows // 2), train=ON, seconds=60),
    ]


class Report:
    """What was found so far, on disk after every finding."""

    def __init__(self, file: Path, deadline: float) -> None:
        self.file, self.deadline = file, deadline
        self.values: dict[str, Any] = {}

    def keep(self, name: str, value: object) -> None:
        self.values[name] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.values, indent=1) + "\n")

    def attempt(self, work: Callable[[], Any], seconds: float = 0) -> Any:
        """Do a piece of work that may take some seconds, or say why it was skipped."""
        if time.monotonic() + seconds > self.deadline:
            return {"skipped": "no time left"}
        try:
            return work()
        except torch.cuda.OutOfMemoryError:
            return {"skipped": "not enough GPU memory"}
        except Exception as error:  # a missing package must not cost the other results
            return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; default $OUT, else benchmarks/results")
    parser.add_argument("--minutes", type=float, default=9.5, help="after this, what is left is skipped")
    parser.add_argument("--steps", type=int, default=6, help="steps in each of three stretches")
    parser.add_argument("--only", default="", help="time only variants whose size and name contain this, such as 3b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one step: does everything run?")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available")
    began = time.monotonic()
    report = Report(result_file(options.out, device), began + options.minutes * 60)
    end = threading.Timer(options.minutes * 60 + 15, lambda: (print(table(report.values), flush=True), os._exit(3)))
    end.daemon = True  # one variant outlasted its guess: what was found is on disk
    end.start()
    measure_all(report, options, device)
    report.keep("seconds", round(time.monotonic() - began, 1))
    end.cancel()
    print(table(report.values))
    if wrong := failures(report.values):
        sys.exit(f"wrong on this device: {', '.join(wrong)}")


def measure_all(report: Report, options: argparse.Namespace, device: torch.device) -> None:
    """Fill the report, section by section."""
    smoke, cuda = options.smoke, device.type == "cuda"
    small = SMOKE if smoke else ModelChoice(size="5m")
    rows, length = (2, 32) if smoke else (8, 256)
    report.keep("date", datetime.date.today().isoformat())
    report.keep("device", torch.cuda.get_device_name() if cuda else "cpu")
    report.keep("torch", torch.__version__)
    report.keep("packages", {name: package_version(name) for name in ("triton", "torchao", "transformers", "litgpt")})
    report.keep("matmul_tflops", matmul_flops(device, 256 if smoke else 8192) / 1e12)
    report.keep("kernel_errors", report.attempt(lambda: gpu_checks.kernel_errors(device)))
    report.keep("loss", report.attempt(lambda: losses(device)))
    report.keep("steady_step", report.attempt(lambda: gpu_checks.steady_step(device, small, rows, length)))
    report.keep("compiled", report.attempt(lambda: gpu_checks.compiled_gradients(device, small, rows, length)))
    report.keep("repeats", report.attempt(lambda: gpu_checks.repeats(device, small, rows, length)))
    shape = {"rows": 1, "length": 64, "heads": (2, 1)} if smoke else {"rows": 8, "length": 2048, "heads": (16, 4)}
    report.keep("attention", report.attempt(lambda: gpu_checks.attention_times(device, **shape)))
    report.keep("decode", report.attempt(lambda: decode_times(device, None if smoke else "1.1b", PLAIN)))
    report.keep("length", 32 if smoke else 2048)
    report.keep("training", [])
    listed = variants({"smoke": 2} if smoke else ROWS)
    for variant in listed:
        if options.only not in f"{variant.size} {variant.name}":
            continue
        choice = SMOKE if smoke else ModelChoice(size=variant.size)
        case = Case(choice, 97 if smoke else 32_128, report.values["length"], device, 1 if smoke else options.steps)
        if "shards" in variant.train and smoke:
            variant = Variant("exact", variant.size, 2, train={**OFF, "numerics": "exact", "shards": 2})
        result = report.attempt(lambda: measure(variant, case), 0 if smoke else variant.seconds)  # noqa: B023
        row = {"size": variant.size, "rows": variant.rows, "side": variant.name, **result}
        report.keep("training", [*report.values["training"], with_mfu(row, report.values)])
        print(training_line(report.values["training"][-1], report.values["training"]), flush=True)


def result_file(out: Path | None, device: torch.device) -> Path:
    if out is None and "OUT" in os.environ:
        out = Path(os.environ["OUT"])
    name = torch.cuda.get_device_name().split()[1].lower() if device.type == "cuda" else "cpu"
    folder = out or Path(__file__).parent / "results"
    return folder / f"{datetime.date.today().isoformat()}-{name}.json"


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def with_mfu(row: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Add the share of the published peak and of the measured product."""
    if "tflops" not in row:
        return row
    peak = next((flops for name, flops in DENSE_BF16_FLOPS.items() if name in values["device"]), None)
    mfu = round(row["tflops"] * 1e12 / peak, 3) if peak else None
    return {**row, "mfu": mfu, "of_matmul": round(row["tflops"] / values["matmul_tflops"], 3)}


def losses(device: torch.device) -> dict[str, Any]:
    """Compare the loss of one small model on the CPU and the device."""
    config = model_size("5m")
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))

    def loss() -> float:
        ids = tokens.to(model.head_weight.device)
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return float(linear_cross_entropy(hidden, model.head_weight, ids[:, 1:].flatten())[1]) / 128

    with torch.no_grad():
        cpu = loss()
        model.to(device)
        fp32 = loss()
        with torch.autocast(device.type, torch.bfloat16):
            bf16 = loss()
    return {"cpu": cpu, "fp32": fp32, "bf16": bf16, "ok": abs(fp32 - cpu) < 1e-3 and abs(bf16 - cpu) < 3e-2}


def matmul_flops(device: torch.device, size: int) -> float:
    """Measure bf16 FLOP/s of one large product: the practical ceiling of this device."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / gpu_checks.timed(lambda: torch.mm(a, b, out=out), device, warm=5)


def failures(values: dict[str, Any]) -> list[str]:
    """Name what is wrong, rather than slow or missing."""
    kernels = values["kernel_errors"]
    if isinstance(kernels, dict):
        return [f"kernels ({kernels['skipped']})"]
    wrong = [f"{row['kernel']} in {row['precision']}" for row in kernels if not row["ok"]]
    return [*wrong, *(name for name in ("loss", "compiled") if not values[name].get("ok"))]


def training_line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    start = f"{row['size']:5} {row['rows']:>4} {row['side']:26} "
    if "skipped" in row:
        return start + f"skipped: {row['skipped']}"
    plain = [r for r in rows if (r["size"], r["rows"], r["side"]) == (row["size"], row["rows"], "baseline")]
    ratio = f"{row['tokens_per_second'] / plain[0]['tokens_per_second']:.2f}" if plain and "tflops" in plain[0] else "-"
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
    return (
        start + f"{row['tokens_per_second']:>9} {row['tflops']:>8} {mfu:>6} {row['of_matmul']:>9.3f} {peak:>8} "
        f"{ratio:>6} {row['first_step_seconds']:>7} {row['graphs']:>6}"
    )


def table(values: dict[str, Any]) -> str:
    lines = [f"{values['device']}, torch {values['torch']}, bf16 matmul {values.get('matmul_tflops', 0):.0f} TFLOP/s"]
    errors = values.get("kernel_errors", [])
    for row in errors if isinstance(errors, list) else []:
        verdict = f"error {row['error']:.1e}" if row["error"] is not None else row["why"]
        lines.append(f"{row['kernel']:24} {row['precision']:5} {verdict} {'ok' if row['ok'] else 'WRONG'}")
    for name in ("loss", "steady_step", "compiled", "repeats"):
        lines.append(f"{name}: " + " ".join(f"{key}={value}" for key, value in values.get(name, {}).items()))
    decoded = values.get("decode", [])
    lines += [decode_line(row) for row in decoded] if isinstance(decoded, list) else [f"decode: {decoded['skipped']}"]
    attention = values.get("attention", [])
    for row in attention if isinstance(attention, list) else []:
        lines.append(f"attention {row['kernel']:24} " + str(row.get("milliseconds", row.get("skipped"))))
    lines.append(
        f"{'size':5} {'rows':>4} {'side':26} {'tokens/s':>9} {'TFLOP/s':>8} {'MFU':>6} {'of matmul':>9} {'peak GB':>8} "
        f"{'ratio':>6} {'first s':>7} {'graphs':>6}"
    )
    rows = values.get("training", [])
    return "\n".join([*lines, *(training_line(row, rows) for row in rows)])


if __name__ == "__main__":
    main()
