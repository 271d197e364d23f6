"""Constrained output: the tokens with which a text can still become what a schema, a regex or a grammar accepts.

llguidance does the parsing, on bytes, so any of our tokenizers will do. Its limits end a hard grammar step by step,
but a few lines can still keep its compiler busy for minutes or overflow the stack: each new grammar is tried in a
child process first.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.generate.sampling import SamplingConfig
from openelm.text.tokenizer import Tokenizer

_LARGEST_BYTES = 64 << 10  # of a schema, a regex or a grammar
_KEPT_GRAMMARS = 256  # that passed the trial, at most 17 MB of text
_KEPT_VOCABULARIES = 4
_TRIAL_SECONDS = 60  # on a busy machine; the trial itself counts its own CPU time
# As json.dumps writes it. With free white space a small model may never stop writing it.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
# With the library's own limits the worst grammar found took up to 68 ms a token, and a lexer could take 250 MB.
_LIMITS = {"step_max_items": 5000, "step_lexer_fuel": 100_000, "max_lexer_states": 20_000}
_FIX = "simplify it"


class Constraint:
    """Follows one text, token by token, and says what may come next.

    Args:
        grammar: what `_description` gives.

    Raises:
        ConfigError: the grammar is wrong, uses what the library does not have, is too hard, or allows no text; or
            the tokenizer has no EOS, or the library is not installed.
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        library = _library()
        if tokenizer.eos_id is None:
            raise ConfigError("constrained output needs a tokenizer with an EOS id", fix="leave the constraint out")
        _try_in_child(grammar)
        # Not a copy of a matcher kept for all: copies share one lexer, whose limits would run out for later texts.
        limits = library.LLParserLimits(**_LIMITS, verbose_errors=False)
        self._matcher: Any = library.LLMatcher(_vocabulary(tokenizer), grammar, log_level=0, limits=limits)
        self._eos_id, self._size = tokenizer.eos_id, tokenizer.vocab_size
        self._silent = tokenizer.byte_lengths() == 0
        self._check()
        self.allowed()

    @classmethod
    def of(cls, config: SamplingConfig, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Self | None:
        """Make the constraint that a config asks for, if any, for the text that follows a prompt."""
        if config.json_schema is None and config.regex is None and config.grammar is None:
            return None
        begins = not any(tokenizer.token_bytes(token_id) for token_id in prompt_ids)
        return cls(_description(config, after_space=begins and tokenizer.leading_space), tokenizer)

    def allowed(self) -> Tensor:
        """Return the tokens that may come next, (vocab_size,) bool on the CPU; EOS exactly where the text may end.

        Raises:
            ConfigError: there are none, or finding them takes too much work.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)
        allowed[self._silent] = False  # a grammar can name control ids by number
        allowed[self._eos_id] = self._matcher.is_accepting()
        if not allowed.any():
            raise ConfigError("the constraint allows nothing here, not even the end", fix="check it for dead ends")
        return torch.from_numpy(allowed)

    def accept(self, token_id: int) -> None:
        """Go on by one token, one of those allowed.

        Raises:
            ConfigError: it takes too much work.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the constraint cannot be followed: {_told(self._matcher.get_error())}", fix=_FIX)


def _description(config: SamplingConfig, *, after_space: bool) -> str:
    """Write a constraint in the library's JSON.

    Args:
        after_space: the text begins behind a space that the tokenizer takes off again.
    """
    library = _library()
    part: dict[str, Any]
    try:
        if config.json_schema is not None:
            part = {"json_schema": {**config.json_schema, "x-guidance": _JSON_STYLE}}
        elif config.regex is not None:
            part = {"lark_grammar": f"start: /{library.regex_to_lark(config.regex, 'dw')}/"}
        else:
            part = {"lark_grammar": config.grammar}
        # Without forcing every spelling of a text is allowed; with it only the one that `encode` gives.
        start = '%llguidance {"no_forcing": true}\nstart: ' + ('" " @text' if after_space else "@text")
        text = json.dumps({"grammars": [{"lark_grammar": start}, {"name": "text", **part}]})
    except (RecursionError, TypeError, ValueError) as error:
        what = _told(str(error)) or type(error).__name__
        raise ConfigError(f"the constraint cannot be read: {what}", fix=_FIX) from None
    if len(text) > _LARGEST_BYTES:
        raise ConfigError(f"the constraint has {len(text):,} bytes; at most {_LARGEST_BYTES:,} are allowed", fix=_FIX)
    return text


@lru_cache(maxsize=_KEPT_GRAMMARS)
def _try_in_child(grammar: str) -> None:
    """Let a child process compile a grammar, within its limits; only what passes is remembered.

    Raises:
        ConfigError: the child died of it.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name("grammar_trial.py"))]
    try:
        done = subprocess.run(
            command,
            input=grammar.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pass
    else:
        if done.returncode == 0:
            return
    raise ConfigError("the constraint takes too much time, memory or depth to compile", fix=_FIX)


@lru_cache(maxsize=_KEPT_VOCABULARIES)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Give the library the bytes of every id; 40 ms for 32,000."""
    library = _library()
    table = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    description = SimpleNamespace(
        tokens=table,
        eos_token_id=tokenizer.eos_id,
        bos_token_id=tokenizer.bos_id,
        special_token_ids=[token_id for token_id, piece in enumerate(table) if not piece],
    )
    return library.LLTokenizer(library.TokenizerWrapper(description))


def _library() -> Any:
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError(
            "constrained output needs the package llguidance", fix="pip install 'openelm-framework[grammar]'"
        )
    return importlib.import_module("llguidance")


def _told(message: str) -> str:
    """Take the line of a message that says what is wrong: a regex's comes after a drawing of where."""
    lines = message.strip().splitlines() or [""]
    return next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")[:200]
