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
    if tokenizer.eos_id is None:
        raise DataError(
            "this tokenizer has no end token, which a chat needs",
            fix='name one as "eos_token" in tokenizer_config.json',
            code="E_TOKENIZER",
        )
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in tokenizer.encode_many(_parts(messages, generation_prompt)):
        ids += part
        ids.append(tokenizer.eos_id)
    return ids[:-1]  # the last part has no end token
