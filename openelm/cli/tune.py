"""`openelm tune`: a trained model and examples to a tuned model, or an adapter, and a page that shows what changed."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn

from openelm.cli.screen import Screen, WorkBar
from openelm.cli.train import check_spares_base, find_recipe, publish_average, read_recipe, train_config
from openelm.cli.tune_options import ADAPTERS
from openelm.config import apply_overrides
from openelm.errors import ConfigError, printable
from openelm.model.config import ModelConfig
from openelm.release.report import write_report
from openelm.text.tokenizer import load_tokenizer
from openelm.train.run import RunConfig
from openelm.train.work import read_examples

_MODEL, _EXAMPLES = "MODEL", "EXAMPLES"
"""What stands in shipped recipes where the command line says more."""


def tune(arguments: argparse.Namespace) -> int:
    """Tune, or go on; publishes the model or adapter, prints where it is."""
    console, folder = Screen(), Path(arguments.out)
    if (arguments.recipe is None) == (arguments.method is None):
        raise ConfigError("give either a recipe or a --method", fix="openelm tune --help shows examples")
    recipe = find_recipe(arguments.recipe or _of_method(arguments.method, arguments.adapter))
    values = read_recipe(recipe)
    if not isinstance(values.get("tune"), Mapping):
        raise ConfigError("the recipe does not tune", file=recipe, fix="add [tune] with a base, or use openelm train")
    if arguments.method in ADAPTERS and arguments.adapter not in (None, arguments.method):
        what = f"--method {arguments.method} and --adapter {arguments.adapter} are two adapters"
        raise ConfigError(what, fix="give one of them")
    values = with_options(values, arguments)
    if any(word.startswith("tune.epochs=") for word in arguments.overrides):
        values["train"].pop("steps", None)
    values = apply_overrides(values, arguments.overrides)
    check_given(values, recipe)
    if not any(word.startswith("train.length=") for word in arguments.overrides):
        values = within_context(values)
    config = RunConfig.parse(with_steps(values, recipe, console), file=recipe)
    kind = "model" if config.adapter is None else "adapter"
    check_spares_base(config, folder / kind)
    if not train_config(config, folder, console, allow_change=arguments.allow_change):
        return 0
    publish_average(folder, 1, folder / kind)
    page = write_report(folder)
    console.print(f"\n{kind:<8} {printable(str(folder / kind))}")
    console.print(f"report   {printable(str(page))}")
    if kind == "adapter":
        console.print(
            f"next     openelm adapter merge {printable(str(folder / kind))} -o {printable(str(folder))}/merged"
        )
    else:
        console.print(f"next     openelm chat {printable(str(folder / kind))}")
    return 0


def _of_method(method: str, adapter: str | None) -> str:
    """Name the shipped recipe of a method; an adapter wants other learning rates than a whole model."""
    if adapter is None or method in ADAPTERS:
        return f"tune-{method}"
    return f"tune-{adapter}" if method == "sft" else "tune-dpo-lora"


def with_options(recipe: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Put what the command line says into a recipe's values."""
    values = {**recipe, **{name: dict(recipe.get(name, {})) for name in ("tune", "data", "evaluation", "train")}}
    if arguments.model:
        values["tune"]["base"] = arguments.model
    if arguments.data:
        values["data"]["sources"] = [_source("examples", arguments.data)]
    if arguments.held_out:
        values["tune"]["held_out"] = [_source("held-out examples", arguments.held_out)]
    if arguments.text:
        values["held_out"] = [_source("held-out text", arguments.text)]
    if arguments.suite:
        values["evaluation"]["suites"] = {**(values["evaluation"].get("suites") or {}), "names": arguments.suite}
    if arguments.epochs is not None:
        values["tune"]["epochs"] = arguments.epochs
        values["train"].pop("steps", None)
    if arguments.seed is not None:
        values["train"]["seed"] = arguments.seed
    if arguments.adapter:
        values["adapter"] = {**(values.get("adapter") or {}), "kind": arguments.adapter}
    return values


def _source(name: str, paths: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "paths": list(paths)}


def check_given(values: dict[str, Any], recipe: Path) -> None:
    """Refuse what a shipped recipe leaves open.

    Raises:
        ConfigError: names the option that fills it in.
    """
    if values["tune"].get("base", _MODEL) == _MODEL:
        raise ConfigError("no model to begin with is given", file=recipe, fix="give its folder with --model")
    sources = values["data"].get("sources", ())
    if any(isinstance(source, Mapping) and source.get("paths") == [_EXAMPLES] for source in sources):
        raise ConfigError("no examples are given", file=recipe, fix="give files with --data")


def within_context(values: dict[str, Any]) -> dict[str, Any]:
    """Shorten a recipe's rows to the context of the base, if that is shorter."""
    context = ModelConfig.from_file(Path(values["tune"]["base"]) / "config.json").max_context_length
    length = min(values["train"].get("length", context), context)
    return {**values, "train": {**values["train"], "length": length}}


def with_steps(values: dict[str, Any], recipe: Path, console: Console) -> dict[str, Any]:
    """Turn `tune.epochs` into steps, where the recipe does not give steps; all examples are read for that.

    Raises:
        ConfigError: there are neither epochs nor steps.
        DataError: see `read_examples`.
    """
    settings = values.get("train", {})
    if "steps" in settings:
        return values
    config = RunConfig.parse({**values, "train": {**settings, "steps": 1}}, file=recipe)
    if config.tune is None or config.tune.epochs is None:
        raise ConfigError("there are neither train.steps nor tune.epochs", file=recipe, fix="give one of them")
    tokenizer = load_tokenizer(Path(config.tokenizer.path or config.tune.base))
    with WorkBar(console, MofNCompleteColumn(), "{what}: {done:,} of {total:,}") as bar:
        told = functools.partial(bar, "counting examples")
        examples = read_examples(config, config.data.open_manifest(), tokenizer, told)
    steps = max(1, math.ceil(config.tune.epochs * len(examples) / config.train.rows))
    return {**values, "train": {**settings, "steps": steps}}
