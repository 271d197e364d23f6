"""Turn chats and texts into ids, with which of them are learned; many at once, because libraries are fast that way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from openelm.data.shapes import Answer, Chat, Pair, Text
from openelm.errors import ConfigError, DataError
from openelm.text.chat import (
    GENERATION_PROMPTS,
    chat_texts,
    common_length,
    end_of_text,
    join_learned_chat,
)
from openelm.text.tokenizer import Tokenizer

Kind = Literal["answers", "preferences"]
OnLong = Literal["error", "skip", "cut"]
Learn = Literal["answers", "everything"]


class Encoded(NamedTuple):
    """One sequence: int32 (tokens,), and bool (tokens,), whether each is a target that is learned."""

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Encoder:
    """Encode answers and pairs of them.

    Plain text is BOS, the ids of prompt and completion as one text, EOS; learned is what differs from the ids of the
    prompt alone, and EOS. A chat is as `openelm.text.chat.encode_learned_chat` says. A pair's prompt is what comes
    before the first token learned in either answer. BOS, or whatever comes first, is never a target.

    Args:
        length: the most tokens of a sequence.
        prompt_tokens: of a pair: a longer prompt loses its beginning, but not BOS, and is this long then; this comes
            before `length`.
        on_long: what becomes of sequences longer than `length`; "cut" takes tokens off the end.
        learn: "everything" learns prompts too.

    Raises:
        ConfigError: a limit below 2 tokens.
        DataError: E_TOKENIZER without an EOS.
    """

    tokenizer: Tokenizer
    length: int
    prompt_tokens: int | None = None
    on_long: OnLong = "error"
    learn: Learn = "answers"

    def __post_init__(self) -> None:
        for name, limit in (("length", self.length), ("prompt_tokens", self.prompt_tokens)):
            if limit is not None and limit < 2:
                raise ConfigError(f"{name} {limit}: a sequence needs at least 2 tokens", fix=f"raise {name}")
        end_of_text(self.tokenizer)

    def encode(self, items: Sequence[Answer | Pair]) -> list[tuple[Encoded, ...] | DataError]:
        """Encode each item to one sequence, or two for a pair; one that does not fit gives an E_TOO_LONG.

        Raises:
            DataError: E_TEXT for a lone surrogate.
        """
        answers = [
            answer for item in items for answer in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))
        ]
        sequences = self._sequences(answers)
        return [
            self._pair(next(sequences), next(sequences))
            if isinstance(item, Pair)
            else self._limited((next(sequences),))
            for item in items
        ]

    def _sequences(self, answers: Sequence[Answer]) -> Iterator[_Sequence]:
        """Encode all texts in one call, each once, then join those of each answer."""
        parts = [_texts(answer) for answer in answers]
        texts = list(dict.fromkeys(chain(GENERATION_PROMPTS, *parts)))
        ids = dict(zip(texts, self.tokenizer.encode_many(texts), strict=True))
        prompts = [ids[text] for text in GENERATION_PROMPTS]
        for answer, own in zip(answers, parts, strict=True):
            own_ids = [ids[text] for text in own]
            if isinstance(answer, Chat):
                yield _Sequence(*join_learned_chat(self.tokenizer, answer.messages, own_ids, prompts, answer.given))
            else:
                yield self._text(*own_ids)

    def _text(self, prompt: list[int], whole: list[int]) -> _Sequence:
        begin = self.tokenizer.start_ids
        hidden = len(begin) + common_length(prompt, whole)
        ids = [*begin, *whole, end_of_text(self.tokenizer)]
        return _Sequence(ids, [False] * hidden + [True] * (len(ids) - hidden))

    def _pair(self, chosen: _Sequence, rejected: _Sequence) -> tuple[Encoded, ...] | DataError:
        both = (chosen, rejected)
        starts = [sequence.learned.index(True) for sequence in both]
        prompt = min(*starts, common := common_length(chosen.ids, rejected.ids))
        if common >= min(starts):  # one answer melts into the prompt's end: the other must then begin there too
            for sequence, start in zip(both, starts, strict=True):
                sequence.learned[prompt:start] = [True] * (start - prompt)
        if self.prompt_tokens is not None and prompt > self.prompt_tokens:
            kept = int(chosen.ids[0] == self.tokenizer.bos_id)
            for sequence in both:
                for values in (sequence.ids, sequence.learned):
                    del values[kept : prompt - self.prompt_tokens + kept]
        return self._limited(both)

    def _limited(self, sequences: Sequence[_Sequence]) -> tuple[Encoded, ...] | DataError:
        longest = max(len(sequence.ids) for sequence in sequences)
        if longest > self.length and self.on_long != "cut":
            return _too_long(f"{longest:,} tokens, but length is {self.length:,}")
        result = tuple(self._encoded(sequence) for sequence in sequences)
        if not all(one.learned.any() for one in result):
            return _too_long(f"nothing to learn is left of {longest:,} tokens when they are cut to {self.length:,}")
        if len(result) == 2 and np.array_equal(result[0].tokens, result[1].tokens):
            return _too_long(f"chosen and rejected are equal when they are cut to {self.length:,} tokens")
        return result

    def _encoded(self, sequence: _Sequence) -> Encoded:
        tokens = np.array(sequence.ids[: self.length], np.int32)
        learned = np.array(sequence.learned[: self.length], np.bool_)
        if self.learn == "everything":
            learned[:] = True
        learned[0] = False
        return Encoded(tokens, learned)


class _Sequence(NamedTuple):
    ids: list[int]
    learned: list[bool]


def _texts(answer: Answer) -> list[str]:
    if isinstance(answer, Text):
        return [answer.prompt, answer.prompt + answer.completion]
    return chat_texts(answer.messages)


def _too_long(what: str) -> DataError:
    fix = "raise length, or set on_long = 'skip' or 'cut'"
    return DataError(what, fix=fix, code="E_TOO_LONG")
