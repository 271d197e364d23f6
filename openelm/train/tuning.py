"""What a recipe says about tuning: which model learns from examples, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from openelm.config import Config
from openelm.data.manifest import SourceConfig
from openelm.errors import CheckpointError
from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file
from openelm.model.weights import weight_files
from openelm.train.objectives import PreferenceLoss


class PreferenceConfig(Config):
    """Learn from pairs of answers, a chosen and a rejected one; see `objectives.Preference`."""

    loss: PreferenceLoss = "sigmoid"
    """`sigmoid`: DPO. `hinge`: SLiC and statistical rejection sampling. `ipo`: a squared distance."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much a log-ratio counts: the smaller, the farther the model may go from the one it began as."""


class TuneConfig(Config):
    """Go on from a trained model with examples; `data.sources` says where they are.

    `train.rows` counts examples (pairs, with `preference`), which are packed into rows of at most `train.length`.
    """

    base: str
    """The folder of the model to begin with, which gives its tokenizer too."""
    epochs: PositiveFloat | None = None
    """How often each example is learned, from which `openelm tune` derives `train.steps` where they are not given."""
    preference: PreferenceConfig | None = None
    """Learn which of two answers is better; None: learn to give the answers."""
    learn: Literal["answers", "everything"] = "answers"
    """Which tokens are targets: those of the answers, or prompts and other roles' turns too."""
    prompt_tokens: PositiveInt | None = None
    """With `preference`: longer prompts lose their beginning."""
    on_long: Literal["error", "skip", "cut"] = "skip"
    """What to do with an example that does not fit into `train.length`; what is skipped is counted."""
    held_out: tuple[SourceConfig, ...] = ()
    """Examples not to learn from; how well the model does on them is measured at the start and at every evaluation."""
    held_out_examples: PositiveInt = 256
    """How many of them at most, the first ones."""


def base_sha256(folder: Path) -> str:
    """Hash what a model computes with: its config and weights.

    Raises:
        CheckpointError: the folder is no model folder.
    """
    names = ["config.json", *weight_files(folder)]
    try:
        return sha256_bytes(canonical_json([[name, sha256_file(folder / name)] for name in names]))
    except OSError as error:
        fix = "give a folder with config.json and model.safetensors as tune.base"
        raise CheckpointError(f"cannot read the base model: {error.strerror}", file=folder, fix=fix) from None
