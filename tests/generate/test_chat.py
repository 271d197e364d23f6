"""Conversations equal fresh generation from the same ids, whatever is kept in the cache."""

from __future__ import annotations

from itertools import islice

import pytest

from openelm.errors import ConfigError
from openelm.generate.chat import Continuation, Conversation
from openelm.generate.engine import Engine, generate, prompt_ids
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.model.transformer import OpenELM
from openelm.text.chat import Message, encode_chat
from openelm.text.tokenizer import Tokenizer

CONFIG = SamplingConfig(temperature=1.0, max_tokens=6, seed=11)


def joined(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_prompts_that_share_a_prefix_with_the_last_one_give_the_tokens_of_a_fresh_cache(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer)
    for prompt in ("To be", "To be or not", "To be or not", "To", "Not to", "Not to be, that"):
        ids = prompt_ids(tokenizer, prompt)
        fresh = [token.id for token in generate(model, tokenizer, ids, CONFIG)]
        assert [token.id for token in engine.stream(ids, CONFIG)] == fresh


def test_a_conversation_answers_the_encoded_messages(model: OpenELM, tokenizer: Tokenizer) -> None:
    talk = Conversation(model, tokenizer, CONFIG)
    expected: list[Message] = []
    for turn, text in enumerate(("Hi", "Why?")):
        expected.append(Message("user", text))
        config = CONFIG.model_copy(update={"seed": 11 + turn})
        fresh = list(generate(model, tokenizer, encode_chat(tokenizer, expected), config))
        assert [token.id for token in talk.reply(text)] == [token.id for token in fresh]
        expected.append(Message("assistant", joined(fresh)))
        assert talk.messages == expected


def test_a_full_context_leaves_out_the_oldest_turns_and_keeps_the_system_message(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    system = Message("system", "s")
    turns = [Message(role, "...") for role in ("user", "assistant") * 2]
    talk = Conversation(model, tokenizer, CONFIG, system="s")
    talk.messages += turns
    room_tokens = model.config.max_context_length - CONFIG.max_tokens
    asked = [Message("user", "four")]
    assert len(encode_chat(tokenizer, [system, *turns, *asked])) > room_tokens
    expected = encode_chat(tokenizer, [system, *turns[2:], *asked])
    assert len(expected) <= room_tokens
    fresh = [token.id for token in generate(model, tokenizer, expected, CONFIG)]
    assert [token.id for token in talk.reply("four")] == fresh
    assert talk.messages[:-1] == [system, *turns, *asked]


def test_a_message_that_cannot_fit_is_refused_and_forgotten(model: OpenELM, tokenizer: Tokenizer) -> None:
    talk = Conversation(model, tokenizer, CONFIG)
    with pytest.raises(ConfigError, match="shorten the message"):
        next(talk.reply("x" * 90))
    assert talk.messages == []


def test_a_reply_that_is_cut_short_stays_in_the_conversation(model: OpenELM, tokenizer: Tokenizer) -> None:
    talk = Conversation(model, tokenizer, CONFIG)
    reply = talk.reply("Hi")
    read = list(islice(reply, 2))
    reply.close()  # type: ignore[attr-defined]
    assert talk.messages == [Message("user", "Hi"), Message("assistant", joined(read))]


def test_a_continuation_goes_on_from_the_text_and_then_from_its_own(model: OpenELM, tokenizer: Tokenizer) -> None:
    story = Continuation(model, tokenizer, CONFIG)
    list(story.reply("Once upon"))
    first = story.text
    more = list(story.reply(""))
    config = CONFIG.model_copy(update={"seed": 12})
    fresh = list(generate(model, tokenizer, prompt_ids(tokenizer, first), config))
    assert [token.id for token in more] == [token.id for token in fresh]
    assert story.text == first + joined(more)


def test_a_continuation_of_a_long_text_keeps_its_end(model: OpenELM, tokenizer: Tokenizer) -> None:
    text = "".join(chr(97 + place % 26) for place in range(400))
    ids = prompt_ids(tokenizer, text)
    longest = model.config.max_context_length - CONFIG.max_tokens
    kept = [tokenizer.bos_id or 0, *ids[-(longest - 1) :]]
    fresh = [token.id for token in generate(model, tokenizer, kept, CONFIG)]
    assert [token.id for token in Continuation(model, tokenizer, CONFIG).reply(text)] == fresh
