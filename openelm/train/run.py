"""A run: its resolved config, its folder, and everything a stranger needs to start the same run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from openelm.config import Config
from openelm.data.manifest import Manifest, SourceConfig
from openelm.data.manifest_file import manifest_of, survey_sources, write_manifest_file
from openelm.data.reading import read_documents
from openelm.data.stream import DataConfig
from openelm.errors import CheckpointError, ConfigError
from openelm.files.atomic import make_folder, write_atomic
from openelm.files.published import publish_folder
from openelm.kernels.precision import cpu_multiplies_bf16
from openelm.model.budget import Work, recompute_within
from openelm.model.config import ModelConfig
from openelm.model.device import choose_device
from openelm.model.float8 import check_float8
from openelm.model.plan import LayerPlan, matched_uniform_plan
from openelm.model.sizes import ModelChoice
from openelm.model.transformer import Recompute
from openelm.optim.config import OptimizerConfig
from openelm.optim.schedule import ScheduleConfig
from openelm.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from openelm.train.checkpoint import CheckpointConfig
from openelm.train.data_lists import LISTS, Lists, first_difference, read_lists
from openelm.train.environment import COMPARED, environment, git_commit

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class TokenizerChoice(Config):
    """An existing tokenizer, or one trained on the run's own text."""

    path: str | None = None
    """A SentencePiece `.model`, a `tokenizer.json`, or a folder with one."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    """Pieces of the tokenizer to train when no path is given."""


class TrainConfig(Config):
    """The shape of the work and what to do when it goes wrong."""

    steps: Positive
    rows: Positive
    """Sequences per optimizer step."""
    length: Positive
    """Tokens per sequence."""
    micro_rows: Positive | None = None
    """Sequences per forward and backward pass; gradients are averaged over all target tokens of the step."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the initial weights and the document order."""
    precision: Literal["auto", "fp32", "bf16", "float8"] = "auto"
    """`auto`: bf16 on GPUs and on CPUs that multiply it natively, otherwise fp32. `float8`: bf16, and the layers'
    projections in float8 (extra `float8`, CUDA capability 8.9 or more)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    numerics: Literal["fast", "exact"] = "fast"
    """`exact`: gradients are added in one fixed order, so 1, 2 and 4 processes give the same weights to the bit."""
    shards: Positive = 8
    """With `exact`: into how many parts each batch is cut; a power of two, at least the number of processes."""
    shard_processes: Positive = 1
    """How many processes share one copy of weights, gradients and optimizer state (FSDP2); 1: each holds a whole
    copy (data parallel), all of them: fully sharded, fewer: hybrid. Where fewer are started, all of them share."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long a process waits for the others before it stops."""
    document_mask: bool = True
    """Whether the documents packed into one row are hidden from each other."""
    recompute: Recompute = "none"
    """Activation checkpointing: "full" keeps each layer's input only and computes the rest again in the backward pass,
    "selective" computes everything but the projections again."""
    activation_gb: Annotated[float, Field(gt=0)] | None = None
    """In place of `recompute`: what layers may keep for the backward pass, in units of 1e9 bytes; as few layers as
    possible compute again, the cheapest ones."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether layers go through torch.compile; `auto`: on CUDA, where Triton is installed."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-4
    recheck_every: Count = 0
    """Compute the gradients of the steps that are multiples of this twice, and stop if they differ; 0: never."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What to do with an update whose loss or gradient is not finite."""
    max_skips: Positive = 5
    """Stop when this many updates in a row were skipped."""
    on_spike: Literal["warn", "skip"] = "warn"
    """What to do with an update whose loss is far above the recent ones."""
    spike_sigmas: Annotated[float, Field(gt=0)] = 6.0
    """A spike is this many standard deviations above the mean of the last 64 losses."""

    @model_validator(mode="after")
    def _micro_rows_divide(self) -> Self:
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"micro_rows {self.micro_rows} must divide rows {self.rows}")
        if self.numerics == "exact" and (self.shards & (self.shards - 1) or self.rows % self.shards):
            raise ValueError(f"shards {self.shards} must be a power of two that divides rows {self.rows}")
        if self.numerics == "exact" and self.shard_processes > 1:
            raise ValueError("numerics 'exact' adds up whole gradients: it needs shard_processes 1")
        if self.recheck_every and self.shard_processes > 1:
            raise ValueError("recheck_every compares whole gradients: it needs shard_processes 1")
        if self.precision == "float8" and self.shard_processes > 1:
            raise ValueError("precision 'float8' needs shard_processes 1")
        if self.activation_gb is not None and self.recompute != "none":
            raise ValueError("activation_gb chooses what to compute again: leave recompute at 'none'")
        return self

    def work(self, plan: LayerPlan, processes: int, precision: str, device: str) -> Work:
        """Describe what goes through a model at once in each of some processes, on a "cpu" or another device.

        Raises:
            ConfigError: activation_gb is too little.
        """
        rows = self.rows // (self.shards if self.numerics == "exact" else processes)
        work = Work(
            min(rows, self.micro_rows or rows),
            self.length,
            "fp32" if precision == "fp32" else "bf16",
            "cpu" if device == "cpu" else "gpu",
            self.recompute,
            self.document_mask,
        )
        if self.activation_gb is None:
            return work
        return replace(work, recompute=recompute_within(plan, work, int(self.activation_gb * 1e9)))


