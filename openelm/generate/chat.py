"""Talk with a model over many turns: messages for a chat-tuned model, plain continuation for a base model."""

from __future__ import annotations

from collections.abc import Iterator

from openelm.errors import ConfigError
from openelm.generate.engine import Engine, prompt_ids
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.model.transformer import OpenELM
from openelm.text.chat import Message, encode_chat
from openelm.text.tokenizer import Tokenizer


class Conversation:
    """Messages with a chat-tuned model; when the context is full, the oldest turns are left out.

    Args:
        system: a first message that is never left out.
    """

    def __init__(self, model: OpenELM, tokenizer: Tokenizer, config: SamplingConfig, *, system: str = "") -> None:
        self.messages = [Message("system", system)] if system else []
        self._context_tokens, self._tokenizer, self._config = (
            model.config.max_context_length,
            tokenizer,
            config,
        )
        self._engine = Engine(model, tokenizer)
        self._turn = 0

    def reply(self, text: str) -> Iterator[Token]:
        """Answer a message; the reply, also one the caller stops reading, becomes a part of the conversation.

        Each turn has its own seed, the config's plus the number of turns before it.

        Raises:
            ConfigError: the message alone does not fit in the context.
        """
        messages = [*self.messages, Message("user", text)]
        ids = self._fitting_ids(messages)
        self.messages = messages
        pieces: list[str] = []
        try:
            yield from _collected(self._engine.stream(ids, _of_turn(self._config, self._turn)), pieces)
        finally:
            self.messages = [*messages, Message("assistant", "".join(pieces))]
            self._turn += 1

    def _fitting_ids(self, messages: list[Message]) -> list[int]:
        """Encode the messages, leaving out as many of the oldest turns as the reply needs room for."""
        room_tokens = _room_tokens(self._context_tokens, self._config)
        first = 1 if messages[0].role == "system" else 0
        for start in range(first, len(messages), 2):
            ids = encode_chat(self._tokenizer, messages[:first] + messages[start:])
            if len(ids) + room_tokens <= self._context_tokens:
                return ids
        raise ConfigError(
            f"the message has {len(ids)} tokens, the reply {room_tokens}, the context {self._context_tokens}",
            fix="shorten the message, or ask for fewer tokens",
        )


class Continuation:
    """Text with a base model: it goes on from what it is given; an empty text asks for more."""

    def __init__(self, model: OpenELM, tokenizer: Tokenizer, config: SamplingConfig) -> None:
        self.text = ""
        self._context_tokens, self._tokenizer, self._config = (
            model.config.max_context_length,
            tokenizer,
            config,
        )
        self._engine = Engine(model, tokenizer)
        self._turn = 0

    def reply(self, text: str) -> Iterator[Token]:
        """Continue a new text, or with "" the one so far; of a long text the model sees the end."""
        before = text or self.text
        ids = prompt_ids(self._tokenizer, before)
        longest = self._context_tokens - _room_tokens(self._context_tokens, self._config)
        if len(ids) > longest:
            start = self._tokenizer.start_ids
            ids = [*start, *ids[len(ids) - longest + len(start) :]]
        pieces: list[str] = []
        try:
            yield from _collected(self._engine.stream(ids, _of_turn(self._config, self._turn)), pieces)
        finally:
            self.text = before + "".join(pieces)
            self._turn += 1


def _room_tokens(context_tokens: int, config: SamplingConfig) -> int:
    """Tokens kept free for a reply: what it may use, at most half the context."""
    return min(config.max_tokens, context_tokens // 2)


def _of_turn(config: SamplingConfig, turn: int) -> SamplingConfig:
    return config.model_copy(update={"seed": (config.seed + turn) % 2**63})


def _collected(tokens: Iterator[Token], pieces: list[str]) -> Iterator[Token]:
    """Pass tokens on and keep their text."""
    for token in tokens:
        pieces.append(token.text)
        yield token
