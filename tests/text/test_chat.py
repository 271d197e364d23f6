"""A chat has the published format, as text, as template and as ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.errors import DataError
from openelm.text.chat import CHAT_TEMPLATE, Message, encode_chat, encode_learned_chat, render
from openelm.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_tokenizer

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


def prefixed_json() -> bytes:
    """Train a tiny byte-level file whose library puts a space before a text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    library.train_from_iterator(["<|assistant|>\n\nthe answer\n\n"] * 3, trainer)
    return library.to_str().encode()


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "without BOS": lambda: HuggingFaceTokenizer(ByteTokenizer().file_bytes, names={"bos_token": None}),
    "trained": lambda: train_tokenizer(["<|assistant|>\n\nThe answer, and more.\n" * 3, "To be, or not to be"], 300),
    "space before a text, no BOS": lambda: HuggingFaceTokenizer(prefixed_json()),
}
MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(st.sampled_from(["a", " ", "\n", "answer", "<|assistant|>", "</s>", "é", "▁", "🦙"]), max_size=6).map(
        "".join
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@pytest.fixture(scope="module", params=MAKERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in ids)


@settings(max_examples=150, deadline=None)
@given(chat=st.lists(MESSAGES, max_size=5), given_messages=st.integers(0, 3))
def check_learned_chat(tokenizer: Tokenizer, chat: list[Message], given_messages: int) -> None:
    """Split the learned ids at their ends and hold each piece to one assistant turn."""
    ids, learned = encode_learned_chat(tokenizer, chat, given_messages)
    assert ids == encode_chat(tokenizer, chat, generation_prompt=False)
    pieces: list[list[int]] = [[]]
    for token_id, is_learned in zip(ids, learned, strict=True):
        if is_learned and token_id == tokenizer.eos_id:
            pieces.append([])
        elif is_learned:
            pieces[-1].append(token_id)
    answers = [message.content for message in chat[given_messages:] if message.role == "assistant"]
    assert len(pieces) == len(answers) + 1 and not pieces[-1]
    for piece, answer in zip(pieces, answers, strict=False):
        before = spelled(tokenizer, piece).removesuffix(answer.encode())
        assert spelled(tokenizer, piece) == before + answer.encode()
        assert b"\n<|assistant|>\n".endswith(before)  # where the prompt's end melts into the answer


def test_only_answers_and_their_ends_are_learned_of_a_chat(any_tokenizer: Tokenizer) -> None:
    check_learned_chat(any_tokenizer)


def test_what_is_learned_follows_the_ids_of_the_generation_prompt(any_tokenizer: Tokenizer) -> None:
    chat = [*CHAT, Message("assistant", "The answer")]
    ids, learned = encode_learned_chat(any_tokenizer, chat, given=len(CHAT))
    prompt = encode_chat(any_tokenizer, CHAT, generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert learned.index(True) == len(prompt)


def test_the_answer_is_learned_from_where_the_prompt_melts_into_it() -> None:
    tokenizer = MAKERS["trained"]()
    chat = [Message("assistant", "\nThe answer")]
    prompt = encode_chat(tokenizer, [], generation_prompt=True)
    ids, learned = encode_learned_chat(tokenizer, chat)
    start = learned.index(True)
    assert ids[:start] == prompt[:start] and start < len(prompt)
