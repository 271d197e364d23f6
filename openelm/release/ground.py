"""The verifier's own side: its copy of the data, its device, and how its numbers may differ from the publisher's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from openelm.data.manifest import Manifest, SourceConfig, build_manifest
from openelm.data.remote import is_url
from openelm.errors import CheckpointError, DataError, VerificationError
from openelm.model.device import choose_device
from openelm.release.numerics import is_portable, maker
from openelm.release.publication import Publication, Start
from openelm.text.tokenizer import Tokenizer
from openelm.train.data_lists import first_difference
from openelm.train.environment import environment
from openelm.train.run import Run
from openelm.train.tuning import base_sha256
from openelm.train.work import Work

LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-3, 1e-2
"""Relative, where the verifier's numerics differ: per step, and per tensor at the end of a segment (L2 norm)."""
_DECIDES_BITS = ("code", "torch", "machine", "cpu_capability", "kernels", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "precision")
_MOST_THREADS = 256

Replacements = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Ground:
    """What a verifier computes with; `run` has the verifier's paths, and the publication's folder for names only."""

    run: Run
    here: dict[str, str]
    replacements: Replacements

    def differences(self, start: Start) -> list[str]:
        """Say why numbers made since a start may differ here in their last bits; empty: they must be equal."""
        there, settings = start.environment, self.run.config.train
        names = list(_DECIDES_BITS)
        if self.run.device.type != "cpu" or self.run.precision == "bf16":  # bf16 products depend on the CPU's model
            names.append("device")
        found = [
            f"{name}: {there.get(name, 'not set')} there, {self.here.get(name, 'not set')} here"
            for name in names
            if there.get(name) != self.here.get(name)
        ]
        if _kind(there) != self.run.device.type:
            found.append(f"device: {there.get('device')} there, {self.run.device.type} here")
        elif self.run.device.type != "cpu":
            found.append(f"device: {self.run.device.type} adds in no fixed order")
        elif "device" not in names and not is_portable(there) and maker(there["device"]) != maker(self.here["device"]):
            found.append(f"device: {there['device']} there, {self.here['device']} here, without the portable profile")
        if start.processes > 1 and settings.numerics == "fast":
            found.append(f"{start.processes} processes with fast numerics there, 1 here")
        return found

    @functools.cached_property
    def work(self) -> Work:
        """What the run trained with, read in this process; nothing is written."""
        config = self.run.config
        lists = tuple(_moved_path(path, self.replacements) for path in config.data.exclude_documents)
        data = config.data.model_copy(update={"workers": 0, "exclude_documents": lists})
        return Work(dataclasses.replace(self.run, config=config.model_copy(update={"data": data})), keeps=False)


def stand_on(publication: Publication, tokenizer: Tokenizer, replacements: Replacements) -> Ground:
    """Choose the device and precision of the publication's last start, as far as this machine has them."""
    recorded = publication.starts[-1].environment
    kind = _kind(recorded)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = choose_device(kind if available[kind] else "cpu")
    precision: Literal["fp32", "bf16"] = "bf16" if recorded.get("precision") in ("bf16", "float8") else "fp32"
    run = Run(
        folder=publication.folder,
        config=publication.config,
        model_config=publication.model_config(tokenizer),
        manifest=publication.data,
        held_out=None,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
    )
    return Ground(run, environment(device, precision), replacements)


def _kind(recorded: dict[str, str]) -> Literal["cpu", "mps", "cuda"]:
    name = recorded.get("device", "").split(" ")[0]
    return "cpu" if name == "cpu" else "mps" if name == "mps" else "cuda"


def with_held_out(ground: Ground, publication: Publication) -> Ground:
    """Find the held-out text and examples on this disk.

    Raises:
        DataError: it is missing, or not what the run measured on.
    """
    text = examples = None
    if publication.held_out is not None:
        text = _found(publication.held_out, _moved(publication.config.held_out, ground.replacements), "error")
    if publication.held_out_examples is not None and publication.config.tune is not None:
        sources = _moved(publication.config.tune.held_out, ground.replacements)
        examples = _found(publication.held_out_examples, sources, "error")
    run = dataclasses.replace(ground.run, held_out=text, held_out_examples=examples)
    return dataclasses.replace(ground, run=run)


