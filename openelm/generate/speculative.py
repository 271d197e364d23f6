"""Guess how a text goes on, so that several tokens are computed with one reading of the weights.

The engine chooses each token as it does without guesses, from the same logits and with the same random number, and goes
on while the guess was that token: the text is the same, to the seed. A guess is right with the probability that the
model gives it, the acceptance rule of arXiv 2211.17192 for proposals that leave nothing to chance.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from openelm.errors import ConfigError
from openelm.generate.request import common_tokens
from openelm.model.decoding import Decoder
from openelm.model.transformer import OpenELM

_FEW = 8
"""So many tokens of one text cost a step little more than one does."""


class PromptLookup:
    """Guesses that the text goes on as it did after its last few tokens stood before: for text that repeats itself.

    Args:
        most: tokens guessed at a time.
        longest: tokens that are looked for; shorter ends are tried next, down to one.
    """

    def __init__(self, most: int = 8, longest: int = 3) -> None:
        self._most, self._longest = most, longest

    def propose(self, slot: int, ids: Sequence[int], most: int) -> list[int]:
        """Guess what followed the last place where the text's last tokens stood before."""
        text = array("i", ids)
        data, width = text.tobytes(), text.itemsize
        for length in range(min(self._longest, len(text) - 1), 0, -1):
            end, before = data[-length * width :], len(data) - width
            while (found := data.rfind(end, 0, before)) >= 0:
                if found % width == 0:
                    return text[found // width + length :][: min(most, self._most)].tolist()
                before = found + len(end) - 1
        return []


class DraftModel:
    """Guesses the likeliest tokens of a smaller model with the same tokenizer.

    Args:
        model: the smaller one.
        target: the one whose texts are guessed.
        slots, length: of the engine.
        most: tokens guessed at a time.

    Raises:
        ConfigError: the vocabularies differ.
    """

    def __init__(self, model: OpenELM, target: OpenELM, *, slots: int, length: int, most: int = 4) -> None:
        if model.config.vocab_size != target.config.vocab_size:
            raise ConfigError(
                f"the draft model has {model.config.vocab_size} ids and the model {target.config.vocab_size}",
                fix="use a draft model with the same tokenizer",
            )
        self._most, self._length = most, min(length, model.config.max_context_length)
        self._decoder = Decoder(model, slots, self._length)
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def propose(self, slot: int, ids: Sequence[int], most: int) -> list[int]:
        """Guess greedily, token by token; what the slot holds of another text is forgotten."""
        most = min(most, self._most, self._length - len(ids))
        if most < 1:
            return []
        known = min(common_tokens(self._held[slot], ids), len(ids) - 1)
        self._decoder.truncate(slot, known)
        del self._held[slot][known:]
        guesses = [int(self._after(slot, ids[known:]).argmax())]
        while len(guesses) < most:
            guesses.append(int(self._decoder.step(guesses[-1:], [slot])[0].argmax()))
        self._held[slot] = [*ids, *guesses[:-1]]
        return guesses

    def _after(self, slot: int, ids: Sequence[int]) -> Tensor:
        """Append ids to a slot, few in one step and many as a prompt; returns logits after the last one."""
        if len(ids) > _FEW:
            return self._decoder.prefill(slot, ids)
        return self._decoder.step(ids, [slot] * len(ids))[-1]
