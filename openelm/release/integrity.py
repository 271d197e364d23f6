"""Level 0: do the files of a publication hold together? Needs neither its data nor its numerics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openelm.adapters.adapter import add_adapter, published_name
from openelm.adapters.description import CONFIG, WEIGHTS
from openelm.errors import VerificationError
from openelm.files.published import MANIFEST, verify_folder
from openelm.model.config import ModelConfig
from openelm.model.folder import ORIGIN, load_model, read_tensors, weights_sha256
from openelm.model.plan import matched_uniform_plan
from openelm.model.transformer import OpenELM
from openelm.model.weights import weight_files
from openelm.optim.optimizer import Optimizer
from openelm.release.card import contradicts
from openelm.release.findings import Findings
from openelm.release.history import check_history
from openelm.release.publication import Origin, Publication, Saved, SavedState, parse, plain, read_json
from openelm.text.tokenizer import Tokenizer, load_tokenizer
from openelm.train.average import mean_of_checkpoints
from openelm.train.checkpoint import STATE, load_checkpoint
from openelm.train.data_lists import LISTS

_READ = frozenset(
    {"run.json", "ledger.jsonl", "tokenizer", "checkpoints", "model", "adapter", "eval", "result.json", ".lock"}
    | {*LISTS.values()}
)
_NOT_READ = {
    "report.html": "made from the ledger",
    "tensorboard": "made from the ledger",
    "ledger.torn": "the rest of a line that a crash cut short",
    "text": "compared from level 2 on, where run.json names it",
    "reference.safetensors": "not read: the base rates the pairs again when updates are repeated",
    "reference-held-out.safetensors": "not read: the base rates the pairs again when updates are repeated",
    "uniform": "a run of its own: verify it apart",
}


def check_integrity(publication: Publication, findings: Findings) -> Tokenizer:
    """Do every check of level 0; returns the run's tokenizer.

    Raises:
        VerificationError: the first thing that does not fit.
    """
    findings.run("files of its own", lambda: _files(publication))
    findings.run("ledger: order of its lines", lambda: _history(publication, findings))
    tokenizers: list[Tokenizer] = []
    findings.run("tokenizer", lambda: _tokenizer(publication, tokenizers, findings))
    findings.run("run.json and the ledger", lambda: _settings(publication, tokenizers[0], findings))
    findings.run("checkpoints", lambda: _checkpoints(publication, findings))
    if publication.config.adapter is not None:
        if (publication.folder / "adapter").exists():
            findings.run("published adapter", lambda: _adapter(publication, findings))
        else:
            findings.skip("published adapter", "the run has none")
            _last_line(publication, None, findings)
        if (publication.folder / "model").exists():
            findings.skip("model", "the run publishes an adapter; what it was merged into is no part of it")
    elif (publication.folder / "model").exists():
        findings.run("published model", lambda: _model(publication, tokenizers[0], findings))
    else:
        findings.skip("published model", "the run has no model folder")
        _last_line(publication, None, findings)
    if (publication.folder / "result.json").exists():
        findings.run("result.json", lambda: _result(publication, findings))
    findings.skip("speeds, times and MFU", "they are claims about a machine, not about the model")
    for path in sorted(publication.folder.iterdir()):
        if path.name not in _READ:
            findings.skip(path.name, _NOT_READ.get(path.name, "no part of a run that is known here"))
    return tokenizers[0]


def _files(publication: Publication) -> str:
    return f"{len([plain(path) for path in publication.folder.iterdir()])} files and folders, none of them a link"


def _history(publication: Publication, findings: Findings) -> str:
    for note in check_history(publication):
        findings.skip(*note.split(": ", 1))
    rewinds = sum(line.event == "rewind" for line in publication.lines)
    return f"{len(publication.lines):,} chained lines, {len(publication.steps):,} steps, {rewinds} rewinds"


def _name_extras(folder: Path, findings: Findings) -> None:
    """Name the files of a verified folder that its manifest does not list."""
    listed = read_json(folder / MANIFEST)["files"]
    for extra in sorted({file.name for file in folder.iterdir()} - {*listed, MANIFEST}):
        findings.skip(f"{folder.name}/{extra}", "the folder's manifest does not list it")


def _tokenizer(publication: Publication, found: list[Tokenizer], findings: Findings) -> str:
    folder = plain(publication.folder / "tokenizer")
    verify_folder(folder)
    _name_extras(folder, findings)
    found.append(load_tokenizer(folder))
    facts = publication.description.tokenizer
    expect("tokenizer", facts.sha256, found[0].sha256, folder)
    expect("vocabulary", facts.vocab_size, found[0].vocab_size, folder)
    return f"SHA-256 {facts.sha256[:12]}…"


def expect(name: str, recorded: object, found: object, file: Path) -> None:
    """Compare a recorded value with the one found.

    Raises:
        VerificationError: they differ.
    """
    if recorded != found:
        raise VerificationError(f"{name} is {found!r}, recorded is {recorded!r}", file=file)


def _settings(publication: Publication, tokenizer: Tokenizer, findings: Findings) -> str:
    described, config = publication.description, publication.config
    path = publication.folder / "run.json"
    model = publication.model_config(tokenizer)
    derived: dict[str, Any] = {
        "seed": config.train.seed,
        "model": model.model_dump(mode="json"),
        "parameters": model.parameters,
        "plan": _plain(asdict(model.plan)),
        "uniform_plan": _plain(asdict(matched_uniform_plan(model.plan))),
    }
    for name, value in derived.items():
        expect(name, _plain(getattr(described, name)), _plain(value), path)
    if config.tune is not None:
        findings.skip("the base model", "its config is taken as recorded here; its hash is compared from level 1 on")
    expect("whether there is held-out text", bool(config.held_out), publication.held_out is not None, path)
    facts = {
        "data_sha256": publication.data.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "parameters": model.parameters,
    }
    for start in publication.starts:
        for name, value in facts.items():
            expect(f"{name} of the {start.event} at step {start.step}", getattr(start, name), value, publication.ledger)
    expect("config_sha256", publication.starts[-1].config_sha256, publication.config_sha256, path)
    others = [step for step in publication.start_of if not publication.same_settings(step)]
    if others:
        findings.skip(
            f"updates {others[0]} to {others[-1]}",
            "made before the settings changed, and the publication does not hold the old ones",
        )
        findings.weaken("settings changed on the way")
    return f"settings, plan, data and {model.parameters:,} parameters; {len(publication.starts)} starts"


def _plain(value: object) -> object:
    """Bring tuples to lists, so that what JSON holds can be compared."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _checkpoints(publication: Publication, findings: Findings) -> str:
    folder = plain(publication.folder / "checkpoints")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    optimizer = expected_optimizer(publication)
    known = {publication.checkpoint(step).name: step for step in publication.checkpoints}
    for path in found:
        plain(path)
        if path.name in known:
            _checkpoint(publication, known[path.name], optimizer, findings)
        elif path.name.startswith("step-"):
            raise VerificationError("the ledger knows no checkpoint of this step", file=path)
        else:
            findings.skip(f"checkpoints/{path.name}", "not a checkpoint")
    thinned = sorted(publication.saved.keys() - set(publication.checkpoints))
    if thinned:
        findings.skip(
            f"{len(thinned)} checkpoints between steps {thinned[0]} and {thinned[-1]}",
            "not there any more; their hashes are compared when their steps are replayed",
        )
    return f"{len(publication.checkpoints)} of {len(publication.saved)} recorded ones are there, whole and as recorded"


