"""Read a run folder as it is on disk: finished, stopped, rewound, or only just started."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic

from openelm.data.manifest import Shard
from openelm.data.manifest_file import read_manifest_file
from openelm.errors import CheckpointError, DataError
from openelm.files.hashes import sha256_file
from openelm.train.data_lists import LISTS
from openelm.train.ledger import number, read_ledger, valid_events

Number = Annotated[float, pydantic.BeforeValidator(lambda value: number(value) if isinstance(value, str) else value)]
Finite = Annotated[Number, pydantic.AllowInfNan(False)]


class Part(pydantic.BaseModel):
    """A part of a run folder: unknown keys are ignored, so that newer runs can be read."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore")


class Plan(Part):
    """The widths of each layer, input first."""

    dim: int
    head_dim: int
    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]

    @pydantic.model_validator(mode="after")
    def _same_length(self) -> Plan:
        if not len(self.query_heads) == len(self.kv_heads) == len(self.ffn_dims) > 0:
            raise ValueError("query_heads, kv_heads and ffn_dims must have one entry a layer")
        return self


class Source(Part):
    """A named group of data files."""

    name: str
    files: int = 0
    rows: int = 0
    bytes: int = 0


class Corpus(Part):
    """What was read, and the hash of the list of its files."""

    sources: tuple[Source, ...] = ()
    sha256: str = ""


class TokenizerFile(Part):
    """Which tokenizer was used."""

    vocab_size: int | None = None
    sha256: str = ""


class RunFile(Part):
    """`run.json`."""

    name: str | None = None
    config: dict[str, Any] = {}
    model: dict[str, Any] = {}
    plan: Plan | None = None
    uniform_plan: Plan | None = None
    parameters: int | None = None
    data: Corpus | None = None
    held_out: Corpus | None = None
    held_out_examples: Corpus | None = None
    tokenizer: TokenizerFile | None = None
    environment: dict[str, Any] = {}
    seed: int | None = None
    git_commit: str | None = None


class DocumentScore(Part):
    """The score of one held-out document."""

    name: str
    value: Finite = pydantic.Field(validation_alias=pydantic.AliasChoices("value", "bits_per_byte"))
    bytes: int = 0


class Score(Part):
    """Held-out bits per byte, and its 95 % bootstrap interval where there is enough text for one."""

    value: Finite
    low: Finite | None = None
    high: Finite | None = None
    documents: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    perplexity: Finite | None = None
    interval_over: str = ""
    per_document: tuple[DocumentScore, ...] = ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Baseline(Part):
    """What another way of predicting the same bytes needs."""

    name: str
    bits_per_byte: Finite
    note: str = ""


class Evaluation(Part):
    """One file of `eval/`."""

    bits_per_byte: Score | None = None
    baselines: tuple[Baseline, ...] = ()
    step: int | None = None

    @property
    def best_baseline(self) -> Baseline | None:
        """The baseline that needs the fewest bits."""
        return min(self.baselines, key=lambda baseline: baseline.bits_per_byte, default=None)


class Line(Part):
    """A ledger line that belongs to a step."""

    step: int


class StepLine(Line):
    """One optimizer step; `loss` is in nats per target token, `seconds` is the time of this step alone."""

    tokens: int | None = None
    target_tokens: int | None = None
    target_bytes: int | None = None
    loss: Number
    preference_accuracy: Number | None = None
    gradient_norm: Number | None = None
    learning_rate: Number | None = None
    seconds: Number | None = None
    tokens_per_second: Number | None = None
    mfu: Number | None = None

    @property
    def bits(self) -> float | None:
        """The bits that this step's batch needed: nats per token / ln 2 times its target tokens; pairs need none."""
        return (
            None
            if self.target_tokens is None or self.preference_accuracy is not None
            else self.loss / math.log(2) * self.target_tokens
        )

    @property
    def bits_per_byte(self) -> float | None:
        """The training loss in the unit of the held-out score."""
        return self.bits / self.target_bytes if self.bits is not None and self.target_bytes else None


class HeldOutLine(Line):
    """The held-out score during training."""

    bits_per_byte: Number
    documents: int | None = None


class ExamplesLine(Line):
    """What a tuned model made of held-out examples."""

    examples: int
    loss: Number
    preference_accuracy: Number | None = None


class SuiteTask(Part):
    """A task's result; `values` has a digit for each question."""

    task: str
    metric: str = ""
    n: int | None = None
    value: Number
    values: str | None = pydantic.Field(None, pattern=r"^[01]*$")
    questions_sha256: str = ""


class SuiteLine(Line):
    """Answers to a suite of questions."""

    suite: str
    tasks: tuple[SuiteTask, ...] = ()