class EvaluationConfig(Config):
    """Measurements on held-out text while training goes on."""

    every: Positive = 500
    """Steps between measurements; the last step is always measured."""
    max_bytes: Positive = 65_536
    """Held-out text read each time, the beginnings of its documents."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the model continues each time, to be read by people."""
    sample_tokens: Positive = 80


class RunConfig(Config):
    """A recipe: everything that decides what a run does."""

    model: ModelChoice = ModelChoice()
    tokenizer: TokenizerChoice = TokenizerChoice()
    data: DataConfig
    held_out: tuple[SourceConfig, ...] = ()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _length_fits(self) -> Self:
        if self.train.length > self.model.context:
            raise ValueError(f"train.length {self.train.length} is longer than model.context {self.model.context}")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.optimizer.weights != "fp32" and self.train.precision == "fp32":
            raise ValueError(f"optimizer.weights {self.optimizer.weights!r} needs train.precision 'bf16'")
        if self.optimizer.weights != "fp32" and self.train.shard_processes > 1:
            raise ValueError(f"optimizer.weights {self.optimizer.weights!r} needs train.shard_processes 1")
        return self


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    config: RunConfig
    model_config: ModelConfig
    manifest: Manifest
    held_out: Manifest | None
    tokenizer: Tokenizer
    device: torch.device
    precision: Literal["fp32", "bf16", "float8"]

    @property
    def compiles(self) -> bool:
        """Whether layers go through torch.compile."""
        if self.config.train.compile == "auto":
            return self.device.type == "cuda" and find_spec("triton") is not None
        return self.config.train.compile == "on"

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger.jsonl"


def open_run(folder: Path, config: RunConfig, *, allow_change: Sequence[str] = (), leads: bool = True) -> Run:
    """Create a run folder, or open it again for the same config.

    Args:
        allow_change: dotted names that may differ from the folder's `run.json`, such as `train.steps`.
        leads: whether this process writes the folder; another one has written it otherwise.

    Raises:
        CheckpointError: `run.json` or a list of the data files is damaged.
        ConfigError: the folder belongs to another config; lists what differs.
        DataError: a source or the tokenizer cannot be used.
        DiskError: the folder cannot be written.
    """
    make_folder(folder)
    stored = _read_stored(folder / "run.json")
    known = read_lists(folder, stored, allow_change) if stored else {}
    found = {"data": config.data.open_surveys(known.get("data", ()))}
    if config.held_out:
        found["held_out"] = survey_sources(config.held_out, known=known.get("held_out", ()))
    manifest = manifest_of(found["data"])
    tokenizer = _open_tokenizer(folder / "tokenizer", config, manifest)
    device = choose_device(config.train.device)
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type != "cpu" or cpu_multiplies_bf16() else "fp32"
    if precision == "float8":
        check_float8(device)
    if precision == "fp32" and config.optimizer.weights != "fp32":
        what = f"optimizer.weights {config.optimizer.weights!r}, but precision 'auto' is fp32 on this machine"
        raise ConfigError(what, fix="set train.precision=bf16, which is slow here, or optimizer.weights=fp32")
    run = Run(
        folder=folder,
        config=config,
        model_config=run_model(config, tokenizer),
        manifest=manifest,
        held_out=manifest_of(found["held_out"]) if config.held_out else None,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
    )
    description = describe_run(run)
    changed = stored is None or _check_changes(stored, description, known, found, allow_change, folder / "run.json")
    if leads:
        for key, surveys in found.items():
            if surveys != known.get(key):
                write_manifest_file(folder / LISTS[key], surveys)
        if changed:
            data = json.dumps(description, indent=2, sort_keys=True, allow_nan=False)
            write_atomic(folder / "run.json", f"{data}\n".encode())
    return run


