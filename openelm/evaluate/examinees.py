"""Models by their folder: ours, or any causal one of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openelm.errors import ConfigError, DataError
from openelm.evaluate.foreign import TransformersScores
from openelm.evaluate.harness import Encodes, Progress, Writes, Writing
from openelm.evaluate.trees import OurScores, Scores
from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file
from openelm.generate.engine import Engine
from openelm.generate.request import Generation
from openelm.generate.sampling import SamplingConfig
from openelm.kernels.native import kernels_name
from openelm.model.packed import load_packed
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer, load_tokenizer

_SLOTS = 8
_LARGE_BYTES = 256 << 20


@dataclass(frozen=True)
class Candidate:
    """A model that can be examined.

    Attributes:
        sha256: of the files that decide what it answers.
        numerics: what computes it, which decides the last digits.
        writes: None where only likelihoods are known.
    """

    name: str
    sha256: str
    numerics: str
    scores: Scores
    tokenizer: Encodes
    writes: Writes | None


def open_candidate(
    folder: Path, device: torch.device | str = "cpu", progress: Progress = lambda what, done, total: None
) -> Candidate:
    """Open a model folder with its tokenizer.

    Args:
        progress: told of the bytes that are hashed where a file is large.

    Raises:
        ConfigError: transformers is needed and not installed.
        CheckpointError, DataError: the folder cannot be used.
    """
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except FileNotFoundError:
        raise DataError(
            "no config.json is there", fix="give a model folder, ours or of transformers", file=folder
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"config.json cannot be read: {error}", fix="write the folder again", file=folder) from None
    sha256 = _sha256(folder, progress)
    if kind == "openelm":
        model, tokenizer = load_packed(folder, device=device), load_tokenizer(folder)
        scores = OurScores(model, tokenizer.vocab_size)
        numerics = f"{torch.device(device).type} {model.transformer.norm.weight.dtype} {kernels_name()}"
        writes = EngineWrites(model, tokenizer)
        return Candidate(str(folder), sha256, numerics, scores, OurTokenizer(tokenizer), writes)
    return _foreign(folder, sha256, device)


def _foreign(folder: Path, sha256: str, device: torch.device | str) -> Candidate:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ConfigError(
            "this is no OpenELM folder, and transformers is not installed", fix="pip install 'openelm-framework[hf]'"
        ) from None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"transformers cannot open it: {first}", fix="give a folder it opens", file=folder) from error
    numerics = f"{torch.device(device).type} {model.dtype} transformers"
    scores = TransformersScores(model)
    return Candidate(str(folder), sha256, numerics, scores, TransformersTokenizer(tokenizer), None)


def _sha256(folder: Path, progress: Progress) -> str:
    """Hash all files that may decide what a model answers: weights of any format, settings, tokenizers, code."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in (".md", ".html"))
    sizes = [file.stat().st_size for file in files]
    done, large = 0, max(sizes, default=0) > _LARGE_BYTES

    def read(count: int) -> None:
        nonlocal done
        done += count
        if large:
            progress("bytes hashed", done, sum(sizes))

    return sha256_bytes(canonical_json([[file.name, sha256_file(file, read)] for file in files]))


class OurTokenizer:
    """A tokenizer of ours; texts start with BOS where it puts one, as the paper's harness had it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def start_id(self) -> int:
        """BOS, or EOS where there is none."""
        found = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        if found is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS", fix="use a tokenizer with one of them")
        return found

    def encode(self, text: str, *, starts: bool) -> list[int]:
        """Encode a text."""
        return [*(self._tokenizer.start_ids if starts else []), *self._tokenizer.encode(text)]


class TransformersTokenizer:
    """A tokenizer of transformers, with the beginning that it gives texts by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def start_id(self) -> int:
        """BOS, or EOS where there is none."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        return int(eos if bos is None else bos)

    def encode(self, text: str, *, starts: bool) -> list[int]:
        """Encode a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=starts)
        return ids


class EngineWrites:
    """Continues several texts at a time in an engine."""

    def __init__(self, model: OpenELM, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer

    def __call__(self, writings: Sequence[Writing]) -> Iterator[str]:
        """Continue texts greedily; they come in order."""
        length = max((len(writing.ids) + writing.most_tokens for writing in writings), default=1)
        engine = Engine(self._model, self._tokenizer, slots=_SLOTS, length=length)
        for start in range(0, len(writings), _SLOTS):
            yield from self._together(engine, writings[start : start + _SLOTS])

    def _together(self, engine: Engine, writings: Sequence[Writing]) -> list[str]:
        generations = list[Generation]()
        for writing in writings:
            config = SamplingConfig(temperature=0, max_tokens=writing.most_tokens, stop=writing.until)
            generations.append(engine.submit(writing.ids, config))
        while engine.step():
            pass
        for generation in generations:
            if generation.error is not None:
                raise generation.error
        return ["".join(token.text for token in generation.take()) for generation in generations]
