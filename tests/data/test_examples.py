"""Rows become examples: encoded as they are asked and answered, or named, skipped, counted and listed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.data.document import list_bad_rows
from openelm.data.encoding import Encoded, Encoder
from openelm.data.examples import Examples, load_examples
from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.rows import whole_rows
from openelm.data.shapes import Chat, Pair, Text
from openelm.errors import ConfigError, DataError
from openelm.text.chat import Message, encode_chat, encode_learned_chat
from openelm.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_tokenizer

BOS, EOS = 256, 257  # of the tokenizer of bytes
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
PAIR = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}


def manifest(*paths: Path) -> Manifest:
    return build_manifest(
        whole_rows([SourceConfig(name=path.name, paths=(str(path),)) for path in paths]), on_bad_row="skip"
    )


@pytest.fixture
def load(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Examples]:
    def load_(rows: list[Any], **options: Any) -> Examples:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
        )
        return load_examples(manifest(path), tokenizer, **{"kind": "answers", "length": 1 << 12, **options})

    return load_


def plain(encoded: Encoded) -> tuple[list[int], list[bool]]:
    return encoded.tokens.tolist(), encoded.learned.tolist()


def content(encoded: Encoded) -> bytes:
    return bytes(encoded.tokens[encoded.learned & (encoded.tokens < 256)].tolist())


def test_a_chat_is_encoded_as_the_chat_format_says(load: Callable[..., Examples], tokenizer: Tokenizer) -> None:
    examples = load([CHAT])
    assert plain(*examples.sequences(0)) == encode_learned_chat(
        tokenizer, [Message("user", "Hi"), Message("assistant", "Yo")]
    )


def test_plain_text_is_learned_from_behind_the_prompt_to_the_end(load: Callable[..., Examples]) -> None:
    ids, learned = plain(*load([{"prompt": "ab", "completion": " c"}]).sequences(0))
    assert ids == [BOS, *b"ab c", EOS]
    assert learned == [False, False, False, True, True, True]


def test_everything_but_the_beginning_can_be_learned(load: Callable[..., Examples]) -> None:
    for row in (CHAT, {"prompt": "ab", "completion": " c"}):
        _, learned = plain(*load([row], learn="everything").sequences(0))
        assert learned == [False] + [True] * (len(learned) - 1)


def test_both_answers_of_a_preference_go_on_the_same_prompt(load: Callable[..., Examples]) -> None:
    chosen, rejected = load([PAIR], kind="preferences").sequences(0)
    assert plain(chosen) == ([BOS, *b"1 + 1 = 2", EOS], [False] * 8 + [True] * 3)
    assert plain(rejected) == ([BOS, *b"1 + 1 = 3", EOS], [False] * 8 + [True] * 3)


def test_without_a_token_that_begins_a_text_the_first_is_no_target() -> None:
    tokenizer = HuggingFaceTokenizer(ByteTokenizer().file_bytes, names={"bos_token": None})
    (result,) = Encoder(tokenizer, 100).encode([Text("", "ab")])
    assert plain(result[0]) == ([*b"ab", EOS], [False, True, True])


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = HuggingFaceTokenizer(ByteTokenizer().file_bytes, names={"eos_token": None})
    with pytest.raises(DataError, match="no end token"):
        Encoder(tokenizer, 100)


MERGING = train_tokenizer(["the answer is\n\nyes, the answer is\n\nno\n" * 5], 295)
PIECES = st.sampled_from(["the", " ", "\n", "answer", " is", "yes", ",", "é"])
STRINGS = st.lists(PIECES, max_size=5).map("".join)
ANSWERED = STRINGS.filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(prompt=STRINGS, answers=st.tuples(ANSWERED, ANSWERED).filter(lambda two: two[0] != two[1]))
def test_the_answers_of_a_text_differ_behind_a_prompt_that_is_never_learned(prompt, answers) -> None:
    (pair,) = Encoder(MERGING, 1000).encode([Pair(*(Text(prompt, answer) for answer in answers))])
    starts = [int(one.learned.argmax()) for one in pair]
    assert starts[0] == starts[1]
    assert pair[0].tokens[: starts[0]].tolist() == pair[1].tokens[: starts[0]].tolist()
    whole_prompt = [MERGING.bos_id, *MERGING.encode(prompt)]
    for one, answer in zip(pair, answers, strict=True):
        assert one.tokens.tolist() == [MERGING.bos_id, *MERGING.encode(prompt + answer), MERGING.eos_id]
        assert one.learned[starts[0] :].all() and one.tokens[: starts[0]].tolist() == whole_prompt[: starts[0]]


@settings(max_examples=200, deadline=None)
@given(
    given_turns=st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), STRINGS), max_size=3),
    answers=st.tuples(ANSWERED, ANSWERED).filter(lambda two: two[0] != two[1]),
)
def test_the_answers_of_a_chat_differ_behind_a_prompt_that_is_never_learned(given_turns, answers) -> None:
    chats = [Chat((*given_turns, Message("assistant", answer)), len(given_turns)) for answer in answers]
    (pair,) = Encoder(MERGING, 1000).encode([Pair(*chats)])
    start = min(int(one.learned.argmax()) for one in pair)
    asked = encode_chat(MERGING, given_turns)
    for one, chat in zip(pair, chats, strict=True):
        assert one.tokens.tolist() == encode_chat(MERGING, chat.messages, generation_prompt=False)
        assert one.tokens[:start].tolist() == asked[:start] and int(one.learned.argmax()) == start


def test_a_batch_of_examples_is_encoded_as_each_alone() -> None:
    encoder = Encoder(MERGING, 1000)
    items = [
        Text("the", " answer"),
        Pair(Text("", "a"), Text("", "b")),
        Chat((Message("assistant", "yes"),)),
        Text("", "a"),
    ]
    together = encoder.encode(items)
    alone = [encoder.encode([item])[0] for item in items]
    assert [list(map(plain, one)) for one in together] == [list(map(plain, one)) for one in alone]


@pytest.mark.parametrize("prompt_tokens", [2, 5, 7, 8, 100])
def test_a_long_prompt_of_a_preference_loses_its_beginning(prompt_tokens: int, load: Callable[..., Examples]) -> None:
    whole = [BOS, *b"1 + 1 ="]
    kept = whole if prompt_tokens >= len(whole) else [BOS, *whole[len(whole) - prompt_tokens + 1 :]]
    for one, answer in zip(
        load([PAIR], kind="preferences", prompt_tokens=prompt_tokens).sequences(0), (b" 2", b" 3"), strict=True
    ):
        assert plain(one) == ([*kept, *answer, EOS], [False] * len(kept) + [True] * 3)


def test_prompt_tokens_are_for_preferences_only(load: Callable[..., Examples]) -> None:
    with pytest.raises(ConfigError, match="preferences only"):
        load([CHAT], prompt_tokens=10)


LONG = {"prompt": "abc", "completion": "defghi"}  # 11 tokens


def test_a_long_example_is_named(load: Callable[..., Examples]) -> None:
    with pytest.raises(DataError, match="11 tokens, but length is 10") as caught:
        load([CHAT | {"messages": CHAT["messages"][1:]}, LONG][1:], length=10, on_bad_row="skip")
    assert (caught.value.code, caught.value.line) == ("E_TOO_LONG", 1)


def test_a_long_example_can_be_skipped(load: Callable[..., Examples]) -> None:
    examples = load([LONG, {"prompt": "a", "completion": "b"}], length=10, on_long="skip")
    assert len(examples) == 1 and examples.drops == {"rows.jsonl": {"E_TOO_LONG": 1}}


def test_a_long_example_can_be_cut(load: Callable[..., Examples]) -> None:
    (whole,), (cut,) = load([LONG]).sequences(0), load([LONG], length=6, on_long="cut").sequences(0)
    assert plain(cut) == (whole.tokens[:6].tolist(), whole.learned[:6].tolist())


def test_an_example_of_which_nothing_learned_is_left_is_skipped(load: Callable[..., Examples]) -> None:
    examples = load([LONG, {"prompt": "", "completion": "abcdef"}], length=4, on_long="cut")
    assert len(examples) == 1 and examples.drops == {"rows.jsonl": {"E_TOO_LONG": 1}}


def test_a_preference_whose_difference_is_cut_off_is_skipped(load: Callable[..., Examples]) -> None:
    rows = [{"prompt": "a", "chosen": "bbbc", "rejected": "bbbd"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    examples = load(rows, kind="preferences", length=5, on_long="cut")
    assert len(examples) == 1 and examples.drops == {"rows.jsonl": {"E_TOO_LONG": 1}}


def question(number: int, choice: int, query: str = "Question: a?\nAnswer:") -> dict[str, Any]:
    doc = {"query": query, "choices": ["b", "c"], "gold": 1}
    request = {"context": "x", "continuation": "y"}
    return {"doc": doc, "request": request, "task_name": "arc_easy", "doc_id": number, "idx": choice}


def test_all_rows_of_a_question_are_one_example(load: Callable[..., Examples]) -> None:
    rows = [
        question(number + half, choice, f"{number}?")
        for half in (0, 1_000_000)
        for number in (4, 7)
        for choice in (0, 1)
    ]
    for kind, texts in (("answers", [b"c"]), ("preferences", [b"c", b"b"])):
        examples = load(rows, kind=kind)
        assert len(examples) == 2 and examples.drops == {}
        for index, number in enumerate((4, 7)):
            found = [bytes(one.tokens[1:-1].tolist()) for one in examples.sequences(index)]
            assert found == [b"%d? %s" % (number, text) for text in texts]


WITHOUT_ANSWER = {"messages": CHAT["messages"][:1]}
BAD: dict[str, tuple[list[Any], str]] = {  # the last row is bad
    "broken JSON": ([b'{"messages": ['], "E_JSON"),
    "duplicate key": ([b'{"id": 1, "id": 2}'], "E_JSON"),
    "not UTF-8": ([b'{"prompt": "\xff", "completion": "a"}'], "E_TEXT"),
    "not an object": ([[CHAT]], "E_SCHEMA"),
    "unknown shape": ([{"text": "a"}], "E_SCHEMA"),
    "unknown role": ([{"messages": [{"role": "tool", "content": "a"}]}], "E_SCHEMA"),
    "missing role": ([{"messages": [{"content": "a"}]}], "E_SCHEMA"),
    "empty answer": ([{"instruction": "a", "output": " "}], "E_ANSWER"),
    "no assistant turn": ([WITHOUT_ANSWER], "E_ANSWER"),
    "equal answers": ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "E_ANSWER"),
    "lone surrogate": ([b'{"prompt": "\\ud800", "completion": "a"}'], "E_TEXT"),
    "NUL": ([b'{"prompt": "a", "completion": "\\u0000a"}'], "E_TEXT"),
    "the same id": ([{"id": "a", **CHAT}, {"id": "b", **CHAT}, {"id": "a", **CHAT}], "E_DUPLICATE"),
    "the same number": ([{"id": 0, **CHAT}, {"id": "0", **CHAT}, {"id": 0, **CHAT}], "E_DUPLICATE"),
    "the same doc_id": ([{"doc_id": 3, **CHAT}, {"doc_id": 3, **CHAT}], "E_DUPLICATE"),
    "the same choice": ([question(3, 0), question(3, 1), question(3, 0)], "E_DUPLICATE"),
    "another question": ([question(3, 0), question(3, 1, "Question: b?\nAnswer:")], "E_DUPLICATE"),
    "question without number": ([{**question(3, 0), "doc_id": None}], "E_SCHEMA"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_file_and_line(name: str, tmp_path: Path, load: Callable[..., Examples]) -> None:
    rows, code = BAD[name]
    with pytest.raises(DataError) as caught:
        load([CHAT, *rows])
    assert (caught.value.code, caught.value.file, caught.value.line) == (code, tmp_path / "rows.jsonl", 1 + len(rows))
    assert caught.value.fix


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_counted_and_listed(name: str, load: Callable[..., Examples]) -> None:
    rows, code = BAD[name]
    good = load([CHAT, *rows[:-1]])
    examples = load([CHAT, *rows, b"", {"prompt": "a", "completion": "last"}], on_bad_row="skip")
    assert examples.drops == {"rows.jsonl": {code: 1, "empty": 1}}
    assert content(examples.sequences(len(examples) - 1)[0]) == b"last" and len(examples) == len(good) + 1
    listing = list_bad_rows(examples.bad_rows)
    assert listing["count"] == 1
    found = listing["rows"][0]
    assert (found["source"], found["file"], found["line"], found["code"]) == (
        "rows.jsonl", "rows.jsonl", 1 + len(rows), code,
    )  # fmt: skip
    assert len(found["sha256"]) == 64


def test_the_first_bad_row_is_named_first(load: Callable[..., Examples]) -> None:
    with pytest.raises(DataError) as caught:
        load([LONG, {"text": "a"}], length=10)
    assert (caught.value.code, caught.value.line) == ("E_TOO_LONG", 1)


def test_rows_that_are_all_bad_are_an_error_with_the_reasons(load: Callable[..., Examples]) -> None:
    with pytest.raises(DataError, match="E_SCHEMA': 2") as caught:
        load([{"text": "a"}, {"text": "b"}], on_bad_row="skip")
    assert caught.value.code == "E_EMPTY"


def test_the_same_id_in_two_sources_is_two_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        path.write_text(json.dumps({"id": 1, **CHAT}) + "\n" + json.dumps(question(1, 0)) + "\n")
    assert len(load_examples(manifest(*paths), tokenizer, kind="answers", length=100)) == 4


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.json", "rows.parquet"])
def test_every_format_gives_the_same_examples_and_bad_rows(
    name: str, tmp_path: Path, tokenizer: Tokenizer, load: Callable[..., Examples]
) -> None:
    rows = [{"id": at, "prompt": f"{at} é", "completion": "x" * (at % 5)} for at in range(2500)]
    expected = load(rows, on_bad_row="skip")
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    elif path.suffix == ".json":
        path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    else:
        pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
        path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = load_examples(manifest(path), tokenizer, kind="answers", length=1 << 12, on_bad_row="skip")
    assert found.sha256 == expected.sha256
    assert found.drops == {name: {"E_ANSWER": 500}}
    assert [row["line"] for row in found.bad_rows] == [row["line"] for row in expected.bad_rows]


def test_columns_that_hold_null_do_not_hide_a_rows_shape(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{**CHAT, "instruction": None, "output": None}, {"instruction": "Hi", "output": "Yo"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples = load_examples(manifest(path), tokenizer, kind="answers", length=100)
    assert plain(*examples.sequences(0)) == plain(*examples.sequences(1))


def test_examples_keep_the_order_of_the_rows_over_many_batches(load: Callable[..., Examples]) -> None:
    examples = load([{"prompt": "", "completion": str(number)} for number in range(3000)])
    assert [content(*examples.sequences(index)) for index in range(3000)] == [b"%d" % number for number in range(3000)]
    assert int(examples.ends[-1]) == len(examples.tokens) == len(examples.learned)


def test_progress_tells_rows_done_and_all_rows(load: Callable[..., Examples]) -> None:
    told: list[tuple[int, int]] = []
    load([CHAT] * 2500, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2500, 2500) and told == sorted(told) and len(told) > 2


def test_the_hash_tells_what_is_learned_and_where_examples_end() -> None:
    def made(tokens: list[int], learned: list[bool], ends: list[int], per_example: int = 1) -> str:
        arrays = np.array(tokens, np.int32), np.array(learned), np.array(ends, np.int64)
        return Examples(*arrays, per_example, np.zeros(9, np.int32), {}, ()).sha256

    hashes = [
        made([1, 2, 3, 4], [False, True, False, True], [2, 4]),
        made([1, 2, 3, 5], [False, True, False, True], [2, 4]),
        made([1, 2, 3, 4], [False, True, True, True], [2, 4]),
        made([1, 2, 3, 4], [False, True, False, True], [1, 4]),
        made([1, 2, 3, 4], [False, True, False, True], [2, 4], 2),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == made([1, 2, 3, 4], [False, True, False, True], [2, 4])


def test_a_prompt_may_have_several_pairs(load: Callable[..., Examples]) -> None:
    rows = [{"prompt_id": "a", "prompt": "1 ", "chosen": "good", "rejected": bad} for bad in ("bad", "worse")]
    assert len(load(rows, kind="preferences")) == 2
