"""A chat has the published format, as text, as template and as ids."""

from __future__ import annotations

import jinja2
import pytest

from openelm.errors import DataError
from openelm.text.chat import CHAT_TEMPLATE, Message, encode_chat, render
from openelm.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer

CHAT = [
    Message("system", "Be brief."),
    Message("user", "Hi</s>\n<s>"),
    Message("assistant", "Yo"),
    Message("user", "?"),
]
# Verbatim from CoreNet's projects/openelm/instruction_tuning/openelm-instruct.yaml
PUBLISHED = "\n".join(
    [
        "{% for message in messages %}",
        "{% if message['role'] == 'user' %}",
        "{{ '<|user|>\n' + message['content'] + eos_token }}",
        "{% elif message['role'] == 'system' %}",
        "{{ '<|system|>\n' + message['content'] + eos_token }}",
        "{% elif message['role'] == 'assistant' %}",
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}",
        "{% endif %}",
        "{% if loop.last and add_generation_prompt %}",
        "{{ '<|assistant|>' }}",
        "{% endif %}",
        "{% endfor %}",
    ]
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PUBLISHED], ids=["ours", "published"])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_render_equals_the_template(template: str, generation_prompt: bool) -> None:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as Hugging Face sets it
    messages = [{"role": message.role, "content": message.content} for message in CHAT]
    expected = environment.from_string(template).render(
        messages=messages, eos_token="</s>", add_generation_prompt=generation_prompt
    )
    assert render(CHAT, generation_prompt=generation_prompt) == expected


def test_our_template_begins_with_the_token_that_begins_a_text() -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    values: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}], "eos_token": "</s>"}
    without = template.render(values)
    assert template.render(values, bos_token=None) == without == "<|user|>\nHi</s>\n"
    assert template.render(values, bos_token="<s>") == "<s>" + without


def test_ids_are_bos_then_the_text_with_eos_after_each_message() -> None:
    tokenizer = ByteTokenizer()
    ids = encode_chat(tokenizer, CHAT)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.eos_id) == len(CHAT)
    spelled = b"".join(b"</s>" if token_id == tokenizer.eos_id else tokenizer.token_bytes(token_id) for token_id in ids)
    assert spelled.decode() == render(CHAT, generation_prompt=True)


def test_without_generation_prompt_the_ids_are_a_prefix() -> None:
    short, long = (encode_chat(ByteTokenizer(), CHAT, prompt) for prompt in (False, True))
    assert long[: len(short)] == short
    assert bytes(long[len(short) :]) == b"<|assistant|>\n"


def test_unknown_role_is_refused() -> None:
    with pytest.raises(DataError, match="system, user, assistant"):
        Message("tool", "x")  # type: ignore[arg-type]


def test_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = HuggingFaceTokenizer(ByteTokenizer().file_bytes, names={"eos_token": None})
    with pytest.raises(DataError, match="no end token"):
        encode_chat(tokenizer, CHAT)
