"""An error is one line a person can act on and a number a script can act on, also from another process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from openelm import errors
from openelm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    NumericError,
    OpenELMError,
    ProcessError,
    Stopped,
    VerificationError,
    printable,
)

EXIT_CODES = {
    OpenELMError: 1,
    ConfigError: 2,
    DataError: 3,
    CheckpointError: 4,
    DiskError: 5,
    NumericError: 6,
    VerificationError: 7,
    Stopped: 75,
    ProcessError: 75,
}


def test_the_line_names_code_place_cause_and_fix() -> None:
    error = DataError("cut short", fix="copy it again", file="a.txt", line=3, offset=70, code="E_TRUNC")
    assert str(error) == "error[E_TRUNC] file=a.txt line=3 offset=70: cut short; copy it again"


def test_what_is_not_known_is_left_out() -> None:
    assert str(ConfigError("no")) == "error[E_CONFIG]: no"


def test_places_of_zero_are_shown() -> None:
    assert str(DataError("no", line=0, offset=0)) == "error[E_DATA] line=0 offset=0: no"


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_every_kind_has_its_exit_code(kind: type[OpenELMError]) -> None:
    assert kind("x").exit_code == EXIT_CODES[kind]


def test_no_kind_is_missing_from_the_table_of_exit_codes_and_none_shares_a_code() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OpenELMError)}
    assert kinds == set(EXIT_CODES)
    assert len({kind.code for kind in kinds}) == len(kinds)
    own_exits = kinds - {ProcessError}  # a kind of Stopped: scripts start the run again in both cases
    assert len({kind.exit_code for kind in own_exits}) == len(own_exits)


@pytest.mark.parametrize("bad", ["\n", "\r", "\x1b[2J", "\x00", "\x85", "\u2028", "\u202e", "\ud800", "\x7f"])
def test_control_characters_cannot_reach_the_terminal(bad: str) -> None:
    error = DataError(f"what{bad}", fix=f"fix{bad}", file=f"name{bad}", code=f"E{bad}")
    assert str(error).isprintable()
    str(error).encode()


@pytest.mark.parametrize("text", ["plain text", "Zürich, 你好 🦙", "a  b", ""])
def test_harmless_text_is_left_alone(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_after_the_way_back_from_a_worker(kind: type[OpenELMError]) -> None:
    error = kind("cut\n", fix="copy", file=Path("a/b"), line=3, offset=7, code="E_MINE")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert back.exit_code == error.exit_code
