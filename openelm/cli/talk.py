"""`openelm generate` and `openelm chat`: text on the terminal, as it is made."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from openelm.errors import ConfigError
from openelm.generate.chat import Continuation, Conversation
from openelm.generate.engine import Engine, Proposer, prompt_ids
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.generate.speculative import DraftModel, PromptLookup
from openelm.model.device import choose_device
from openelm.model.folder import is_chat_tuned
from openelm.model.packed import load_packed
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer, load_tokenizer

_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "regex",
    "max_tokens",
    "stop",
    "seed",
)


def generate(arguments: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    folder = Path(arguments.model)
    sampling = _sampling(arguments)
    model, tokenizer = load_packed(folder, device=choose_device(arguments.device)), load_tokenizer(folder)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt.replace("\\n", "\n")
    ids = prompt_ids(tokenizer, prompt)
    length = max(1, min(model.config.max_context_length, len(ids) + sampling.max_tokens))
    engine = Engine(model, tokenizer, length=length, proposer=_proposer(arguments, model, length))
    tokens = engine.stream(ids, sampling)
    first = next(tokens)  # a bad prompt is an error before anything is printed
    print(prompt + first.text, end="", flush=True)
    made = [first, *_passed_on(tokens)]
    print()
    if sampling.top_logprobs:
        _print_top(made, tokenizer)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Read lines and answer them until the input ends."""
    folder = Path(arguments.model)
    sampling = _sampling(arguments)
    model, tokenizer = load_packed(folder, device=choose_device(arguments.device)), load_tokenizer(folder)
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


def _proposer(arguments: argparse.Namespace, model: OpenELM, length: int) -> Proposer | None:
    if arguments.speculate in (None, "lookup"):
        return None if arguments.speculate is None else PromptLookup()
    draft = load_packed(Path(arguments.speculate), device=choose_device(arguments.device))
    return DraftModel(draft, model, slots=1, length=length)


def _read_line() -> str | None:
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _stream(tokens: Iterator[Token]) -> None:
    for _ in _passed_on(tokens):
        pass
    print()


def _passed_on(tokens: Iterator[Token]) -> Iterator[Token]:
    for token in tokens:
        print(token.text, end="", flush=True)
        yield token


def _print_top(tokens: list[Token], tokenizer: Tokenizer) -> None:
    """One line a token: itself, then the likeliest there, each with its log-probability."""
    for token in tokens:
        shown = [(token.id, token.logprob), *token.top]
        words = [f"{_name(tokenizer, token_id)} {logprob:.3f}" for token_id, logprob in shown]
        print("\t".join(words), file=sys.stderr)


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """Write a token as Python would, with what is no text as bytes."""
    data = tokenizer.token_bytes(token_id)
    try:
        return repr(data.decode()) if data else f"<{token_id}>"
    except UnicodeDecodeError:
        return repr(data)


def _sampling(arguments: argparse.Namespace) -> SamplingConfig:
    given = {name: value for name in _OPTIONS if (value := getattr(arguments, name, None)) is not None}
    if arguments.logit_bias:
        given["logit_bias"] = dict(map(_bias, arguments.logit_bias))
    if arguments.json_schema is not None:
        given["json_schema"] = _read_schema(Path(arguments.json_schema))
    if arguments.grammar is not None:
        given["grammar"] = _read_text(Path(arguments.grammar))
    return SamplingConfig.parse(given)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise ConfigError(f"logit_bias {text!r} is not of the form ID=VALUE", fix="for example 65=-100") from None


def _read_schema(file: Path) -> object:
    try:
        return json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"json_schema: not JSON: {error}", file=file) from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file, fix="give the path of a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text", file=file, offset=error.start) from None
