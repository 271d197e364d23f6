"""Stop strings give the same text however it is cut."""

from __future__ import annotations

from itertools import product

import pytest

from openelm.generate.stop import StopStrings


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.found:
            return text, True
    return text + matcher.finish(), False


def cuts(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    ways = []
    for choice in product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for character, cut in zip(text[1:], choice, strict=True):
            if cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        ways.append(pieces)
    return ways


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("say END now", ("END",), ("say ", True)),
        ("say EN now", ("END",), ("say EN now", False)),
        ("aaabaaac", ("aaac",), ("aaab", True)),
        ("ababac", ("abac",), ("ab", True)),
        ("xabcdy", ("abcd", "bc"), ("xa", True)),
        ("xabcy", ("bc", "abc"), ("x", True)),
        ("one\n\ntwo", ("\n\n",), ("one", True)),
        ("ends EN", ("END", "\n"), ("ends EN", False)),
        ("aé☃😀b", ("☃😀",), ("aé", True)),
        ("END", ("END",), ("", True)),
        ("abc", (), ("abc", False)),
    ],
)
def test_every_cut_of_the_text_gives_the_same_result(
    text: str, stops: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    assert {run(pieces, stops) for pieces in cuts(text)} == {expected}


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    matcher = StopStrings(("<end>",))
    assert [matcher.push(piece) for piece in ("a", "<", "e", "x", "<en")] == ["a", "", "", "<ex", ""]
    assert matcher.finish() == "<en"