def with_base(ground: Ground, publication: Publication) -> Ground:
    """Find the model that a tuned run began with on this disk.

    Raises:
        DataError: it is missing, or another.
    """
    tune = publication.config.tune
    if tune is None:
        return ground
    base = Path(_moved_path(tune.base, ground.replacements))
    try:
        found = base_sha256(base)
    except CheckpointError as error:
        raise DataError(error.what, fix=_DATA_FIX, file=base, code="E_PATH") from None
    if found != publication.description.base_sha256:
        raise DataError("this is not the model that the run began with", fix=_DATA_FIX, file=base, code="E_CHANGED")
    config = ground.run.config.model_copy(update={"tune": tune.model_copy(update={"base": str(base)})})
    return dataclasses.replace(ground, run=dataclasses.replace(ground.run, config=config, base_sha256=found))


def with_data(ground: Ground, publication: Publication) -> Ground:
    """Find the training text on this disk.

    Raises:
        DataError: it is missing, or not what the run trained on; names the first file that differs.
    """
    data, manifest = publication.config.data, publication.data
    if data.manifest is None:
        manifest = _found(manifest, _moved(data.sources, ground.replacements), data.on_bad_row)
    else:
        manifest = _moved_files(manifest, ground.replacements)
    return dataclasses.replace(ground, run=dataclasses.replace(ground.run, manifest=manifest))


def _moved_files(recorded: Manifest, replacements: Replacements) -> Manifest:
    """Take the files that the run's own manifest names, from where they lie here; each is hashed whole."""
    sources = []
    for source in recorded.sources:
        shards = tuple(
            dataclasses.replace(shard, path=_moved_path(shard.path, replacements)) for shard in source.shards
        )
        sources.append(dataclasses.replace(source, shards=shards))
    manifest = Manifest(tuple(sources))
    try:
        manifest.check_unchanged(whole=True)
    except DataError as error:
        raise DataError(error.what, fix=_DATA_FIX, file=error.file, code=error.code) from None
    return manifest


def _moved(sources: Sequence[SourceConfig], replacements: Replacements) -> list[SourceConfig]:
    return [
        source.model_copy(update={"paths": tuple(_moved_path(path, replacements) for path in source.paths)})
        for source in sources
    ]


def _moved_path(path: str, replacements: Replacements) -> str:
    for old, new in replacements:
        if path.startswith(old):
            return new + path[len(old) :]
    if is_url(path):  # a stranger does not choose whom this machine talks to, with its user's credentials
        raise DataError("the run read this address, which is not asked unless you name it", fix=_DATA_FIX, file=path)
    return path


_DATA_FIX = "give your own copy with --data OLD=NEW, where OLD is how its path begins in run.json or data.json"


def _found(recorded: Manifest, sources: Sequence[SourceConfig], on_bad_row: Literal["error", "skip"]) -> Manifest:
    try:
        manifest = build_manifest(sources, on_bad_row=on_bad_row)
    except DataError as error:
        raise DataError(error.what, fix=_DATA_FIX, file=error.file, line=error.line, code=error.code) from None
    if manifest.sha256 == recorded.sha256:
        return manifest
    what = f"this is not the data of the run: {first_difference(recorded, manifest)}"
    raise DataError(what, fix=_DATA_FIX, file=", ".join(sources[0].paths), code="E_CHANGED")


def use_threads(start: Start) -> None:
    """Compute on as many threads as the publisher did: sums that threads share could depend on it."""
    recorded = start.environment.get("threads", "")
    count = int(recorded) if recorded.isascii() and recorded.isdigit() and len(recorded) < 5 else 0
    if 0 < count <= _MOST_THREADS and count != torch.get_num_threads():
        torch.set_num_threads(count)


def compare_numbers(what: str, recorded: str, found: str, tolerant: bool, file: Path, scale: str | None = None) -> None:
    """Compare two hex numbers: to the bit, or within `LOSS_TOLERANCE` of the recorded one (or of `scale`).

    Raises:
        VerificationError: they differ.
    """
    theirs, mine = float.fromhex(recorded), float.fromhex(found)
    size = abs(float.fromhex(scale) if scale else theirs)
    close = tolerant and (abs(mine - theirs) <= LOSS_TOLERANCE * size or (math.isnan(mine) and math.isnan(theirs)))
    if recorded != found and not close:
        raise VerificationError(f"{what} is {mine:.9g} ({found}), recorded is {theirs:.9g} ({recorded})", file=file)
