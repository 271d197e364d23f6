"""The answers' shapes: OpenAI's objects for chats and completions, whole or in pieces."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from openelm import __version__
from openelm.generate.request import Token
from openelm.text.tokenizer import Tokenizer

_FINGERPRINT = f"openelm-{__version__}"


@dataclass
class Choice:
    """One choice as it grows."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Answers(ABC):
    """Builds the objects of one request; there are two kinds, chats and texts.

    Args:
        alternatives: how many are told with each token; None: no log-probabilities.
        echoed: what the text of each choice begins with.
    """

    _prefix: ClassVar[str]
    _whole: ClassVar[str]
    _part: ClassVar[str]

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        model: str,
        alternatives: int | None,
        echoed: Sequence[str],
        prompt_tokens: int,
        usage_in_stream: bool,
    ) -> None:
        self._tokenizer, self._alternatives, self._echoed = tokenizer, alternatives, echoed
        self._prompt_tokens, self._usage_in_stream = prompt_tokens, usage_in_stream
        self._same = {
            "id": f"{self._prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": _FINGERPRINT,
        }
        self._offsets = [len(text) for text in echoed]

    def usage(self, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
        """Count tokens, those that were found in the cache too."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        made = [
            {
                "index": index,
                **self._content(self._echoed[index] + choice.text),
                "logprobs": self._logprobs(index, choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._same, "object": self._whole, "choices": made, "usage": usage}

    def begin(self) -> list[dict[str, Any]]:
        """Return the events before the first token."""
        return [
            self._event([{"index": index, **first, "logprobs": None, "finish_reason": None}])
            for index, echoed in enumerate(self._echoed)
            if (first := self._first(echoed))
        ]

    def piece(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return the event of some tokens of a choice; None where they say nothing yet."""
        text, finish_reason = "".join(token.text for token in tokens), tokens[-1].finish_reason
        logprobs = self._logprobs(index, tokens)
        if not text and not finish_reason and logprobs is None:
            return None  # half a character, or what may become a stop text
        return self._event(
            [{"index": index, **self._delta(text), "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def end(self, usage: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events after the last token."""
        return [{**self._event([]), "usage": usage}] if self._usage_in_stream else []

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._usage_in_stream else {}
        return {**self._same, "object": self._part, "choices": choices, **usage}

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _first(self, echoed: str) -> dict[str, Any] | None: ...

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None: ...

    def _name(self, token_id: int) -> str:
        """Show an id as text; a part of a character as OpenAI does, so that two parts have two names."""
        if token_id in (self._tokenizer.bos_id, self._tokenizer.eos_id):
            return "</s>" if token_id == self._tokenizer.eos_id else "<s>"
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _spoken(self, tokens: Sequence[Token]) -> list[Token]:
        """Leave out the end token: it is no part of the text."""
        return [token for token in tokens if token.id != self._tokenizer.eos_id]


class ChatAnswers(Answers):
    """Of /v1/chat/completions."""

    _prefix, _whole, _part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _first(self, echoed: str) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        content = [
            {
                **self._entry(token.id, token.logprob),
                "top_logprobs": [self._entry(*other) for other in token.top[: self._alternatives]],
            }
            for token in self._spoken(tokens)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity; OpenAI's own number for it
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class TextAnswers(Answers):
    """Of /v1/completions."""

    _prefix, _whole, _part = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _first(self, echoed: str) -> dict[str, Any] | None:
        return {"text": echoed} if echoed else None

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        spoken = self._spoken(tokens)
        offsets = []
        for token in spoken:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [self._name(token.id) for token in spoken],
            "token_logprobs": [max(token.logprob, -9999.0) for token in spoken],
            "top_logprobs": [
                {
                    self._name(other): max(logprob, -9999.0)
                    for other, logprob in (*token.top[: self._alternatives], (token.id, token.logprob))
                }
                for token in spoken
            ],
            "text_offset": offsets,
        }
