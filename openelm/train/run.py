"""A run: its resolved config, its folder, and everything a stranger needs to start the same run again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from openelm.adapters.config import AdapterConfig
from openelm.config import Config
from openelm.data.manifest import Manifest, SourceConfig
from openelm.data.manifest_file import manifest_of, survey_sources, write_manifest_file
from openelm.data.reading import read_documents
from openelm.data.stream import DataConfig
from openelm.errors import CheckpointError, ConfigError
from openelm.files.atomic import make_folder, write_atomic
from openelm.files.published import publish_folder
from openelm.kernels.precision import cpu_multiplies_bf16
from openelm.model.config import ModelConfig
from openelm.model.device import choose_device
from openelm.model.float8 import check_float8
from openelm.model.plan import matched_uniform_plan
from openelm.model.sizes import ModelChoice
from openelm.optim.config import OptimizerConfig
from openelm.optim.schedule import ScheduleConfig
from openelm.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from openelm.train.checkpoint import CheckpointConfig
from openelm.train.data_lists import LISTS, Lists, first_difference, read_lists
from openelm.train.environment import COMPARED, environment, git_commit
from openelm.train.settings import EvaluationConfig, TrainConfig
from openelm.train.tuning import TuneConfig, base_sha256


class TokenizerChoice(Config):
    """An existing tokenizer, or one trained on the run's own text."""

    path: str | None = None
    """A SentencePiece `.model`, a `tokenizer.json`, or a folder with one."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    """Pieces of the tokenizer to train when no path is given."""


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
    tune: TuneConfig | None = None
    adapter: AdapterConfig | None = None
    """With `tune`: leave the base as it is, and train small matrices beside its own."""

    @model_validator(mode="before")
    @classmethod
    def _examples_are_whole_rows(cls, values: Any) -> Any:
        """Let the sources of examples need no text column, unless they name one."""
        if isinstance(values, Mapping) and isinstance(tune := values.get("tune"), Mapping):
            data, kept = values.get("data"), tune.get("held_out", ())
            values = {**values, "tune": {**tune, "held_out": _whole_rows(kept)}}
            if isinstance(data, Mapping) and "sources" in data:
                values["data"] = {**data, "sources": _whole_rows(data["sources"])}
        return values

    @model_validator(mode="after")
    def _adapter_fits(self) -> Self:
        if self.adapter is None:
            return self
        if self.tune is None:
            raise ValueError("an adapter needs a trained model to adapt: give [tune] with a base")
        if self.train.shard_processes > 1 or self.train.precision == "float8":
            raise ValueError("an adapter needs train.shard_processes 1 and a train.precision other than 'float8'")
        if self.optimizer.weights != "fp32" or self.optimizer.kind != "adamw":
            raise ValueError("an adapter's matrices are trained in fp32 with AdamW: leave both at their defaults")
        return self

    @model_validator(mode="after")
    def _examples_are_taken_as_they_are(self) -> Self:
        """Refuse settings of text that tuning has no use for, and that would be missed in silence."""
        if self.tune is None:
            return self
        if not self.train.document_mask:
            raise ValueError("examples in a row must not see each other: leave train.document_mask at true")
        weighted = any(source.weight != 1 for source in self.data.sources) or self.data.weights
        unused = {
            "exclude_documents": self.data.exclude_documents,
            "weights": weighted,
            "packing": self.data.packing != "documents",
        }
        if found := [f"data.{name}" for name, is_set in unused.items() if is_set]:
            raise ValueError(f"{', '.join(found)}: not for examples, which are learned one as often as another")
        return self

    @model_validator(mode="after")
    def _length_fits(self) -> Self:
        if self.tune is None and self.train.length > self.model.context:
            raise ValueError(f"train.length {self.train.length} is longer than model.context {self.model.context}")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.optimizer.weights != "fp32" and self.train.precision == "fp32":
            raise ValueError(f"optimizer.weights {self.optimizer.weights!r} needs train.precision 'bf16'")
        if self.optimizer.weights != "fp32" and self.train.shard_processes > 1:
            raise ValueError(f"optimizer.weights {self.optimizer.weights!r} needs train.shard_processes 1")
        return self


def _whole_rows(sources: Any) -> Any:
    if not isinstance(sources, list | tuple):
        return sources  # the field's validator says what is wrong
    return [{"text_key": "", **source} if isinstance(source, Mapping) else source for source in sources]


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
    held_out_examples: Manifest | None = None
    base_sha256: str | None = None

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
    if config.tune and config.tune.held_out:
        known_examples = known.get("held_out_examples", ())
        found["held_out_examples"] = survey_sources(config.tune.held_out, known=known_examples)
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
        held_out_examples=manifest_of(found["held_out_examples"]) if "held_out_examples" in found else None,
        base_sha256=base_sha256(Path(config.tune.base)) if config.tune else None,
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
    """Resolve a recipe's model for the run's tokenizer: the base, where there is one.

    Raises:
        CheckpointError: the base is no model folder.
        ConfigError: `train.length` is longer than its context.
    """
    if config.tune is not None:
        base = ModelConfig.from_file(Path(config.tune.base) / "config.json")
        if config.train.length > base.max_context_length:
            what = f"train.length {config.train.length} is longer than the base's context"
            raise ConfigError(what, fix=f"set it to {base.max_context_length} or less")
        return base
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return config.model.config(tokenizer.vocab_size).model_copy(update=ids)


def _open_tokenizer(folder: Path, config: RunConfig, manifest: Manifest) -> Tokenizer:
    if folder.is_dir():
        return load_tokenizer(folder)
    path = config.tokenizer.path or (config.tune.base if config.tune else None)
    if path is not None:
        tokenizer = load_tokenizer(Path(path))
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
        "held_out_examples": run.held_out_examples.summary() if run.held_out_examples else None,
        "base_sha256": run.base_sha256,
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
        "held_out_examples_sha256": (description.get("held_out_examples") or {}).get("sha256"),
        "base_sha256": description.get("base_sha256"),
        "tokenizer_sha256": description["tokenizer"]["sha256"],
    }


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
