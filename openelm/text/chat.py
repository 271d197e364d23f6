"""Chat messages to text and ids, in the format the published OpenELM Instruct models were tuned with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from openelm.errors import DataError

if TYPE_CHECKING:
    from openelm.text.base import Tokenizer

Role = Literal["system", "user", "assistant"]
_END = "</s>"  # how `render` shows the end of a message; in ids it is the tokenizer's eos_id

# What the template of CoreNet's openelm-instruct.yaml gives when Hugging Face renders it (trim_blocks,
# lstrip_blocks): a newline follows each end token and the generation prompt; tags are plain text; other
# roles are left out. CoreNet left BOS to the tokenizer; libraries add none to a rendered template.
CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Raises:
        DataError: (E_SCHEMA) the role is none of system, user, assistant.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise DataError(
                f"unknown role {self.role!r}", fix=f"use one of {', '.join(get_args(Role))}", code="E_SCHEMA"
            )


def _parts(messages: Sequence[Message], generation_prompt: bool) -> list[str]:
    """Cut the chat at its end tokens: one string before each, one (maybe "") after the last."""
    parts = [""]
    for message in messages:
        parts[-1] += f"<|{message.role}|>\n{message.content}"
        parts.append("\n")
    if generation_prompt:
        parts[-1] += "<|assistant|>\n"
    return parts


def render(messages: Sequence[Message], *, generation_prompt: bool) -> str:
    """Show a chat as text, with "</s>" for the end token; for people, not for `Tokenizer.encode`."""
    return _END.join(_parts(messages, generation_prompt))


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
    """Encode a chat as BOS, then per message tag, newline, content, EOS, newline; then the assistant's tag.

    A "</s>" inside a message stays text. A tag inside one ("<|user|>") looks like a real tag to the model, as
    the published format has no control ids for tags: whoever serves untrusted messages filters them first.

    Raises:
        DataError: (E_TOKENIZER) the tokenizer has no EOS; (E_TEXT) a message holds a lone surrogate.
    """
    end_id = end_of_text(tokenizer)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in tokenizer.encode_many(_parts(messages, generation_prompt)):
        ids += part
        ids.append(end_id)
    return ids[:-1]  # the last part has no end token


GENERATION_PROMPTS = ("<|assistant|>\n", "\n<|assistant|>\n")
"""What stands before the assistant's content: in the first message of a chat, and in a later one."""


def encode_learned_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], given: int = 0
) -> tuple[list[int], list[bool]]:
    """Encode a chat to the ids of `encode_chat` without a generation prompt, and tell which of them are learned.

    Learned is what the model must write when it is asked: of each assistant turn the ids that follow those of
    the generation prompt alone, and the EOS.

    Args:
        given: so many messages at the beginning are a prompt, of which nothing is learned.

    Raises:
        DataError: (E_TOKENIZER) the tokenizer has no EOS; (E_TEXT) a message holds a lone surrogate.
    """
    parts = tokenizer.encode_many([*chat_texts(messages), *GENERATION_PROMPTS])
    return join_learned_chat(tokenizer, messages, parts[:-2], parts[-2:], given)


def chat_texts(messages: Sequence[Message]) -> list[str]:
    """Return the texts whose ids `join_learned_chat` takes, so that those of many chats are encoded in one call."""
    return _parts(messages, generation_prompt=False)


def join_learned_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    parts: Sequence[list[int]],
    prompts: Sequence[list[int]],
    given: int = 0,
) -> tuple[list[int], list[bool]]:
    """Join what `encode_learned_chat` encodes.

    Args:
        parts: ids of the `chat_texts`.
        prompts: ids of the `GENERATION_PROMPTS`.

    Raises:
        DataError: (E_TOKENIZER) the tokenizer has no EOS.
    """
    end_id = end_of_text(tokenizer)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    learned = [False] * len(ids)
    for index, (message, part) in enumerate(zip(messages, parts, strict=False)):  # the last part is a newline
        is_learned = message.role == "assistant" and index >= given
        hidden = common_length(part, prompts[min(index, 1)]) if is_learned else len(part)
        ids += part
        ids.append(end_id)
        learned += [False] * hidden + [is_learned] * (len(part) - hidden + 1)
    ids += parts[-1]
    return ids, learned + [False] * len(parts[-1])


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the ids that two sequences have in common at their beginning."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return next(index for index in range(most) if first[index] != second[index])


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id that ends an answer.

    Raises:
        DataError: (E_TOKENIZER) the tokenizer has none.
    """
    if tokenizer.eos_id is None:
        raise DataError(
            "this tokenizer has no end token, which a chat needs",
            fix='name one as "eos_token" in tokenizer_config.json',
            code="E_TOKENIZER",
        )
    return tokenizer.eos_id
