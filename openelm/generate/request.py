"""One request on its way through the engine: what was chosen for it, and the text that this makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch

from openelm.errors import NumericError, OpenELMError
from openelm.generate.sampler import Choice, Chosen, Sampler
from openelm.generate.sampling import SamplingConfig
from openelm.generate.stop import StopStrings
from openelm.text.tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: its number in the tokenizer.
        text: the text that is certain now: whole characters, possibly none, and never of a stop string.
        logprob: natural log of the model's own probability, before penalty, temperature and filters.
        finish_reason: on the last token alone: "stop" (end of text, or a stop string) or "length"
            (max_tokens, or the context is full).
        top: the likeliest tokens here, (id, logprob) each, most likely first; as many as the config asks for.
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation:
    """A request in an engine; `Engine.submit` makes it.

    Attributes:
        ids: of the prompt and of everything generated.
        reused_tokens: of the prompt, found in the cache.
        proposed_tokens, accepted_tokens: by a proposer, and of these the ones that the model chose too.
        finished: nothing more comes.
        error: why it ended before its end.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        config: SamplingConfig,
        tokenizer: Tokenizer,
        limit_tokens: int,
        scope: str,
        device: torch.device,
    ) -> None:
        self.ids, self.prompt_tokens, self.scope = list(prompt_ids), len(prompt_ids), scope
        self.limit_tokens = limit_tokens
        self.reused_tokens = self.proposed_tokens = self.accepted_tokens = 0
        self.finished = False
        self.error: OpenELMError | None = None
        self.sampler = Sampler(config, tokenizer, prompt_ids, device)
        continues = any(tokenizer.token_bytes(token_id) for token_id in prompt_ids)
        self._eos_id, self._stream = tokenizer.eos_id, TextStream(tokenizer, continues=continues)
        self._stops = StopStrings(config.stop)
        self._known: list[Token] = []

    @property
    def generated_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def take(self) -> list[Token]:
        """Return the tokens that became known since the last call."""
        known, self._known = self._known, []
        return known

    def add(self, chosen: Chosen) -> None:
        """Go on by one token, which may be the last one.

        Raises:
            NumericError: its logits are not finite.
            ConfigError: the constraint takes too much work.
        """
        if not math.isfinite(chosen.logprob):
            raise NumericError(
                f"the model's logits are not finite (log-probability {chosen.logprob})",
                fix="the weights are damaged, or too wide for their dtype: try float32",
            )
        self.sampler.accept(chosen.id)
        self.ids.append(chosen.id)
        reason: FinishReason | None = None
        if chosen.id == self._eos_id:
            text, reason = self._stops.push(self._stream.finish()), "stop"
        else:
            text = self._stops.push(self._stream.push(chosen.id))
            if self.generated_tokens == self.limit_tokens:
                text, reason = text + self._stops.push(self._stream.finish()), "length"
        if self._stops.found:
            reason = "stop"
        if reason:
            text += self._stops.finish()
            self.finished = True
        self._known.append(Token(chosen.id, text, chosen.logprob, reason, chosen.top))

    def fail(self, error: OpenELMError) -> None:
        """End early."""
        self.finished, self.error = True, error


def read_choices(choices: Sequence[Choice]) -> list[Chosen]:
    """Bring choices to the host, all at once; fp32 holds ids up to 2^24."""
    if not choices:
        return []
    rows = [
        torch.cat((choice.id[None].float(), choice.logprob[None], choice.top_ids.float(), choice.top_logprobs))
        for choice in choices
    ]
    numbers = torch.cat(rows).tolist()
    found = []
    for row in rows:
        (token_id, logprob, *top), numbers = numbers[: len(row)], numbers[len(row) :]
        ids, logprobs = top[: len(top) // 2], top[len(top) // 2 :]
        found.append(Chosen(int(token_id), logprob, tuple(zip(map(int, ids), logprobs, strict=True))))
    return found


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the ids that two texts begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
