"""From a request's bytes to ids and a sampling config; runs off the event loop, as tokenising takes its time."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openelm.errors import OpenELMError
from openelm.generate.engine import prompt_ids
from openelm.generate.grammar import Constraint
from openelm.generate.sampling import SamplingConfig
from openelm.serve.refusal import Refusal
from openelm.serve.schema import MOST_CHOICES, Asked, ChatAsked, TextAsked, parse
from openelm.text.chat import Message, Role, encode_chat
from openelm.text.tokenizer import Tokenizer

_TAG = re.compile(r"<\|(system|user|assistant)\|>")


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine.

    Attributes:
        choices: ids and sampling of each choice; those of one prompt follow each other.
        echoed: what each choice's text begins with, where the prompt was asked for too.
        prompt_tokens: of all prompts together.
        alternatives: how many other tokens are told with each; None: not even its own log-probability.
    """

    asked: Asked
    choices: tuple[tuple[Sequence[int], SamplingConfig], ...]
    echoed: tuple[str, ...]
    prompt_tokens: int
    alternatives: int | None


class Preparer:
    """Knows what the model can take.

    Args:
        name: of the model, which requests must give.
        context_tokens: of a prompt and its continuation together.
    """

    def __init__(self, tokenizer: Tokenizer, *, name: str, context_tokens: int, chat_tuned: bool) -> None:
        self._tokenizer, self._name, self._chat_tuned = tokenizer, name, chat_tuned
        self._context_tokens = context_tokens
        # No id stands for more bytes than the longest, so a longer text cannot fit, and need not be tokenised.
        self._most_bytes = context_tokens * int(tokenizer.byte_lengths().max())

    def chat(self, body: bytes) -> Prepared:
        """Render messages in the model's chat format.

        Raises:
            Refusal: 400 for what is not allowed, 404 for another model's name.
        """
        asked = parse(ChatAsked, body)
        self._check_name(asked)
        if not self._chat_tuned:
            raise Refusal(
                400,
                "this model continues text and was not tuned to chat; use /v1/completions",
                param="messages",
                code="model_not_chat_tuned",
            )
        messages = []
        for index, turn in enumerate(asked.messages):
            if found := _TAG.search(turn.text):
                raise Refusal(
                    400,
                    f"the text holds {found[0]}, which this model would take for the begin of another turn",
                    param=f"messages.{index}.content",
                    code="invalid_value",
                )
            role: Role = "system" if turn.role == "developer" else turn.role
            messages.append(Message(role, turn.text))
        self._check_bytes(sum(len(message.content.encode(errors="replace")) for message in messages), "messages")
        ids = self._tokenised(lambda: encode_chat(self._tokenizer, messages), "messages")
        limits = [given for given in (asked.max_tokens, asked.max_completion_tokens) if given is not None]
        alternatives = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._prepared(asked, [(ids, "")], min(limits, default=self._context_tokens), alternatives, "messages")

    def text(self, body: bytes) -> Prepared:
        """Encode one or several prompts to be continued.

        Raises:
            Refusal: as `chat`.
        """
        asked = parse(TextAsked, body)
        self._check_name(asked)
        if asked.echo and asked.logprobs is not None:
            raise Refusal(
                400,
                "log-probabilities of a prompt are not offered; leave out echo or logprobs",
                param="echo",
                code="unsupported_parameter",
            )
        if len(asked.prompts) * asked.n > MOST_CHOICES:
            raise Refusal(
                400,
                f"{len(asked.prompts)} prompts with {asked.n} choices each; at most {MOST_CHOICES} choices together",
                param="prompt",
                code="invalid_value",
            )
        prompts = [self._prompt(prompt, asked.echo) for prompt in asked.prompts]
        return self._prepared(asked, prompts, asked.max_tokens, asked.logprobs, "prompt")

    def _prompt(self, prompt: str | tuple[int, ...], echo: bool) -> tuple[Sequence[int], str]:
        if isinstance(prompt, str):
            self._check_bytes(len(prompt.encode(errors="replace")), "prompt")
            return self._tokenised(lambda: prompt_ids(self._tokenizer, prompt), "prompt"), prompt if echo else ""
        if any(not 0 <= token_id < self._tokenizer.vocab_size for token_id in prompt):
            raise Refusal(
                400,
                f"an id of the prompt is outside 0..{self._tokenizer.vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
        return prompt, self._tokenizer.decode(prompt) if echo else ""

    def _prepared(
        self,
        asked: Asked,
        prompts: Sequence[tuple[Sequence[int], str]],
        max_tokens: int,
        alternatives: int | None,
        param: str,
    ) -> Prepared:
        for ids, _ in prompts:
            if not ids:
                raise Refusal(400, "the prompt is empty", param=param, code="invalid_value")
            if len(ids) > self._context_tokens:
                raise self._too_long(f"{len(ids)} tokens", param)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        choices = tuple(
            (ids, _sampling(asked, max_tokens, alternatives, seed + choice))
            for ids, _ in prompts
            for choice in range(asked.n)
        )
        self._try(choices[0][1])
        return Prepared(
            asked,
            choices,
            tuple(echoed for _, echoed in prompts for _ in range(asked.n)),
            sum(len(ids) for ids, _ in prompts),
            alternatives,
        )

    def _try(self, config: SamplingConfig) -> None:
        """Compile the constraint and look at the biases here, where nobody waits for it but who asked."""
        try:
            Constraint.of(config, self._tokenizer, ())
        except OpenELMError as error:
            raise Refusal(
                400, f"{error.what}; {error.fix}", param="response_format", code="invalid_constraint"
            ) from None
        outside = [token_id for token_id in config.logit_bias if token_id >= self._tokenizer.vocab_size]
        if outside:
            raise Refusal(
                400,
                f"id {outside[0]} is outside 0..{self._tokenizer.vocab_size - 1}",
                param="logit_bias",
                code="invalid_value",
            )

    def _check_name(self, asked: Asked) -> None:
        if asked.model != self._name:
            raise Refusal(
                404, f"the model here is {self._name!r}; no other is loaded", param="model", code="model_not_found"
            )

    def _check_bytes(self, text_bytes: int, param: str) -> None:
        if text_bytes > self._most_bytes:
            raise self._too_long(f"{text_bytes} bytes", param)

    def _too_long(self, what: str, param: str) -> Refusal:
        return Refusal(
            400,
            f"the prompt has {what}, more than fit in a context of {self._context_tokens} tokens",
            param=param,
            code="context_length_exceeded",
        )

    def _tokenised(self, encode: Any, param: str) -> list[int]:
        try:
            ids: list[int] = encode()
        except OpenELMError as error:
            raise Refusal(400, f"{error.what}; {error.fix}", param=param, code="invalid_value") from None
        return ids


def _sampling(asked: Asked, max_tokens: int, alternatives: int | None, seed: int) -> SamplingConfig:
    try:
        return SamplingConfig.parse(
            {
                "temperature": asked.temperature,
                "top_k": asked.top_k,
                "top_p": asked.top_p,
                "min_p": asked.min_p,
                "repetition_penalty": asked.repetition_penalty,
                "presence_penalty": asked.presence_penalty,
                "frequency_penalty": asked.frequency_penalty,
                "logit_bias": asked.logit_bias,
                "top_logprobs": alternatives or 0,
                "json_schema": asked.response_format.schema_of_text,
                "regex": asked.regex,
                "grammar": asked.grammar,
                "max_tokens": max_tokens,
                "stop": asked.stop,
                "seed": seed % 2**63,
            }
        )
    except OpenELMError as error:
        raise Refusal(400, error.what, code="invalid_value") from None
