"""Small runs to publish, and the tools of a careful forger."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from openelm.cli.train import publish_average
from openelm.config import apply_overrides
from openelm.files.atomic import make_folder
from openelm.files.hashes import canonical_json, sha256_bytes
from openelm.files.locks import folder_lock
from openelm.files.published import write_manifest
from openelm.model.folder import load_model, read_tensors, weights_sha256, write_json
from openelm.release.findings import Findings
from openelm.release.probes import final_score, probes
from openelm.release.verify import verify_run
from openelm.train.checkpoint import checkpoint_folder
from openelm.train.loop import train
from openelm.train.objectives import NextToken
from openelm.train.run import RunConfig, open_run
from openelm.train.work import Work

from ..conftest import tiny_recipe

WORDS = ["the", "old", "red", "cat", "dog", "king", "river", "house", "storm", "sees", "finds", "and", "it", "of"]
Events = list[dict[str, Any]]


def text_of(seed: int, words: int) -> str:
    """Text of few words, so that a tiny model has something to learn."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def write_corpus(path: Path, first: int, documents: int) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text_of(seed, 20 + seed % 40)}) + "\n" for seed in range(first, first + documents))
    )
    return path


class Interrupted(Exception):
    """What pulls the plug."""


class Workshop:
    """Makes honest runs of 12 steps, and alters copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = write_corpus(folder / "text.jsonl", 0, 50)
        self.held_out = write_corpus(folder / "held-out.jsonl", 1000, 4)

    def config(self, *overrides: str) -> RunConfig:
        recipe = {
            **tiny_recipe(self.text),
            "tokenizer": {"vocab_size": 290},
            "held_out": [{"name": "other", "paths": [str(self.held_out)]}],
            "schedule": {"peak": 0.01, "warmup_steps": 2},
            "evaluation": {"every": 6, "max_bytes": 64, "prompts": ["the"], "sample_tokens": 2},
        }
        return RunConfig.parse(apply_overrides(recipe, overrides))

    def train(
        self,
        folder: Path,
        *overrides: str,
        stop_at: Callable[[Mapping[str, Any]], bool] = lambda event: False,
        wrap: Callable[[Any], Any] = lambda stream: stream,
        allow_change: Sequence[str] = (),
    ) -> bool:
        """Start a run, or go on with it; `stop_at` pulls the plug at an event. Tells whether it went on to its end."""

        def observe(event: Mapping[str, Any]) -> None:
            if stop_at(event):
                raise Interrupted

        make_folder(folder)
        with folder_lock(folder), contextlib.ExitStack() as opened:
            run = open_run(folder, self.config(*overrides), allow_change=allow_change)
            settings = run.config.train

            def open_batches(cursors: list[dict[str, Any]] | None) -> Any:
                return wrap(opened.enter_context(Work(run).open_batches(cursors)))

            try:
                train(
                    run,
                    open_batches=open_batches,
                    objective=NextToken(settings.z_loss),
                    probes=probes(run),
                    observers=(observe,),
                )
            except Interrupted:
                return False
            return True

    def publish(self, folder: Path, last: int = 3) -> None:
        """Average the last checkpoints, score the mean, and write what the demo writes."""
        publish_average(folder, last, folder / "model")
        run = open_run(folder, RunConfig.parse(json.loads((folder / "run.json").read_bytes())["config"]))
        model = load_model(folder / "model")
        assert run.held_out is not None
        score = final_score(model, run.tokenizer, run.held_out)
        make_folder(folder / "eval")
        write_json(folder / "eval" / "final.json", {"bits_per_byte": score.to_json(), "baselines": []})
        result = {
            "parameters": run.model_config.parameters,
            "seed": run.config.train.seed,
            "precision": run.precision,
            "held_out_bits_per_byte": {"value": score.value, "documents": score.documents},
            "final_weights_sha256": weights_sha256(model.state_dict()),
        }
        write_json(folder / "result.json", result)

    def verify(self, folder: Path, level: int, **options: Any) -> Findings:
        return verify_run(folder, level=level, **{"segments": 0, "seed": 0, **options})


def assert_caught(workshop: Any, folder: Path, level: int, *words: str) -> None:
    """The forgery passes every check below a level, and fails at it with these words."""
    findings = workshop.verify(folder, level, segments=99)
    assert (findings.verdict, findings.level) == ("failed", level)
    message = str(findings.difference)
    assert findings.difference.exit_code == 7
    assert all(word in message for word in words), message


def read_lines(folder: Path) -> Events:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def write_lines(folder: Path, events: Events) -> None:
    """Write lines as they are, whatever they say about the lines before them."""
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def rechain(folder: Path, edit: Callable[[Events], Events] = lambda events: events) -> None:
    """Edit the ledger and make every hash fit again: chain, heads in checkpoints and model, manifests, tensors."""
    events, head = edit(read_lines(folder)), "0" * 64
    last_of = {event["step"]: index for index, event in enumerate(events) if event["event"] == "checkpoint"}
    config = json.loads((folder / "run.json").read_bytes())["config"]
    lines = []
    for index, event in enumerate(events):
        checkpoint = checkpoint_folder(folder, event["step"])
        if event["event"] == "checkpoint" and last_of[event["step"]] == index and checkpoint.exists():
            state = json.loads((checkpoint / "state.json").read_bytes())
            (checkpoint / "state.json").write_text(json.dumps({**state, "ledger_head": head}))
            for file, name in (("model", "weights_sha256"), ("optimizer", "optimizer_sha256")):
                event[name] = weights_sha256(read_tensors(checkpoint / f"{file}.safetensors"))
            event["manifest_sha256"] = write_manifest(checkpoint)
        if event["event"] == "resume" and checkpoint.exists():
            event["manifest_sha256"] = sha256_bytes((checkpoint / "manifest.json").read_bytes())
        if event["event"] in ("start", "resume"):
            event["config_sha256"] = sha256_bytes(canonical_json(config))
        line = json.dumps({**event, "prev": head})
        lines.append(line)
        head = sha256_bytes(line.encode())
    (folder / "ledger.jsonl").write_text("".join(line + "\n" for line in lines))
    if (origin := folder / "model" / "origin.json").exists():
        write_json(origin, {**json.loads(origin.read_bytes()), "ledger_head": head})
        write_manifest(folder / "model")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def honest(workshop: Workshop, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run that nothing happened to. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("honest") / "run"
    workshop.train(folder)
    workshop.publish(folder)
    return folder


@pytest.fixture(scope="module")
def rewound(workshop: Workshop, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run that was killed at step 8 and went back to step 6. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("rewound") / "run"
    workshop.train(folder, stop_at=lambda event: event["event"] == "step" and event["step"] == 8)
    workshop.train(folder)
    workshop.publish(folder)
    return folder


@pytest.fixture
def forged(honest: Path, tmp_path: Path) -> Path:
    """A copy of the honest run, to be altered."""
    return Path(shutil.copytree(honest, tmp_path / "run"))
