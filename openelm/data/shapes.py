"""Recognise the shapes in which chats, texts, preferences and questions are published, and make one of each.

A row's shape is told by its keys; a key that holds null counts as absent, other keys are ignored. The first that fits:

| keys | shape |
|---|---|
| doc, request | a question with choices, see `openelm.data.choices` |
| chosen, rejected | a preference: two lists of messages, or two strings that go on a string `prompt` |
| messages | a chat: [{role: system, user or assistant; content}] |
| conversations | a chat as ShareGPT has it: [{from: system, human, user, gpt or assistant; value}] |
| instruction, output | a chat as Alpaca has it: the user says `instruction`, an empty line, `input` if there is one |
| prompt, completion | two lists of messages, or two strings: plain text, in which nothing stands between them |

In a preference of two lists, what both begin with is the prompt. A list `prompt` stands before both unless they begin
with it; a string `prompt` is ignored, except where the lists share no user's turn: there it is that turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm.data.choices import is_question, question
from openelm.data.readers.jsonl import fault_of_text, json_kind
from openelm.errors import DataError
from openelm.text.chat import Message, Role

SHAPES = (
    "messages; conversations; instruction, output; prompt, completion; chosen, rejected (with a prompt if they are "
    "strings); doc, request"
)
_SHAREGPT: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_MESSAGES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text without a chat's tags; the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat whose assistant turns are learned, except those among the first `given` messages."""

    messages: tuple[Message, ...]
    given: int = 0


Answer = Text | Chat


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Answer
    rejected: Answer


def answer_of(row: Mapping[str, Any]) -> Answer:
    """Make what is to be learned of a row; of a preference it is the chosen answer, of a question the right one.

    Raises:
        DataError: E_SCHEMA for keys or values of no known shape; E_ANSWER where there is no answer or it is empty;
            E_TEXT for a string that no text file holds.
    """
    keys = _keys(row)
    if is_question(row):
        return Text(*question(row).answer)
    if {"chosen", "rejected"} <= keys:
        return _preference(row).chosen
    if "messages" in keys:
        return _checked(Chat(_messages(row, "messages")))
    if "conversations" in keys:
        return _checked(Chat(_messages(row, "conversations")))
    if {"instruction", "output"} <= keys:
        return _checked(Chat(_alpaca(row)))
    if {"prompt", "completion"} <= keys:
        if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
            return _checked(Text(_string(row, "prompt"), _string(row, "completion")))
        given = _messages(row, "prompt")
        return _checked(Chat(given + _messages(row, "completion"), len(given)))
    raise _unknown(row, SHAPES)


def pair_of(row: Mapping[str, Any]) -> Pair:
    """Make two answers of a preference, or of a question its right choice and a wrong one.

    Raises:
        DataError: as `answer_of`; E_ANSWER where both are equal.
    """
    if is_question(row):
        prompt, chosen, rejected = question(row).pair
        return Pair(Text(prompt, chosen), Text(prompt, rejected))
    if {"chosen", "rejected"} <= _keys(row):
        return _preference(row)
    raise _unknown(row, "chosen, rejected (with a prompt if they are strings); doc, request")


def _preference(row: Mapping[str, Any]) -> Pair:
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        if not isinstance(row.get("prompt"), str):
            raise _bad("chosen and rejected are strings, and there is no string 'prompt' that they go on")
        answers: list[Answer] = [Text(_string(row, "prompt"), _string(row, key)) for key in ("chosen", "rejected")]
    else:
        answers = list(_chats(row))
    if answers[0] == answers[1]:
        raise _no_answer("chosen and rejected are equal")
    return Pair(_checked(answers[0]), _checked(answers[1]))


def _chats(row: Mapping[str, Any]) -> tuple[Chat, Chat]:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        given = _messages(row, "prompt")
        if chosen[: len(given)] != given or rejected[: len(given)] != given:
            chosen, rejected = given + chosen, given + rejected
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if isinstance(prompt, str) and all(message.role == "system" for message in chosen[:common]):
        turn = (Message("user", _string(row, "prompt")),)
        chosen, rejected = (chat[:common] + turn + chat[common:] for chat in (chosen, rejected))
        common += 1
    return Chat(chosen, common), Chat(rejected, common)


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    more = _string(row, "input") if row.get("input") is not None else ""
    user = _string(row, "instruction") + (f"\n\n{more}" if more else "")
    return Message("user", user), Message("assistant", _string(row, "output"))


def _messages(row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    value = row[key]
    if not isinstance(value, list):
        raise _bad(f"key {key!r} holds a JSON {json_kind(value)}, but must hold a list of messages")
    names = ("from", "value", _SHAREGPT) if key == "conversations" else ("role", "content", _MESSAGES)
    return tuple(_message(item, f"{key}[{index}]", *names) for index, item in enumerate(value))


def _message(item: Any, place: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> Message:
    if not isinstance(item, dict):
        raise _bad(f"{place} is a JSON {json_kind(item)}, but must be an object with {role_key!r} and {content_key!r}")
    role = item.get(role_key)
    if not isinstance(role, str) or role not in roles:
        found = f"the unknown role {role[:40]!r}" if isinstance(role, str) else f"no string {role_key!r}"
        raise _bad(f"{place} has {found}; roles: {', '.join(roles)}")
    return Message(roles[role], _string(item, content_key, place))


def _string(row: Mapping[str, Any], key: str, place: str = "the row") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _bad(f"key {key!r} of {place} holds a JSON {json_kind(value)}, but must hold a string")
    if fault := fault_of_text(value):
        raise DataError(f"key {key!r} of {place}: {fault}", fix=_FIX, code="E_TEXT")
    return value


def _checked(answer: Answer) -> Answer:
    if isinstance(answer, Text):
        contents: Sequence[str] = [answer.completion]
    else:
        contents = [message.content for message in answer.messages[answer.given :] if message.role == "assistant"]
    if not contents:
        raise _no_answer("no assistant turn, so there is nothing to learn")
    if not all(content.strip() for content in contents):
        raise _no_answer("an answer is empty")
    return answer


def _keys(row: Mapping[str, Any]) -> set[str]:
    return {key for key, value in row.items() if value is not None}


def _unknown(row: Mapping[str, Any], shapes: str) -> DataError:
    present = [repr(key[:40]) for key, value in row.items() if value is not None]
    keys = ", ".join(present[:12]) or "none"
    return _bad(f"no known shape; keys present: {keys}; known shapes: {shapes}")


_FIX = "mend the row, or set on_bad_row = 'skip'"


def _bad(what: str) -> DataError:
    return DataError(what, fix=_FIX, code="E_SCHEMA")


def _no_answer(what: str) -> DataError:
    return DataError(what, fix=_FIX, code="E_ANSWER")
