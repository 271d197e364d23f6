"""A published run as a stranger reads it: data to be doubted, parsed strictly, never executed, never written to."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from openelm.data.manifest import Manifest
from openelm.data.manifest_file import check_has_text, manifest_of, read_manifest_file
from openelm.errors import DataError, VerificationError
from openelm.files.hashes import canonical_json, sha256_bytes
from openelm.model.config import ModelConfig
from openelm.text.tokenizer import Tokenizer
from openelm.train.checkpoint import checkpoint_folder
from openelm.train.data_lists import LISTS
from openelm.train.ledger import read_lines, valid_events
from openelm.train.run import RunConfig, run_model


def _exact(text: str) -> str:
    if float.fromhex(text).hex() != text:
        raise ValueError("not a number as float.hex writes it")
    return text


_CHECKPOINT_NAME = re.compile(r"step-[0-9]{8,12}")
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex = Annotated[str, pydantic.AfterValidator(_exact)]
Text = Annotated[str, Field(max_length=1 << 20)]


class Strict(pydantic.BaseModel):
    """A part of a publication; keys that nothing here reads are left alone."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class Line(Strict):
    """A ledger line; `raw` is all of it."""

    event: Text
    step: Count
    raw: dict[str, Any] = Field(exclude=True, repr=False)


class Step(Line):
    tokens: Count
    target_tokens: Count
    target_bytes: Count
    loss: Hex
    z_loss: Hex
    gradient_norm: Hex
    learning_rate: Hex
    batch_sha256: Hash


class Objection(Line):
    """`skip`, `spike` or `nonfinite`: written before the `step` of the same update, or instead of it."""

    loss: Hex
    gradient_norm: Hex
    batch_sha256: Hash


class BadRows(Line):
    """Rows of the data that were passed over for an update; written before what else is said of it."""

    count: Count
    rows: tuple[dict[str, Any], ...]


class Evaluation(Line):
    bits_per_byte: Hex
    documents: Count


class Sample(Line):
    prompt: Text
    text: Text
    question: Text | None = None


class HeldOutExamples(Line):
    examples: Count
    loss: Hex
    preference_accuracy: Hex | None = None
    preference_margin: Hex | None = None


class SuiteTask(Strict):
    task: Text
    metric: Text
    shots: Count
    n: Count
    value: Hex
    values: Text | None
    questions_sha256: Hash


class Suite(Line):
    suite: Text
    tasks: tuple[SuiteTask, ...]


class Saved(Line):
    folder: Text
    manifest_sha256: Hash
    weights_sha256: Hash
    optimizer_sha256: Hash


class Start(Line):
    """`start` or `resume`: with what the lines after it were made."""

    config_sha256: Hash
    data_sha256: Hash
    tokenizer_sha256: Hash
    parameters: Count
    processes: Annotated[int, Field(ge=1, strict=True)]
    environment: dict[str, Text]
    manifest_sha256: Hash | None = None


class Rewind(Line):
    to: Count


class Finish(Line):
    dropped: dict[str, dict[str, Count]] = {}


KINDS: dict[str, type[Line]] = {
    "step": Step,
    **dict.fromkeys(("skip", "spike", "nonfinite"), Objection),
    "bad_rows": BadRows,
    "evaluation": Evaluation,
    "sample": Sample,
    "examples": HeldOutExamples,
    "suite": Suite,
    "checkpoint": Saved,
    **dict.fromkeys(("start", "resume"), Start),
    "rewind": Rewind,
    "finish": Finish,
    **dict.fromkeys(("stop", "damage"), Line),
}


class TokenizerFacts(Strict):
    vocab_size: Count
    sha256: Hash


class Description(Strict):
    """`run.json`."""

    config: dict[str, Any]
    seed: Count
    model: dict[str, Any]
    parameters: Count
    plan: dict[str, Any]
    uniform_plan: dict[str, Any]
    data: dict[str, Any]
    held_out: dict[str, Any] | None
    held_out_examples: dict[str, Any] | None = None
    base_sha256: Hash | None = None
    tokenizer: TokenizerFacts


class SavedState(Strict):
    """`state.json` of a checkpoint."""

    step: Count
    tokens: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    skips_in_a_row: Count
    recent_losses: tuple[Hex, ...]
    cursors: tuple[dict[str, Any], ...]
    ledger_head: Hash
    parts: Annotated[int, Field(ge=1)]


def _increasing(steps: tuple[int, ...]) -> tuple[int, ...]:
    if not steps or any(late <= early for early, late in itertools.pairwise(steps)):
        raise ValueError("not steps in increasing order")
    return steps


class Origin(Strict):
    """`origin.json` of the published model."""

    averaged_steps: Annotated[tuple[Count, ...], pydantic.AfterValidator(_increasing)]
    ledger_head: Hash