def expected_optimizer(publication: Publication) -> Optimizer:
    """Make the run's optimizer without memory: its tensors' names, shapes and dtypes are those of a checkpoint."""
    with torch.device("meta"):
        model = OpenELM(ModelConfig.parse(publication.description.model))
        if publication.config.adapter is not None:
            add_adapter(model, publication.config.adapter, seed=0)
    return Optimizer(publication.config.optimizer, model)


def _checkpoint(publication: Publication, step: int, optimizer: Optimizer, findings: Findings) -> None:
    path = publication.checkpoint(step)
    checkpoint = load_checkpoint(publication.folder, step)
    manifest, weights, moments = checkpoint.manifest_sha256, checkpoint.weights, checkpoint.optimizer
    _name_extras(path, findings)
    state = parse(SavedState, read_json(path / STATE), path / STATE)
    expect("step", step, state.step, path / STATE)
    for what, tensors, wanted in (("model", weights, optimizer.weights()), ("optimizer", moments, optimizer.state())):
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            odd = sorted(found.items() ^ shapes.items())[0][0]
            raise VerificationError(f"the {what}'s tensor {odd!r} does not fit the run's model", file=path)
        for name, tensor in tensors.items():
            expect(f"dtype of {name}", str(tensor.dtype), str(wanted[name].dtype), path)
    saved = publication.saved.get(step)
    if saved is None:
        _unrecorded(publication, step, manifest, state, findings)
        return
    expect("manifest_sha256", saved.manifest_sha256, manifest, path / MANIFEST)
    _ledger_head(publication, saved, state, path)
    for name, recorded, tensors in (
        ("weights_sha256", saved.weights_sha256, weights),
        ("optimizer_sha256", saved.optimizer_sha256, moments),
    ):
        expect(name, recorded, weights_sha256(tensors), path)


def _ledger_head(publication: Publication, saved: Saved, state: SavedState, path: Path) -> None:
    """Compare a checkpoint's ledger head: the line before its own, or one of its step where saving took longer.

    Saving took longer for the checkpoint before it too, whose line may stand behind those of this step.
    """
    if not publication.background:
        return expect("ledger_head", saved.raw["prev"], state.ledger_head, path / STATE)
    at = publication.hashes.index(state.ledger_head) if state.ledger_head in publication.hashes else -1
    while at >= 0 and isinstance(publication.lines[at], Saved):
        at -= 1
    if at < 0 or publication.lines[at].step != saved.step:
        raise VerificationError(f"ledger_head is no line of step {saved.step}", file=path / STATE)