class SampleLine(Line):
    """What the model wrote during training."""

    prompt: str = ""
    text: str = ""


class EventLine(Line):
    """Something that happened to the run; `seconds` is what a finished run took, evaluations included."""

    event: str
    step: int = 0
    reason: str = ""
    seconds: Number | None = None


class RewindLine(EventLine):
    """The run went back to step `to`; what it had recorded beyond it is void."""

    to: int


@dataclass(frozen=True)
class Record:
    """A run folder in memory, without the ledger lines that a later rewind made void; all events are there."""

    folder: Path
    run: RunFile = field(default_factory=RunFile)
    steps: list[StepLine] = field(default_factory=list)
    held_out: list[HeldOutLine] = field(default_factory=list)
    examples: list[ExamplesLine] = field(default_factory=list)
    suites: list[SuiteLine] = field(default_factory=list)
    samples: list[SampleLine] = field(default_factory=list)
    events: list[EventLine] = field(default_factory=list)
    void_steps: list[StepLine] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by file name
    result: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, tuple[Shard, ...]]] = field(default_factory=dict)  # by `LISTS` key and source
    hashes: dict[str, str] = field(default_factory=dict)  # by file name

    @property
    def final(self) -> Evaluation | None:
        """`eval/final.json`, when it holds a score."""
        found = self.evaluations.get("final.json")
        return found if found is not None and found.bits_per_byte is not None else None

    @property
    def last_step(self) -> int:
        """The last step that counts; 0 before the first."""
        return self.steps[-1].step if self.steps else 0


KINDS: dict[str, type[Line]] = {
    "step": StepLine,
    "evaluation": HeldOutLine,
    "examples": ExamplesLine,
    "suite": SuiteLine,
    "sample": SampleLine,
    "rewind": RewindLine,
}
PartType = TypeVar("PartType", bound=Part)


def read_run(folder: Path) -> Record:
    """Read a run folder; each file in it may be missing.

    Raises:
        CheckpointError: the folder is missing, or a file in it is not what it should be.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder at {folder}", fix="give the folder that holds run.json")
    ledger = folder / "ledger.jsonl"
    events = read_ledger(ledger)
    lines = [_line(event, ledger, i) for i, event in enumerate(events, start=1)]
    valid = {id(event) for event in valid_events(events)}
    kept = [line for event, line in zip(events, lines, strict=True) if id(event) in valid]
    void = [line for event, line in zip(events, lines, strict=True) if id(event) not in valid]
    result = _json(folder / "result.json")
    return Record(
        folder=folder,
        run=_read(folder / "run.json", RunFile) or RunFile(),
        files={key: _files(folder / name) for key, name in LISTS.items()},
        steps=[line for line in kept if isinstance(line, StepLine)],
        held_out=[line for line in kept if isinstance(line, HeldOutLine)],
        examples=[line for line in kept if isinstance(line, ExamplesLine)],
        suites=[line for line in kept if isinstance(line, SuiteLine)],
        samples=[line for line in kept if isinstance(line, SampleLine)],
        events=[line for line in lines if isinstance(line, EventLine)],
        void_steps=[line for line in void if isinstance(line, StepLine)],
        evaluations={
            path.name: evaluation
            for path in sorted(folder.glob("eval/*.json"))
            if (evaluation := _read(path, Evaluation)) is not None
        },
        result=result if isinstance(result, dict) else {},
        hashes={name: sha256_file(folder / name) for name in ("run.json", "ledger.jsonl") if (folder / name).exists()},
    )


def _files(path: Path) -> dict[str, tuple[Shard, ...]]:
    try:
        surveys = read_manifest_file(path) if path.exists() else ()
        return {survey.source.name: survey.source.shards for survey in surveys}
    except DataError as error:
        raise CheckpointError(error.what, fix=_FIX, file=path) from None


def _line(event: dict[str, Any], path: Path, line: int) -> Line:
    kind = event.get("event")
    if not isinstance(kind, str):
        raise CheckpointError("this line of the ledger has no event", fix=_FIX, file=path, line=line)
    return _validate(KINDS.get(kind, EventLine), event, path, line)


_FIX = "restore the file from a copy, or give another run folder"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", fix=_FIX, file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", fix=_FIX, file=path) from error


def _read(path: Path, kind: type[PartType]) -> PartType | None:
    found = _json(path)
    return None if found is None else _validate(kind, found, path)


def _validate(kind: type[PartType], value: object, path: Path, line: int | None = None) -> PartType:
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise CheckpointError(f"{where}: {first['msg']}", fix=_FIX, file=path, line=line) from error
