"""The token loop: prefill, then one token at a time, each handed over as soon as it is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from openelm.errors import ConfigError, NumericError, OpenELMError
from openelm.generate.sampling import SamplingConfig, choose
from openelm.generate.stop import StopStrings
from openelm.model.cache import KeyValueCache
from openelm.model.transformer import OpenELM
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
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    top: tuple[tuple[int, float], ...] = ()


def make_cache(model: OpenELM, length_tokens: int) -> KeyValueCache:
    """Make a cache for one sequence of the model, on its device and in its dtype."""
    weight = next(model.parameters())
    return KeyValueCache(model.config.plan, 1, length_tokens, dtype=weight.dtype, device=weight.device)


@torch.inference_mode()
def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    config: SamplingConfig,
    *,
    cache: KeyValueCache | None = None,
) -> Iterator[Token]:
    """Continue a prompt, token by token; the device is read once a token. Errors come with the first token.

    Args:
        prompt_ids: ids with the BOS id first, at most the model's context long.
        cache: one row that already holds the first `cache.used` ids of the prompt; afterwards it holds every
            id but the last one generated. None makes one.

    Raises:
        ConfigError: the prompt is empty, longer than the context, or holds an id the tokenizer does not have.
        NumericError: the model's logits are not finite.
    """
    limit_tokens = min(config.max_tokens, _room_tokens(model, tokenizer, prompt_ids))
    if cache is None:
        cache = make_cache(model, len(prompt_ids) + limit_tokens - 1)
    device = next(model.parameters()).device
    known = torch.tensor(prompt_ids, device=device)
    seen = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=device)
    seen[known] = True
    generator = torch.Generator().manual_seed(config.seed)
    continues = any(tokenizer.token_bytes(token_id) for token_id in prompt_ids)
    stream, stops = TextStream(tokenizer, continues=continues), StopStrings(config.stop)

    # At least one id must pass the model to predict the next.
    cache.truncate(min(cache.used, len(prompt_ids) - 1))
    new = known[cache.used :]
    for generated_tokens in count(1):
        logits = model.logits(model.hidden(new[None], cache=cache)[:, -1])[0, : tokenizer.vocab_size].float()
        if config.logit_bias:
            logits[list(config.logit_bias)] += torch.tensor(list(config.logit_bias.values()))
        new = choose(logits, config, generator, seen)[None]
        seen.index_fill_(0, new, True)
        token_id, logprob = _read(new, logits)
        top: tuple[tuple[int, float], ...] = ()
        if config.top_logprobs:
            values, ids = logits.log_softmax(dim=-1).topk(min(config.top_logprobs, tokenizer.vocab_size))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        finish_reason: FinishReason | None = None
        if token_id == tokenizer.eos_id:
            text, finish_reason = stops.push(stream.finish()), "stop"
        else:
            text = stops.push(stream.push(token_id))
            if generated_tokens == limit_tokens:
                text, finish_reason = text + stops.push(stream.finish()), "length"
        if stops.found:
            finish_reason = "stop"
        if finish_reason:
            yield Token(token_id, text + stops.finish(), logprob, finish_reason, top)
            return
        yield Token(token_id, text, logprob, None, top)


def generate_text(model: OpenELM, tokenizer: Tokenizer, prompt: str, config: SamplingConfig) -> str:
    """Continue a text and return what was added; raises what `generate` raises."""
    return "".join(token.text for token in generate(model, tokenizer, prompt_ids(tokenizer, prompt), config))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text to be continued: BOS, where the tokenizer has one, then the text's ids."""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]


def _room_tokens(model: OpenELM, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> int:
    """Count tokens that can follow: the rest of the context and one more, as the last is not read back."""
    context_tokens, vocab_size = model.config.max_context_length, model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model only {vocab_size}",
            fix="use the tokenizer the model was trained with",
        )
    if not prompt_ids:
        raise ConfigError("the prompt is empty", fix="give some text, or a tokenizer with a BOS id")
    if len(prompt_ids) > context_tokens:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens and the model's context is {context_tokens}",
            fix="shorten the prompt",
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < tokenizer.vocab_size:
        raise ConfigError(
            f"a prompt id is outside 0..{tokenizer.vocab_size - 1}", fix="encode with the model's tokenizer"
        )
    return context_tokens - len(prompt_ids) + 1


def _read(chosen: Tensor, logits: Tensor) -> tuple[int, float]:
    """Bring the chosen id (1,) and its log-probability to the host at once; fp32 holds ids up to 2^24."""
    logprob = logits.log_softmax(dim=-1)[chosen]
    token_id, value = torch.cat((chosen.float(), logprob)).tolist()
    if not math.isfinite(value):
        raise NumericError(
            f"the model's logits are not finite (log-probability {value})",
            fix="the weights are damaged, or too wide for their dtype: try float32",
        )
    return int(token_id), value


class Generation:
    """One request in the engine."""

    def __init__(self, tokens: Iterator[Token], prompt_tokens: int) -> None:
        self.tokens, self.prompt_tokens, self.reused_tokens, self.generated_tokens = tokens, prompt_tokens, 0, 0
        self.finished, self.error, self._known = False, None, list[Token]()
        self.error: OpenELMError | None

    def take(self) -> list[Token]:
        """Return the tokens that became known since the last call."""
        known, self._known = self._known, []
        return known


class Engine:
    """Generations side by side."""

    def __init__(
        self, model: OpenELM, tokenizer: Tokenizer, *, slots: int = 1, length: int | None = None, chunk: int = 256
    ) -> None:
        self._model, self._tokenizer, self._slots = model, tokenizer, slots
        self._length = length or model.config.max_context_length
        self._running: list[Generation] = []
        self._queue: list[Generation] = []

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, prompt_ids: Sequence[int], config: SamplingConfig, *, scope: str = "") -> Generation:
        """Add a request."""
        _room_tokens(self._model, self._tokenizer, prompt_ids)
        limit = min(config.max_tokens, self._length - len(prompt_ids) + 1)
        config = config.model_copy(update={"max_tokens": limit})
        made = Generation(generate(self._model, self._tokenizer, prompt_ids, config), len(prompt_ids))
        self._queue.append(made)
        return made

    def step(self) -> bool:
        """Make one token of each."""
        while self._queue and len(self._running) < self._slots:
            self._running.append(self._queue.pop(0))
        for generation in list(self._running):
            try:
                token = next(generation.tokens)
            except OpenELMError as error:
                generation.error, generation.finished = error, True
            else:
                generation._known.append(token)
                generation.generated_tokens += 1
                generation.finished = token.finish_reason is not None
            if generation.finished:
                self._running.remove(generation)
        return bool(self._running or self._queue)

    def cancel(self, generation: Generation) -> None:
        """Forget a request."""
        for kept in (self._running, self._queue):
            if generation in kept:
                kept.remove(generation)