def _unrecorded(publication: Publication, step: int, manifest: str, state: SavedState, findings: Findings) -> None:
    """Check a checkpoint whose line a kill prevented: a resume names it, or the run ended there."""
    path = publication.checkpoint(step)
    resumes = [line for line in publication.valid if line.event == "resume" and line.step == step]
    if state.ledger_head not in publication.hashes:
        raise VerificationError("ledger_head is no line of the ledger", file=path / STATE)
    for line in resumes:
        expect("manifest_sha256", line.raw["manifest_sha256"], manifest, path / MANIFEST)
    if not resumes:
        if step != len(publication.steps) and not publication.background:
            raise VerificationError("the ledger knows no checkpoint of this step", file=path)
        findings.skip(f"the hash of {path.name}", "the run was killed before it recorded it; a replay compares it")


def _model(publication: Publication, tokenizer: Tokenizer, findings: Findings) -> str:
    folder = plain(publication.folder / "model")
    verify_folder(folder, names=("config.json", *weight_files(folder), ORIGIN))
    _name_extras(folder, findings)
    model = load_model(folder)
    found = _plain(model.config.model_dump(mode="json"))
    expect("config.json", _plain(publication.description.model), found, folder / "config.json")
    expect("tokenizer", tokenizer.sha256, load_tokenizer(folder).sha256, folder)
    return _compare_with_mean(publication, folder, model.state_dict(), weight_files(folder)[0], findings)


def _adapter(publication: Publication, findings: Findings) -> str:
    folder = plain(publication.folder / "adapter")
    verify_folder(folder, names=(CONFIG, WEIGHTS, ORIGIN))
    _name_extras(folder, findings)
    return _compare_with_mean(publication, folder, read_tensors(folder / WEIGHTS), WEIGHTS, findings)


def _compare_with_mean(
    publication: Publication, folder: Path, tensors: Mapping[str, Tensor], file: str, findings: Findings
) -> str:
    """Compare a published folder with the mean of the checkpoints that it names; an adapter's names are peft's."""
    origin = parse(Origin, read_json(folder / ORIGIN), folder / ORIGIN)
    _last_line(publication, origin.ledger_head, findings)
    steps = origin.averaged_steps
    if unknown := [step for step in steps if step not in publication.saved and step not in publication.checkpoints]:
        raise VerificationError(f"step {unknown[0]} has no checkpoint", file=folder / ORIGIN)
    listing, card = ", ".join(map(str, steps)), folder / "README.md"
    if card.is_file() and contradicts(plain(card).read_text("utf-8", errors="replace"), steps):
        raise VerificationError(f"the card does not say that steps {listing} were averaged", file=card)
    if gone := [step for step in steps if step not in publication.checkpoints]:
        findings.skip("published weights", f"they are said to be a mean, and step {gone[0]} is not there any more")
        findings.weaken("published weights not compared")
        return "whole; its weights were not compared"
    mean = mean_of_checkpoints(publication.folder, steps)
    if publication.config.adapter is not None:
        mean = {published_name(name): value for name, value in mean.items()}
    compare_tensors("the mean", mean, tensors, folder / file)
    return f"bitwise the mean of the checkpoints of steps {listing}, as it says"


def _last_line(publication: Publication, head: str | None, findings: Findings) -> None:
    """Find the line that was the ledger's last one when the model was averaged; the chain covers the lines before."""
    if head is not None and head not in publication.hashes:
        raise VerificationError(
            "its last lines were changed or removed: none has the hash that the published model holds",
            file=publication.ledger,
        )
    if head != publication.hashes[-1]:
        findings.skip("the last line of the ledger", "nothing that was published later holds its hash")


def compare_tensors(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Compare tensors bit by bit.

    Raises:
        VerificationError: names the first tensor that differs, and by how much.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found:
            raise VerificationError(f"tensor {name} is only in one of the published and {what}", file=file)
        mine, theirs = expected[name].detach().cpu(), found[name].detach().cpu()
        if weights_sha256({name: mine}) != weights_sha256({name: theirs}):
            same = mine.shape == theirs.shape
            by = f", by up to {(mine.double() - theirs.double()).abs().max().item():.3g}" if same else " in shape"
            raise VerificationError(f"tensor {name} differs from {what}{by}", file=file)


def _result(publication: Publication, findings: Findings) -> str:
    path = publication.folder / "result.json"
    result = read_json(path)
    if not isinstance(result, dict):
        raise VerificationError("not a JSON object", file=path)
    expect("parameters", result.get("parameters"), publication.description.parameters, path)
    expect("seed", result.get("seed"), publication.description.seed, path)
    expect("precision", result.get("precision"), publication.starts[-1].environment.get("precision"), path)
    if not (publication.folder / "model").exists():
        findings.skip("result.json: final_weights_sha256", "the run has no model folder")
        return "parameters, seed and precision"
    digest = weights_sha256(load_model(publication.folder / "model").state_dict())
    expect("final_weights_sha256", result.get("final_weights_sha256"), digest, path)
    return "parameters, seed, precision and final_weights_sha256"
