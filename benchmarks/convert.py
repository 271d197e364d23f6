"""Measure a conversion beside a copy of the same bytes: python -m benchmarks.convert --size 3b --to hf gguf [--json].

Makes a folder of the size's shapes with bf16 numbers that repeat, in several files; converts it with the command, in a
process of its own, in turns with a copy of the files to the same disk that ends with an fsync. Medians, the ratio of
the speeds, and the most memory that the command held, beside that of the largest file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3b")
    parser.add_argument("--to", nargs="+", default=["hf", "gguf", "mlx", "onnx"])
    parser.add_argument("--folder", default=".", help="on the disk that is measured (default: %(default)s)")
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        files = make(root / "source", options.size, round(options.shard_gb * 1e9))
        for target in options.to:
            result = compare(root, target, files, options.shard_gb, options.repeats)
            result |= {"size": options.size, "date": str(date.today())}
            print(json.dumps(result) if options.json else result)


def make(folder: Path, size: str, shard_bytes: int) -> list[Path]:
    """Publish a folder of a size's shapes; its matrices are the same numbers over and over."""
    import torch

    from openelm.convert.source import shapes_of
    from openelm.model.folder import save_weights
    from openelm.model.sizes import model_size
    from openelm.model.weights import LazyTensor

    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16() / 64

    def filled(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return numbers.repeat(-(-count // len(numbers)))[:count].view(shape)

    config = model_size(size)
    weights = {
        name: LazyTensor(torch.bfloat16, shape, lambda shape=shape: filled(shape))  # type: ignore[misc]
        for name, shape in shapes_of(config).items()
    }
    save_weights(folder, config, weights, shard_bytes=shard_bytes)
    return sorted(folder.glob("*.safetensors"))


def compare(root: Path, target: str, files: list[Path], shard_gb: float, repeats: int) -> dict[str, Any]:
    copies, conversions, peaks = [], [], []
    for _ in range(repeats):
        copies.append(timed_copy(files, root / "copy"))
        seconds, peak = timed_conversion(root, target, shard_gb)
        conversions.append(seconds)
        peaks.append(peak)
    size = sum(file.stat().st_size for file in files)
    return {
        "to": target,
        "copy_gb_per_second": round(size / median(copies) / 1e9, 3),
        "convert_gb_per_second": round(size / median(conversions) / 1e9, 3),
        "of a copy's speed": round(median(copies) / median(conversions), 3),
        "peak_gb": round(max(peaks) / 1e9, 3),
        "largest_file_gb": round(max(file.stat().st_size for file in files) / 1e9, 3),
        "repeats": repeats,
    }


def timed_copy(files: list[Path], folder: Path) -> float:
    folder.mkdir()
    began = time.perf_counter()
    for file in files:
        shutil.copyfile(file, folder / file.name)
        with (folder / file.name).open("rb") as copy:
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def timed_conversion(root: Path, target: str, shard_gb: float) -> tuple[float, int]:
    """Run the command; returns its seconds, the interpreter's start included, and its largest resident memory."""
    out = root / "out"
    command = [sys.executable, "-m", "openelm", "convert", str(root / "source"), "--to", target, "-o", str(out)]
    began = time.perf_counter()
    child = subprocess.Popen([*command, "--shard-gb", str(shard_gb)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"the conversion to {target} failed")
    shutil.rmtree(out)
    return seconds, _peak_bytes(used)


def _peak_bytes(used: resource.struct_rusage) -> int:
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
