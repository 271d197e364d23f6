"""OpenAI's own client, unchanged: what it asks is answered in the shapes it knows."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from openelm.generate.engine import generate_text
from openelm.generate.sampling import SamplingConfig
from openelm.model.folder import load_model
from openelm.text.tokenizer import load_tokenizer

HELLO: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]


def test_a_chat_is_answered(chatting: Any) -> None:
    with chatting.client() as client:
        done = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    assert done.object == "chat.completion" and done.model == "tiny"
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length"
    assert done.usage and done.usage.completion_tokens == 12
    assert done.usage.total_tokens == done.usage.prompt_tokens + 12


def test_a_stream_joins_to_the_same_text_as_the_whole(chatting: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 40, "seed": 5}
    with chatting.client() as client:
        whole = client.chat.completions.create(**asked)
        events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    parts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(parts) == whole.choices[0].message.content
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == []
    assert events[-1].usage and whole.usage
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens == 40


def test_a_completion_is_what_the_engine_makes_of_the_same_seed(base: Any, folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = generate_text(model, tokenizer, "Once", SamplingConfig(temperature=1.0, max_tokens=30, seed=11))
    with base.client() as client:
        done = client.completions.create(model="tiny", prompt="Once", max_tokens=30, seed=11)
    assert done.choices[0].text == expected


def test_seed_repeats_and_its_absence_does_not(base: Any) -> None:
    def text(**seed: int) -> str:
        return str(client.completions.create(model="tiny", prompt="Once", max_tokens=30, **seed).choices[0].text)

    with base.client() as client:
        assert text(seed=3) == text(seed=3) != text(seed=4)
        assert text(seed=-3) == text(seed=-3)
        assert text() != text()


def test_n_gives_choices_that_differ_and_the_first_is_that_of_n_1(base: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "seed": 3}
    with base.client() as client:
        many = client.completions.create(**asked, n=5)
        one = client.completions.create(**asked)
    assert [choice.index for choice in many.choices] == list(range(5))
    assert len({choice.text for choice in many.choices}) == 5
    assert many.choices[0].text == one.choices[0].text
    assert many.usage and many.usage.completion_tokens == 100


def test_n_choices_of_a_stream_keep_apart(chatting: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 3, "n": 3}
    with chatting.client() as client:
        whole = client.chat.completions.create(**asked)
        texts = {index: "" for index in range(3)}
        for event in client.chat.completions.create(**asked, stream=True):
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_several_prompts_as_text_and_as_ids(base: Any) -> None:
    with base.client() as client:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
        texts = client.completions.create(prompt=["ab", "xy"], **asked)
        ids = client.completions.create(prompt=[[256, 97, 98], [256, 120, 121]], **asked)
        one = client.completions.create(prompt=[256, 97, 98], **asked)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert one.choices[0].text == texts.choices[0].text


def test_stop_ends_before_its_text(base: Any) -> None:
    with base.client() as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "seed": 1}
        whole = client.completions.create(**asked).choices[0].text
        stop = next(c for c in whole[5:] if c.isprintable() and c != "�")
        ended = client.completions.create(**asked, stop=stop).choices[0]
        several = client.completions.create(**asked, stop=["never there", stop]).choices[0]
        streamed = "".join(e.choices[0].text for e in client.completions.create(**asked, stop=stop, stream=True))
    assert ended.text == several.text == streamed == whole[: whole.index(stop)]
    assert ended.finish_reason == "stop"


def test_echo_puts_the_prompt_before_the_text(base: Any) -> None:
    with base.client() as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "seed": 1}
        plain, echoed = client.completions.create(**asked), client.completions.create(**asked, echo=True)
        streamed = "".join(e.choices[0].text for e in client.completions.create(**asked, echo=True, stream=True))
    assert echoed.choices[0].text == streamed == "Once" + plain.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat_name_each_token_and_its_rivals(chatting: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 10, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 3}
    with chatting.client() as client:
        if stream:
            events = [e.choices[0] for e in client.chat.completions.create(**asked, stream=True)]
            entries = [entry for choice in events if choice.logprobs for entry in choice.logprobs.content or []]
        else:
            entries = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(entries) == 10
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy: the likeliest is the one
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1.0001
        data = bytes(entry.bytes or [])
        assert entry.token == (data.decode() if data < b"\x80" else f"bytes:\\x{data[0]:02x}")


def test_logprobs_of_a_completion_have_offsets(base: Any) -> None:
    with base.client() as client:
        choice = client.completions.create(model="tiny", prompt="Once", max_tokens=10, logprobs=2).choices[0]
    told = choice.logprobs
    assert told and len(told.tokens or []) == len(told.token_logprobs or []) == len(told.top_logprobs or []) == 10
    assert told.text_offset and told.text_offset == sorted(told.text_offset)
    assert told.text_offset[0] == 0 and told.text_offset[-1] <= len(choice.text)
    assert all(2 <= len(others) <= 3 for others in told.top_logprobs or [])


def test_logit_bias_forces_and_forbids(base: Any) -> None:
    with base.client() as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 6}
        forced = client.completions.create(**asked, logit_bias={"97": 100}).choices[0].text
        assert forced == "aaaaaa"
        others = {str(token_id): -100 for token_id in range(258) if token_id != 98}
        assert client.completions.create(**asked, logit_bias=others).choices[0].text == "bbbbbb"


def test_the_asynchronous_client_streams_several_at_once(chatting: Any) -> None:
    async def talk(client: AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=30, seed=seed, stream=True
        )
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{chatting.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(talk(client, seed) for seed in range(8)))

    together = asyncio.run(all_at_once())
    with chatting.client() as client:
        alone = [
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=30, seed=seed) for seed in range(8)
        ]
    assert together == [done.choices[0].message.content for done in alone]


def test_models_are_listed_with_their_shape(base: Any) -> None:
    with base.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        model = client.models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    layers = model.model_dump()["layers"]
    assert len(layers) == 2 and set(layers[0]) == {"query_heads", "kv_heads", "ffn_dim"}


def test_errors_are_those_of_the_client(base: Any, chatting: Any) -> None:
    with chatting.client() as client:
        with pytest.raises(openai.NotFoundError) as found:
            client.chat.completions.create(model="gpt-4", messages=HELLO)
        assert found.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="tiny",
                messages=HELLO,
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            )
        assert refused.value.param == "tools" and refused.value.code == "unsupported_parameter"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
        assert long.value.code == "context_length_exceeded"
        done = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=3, tools=None)  # type: ignore[arg-type]
        assert done.usage and done.usage.completion_tokens == 3
    with base.client() as client, pytest.raises(openai.BadRequestError) as untuned:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert untuned.value.code == "model_not_chat_tuned"


def test_an_answer_can_be_sent_back_as_the_client_holds_it(chatting: Any) -> None:
    with chatting.client() as client:
        messages: list[Any] = list(HELLO)
        done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=1)
        messages += [done.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=8).choices


def test_an_answer_keeps_to_a_json_schema(chatting: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "small": {"type": "boolean"}},
        "required": ["colour", "small"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    with chatting.client() as client:
        for seed in range(3):
            done = client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=100, seed=seed, response_format=form
            )
            answer = json.loads(done.choices[0].message.content or "")
            assert set(answer) == {"colour", "small"} and answer["colour"] in ("red", "blue")
            assert done.choices[0].finish_reason == "stop"
        text = client.completions.create(
            model="tiny", prompt="Once", max_tokens=20, extra_body={"regex": "[0-9]{3}-[ab]+"}
        )
        assert re.match(r"\d{3}-[ab]+", text.choices[0].text)
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="Once", extra_body={"regex": "("})
        assert refused.value.code == "invalid_constraint"
