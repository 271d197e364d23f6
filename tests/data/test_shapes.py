"""Every published shape of a row becomes the chat, text or pair that it stands for."""

from __future__ import annotations

from typing import Any

import pytest

from openelm.data.shapes import Chat, Pair, Text, answer_of, pair_of
from openelm.errors import DataError
from openelm.text.chat import Message

USER, ANSWER, OTHER = Message("user", "Sum?\n\n1 2"), Message("assistant", "3"), Message("assistant", "4")
SYSTEM = Message("system", "Be brief.")


def plain(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": plain(USER, ANSWER)},
        {"messages": plain(USER, ANSWER), "prompt": "ignored", "conversations": None},
        {"conversations": [{"from": "human", "value": USER.content}, {"from": "gpt", "value": "3"}]},
        {"conversations": [{"from": "user", "value": USER.content}, {"from": "assistant", "value": "3"}]},
        {"instruction": "Sum?", "input": "1 2", "output": "3"},
        {"instruction": USER.content, "input": "", "output": "3"},
        {"instruction": USER.content, "input": None, "output": "3"},
        {"instruction": USER.content, "output": "3"},
    ],
)
def test_all_shapes_of_chats_give_the_same_chat(row: dict[str, Any]) -> None:
    assert answer_of(row) == Chat((USER, ANSWER))


def test_of_a_prompt_in_messages_nothing_is_learned() -> None:
    row = {"prompt": plain(USER, ANSWER, USER), "completion": plain(OTHER)}
    assert answer_of(row) == Chat((USER, ANSWER, USER, OTHER), given=3)


def test_a_prompt_and_a_completion_of_strings_are_plain_text() -> None:
    assert answer_of({"prompt": "a ", "completion": "b"}) == Text("a ", "b")


STRINGS = {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 4"}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": plain(USER, ANSWER), "rejected": plain(USER, OTHER)},
        {"prompt": USER.content, "chosen": plain(USER, ANSWER), "rejected": plain(USER, OTHER)},
        {"prompt": "something else", "chosen": plain(USER, ANSWER), "rejected": plain(USER, OTHER)},
        {"prompt": USER.content, "chosen": plain(ANSWER), "rejected": plain(OTHER)},
        {"prompt": plain(USER), "chosen": plain(ANSWER), "rejected": plain(OTHER)},
        {"prompt": plain(USER), "chosen": plain(USER, ANSWER), "rejected": plain(USER, OTHER)},
    ],
)
def test_what_two_lists_begin_with_is_the_prompt_of_a_preference(row: dict[str, Any]) -> None:
    assert pair_of(row) == Pair(Chat((USER, ANSWER), 1), Chat((USER, OTHER), 1))


def test_a_prompt_goes_behind_the_system_message() -> None:
    row = {"prompt": USER.content, "chosen": plain(SYSTEM, ANSWER), "rejected": plain(SYSTEM, OTHER)}
    assert pair_of(row) == Pair(Chat((SYSTEM, USER, ANSWER), 2), Chat((SYSTEM, USER, OTHER), 2))


def test_a_preference_of_strings_is_plain_text() -> None:
    assert pair_of(STRINGS) == Pair(Text("1 + 2 =", " 3"), Text("1 + 2 =", " 4"))


def test_the_answer_of_a_preference_is_the_chosen_one() -> None:
    assert answer_of(STRINGS) == Text("1 + 2 =", " 3")
    row = {"chosen": plain(USER, ANSWER), "rejected": plain(USER, OTHER), "messages": plain(USER, OTHER)}
    assert answer_of(row) == Chat((USER, ANSWER), 1)


LONE = "a\ud800"
BAD_ANSWERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown shape": ({"text": "a", "score": 1}, "E_SCHEMA", "'text', 'score'; known shapes: messages; conv"),
    "half a shape": ({"prompt": "a", "completion": None}, "E_SCHEMA", "known shapes"),
    "no keys": ({}, "E_SCHEMA", "keys present: none"),
    "messages is text": ({"messages": "a"}, "E_SCHEMA", "'messages' holds a JSON string"),
    "message is text": ({"messages": ["a"]}, "E_SCHEMA", r"messages\[0\] is a JSON string"),
    "no role": ({"messages": [{"content": "a"}]}, "E_SCHEMA", r"messages\[0\] has no string 'role'; roles: system"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "E_SCHEMA", "unknown role 'tool'; roles: sys"),
    "unknown speaker": ({"conversations": [{"from": "bing", "value": "a"}]}, "E_SCHEMA", "'bing'; roles: .*gpt"),
    "no content": ({"messages": [{"role": "user"}]}, "E_SCHEMA", r"'content' of messages\[0\] holds a JSON null"),
    "no messages": ({"messages": []}, "E_ANSWER", "no assistant turn"),
    "no answer": ({"messages": plain(USER)}, "E_ANSWER", "no assistant turn"),
    "empty answer": ({"messages": plain(USER, Message("assistant", " \n"))}, "E_ANSWER", "empty"),
    "empty first answer": ({"messages": plain(USER, Message("assistant", ""), USER, ANSWER)}, "E_ANSWER", "empty"),
    "empty output": ({"instruction": "a", "output": ""}, "E_ANSWER", "empty"),
    "empty completion": ({"prompt": "a", "completion": " "}, "E_ANSWER", "empty"),
    "a number": ({"instruction": "a", "output": 3}, "E_SCHEMA", "'output' of the row holds a JSON number"),
    "text and messages": ({"prompt": "a", "completion": plain(ANSWER)}, "E_SCHEMA", "'completion' of the row"),
    "lone surrogate": ({"prompt": "a", "completion": LONE}, "E_TEXT", "lone surrogate .ud800 at character 1"),
    "lone surrogate of the user": ({"messages": plain(Message("user", LONE), ANSWER)}, "E_TEXT", "lone surrogate"),
    "NUL": ({"prompt": "a\0", "completion": "b"}, "E_TEXT", "NUL"),
}
BAD_PAIRS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a chat": ({"messages": plain(USER, ANSWER)}, "E_SCHEMA", "known shapes: chosen, rejected"),
    "equal lists": ({"chosen": plain(USER, ANSWER), "rejected": plain(USER, ANSWER)}, "E_ANSWER", "equal"),
    "equal strings": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "E_ANSWER", "equal"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "E_SCHEMA", "no string 'prompt'"),
    "empty rejected": ({"prompt": "a", "chosen": "b", "rejected": " "}, "E_ANSWER", "empty"),
    "one goes on": (
        {"chosen": plain(USER, ANSWER, USER, ANSWER), "rejected": plain(USER, ANSWER)},
        "E_ANSWER",
        "no as",
    ),
    "text and list": ({"prompt": "a", "chosen": "b", "rejected": plain(ANSWER)}, "E_SCHEMA", "'rejected' of the row"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_row_without_an_answer_says_what_is_wrong(name: str) -> None:
    row, code, message = BAD_ANSWERS[name]
    with pytest.raises(DataError, match=message) as caught:
        answer_of(row)
    assert caught.value.code == code and caught.value.fix


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_row_that_is_no_preference_says_what_is_wrong(name: str) -> None:
    row, code, message = BAD_PAIRS[name]
    with pytest.raises(DataError, match=message) as caught:
        pair_of(row)
    assert caught.value.code == code and caught.value.fix
