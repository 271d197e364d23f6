"""What guessing tokens gives: python -m benchmarks.speculate --model M --draft D --text HELD-OUT … [--json].

The greedy text of a model, one text at a time, without guesses and with those of `openelm generate --speculate`, on two
engines of one process that take turns with each prompt. The texts are the same, or the comparison stops. Prompts:

    held-out     stretches of the held-out documents
    repeating    as long, but a short stretch again and again: what a list, a refrain or code is like

Guesses: `lookup` in the text, the `draft` model, and as bounds `right` ones, which cost nothing to make, and `wrong`
ones, which are computed and thrown away. `accepted`: the share of the guesses that the model said too. `guessing`: the
share of the time that went into making them, which for a draft includes its reading of the prompt.

With --size instead of --model, the bounds alone, of random weights of a published size in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from openelm.evaluate.suites import read_texts
from openelm.generate.engine import Engine, Proposer
from openelm.generate.sampling import SamplingConfig
from openelm.generate.speculative import DraftModel, PromptLookup
from openelm.model.folder import load_model
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer, load_tokenizer

PROMPT, TOKENS, PERIOD = 96, 128, 40
BOUNDS = {"right 4": (4, 0), "right 8": (8, 0), "wrong 4": (4, 1), "wrong 8": (8, 1)}
"""How many guesses at a time, and how far from what the text will say."""
Prompts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="model folder")
    what.add_argument("--size", help="a published size with random weights")
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokenizer")
    parser.add_argument("--text", nargs="+", default=[], help="held-out documents")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.model and not options.text:
        parser.error("--model needs --text")
    torch.set_num_threads(options.threads)
    about = {"model": str(options.model or options.size), "threads": options.threads, "date": str(date.today())}
    for line in measured(options):
        print(json.dumps(line | about) if options.json else line, flush=True)


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.size:
        from benchmarks.runtimes import random_model

        with tempfile.TemporaryDirectory() as temporary:
            folder = random_model(Path(temporary) / "model", options.size)
            model, tokenizer = load_model(folder, dtype=torch.bfloat16), load_tokenizer(folder)
        generator = torch.Generator().manual_seed(0)
        size = (options.prompts, PROMPT)
        texts = {"random": torch.randint(300, tokenizer.vocab_size, size, generator=generator).tolist()}
    else:
        model, tokenizer = load_model(options.model), load_tokenizer(options.model)
        texts = prompts(tokenizer, options.text, options.prompts)
    model.requires_grad_(False)
    draft = load_model(options.draft).requires_grad_(False) if options.draft else None
    for number, (case, ids) in enumerate(texts.items()):
        for name in (
            *(["lookup"] if options.model else []),
            *(["draft"] if draft else []),
            *([] if number else BOUNDS),
        ):
            yield {"case": case, "guesses": name} | compared(model, tokenizer, draft, name, ids, options.turns)


def prompts(tokenizer: Tokenizer, paths: Sequence[str], count: int) -> dict[str, Prompts]:
    """Cut prompts out of documents, as far from one another as they can be."""
    texts, _ = read_texts(paths)
    ids = [token for text in texts for token in tokenizer.encode(text)]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    places = [len(ids) // count * number for number in range(count)]
    ordinary = [[*start, *ids[place:][:PROMPT]] for place in places]
    repeating = [[*start, *(ids[place:][:PERIOD] * (PROMPT // PERIOD + 1))[:PROMPT]] for place in places]
    return {"held-out": ordinary, "repeating": repeating}


class Known:
    """Guesses from what the text is known to say, so many tokens at a time and so far from the right ones."""

    def __init__(self, texts: Prompts, most: int, apart: int) -> None:
        self._texts, self._most, self._apart = texts, most, apart

    def propose(self, slot: int, ids: Sequence[int], most: int) -> list[int]:
        (text,) = (text for text in self._texts if text[: len(ids)] == list(ids))
        return [token + self._apart for token in text[len(ids) :][: min(most, self._most)]]


class Timed:
    """A proposer, and the seconds that it took."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer, self.seconds = proposer, 0.0

    def propose(self, slot: int, ids: Sequence[int], most: int) -> list[int]:
        began = time.perf_counter()
        guesses = self._proposer.propose(slot, ids, most)
        self.seconds += time.perf_counter() - began
        return guesses


class Said(NamedTuple):
    """A text, and what it took behind its first token."""

    ids: list[int]
    seconds: float
    steps: int
    proposed: int
    accepted: int


def said(engine: Engine, ids: list[int], tokenizer: Tokenizer) -> Said:
    bias = {} if tokenizer.eos_id is None else {tokenizer.eos_id: -100.0}
    config = SamplingConfig(temperature=0, max_tokens=TOKENS, logit_bias=bias)
    # A scope of its own: the rest of a prompt that was read before would be read alone, and rounded in another way.
    generation = engine.submit(ids, config, scope=str(time.perf_counter_ns()))
    while not generation.generated_tokens:
        engine.step()
    steps, began = 0, time.perf_counter()
    while not generation.finished:
        engine.step()
        steps += 1
    seconds = time.perf_counter() - began
    assert generation.error is None and generation.generated_tokens == TOKENS
    return Said(generation.ids, seconds, steps, generation.proposed_tokens, generation.accepted_tokens)


def compared(
    model: OpenELM, tokenizer: Tokenizer, draft: OpenELM | None, guesses: str, texts: Prompts, turns: int
) -> dict[str, Any]:
    """Continue each prompt with and without guesses, in another order each turn; the first turn is not counted."""
    length = PROMPT + TOKENS + 1
    plain = Engine(model, tokenizer, length=length)
    expected = [said(plain, ids, tokenizer).ids for ids in texts]
    proposer: Proposer
    if guesses == "lookup":
        proposer = PromptLookup()
    elif guesses == "draft":
        assert draft is not None
        proposer = DraftModel(draft, model, slots=1, length=length)
    else:
        proposer = Known(expected, *BOUNDS[guesses])
    timed = Timed(proposer)
    engines = {"without": plain, "with": Engine(model, tokenizer, length=length, proposer=timed)}
    rates: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(turns + 1):
        found: dict[str, list[Said]] = {"without": [], "with": []}
        timed.seconds = 0.0
        for number, ids in enumerate(texts):
            for side in sorted(engines, reverse=(turn + number) % 2 == 0):
                found[side].append(said(engines[side], ids, tokenizer))
                if found[side][-1].ids != expected[number]:
                    raise SystemExit(f"{guesses}: the text of prompt {number} changed {side} guesses")
        if turn:
            for side, answers in found.items():
                rates[side].append(len(texts) * (TOKENS - 1) / sum(answer.seconds for answer in answers))
    last = found["with"]
    proposed, steps = (sum(getattr(answer, name) for answer in last) for name in ("proposed", "steps"))
    return {
        "tokens_per_second": round(median(rates["with"]), 1),
        "without": round(median(rates["without"]), 1),
        "ratio": round(median(one / other for one, other in zip(rates["with"], rates["without"], strict=True)), 3),
        "accepted": round(sum(answer.accepted for answer in last) / max(1, proposed), 3),
        "tokens_a_step": round(len(texts) * (TOKENS - 1) / steps, 2),
        "guessing": round(timed.seconds / sum(answer.seconds for answer in last), 3),
    }


if __name__ == "__main__":
    main()
