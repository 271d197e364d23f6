"""Measure the server through HTTP: python -m benchmarks.serve --model runs/demo/model [--streams 1 4 16] [--json].

Starts `openelm serve` with as many slots as streams and asks for that many streams at once, each with a prompt of its
own, greedy and without an end token, so that all are equally long. A first round is not counted. Prints for each
number of streams, over all rounds: tokens a second of all together, from the first request to the last token, and over
those of one stream; the median and the 99th percentile of the time between two tokens of a stream; the median and the
largest time to a first token. With --size the model has random weights of a published size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import torch

from benchmarks.runtimes import random_model
from openelm.model.device import cpu_name
from openelm.text.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="model folder")
    what.add_argument("--size", help="a published size with random weights")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="counted ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or random_model(Path(temporary) / "model", options.size)
        with server(folder, max(options.streams)) as address:
            single = None
            for streams in options.streams:
                result = asyncio.run(measure(address, folder, streams, options))
                single = single or result["tokens_per_second"] / streams
                result |= {
                    "ratio_to_one_stream": result["tokens_per_second"] / single,
                    "model": options.size or options.model.name,
                }
                result |= {"cpu": cpu_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
                result["date"] = str(date.today())
                print(json.dumps(result) if options.json else result, flush=True)


@contextmanager
def server(folder: Path, slots: int) -> Iterator[str]:
    """Start the command, and end it."""
    command = [sys.executable, "-m", "openelm", "serve", str(folder), "--port", "0", "--slots", str(slots)]
    command += ["--name", "model", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    assert process.stdout
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def measure(address: str, folder: Path, streams: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ask for streams at once, round after round."""
    tokenizer = load_tokenizer(folder)
    generator = np.random.default_rng(streams)
    rates, gaps, firsts = list[float](), list[float](), list[float]()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        for turn in range(options.rounds + 1):
            ids = generator.integers(3, tokenizer.vocab_size, (streams, options.prompt_tokens)).tolist()
            bias = {} if tokenizer.eos_id is None else {str(tokenizer.eos_id): -100}
            asked = {"model": "model", "max_tokens": options.tokens, "temperature": 0, "stream": True, "logprobs": 0}
            began = time.perf_counter()
            arrived = await asyncio.gather(
                *(arrivals(session, address, {**asked, "prompt": prompt, "logit_bias": bias}) for prompt in ids)
            )
            if turn == 0:
                continue
            rates.append(streams * options.tokens / (max(times[-1] for times in arrived) - began))
            gaps += [later - earlier for times in arrived for earlier, later in pairwise(times)]
            firsts += [times[0] - began for times in arrived]
    return {
        "streams": streams,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "tokens_per_second": median(rates),
        "gap_seconds_p50": float(np.percentile(gaps, 50)),
        "gap_seconds_p99": float(np.percentile(gaps, 99)),
        "first_token_seconds_p50": median(firsts),
        "first_token_seconds_max": max(firsts),
        "rounds": options.rounds,
    }


async def arrivals(session: aiohttp.ClientSession, address: str, asked: dict[str, Any]) -> list[float]:
    """Ask for one stream; returns when each of its tokens came."""
    times = []
    async with session.post(f"{address}/v1/completions", json=asked) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]):
                times += [time.perf_counter()] * len(choices[0]["logprobs"]["tokens"])
    assert len(times) == asked["max_tokens"], len(times)
    return times


if __name__ == "__main__":
    main()
