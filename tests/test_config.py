"""Configuration is checked data: a mistake is named by its dotted path, with the nearest allowed key."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from openelm.config import Config, apply_overrides, parse_override, read_toml
from openelm.errors import ConfigError


class Inner(Config):
    rate: float = 0.1
    steps: Annotated[int, Field(ge=1)] = 5
    quick: bool = False


class Outer(Config):
    name: str
    inner: Inner = Inner()
    perhaps: Inner | None = None
    several: tuple[Inner, ...] = ()
    folder: Path | None = None


def refusal(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Outer.parse(values)
    return caught.value.what


def test_plain_data_becomes_the_config() -> None:
    made = Outer.parse({"name": "a", "inner": {"rate": 1, "steps": 3}, "several": [{}], "folder": "x/y"})
    assert made == Outer(name="a", inner=Inner(rate=1.0, steps=3), several=(Inner(),), folder=Path("x/y"))


@pytest.mark.parametrize(
    ("values", "path", "nearest"),
    [
        ({"nam": "a"}, "nam", "name"),
        ({"name": "a", "inner": {"stepz": 1}}, "inner.stepz", "steps"),
        ({"name": "a", "perhaps": {"rat": 1}}, "perhaps.rat", "rate"),
        ({"name": "a", "several": [{}, {"qick": True}]}, "several.1.qick", "quick"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_one(
    values: dict[str, Any], path: str, nearest: str
) -> None:
    assert f"unknown key {path!r}; did you mean {nearest!r}?" in refusal(values)


def test_an_unknown_key_without_a_likeness_lists_what_is_allowed() -> None:
    assert refusal({"name": "a", "inner": {"xyzzy": 1}}) == "unknown key 'inner.xyzzy'; allowed: quick, rate, steps"


def test_every_mistake_is_reported_at_once() -> None:
    what = refusal({"inner": {"steps": 0, "zzz": 1}})
    assert "missing key 'name'" in what
    assert "inner.steps: Input should be greater than or equal to 1 (given: 0)" in what
    assert "unknown key 'inner.zzz'" in what


def test_the_error_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"file=my\.toml"):
        Outer.parse({}, file="my.toml")


def test_a_long_value_is_shortened_in_the_error() -> None:
    assert len(refusal({"name": list(range(100_000))})) < 300


@pytest.mark.parametrize("values", [[], "text", 3, None])
def test_what_is_not_a_table_is_refused(values: Any) -> None:
    assert "config" in refusal(values)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    assert "inner.rate" in refusal({"name": "a", "inner": {"rate": float(number)}})


@pytest.mark.parametrize(
    ("key", "text"), [("steps", "3"), ("rate", "0.5"), ("quick", "yes"), ("steps", "1_0"), ("quick", "0")]
)
def test_text_is_not_silently_converted(key: str, text: str) -> None:
    assert f"inner.{key}" in refusal({"name": "a", "inner": {key: text}})


@pytest.mark.parametrize(("key", "value"), [("steps", True), ("rate", True), ("quick", 1)])
def test_truth_values_are_not_numbers(key: str, value: Any) -> None:
    assert f"inner.{key}" in refusal({"name": "a", "inner": {key: value}})


def test_a_config_is_frozen_and_hashable() -> None:
    made = Outer(name="a")
    with pytest.raises(ValidationError):
        made.name = "b"  # type: ignore[misc]
    assert hash(made) == hash(Outer(name="a"))


def test_a_config_survives_its_own_json() -> None:
    made = Outer.parse({"name": "a", "perhaps": {"rate": 0.1 + 0.2}, "several": [{}, {"steps": 9}], "folder": "x"})
    assert Outer.parse(made.model_dump(mode="json")) == made


def test_a_recipe_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('name = "é"\n[inner]\nsteps = 3\n', encoding="utf-8")
    assert read_toml(file) == {"name": "é", "inner": {"steps": 3}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = = 2\n", "line 2"),
        (b"a = 1\na = 2\n", "not valid TOML"),
        (b"a = '\xff'", "not UTF-8"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
        (b"a = " + b"{b=" * 100_000, "not valid TOML"),
    ],
    ids=["syntax", "twice", "latin-1", "deep list", "deep table"],
)
def test_a_bad_recipe_is_refused_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(file)
    assert caught.value.file == file


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe") as caught:
        read_toml(tmp_path / name)
    assert caught.value.file == tmp_path / name


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("a=1", ["a"], 1),
        ("a.b.c=true", ["a", "b", "c"], True),
        ("a=1e-3", ["a"], 1e-3),
        ("a=[1, 2]", ["a"], [1, 2]),
        ('a="1"', ["a"], "1"),
        ("a={b=1}", ["a"], {"b": 1}),
        ("a=plain text", ["a"], "plain text"),
        ("a=x=y", ["a"], "x=y"),
        ("a=", ["a"], ""),
        ("a=runs/1", ["a"], "runs/1"),
        (" a = 2", ["a"], 2),
    ],
)
def test_an_override_is_a_path_and_a_toml_value_or_text(text: str, keys: list[str], value: Any) -> None:
    found = parse_override(text)
    assert found == (keys, value)
    assert type(found[1]) is type(value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1", "a.=1", ""])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="path=value"):
        parse_override(text)


def test_no_part_of_an_override_is_lost() -> None:
    assert parse_override("a=1\nb = 2") == (["a"], "1\nb = 2")


def test_an_absurdly_deep_override_ends_in_text_or_a_refusal() -> None:
    value = "[" * 100_000
    with contextlib.suppress(ConfigError):
        assert parse_override(f"a={value}") == (["a"], value)


def test_overrides_replace_and_add_and_the_later_wins() -> None:
    values = {"a": {"b": 1, "c": 2}}
    assert apply_overrides(values, ["a.b=3", "d.e.f=4", "a.b=5"]) == {"a": {"b": 5, "c": 2}, "d": {"e": {"f": 4}}}
    assert values == {"a": {"b": 1, "c": 2}}


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'b' is a value"):
        apply_overrides({"a": {"b": 1}}, ["a.b.c=2"])


def test_an_override_is_checked_like_the_recipe() -> None:
    assert "unknown key 'inner.stepz'" in refusal(apply_overrides({"name": "a"}, ["inner.stepz=4"]))
