"""Compare generation with other runtimes on the same weights: python -m benchmarks.decode [--json].

Random weights of a published size, in bf16 and quantised to 8 and 4 bits; llama.cpp has the same numbers as BF16, Q8_0
and Q4_0, onnxruntime those of bf16 in fp32, the dtype of our export. The sides run in processes of their own and take
turns; a peer that is not installed is skipped, and said to be. On Linux mlx-lm takes a fifth of a second for a token
and a tenth for one of a prompt, so it is asked for fewer and in fewer turns: `peer_asked`, `peer_turns`. Of each case
the medians are printed:

    decode-*       tokens a second of one text behind a prompt of 256 tokens. `bandwidth_fraction`: what a plain reading
                   of the same weights takes of a token's time, each token measured between two readings
    prefill-*      tokens a second of a prompt that was not seen before. `matmul_fraction`: what torch's products with
                   the same matrices take of its time
    first-token    seconds to the first token of 128, beside those of its prompt in the engine
    together-16    tokens a second of 16 texts, and beside it of one
    load           seconds of `openelm generate` from a cold process to its first token
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.turns import SideEnded, Worker, in_turn

KINDS = {"bf16": "bf16", "int8": "q8_0", "4-bit": "q4_0"}
PROMPT, TOKENS = 256, 64
CASES = (
    "decode-bf16",
    "decode-int8",
    "decode-4-bit",
    "prefill-256",
    "prefill-1024",
    "first-token",
    "together-16",
    "load",
)
PEERS = ("llama.cpp", "plain", "transformers", "onnxruntime", "mlx-lm")
DTYPES = {"onnxruntime": "fp32"}
"""Of a peer whose numbers are wider than those of the case."""
Turns = dict[str, list[dict[str, float]]]


class Fewer(NamedTuple):
    """The most that a slow peer is asked for."""

    prompt: int
    tokens: int
    turns: int


FEWER = {"mlx-lm": Fewer(prompt=64, tokens=8, turns=2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270m")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="keep the models here, and use those that are here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        prepare(folder, options.size, options.peers)
        about = {"size": options.size, "threads": options.threads, "machine": processor(), "date": str(date.today())}
        for case in options.cases:
            for line in measured(case, folder, options.threads, options.turns, options.peers):
                print(json.dumps(line | about) if options.json else line, flush=True)


def prepare(folder: Path, size: str, peers: list[str]) -> None:
    """Write the models, all of the same numbers rounded to bf16."""
    from benchmarks.runtimes import random_model
    from openelm.convert.convert import Options, open_source, prepared, write
    from openelm.generate.quantize import quantize

    def export(out: str, to: str, **options: Any) -> None:
        if not (folder / out).exists():
            chosen = Options(to=to, dtype="bf16", **options)
            with open_source(folder / "fp32") as source:
                write(prepared(source, chosen), folder / out, chosen)

    if not (folder / "fp32").exists():
        random_model(folder / "fp32", size)
    export("bf16", "hf")
    export("hf", "hf", self_contained=True)
    if "onnxruntime" in peers and importlib.util.find_spec("onnx"):
        export("onnx", "onnx")
    for kind, packed in KINDS.items():
        export(f"{kind}-gguf", "gguf", quantize=packed)
        if kind != "bf16" and not (folder / kind).exists():
            quantize(folder / "bf16", folder / kind, bits={"int8": 8, "4-bit": 4}[kind])


def measured(case: str, folder: Path, threads: int, turns: int, peers: list[str]) -> Iterator[dict[str, Any]]:
    name, _, what = case.partition("-")
    if name == "decode":
        asked = f"decode {PROMPT} {TOKENS} 1"
        chosen = [peer for peer in peers if what == "bf16" or peer == "llama.cpp"]
        share = f"share {PROMPT} {TOKENS}"
        found, skipped = take_turns(["ours", *chosen], folder, what, threads, turns, [asked, share])
        shares, read_rates = zip(*(tuple(answer.values()) for answer in found[f"ours {share}"]), strict=True)
        more = {
            "bandwidth_fraction": round(median(shares), 3),
            "read_gb_per_second": round(median(read_rates) / 1e9, 1),
        }
        yield from beside(case, found, skipped, asked, chosen, what, more)
    elif name == "prefill":
        asked = f"prefill {what}"
        found, skipped = take_turns(["ours", *peers], folder, "bf16", threads, turns, [asked, f"matmul {what}"])
        fractions = [
            products["seconds"] / prompt["seconds"]
            for prompt, products in zip(found[f"ours {asked}"], found[f"ours matmul {what}"], strict=True)
        ]
        rate = median(products["flop"] / products["seconds"] / 1e9 for products in found[f"ours matmul {what}"])
        more = {"matmul_fraction": round(median(fractions), 3), "matmul_gflop_per_second": round(rate)}
        yield from beside(case, found, skipped, asked, peers, "bf16", more)
    elif name == "first":
        yield from first_token(case, folder, threads, turns)
    elif name == "together":
        one, many = (f"decode {PROMPT} {TOKENS} {rows}" for rows in (1, int(what)))
        found, _ = take_turns(["ours"], folder, "bf16", threads, turns, [one, many])
        single, together = rates(found[f"ours {one}"]), rates(found[f"ours {many}"])
        yield described(case, together, "ours, one text", single)
    else:
        seconds = [cold_start(folder / "bf16", threads) for _ in range(turns)]
        yield {"case": case, "seconds": round(median(seconds), 2), "all": [round(second, 2) for second in seconds]}


def take_turns(
    sides: list[str], folder: Path, kind: str, threads: int, turns: int, words: list[str]
) -> tuple[Turns, dict[str, str]]:
    """Ask every side in turn; a side that does not know a word is not asked it. The first turn is not counted.

    Returns the answers, under side and word, and why sides were skipped.
    """
    workers = {side: Worker(side, folder, kind, threads, module="benchmarks.speakers") for side in sides}
    answers: Turns = {}
    try:
        said = {side: worker.answer() for side, worker in workers.items()}
        skipped = {side: said[side]["skipped"] for side in sides if "skipped" in said[side]}
        for turn in range(turns + 1):
            for side in in_turn([side for side in sides if side not in skipped], turn):
                if side in FEWER and turn > FEWER[side].turns:
                    continue
                for word in words:
                    if side == "ours" or word.split()[0] in ("decode", "prefill"):
                        answer = workers[side].ask(asked_of(side, word))
                        if turn:
                            answers.setdefault(f"{side} {word}", []).append(answer)
    except SideEnded as error:
        raise SystemExit(str(error)) from None
    finally:
        for worker in workers.values():
            worker.close()
    return answers, skipped


def asked_of(side: str, word: str) -> str:
    """Return what stands for a word where a side is too slow for it."""
    if side not in FEWER:
        return word
    (what, prompt, *rest), fewer = word.split(), FEWER[side]
    numbers = [min(int(prompt), fewer.prompt), *([min(int(rest[0]), fewer.tokens), 1] if what == "decode" else [])]
    return " ".join([what, *map(str, numbers)])


def first_token(case: str, folder: Path, threads: int, turns: int) -> Iterator[dict[str, Any]]:
    """The engine reads 128 tokens in a step, to which the choice of a token adds little."""
    asked, products = "prefill 128", "states 128"
    found, _ = take_turns(["ours"], folder, "bf16", threads, turns, [asked, products])
    first, prompt = ([answer["seconds"] for answer in found[f"ours {word}"]] for word in (asked, products))
    ratio = median(one / other for one, other in zip(first, prompt, strict=True))
    yield {
        "case": case,
        "seconds": round(median(first), 4),
        "prefill_seconds": round(median(prompt), 4),
        "ratio": round(ratio, 3),
    }


def cold_start(folder: Path, threads: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "openelm", "generate", str(folder), "--prompt", "word300", "--max-tokens", "1"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - began


def rates(answers: list[dict[str, float]]) -> list[float]:
    return [answer["tokens"] / answer["seconds"] for answer in answers]


def beside(
    case: str,
    found: Turns,
    skipped: dict[str, str],
    asked: str,
    peers: list[str],
    kind: str,
    more: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Put our side and each peer into a line, or say why a peer is not there."""
    for peer in peers:
        if peer in skipped:
            yield {"case": case, "peer": peer, "skipped": skipped[peer]}
            continue
        ours, theirs = rates(found[f"ours {asked}"]), rates(found[f"{peer} {asked}"])
        line = described(case, ours, peer, theirs) | {"peer_dtype": DTYPES.get(peer, kind)}
        if (fewer := asked_of(peer, asked)) != asked:
            line["peer_asked"] = fewer
        if len(theirs) < len(ours):
            line["peer_turns"] = len(theirs)
        yield line | more


def described(case: str, ours: list[float], peer: str, theirs: list[float]) -> dict[str, Any]:
    """Medians; the ratio is the median of the ratios of those turns that both sides took, the first ones."""
    return {
        "case": case,
        "tokens_per_second": round(median(ours), 1),
        "peer": peer,
        "peer_tokens_per_second": round(median(theirs), 1),
        "ratio": round(median(one / other for one, other in zip(ours, theirs, strict=False)), 3),
        "slowest_and_fastest": [round(bound(ours), 1) for bound in (min, max)],
    }


def processor() -> str:
    try:
        names = [
            row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row
        ]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()