def run_model(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Resolve a recipe's model for the run's tokenizer."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return config.model.config(tokenizer.vocab_size).model_copy(update=ids)


def _open_tokenizer(folder: Path, config: RunConfig, manifest: Manifest) -> Tokenizer:
    if folder.is_dir():
        return load_tokenizer(folder)
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(Path(config.tokenizer.path))
    else:
        documents = read_documents(manifest, on_bad_row=config.data.on_bad_row)
        tokenizer = train_tokenizer((document.text for document in documents), config.tokenizer.vocab_size)
    with publish_folder(folder) as temporary:
        tokenizer.save(temporary)
    return load_tokenizer(folder)


def describe_run(run: Run) -> dict[str, Any]:
    """Return the content of `run.json`: plain data that starts the same run again and says where it ran."""
    plan = run.model_config.plan
    return {
        "config": run.config.model_dump(mode="json"),
        "seed": run.config.train.seed,
        "model": run.model_config.model_dump(mode="json"),
        "parameters": run.model_config.parameters,
        "plan": asdict(plan),
        "uniform_plan": asdict(matched_uniform_plan(plan)),
        "data": run.manifest.summary(),
        "held_out": run.held_out.summary() if run.held_out else None,
        "tokenizer": {"vocab_size": run.tokenizer.vocab_size, "sha256": run.tokenizer.sha256},
        "environment": environment(run.device, run.precision),
        "git_commit": git_commit(),
    }


def _read_stored(path: Path) -> dict[str, Any] | None:
    """Read the `run.json` of an earlier start; None: there was none."""
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        _comparable(stored)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError):
        raise CheckpointError(
            "run.json is damaged", file=path, fix="restore it, or train into another folder"
        ) from None
    return stored


def _check_changes(
    stored: Mapping[str, Any],
    description: Mapping[str, Any],
    known: Lists,
    found: Lists,
    allow_change: Sequence[str],
    path: Path,
) -> bool:
    """Tell whether anything changed since an earlier start; names the file where the data did.

    Raises:
        ConfigError: what is not allowed to.
    """
    changes = list(_differences(_comparable(stored), _comparable(description)))
    refused = [
        change
        for change in changes
        if not any(change[0] == name or change[0].startswith(f"{name}.") for name in allow_change)
    ]
    if refused:
        listing = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in refused[:8])
        for key in LISTS:
            if key in known and key in found and f"{key}_sha256" in {name for name, _, _ in refused}:
                listing += f"; {first_difference(manifest_of(known[key]), manifest_of(found[key]))}"
        raise ConfigError(
            f"this folder holds a run with other settings ({listing})",
            file=path,
            fix=f"choose another --out, or allow it with --allow-change {refused[0][0]}",
        )
    return bool(changes)


def _comparable(description: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what must not change between the starts of one run, under the names a recipe uses."""
    environment = {key: description["environment"].get(key) for key in COMPARED}
    return {
        **RunConfig.parse(description["config"]).model_dump(mode="json"),
        "environment": environment,
        "data_sha256": description["data"]["sha256"],
        "held_out_sha256": description["held_out"] and description["held_out"]["sha256"],
        "tokenizer_sha256": description["tokenizer"]["sha256"],
    }


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