@dataclass(frozen=True)
class Publication:
    """A run folder whose `run.json` and ledger were read; `valid` is the ledger without what a rewind made void."""

    folder: Path
    description: Description
    config: RunConfig
    lines: tuple[Line, ...]
    hashes: tuple[str, ...]
    valid: tuple[Line, ...]

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The valid steps, in order."""
        return [line for line in self.valid if isinstance(line, Step)]

    @functools.cached_property
    def updates(self) -> dict[int, list[Line]]:
        """What the ledger says about each update: bad rows, objections, and the step unless the run ended there."""
        found: dict[int, list[Line]] = {}
        for line in self.valid:
            if isinstance(line, Step | Objection | BadRows):
                found.setdefault(line.step, []).append(line)
        return found

    @functools.cached_property
    def saved(self) -> dict[int, Saved]:
        """The last valid `checkpoint` line of each step."""
        return {line.step: line for line in self.valid if isinstance(line, Saved)}

    @functools.cached_property
    def starts(self) -> list[Start]:
        """All starts and resumes, the void ones included."""
        return [line for line in self.lines if isinstance(line, Start)]

    @functools.cached_property
    def start_of(self) -> dict[int, Start]:
        """Which start made the valid lines of an update, and those before the first."""
        found: dict[int, Start] = {}
        current = None
        for line in self.valid:
            current = line if isinstance(line, Start) else current
            before_updates = line.step == 0 and isinstance(line, Evaluation | HeldOutExamples | Suite | Sample)
            if (before_updates or isinstance(line, Step | Objection | BadRows)) and current is not None:
                found[line.step] = current
        return found

    @functools.cached_property
    def config_sha256(self) -> str:
        """What `start` and `resume` lines record of the settings in `run.json`, as they are written there."""
        return sha256_bytes(canonical_json(self.description.config))

    @functools.cached_property
    def background(self) -> bool:
        """Whether checkpoints may have been saved in the background: the settings can change on the way."""
        changed = any(start.config_sha256 != self.config_sha256 for start in self.starts)
        return self.config.checkpoints.background or changed

    def same_settings(self, step: int) -> bool:
        """Whether an update was made with the settings in `run.json`."""
        return self.start_of[step].config_sha256 == self.config_sha256

    @functools.cached_property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are still there, and that the history reaches."""
        folder = self.folder / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        steps = sorted(int(name[5:]) for name in names if _CHECKPOINT_NAME.fullmatch(name))
        return [step for step in steps if 0 < step <= len(self.steps) and self.checkpoint(step).name in names]

    def checkpoint(self, step: int) -> Path:
        return checkpoint_folder(self.folder, step)

    @functools.cached_property
    def data(self) -> Manifest:
        """The training files as `data.json` lists them.

        Raises:
            VerificationError: the list is missing, damaged, or not the one that `run.json` speaks of.
        """
        return self._manifest("data", self.description.data)

    @functools.cached_property
    def held_out(self) -> Manifest | None:
        """The held-out files as `held-out.json` lists them, likewise."""
        recorded = self.description.held_out
        return None if recorded is None else self._manifest("held_out", recorded)

    @functools.cached_property
    def held_out_examples(self) -> Manifest | None:
        """The files of held-out examples as `held-out-examples.json` lists them, likewise."""
        recorded = self.description.held_out_examples
        return None if recorded is None else self._manifest("held_out_examples", recorded)

    def model_config(self, tokenizer: Tokenizer) -> ModelConfig:
        """Derive the model from the settings; that of a tuned run is its base's, and taken as it was recorded."""
        if self.config.tune is not None:
            return ModelConfig.parse(self.description.model, file=self.folder / "run.json")
        return run_model(self.config, tokenizer)

    def _manifest(self, key: str, recorded: Mapping[str, Any]) -> Manifest:
        path = self.folder / LISTS[key]
        try:
            surveys = read_manifest_file(plain(path))
            for survey in surveys:
                check_has_text(survey, path)
            manifest = manifest_of(surveys)
        except DataError as error:
            raise VerificationError(error.what, file=path) from None
        if recorded.get("sha256") != manifest.sha256:
            what = f"its files stand for data {manifest.sha256}, but {key}.sha256 is {recorded.get('sha256')!r}"
            raise VerificationError(what, file=path)
        if recorded != manifest.summary():
            what = f"{key} is not the summary of {path.name}"
            raise VerificationError(what, file=self.folder / "run.json")
        return manifest


def read_publication(folder: Path) -> Publication:
    """Read `run.json` and the ledger.

    Raises:
        CheckpointError: the chain is broken.
        VerificationError: a line or setting is not what this framework writes.
    """
    description = parse(Description, read_json(folder / "run.json"), folder / "run.json")
    config = RunConfig.parse(description.config, file=folder / "run.json")
    ledger = plain(folder / "ledger.jsonl")
    raw = list(read_lines(ledger))
    lines = [_line(event, ledger, number) for number, (event, _) in enumerate(raw, start=1)]
    kept = {id(event) for event in valid_events([event for event, _ in raw])}
    return Publication(
        folder=folder,
        description=description,
        config=config,
        lines=tuple(lines),
        hashes=tuple(digest for _, digest in raw),
        valid=tuple(line for line, (event, _) in zip(lines, raw, strict=True) if id(event) in kept),
    )


def _line(event: Mapping[str, Any], path: Path, number: int) -> Line:
    kind = event.get("event")
    return parse(KINDS.get(kind, Line) if isinstance(kind, str) else Line, {**event, "raw": event}, path, number)


PartType = TypeVar("PartType", bound=Strict)


def parse(kind: type[PartType], value: object, path: Path, line: int | None = None) -> PartType:
    """Validate plain data.

    Raises:
        VerificationError: names the first field that is missing or wrong.
    """
    try:
        return kind.model_validate(value)
    except (pydantic.ValidationError, OverflowError) as error:
        first: Any = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": error}
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise VerificationError(f"{where}: {first['msg']}", file=path, line=line) from None


def plain(path: Path) -> Path:
    """Return a path of the publication unless it is a link, which could lead anywhere, or a device or pipe.

    Raises:
        VerificationError: it is one.
    """
    if path.is_symlink():
        raise VerificationError("a link, where a publication has files and folders of its own", file=path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise VerificationError("neither a file nor a folder", file=path)
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file of the publication.

    Raises:
        VerificationError: it is missing, a link or not JSON.
    """
    try:
        return json.loads(plain(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(f"cannot be read as JSON ({type(error).__name__})", file=path) from None
