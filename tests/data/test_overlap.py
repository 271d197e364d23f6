"""Overlap with evaluation texts, against tuples of words compared one by one."""

from __future__ import annotations

import json
import random

import pytest

from openelm.data.overlap import NgramIndex, Overlap
from openelm.errors import DataError

VOCABULARY = ["the", "cat", "sat", "on", "a", "mat", "über", "dog"]


def words_of(text):
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def slow_overlap(text, evaluation_texts, n):
    """Compare every run of n words with every other; returns (matches, covered words / words)."""
    known = {tuple(words[at : at + n]) for words in map(words_of, evaluation_texts) for at in range(len(words) - n + 1)}
    words = words_of(text)
    hits = [at for at in range(len(words) - n + 1) if tuple(words[at : at + n]) in known]
    covered = {at + offset for at in hits for offset in range(n)}
    return len(hits), len(covered) / len(words)


def some_text(draw, words):
    return " ".join(
        draw.choice(VOCABULARY) + draw.choice(["", ",", "--x", "!", "\n", "_y"]) for _ in range(words)
    ).title()


@pytest.mark.parametrize("n", [1, 3, 5])
def test_matches_and_shares_are_those_of_comparing_all_runs_of_words(tmp_path, n):
    draw = random.Random(n)
    evaluation = [some_text(draw, draw.randrange(2, 25)) for _ in range(12)]
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in evaluation))
    index = NgramIndex([path], n)
    seen = set()
    for _ in range(200):
        text = some_text(draw, draw.randrange(1, 30))
        matches, share = slow_overlap(text, evaluation, n)
        found = index.overlap(text)
        assert found.matches == matches and found.share == pytest.approx(share)
        seen.add(bool(matches))
    assert n == 1 or seen == {True, False}


@pytest.mark.parametrize(
    "text", ["To be, or not to be,--that", "TO BE or not — to be: “that”", "ｔｏ be\nor\n\nnot to_be that"]
)
def test_marks_between_words_and_forms_of_letters_do_not_matter(tmp_path, text):
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question")
    assert NgramIndex([tmp_path / "a.txt"], 7).overlap(text).matches == 1


def test_a_file_says_how_many_of_its_runs_were_met(tmp_path):
    (tmp_path / "one.txt").write_text("One two three four five.")
    (tmp_path / "two.txt").write_text("six seven eight, nine")
    index = NgramIndex([tmp_path / "one.txt", tmp_path / "two.txt"], 3)
    index.overlap("zero ONE, two three four and then some")
    index.overlap("zero one two three")
    assert [(file.texts, file.ngrams, file.met) for file in index.files()] == [(1, 3, 2), (1, 2, 0)]


def test_every_string_of_a_row_is_a_text_of_its_own(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text(json.dumps({"q": "a b c", "choices": ["d e f", {"x": "g h i"}], "n": 3}) + "\n\n")
    index = NgramIndex([path], 3)
    assert [index.overlap(text).matches for text in ("a b c", "d e f", "g h i", "b c d", "f g h")] == [1, 1, 1, 0, 0]


def test_parquet_strings_are_texts_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"q": ["a b c", None], "choices": [["d e f"], ["g h i"]], "label": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "evaluation.parquet")
    index = NgramIndex([tmp_path / "evaluation.parquet"], 3)
    assert [index.overlap(text).matches for text in ("a b c", "d e f", "g h i", "a b d")] == [1, 1, 1, 0]


def test_texts_that_are_too_short_are_counted_and_none_long_enough_is_an_error(tmp_path):
    path = tmp_path / "evaluation.jsonl"
    path.write_text('"one two"\n"one two three"\n')
    (file,) = NgramIndex([path], 3).files()
    assert (file.texts, file.too_short, file.ngrams) == (2, 1, 1)
    with pytest.raises(DataError, match="no evaluation text has 4 words"):
        NgramIndex([path], 4)


def test_a_document_shorter_than_the_run_does_not_match(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four")
    assert NgramIndex([tmp_path / "a.txt"], 4).overlap("one two three") == Overlap(0, 0.0)


@pytest.mark.parametrize(
    "name, content, code",
    [
        ("a.jsonl", "{bad\n", "E_JSON"),
        ("a.csv", "x", "E_FORMAT"),
        ("gone.txt", None, "E_PATH"),
        ("gone.parquet", None, "E_PATH"),
    ],
)
def test_evaluation_files_that_cannot_be_read_are_refused(tmp_path, name, content, code):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        NgramIndex([tmp_path / name], 3)
    assert caught.value.code == code
