"""`openelm generate` and `openelm chat`: text on the terminal, as it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from openelm.generate.chat import Continuation, Conversation
from openelm.generate.engine import Token, prompt_ids
from openelm.generate.engine import generate as generate_tokens
from openelm.generate.sampling import SamplingConfig
from openelm.model.device import choose_device
from openelm.model.folder import is_chat_tuned, load_model
from openelm.text.tokenizer import load_tokenizer

_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "stop", "seed")


def generate(arguments: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    folder = Path(arguments.model)
    sampling = _sampling(arguments)
    model, tokenizer = load_model(folder, device=choose_device(arguments.device)), load_tokenizer(folder)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt.replace("\\n", "\n")
    tokens = generate_tokens(model, tokenizer, prompt_ids(tokenizer, prompt), sampling)
    first = next(tokens)  # a bad prompt is an error before anything is printed
    print(prompt + first.text, end="", flush=True)
    _stream(tokens)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends."""
    folder = Path(arguments.model)
    sampling = _sampling(arguments)
    model, tokenizer = load_model(folder, device=choose_device(arguments.device)), load_tokenizer(folder)
    talk: Conversation | Continuation
    if is_chat_tuned(folder):
        talk = Conversation(model, tokenizer, sampling, system=arguments.system)
        print("Type a message; Ctrl-D ends.", file=sys.stderr)
    else:
        talk = Continuation(model, tokenizer, sampling)
        print(
            "This model continues text; it was not tuned to answer. Type how a text begins, or press", file=sys.stderr
        )
        print("Enter for more of the last one; \\n stands for a new line; Ctrl-D ends.", file=sys.stderr)
    while (line := _read_line()) is not None:
        try:
            _stream(talk.reply(line.replace("\\n", "\n")))
        except KeyboardInterrupt:  # stops this reply, not the conversation
            print()
    return 0


def _read_line() -> str | None:
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _stream(tokens: Iterator[Token]) -> None:
    for token in tokens:
        print(token.text, end="", flush=True)
    print()


def _sampling(arguments: argparse.Namespace) -> SamplingConfig:
    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    return SamplingConfig.parse(given)
