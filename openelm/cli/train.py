"""`openelm train`, `average` and `report`: a recipe to a run, a run to a model folder or adapter and a page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn

from openelm.adapters.adapter import save_adapter
from openelm.cli.screen import Screen, WorkBar
from openelm.config import apply_overrides, read_toml
from openelm.data.examples import Examples
from openelm.errors import CheckpointError, ConfigError, printable
from openelm.files.atomic import make_folder
from openelm.files.locks import folder_lock
from openelm.kernels.native import kernels_name, native_missing
from openelm.model.config import ModelConfig
from openelm.model.device import reuse_freed_memory
from openelm.model.folder import is_chat_tuned, save_model
from openelm.model.transformer import OpenELM
from openelm.release.answering import suite_probes
from openelm.release.card import model_card
from openelm.release.probes import probes
from openelm.release.report import write_report
from openelm.text.tokenizer import load_tokenizer
from openelm.train.average import average_checkpoints
from openelm.train.distributed import ALONE, Processes, open_processes
from openelm.train.ledger import ledger_head, read_ledger
from openelm.train.loop import Batches, Observer, train
from openelm.train.progress import ProgressDisplay, TensorBoard
from openelm.train.run import Run, RunConfig, open_run
from openelm.train.start import model_of_checkpoint
from openelm.train.tuning import base_sha256
from openelm.train.work import Work


def train_recipe(arguments: argparse.Namespace) -> int:
    """Train, or go on; prints progress and where the results are."""
    console = Screen()
    recipe = find_recipe(arguments.recipe)
    config = RunConfig.parse(apply_overrides(read_recipe(recipe), arguments.overrides), file=recipe)
    folder = Path(arguments.out)
    if not train_config(config, folder, console, allow_change=arguments.allow_change):
        return 0
    page = write_report(folder)
    console.print(f"\nreport   {printable(str(page))}")
    console.print(f"next     openelm average {printable(str(folder))} --last {min(5, config.checkpoints.keep_last)}")
    return 0


def train_config(config: RunConfig, folder: Path, console: Console, *, allow_change: Sequence[str]) -> bool:
    """Train in a run folder, in as many processes as were started; tells whether this is the first of them."""
    with ExitStack() as opened:
        processes = opened.enter_context(open_processes(config.train.device, config.train.timeout_seconds))
        if processes.leads:
            make_folder(folder)
            opened.enter_context(folder_lock(folder))
            run = open_run(folder, config, allow_change=allow_change)
            print_run(run, console)
        processes.wait_for_all()
        if not processes.leads:
            run = open_run(folder, config, allow_change=allow_change, leads=False)
        train_run(run, console, processes)
        return processes.leads


def print_run(run: Run, console: Console) -> None:
    """Say what is trained, on what and where."""
    shards = [shard for source in run.manifest.sources for shard in source.shards]
    kernels = f" with {kernels_name()} kernels" if run.device.type == "cpu" else ""
    console.print(
        f"{run.model_config.parameters:,} parameters, {run.model_config.num_transformer_layers} layers, "
        f"vocabulary {run.tokenizer.vocab_size:,}; {sum(shard.bytes for shard in shards):,} bytes "
        f"in {len(shards)} files; {run.precision} on {run.device.type}{kernels}; folder {printable(str(run.folder))}"
    )
    if run.device.type == "cpu" and (missing := native_missing()):
        console.print(f"training will be slow: {missing}", style="yellow")


def average(arguments: argparse.Namespace) -> int:
    """Average checkpoints and publish the model folder."""
    run, console = Path(arguments.run), Screen()
    is_adapter = read_run_file(run)["config"].get("adapter") is not None
    target = Path(arguments.out) if arguments.out else run / ("adapter" if is_adapter else "model")
    with folder_lock(run):
        steps = publish_average(run, arguments.last, target)
    console.print(f"averaged the checkpoints of steps {', '.join(map(str, steps))} into {printable(str(target))}")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the report page."""
    read_run_file(Path(arguments.run))
    page = write_report(Path(arguments.run), out=Path(arguments.out) if arguments.out else None)
    Screen().print(f"wrote {printable(str(page))}")
    return 0


