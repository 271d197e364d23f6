"""Configuration is data: frozen models, TOML recipes, `path=value` overrides, errors that name the nearest key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from openelm.errors import ConfigError


class Config(BaseModel):
    """Base of everything a recipe can set: frozen, no unknown keys, no silent conversion from text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _keep_kinds(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse text or truth values for numbers, and anything but truth values for truth values."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        wrong = (bool,) if str in kinds else (bool, str)
        if kinds & {int, float} and bool not in kinds and isinstance(value, wrong):
            raise ValueError("a number is expected")
        if bool in kinds and not isinstance(value, bool | None):
            raise ValueError("true or false is expected")
        return value

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, file: str | Path | None = None) -> Self:
        """Validate plain data into this config.

        Raises:
            ConfigError: names each wrong key by its dotted path, what was given and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, detail) for detail in error.errors()), file=file) from None


def _explain(model: type[BaseModel], detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        *parents, key = detail["loc"]
        allowed = _fields_at(model, parents)
        near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(sorted(allowed))}"
        return f"unknown key {path!r}; {hint}"
    if detail["type"] == "missing":
        return f"missing key {path!r}"
    given = repr(detail["input"])
    given = given if len(given) <= 80 else given[:77] + "..."
    return f"{path or 'config'}: {detail['msg'].removeprefix('Value error, ')} (given: {given})"


def _fields_at(model: type[BaseModel], parents: Sequence[str | int]) -> list[str]:
    """List the keys allowed at a path, following nested models, tuples of models and optional models."""
    for part in parents:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        inner = _inner_model(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, UnionType):
        return next((found for item in get_args(annotation) if (found := _inner_model(item))), None)
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a recipe file.

    Raises:
        ConfigError: the file is missing, not text, or not TOML; names the line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe: {error.strerror}", file=path, fix="give the path of a .toml file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError("the recipe is not UTF-8 text", file=path, offset=error.start) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"the recipe is not valid TOML: {error}", file=path) from None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `path.to.key=value`; the value is TOML (`true`, `3`, `[1, 2]`), and anything else is a string."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r} is not of the form path=value", fix="for example train.steps=200")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return keys, value
    return keys, parsed["value"] if len(parsed) == 1 else value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested `values` with each `path=value` set; later ones win."""
    result = _copy(values)
    for text in overrides:
        keys, value = parse_override(text)
        place = result
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {text!r}: {key!r} is a value, not a table of keys")
        place[keys[-1]] = value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}