def find_recipe(name: str) -> Path:
    """Return a recipe file: the path itself, or the shipped recipe of that name."""
    shipped = Path(str(files("openelm") / "recipes"))
    if Path(name).is_file() or name.endswith((".toml", ".json")):
        return Path(name)
    if (shipped / f"{name}.toml").exists():
        return shipped / f"{name}.toml"
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.toml")))
    raise ConfigError(f"no recipe is called {name!r}", fix=f"give a .toml file, or a shipped recipe: {names}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: a TOML file, or the `run.json` of a run that is to be started again."""
    if path.suffix != ".json":
        return read_toml(path)
    config: dict[str, Any] = read_run_file(path.parent, path.name)["config"]
    return config


def train_run(run: Run, console: Console, processes: Processes = ALONE) -> OpenELM:
    """Train an opened run with its probes; the first process shows the progress."""
    reuse_freed_memory()
    settings = run.config.train
    suites = suite_probes(run)  # before long preparations: they may be missing
    with ExitStack() as opened:
        with WorkBar(console, MofNCompleteColumn(), "{what}: {done:,} of {total:,}") as bar:
            work = Work(run, processes, bar) if processes.leads else Work(run, processes)
            examples, objective, held_out = work.examples, work.objective, work.held_out
        if examples is not None and processes.leads:
            print_examples(examples, console)

        def open_batches(cursors: list[dict[str, Any]] | None) -> Batches:
            stream = work.open_batches(cursors)
            opened.callback(stream.close)
            return stream

        observers: tuple[Observer, ...] = ()
        if processes.leads:
            tensorboard = opened.enter_context(closing(TensorBoard(run.folder / "tensorboard")))
            observers = (opened.enter_context(ProgressDisplay(console, settings.steps)), tensorboard)
        return train(
            run,
            open_batches=open_batches,
            objective=objective,
            probes=probes(run, held_out, suites),
            observers=observers,
            processes=processes,
            facts={} if examples is None else {"examples": examples.facts()},
        )


def print_examples(examples: Examples, console: Console) -> None:
    """Say what a tuned model learns from, and what was passed over."""
    console.print(
        f"{len(examples):,} examples of {len(examples.tokens):,} tokens, {examples.learned_tokens:,} to learn"
    )
    for source, reasons in examples.drops.items():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        console.print(f"passed over in {printable(source)}: {counts}", style="yellow")


def publish_average(run: Path, last: int, target: Path) -> list[int]:
    """Average a run's last checkpoints into a model folder; returns the steps averaged."""
    description = read_run_file(run)
    config = RunConfig.parse(description["config"], file=run / "run.json")
    check_spares_base(config, target)
    weights, steps = average_checkpoints(run, last)
    origin = {"averaged_steps": steps, "ledger_head": ledger_head(run / "ledger.jsonl")}
    card = model_card(run, steps)
    model = model_of_checkpoint(config, ModelConfig.parse(description["model"], file=run / "run.json"), weights)
    chat_tuned = config.tune is not None and (is_chat_tuned(Path(config.tune.base)) or learned_chats(run))
    described: dict[str, Any] = {"chat_tuned": chat_tuned, "card": card, "origin": origin, "replace": True}
    if config.tune is not None and config.adapter is not None:
        base = Path(config.tune.base)
        if base_sha256(base) != description["base_sha256"]:
            what = "this is not the model that the run began with"
            raise CheckpointError(what, file=base, fix="put the run's own base back")
        save_adapter(target, model, config.adapter, base=base, **described)
    else:
        save_model(target, model, tokenizer=load_tokenizer(run / "tokenizer"), **described)
    return steps


def check_spares_base(config: RunConfig, target: Path) -> None:
    """Refuse to write a tuned model over the one that it began with.

    Raises:
        ConfigError: the base is the target folder, or in it.
    """
    if config.tune is not None and Path(config.tune.base).resolve().is_relative_to(target.resolve()):
        what = f"the tuned model would take the place of its base {config.tune.base}"
        raise ConfigError(what, file=target, fix="choose another --out")


def learned_chats(run: Path) -> bool:
    """Tell whether a run learned from chats, as its ledger says."""
    starts = [event for event in read_ledger(run / "ledger.jsonl") if event["event"] in ("start", "resume")]
    return bool(starts and starts[-1].get("examples", {}).get("chats"))


def read_run_file(run: Path, name: str = "run.json") -> Mapping[str, Any]:
    """Read `run.json`.

    Raises:
        CheckpointError: the folder is no run folder.
    """
    try:
        description: dict[str, Any] = json.loads((run / name).read_bytes())
        if not (isinstance(description["model"], dict) and isinstance(description["config"], dict)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{name} is missing or damaged", file=run / name, fix="give a run folder") from None
    return description
