"""What a run does: its batches and its objective, of text or of examples. Training and replay share it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openelm.data.example_stream import ExampleStream
from openelm.data.examples import Examples, load_examples
from openelm.data.manifest import Manifest
from openelm.data.stream import BatchStream
from openelm.text.tokenizer import Tokenizer
from openelm.train.distributed import ALONE, Processes
from openelm.train.objectives import NextToken, Objective, Preference
from openelm.train.reference import reference_log_likelihoods
from openelm.train.run import Run, RunConfig

Stream = BatchStream | ExampleStream
Told = Callable[[str, int, int], None]
"""Is told of long preparations: what is done, how much of it, and of how much."""


@dataclass(frozen=True)
class HeldOut:
    """Examples that are not learned from, and what is measured on them."""

    examples: Examples
    objective: Objective


@dataclass(frozen=True)
class Work:
    """What to train with; each part is prepared when it is first asked for.

    Attributes:
        keeps: whether the run folder may take what was computed once.
    """

    run: Run
    processes: Processes = ALONE
    told: Told = lambda what, done, total: None
    keeps: bool = True

    @functools.cached_property
    def examples(self) -> Examples | None:
        """What a tuned model learns from, read and encoded; None: text.

        Raises:
            DataError: a bad row under the policy "error", or no example that can be used.
        """
        if self.run.config.tune is None:
            return None
        told = functools.partial(self.told, "reading examples")
        return read_examples(self.run.config, self.run.manifest, self.run.tokenizer, told)

    @functools.cached_property
    def objective(self) -> Objective:
        """What batches ask of the model; for pairs the base has rated all of them, once.

        Raises:
            CheckpointError: the base model cannot be read.
            DiskError: its ratings cannot be written.
        """
        return self._objective(self.examples, "reference")

    @functools.cached_property
    def held_out(self) -> HeldOut | None:
        """What is measured on held-out examples, if there are some; see `examples` and `objective` for errors."""
        tune, run = self.run.config.tune, self.run
        if run.held_out_examples is None:
            return None
        assert tune is not None
        examples = read_examples(run.config, run.held_out_examples, run.tokenizer).first(tune.held_out_examples)
        return HeldOut(examples, self._objective(examples, "reference-held-out"))

    def _objective(self, examples: Examples | None, name: str) -> Objective:
        tune, run = self.run.config.tune, self.run
        if tune is None or tune.preference is None:
            return NextToken(run.config.train.z_loss)
        assert examples is not None
        reference = reference_log_likelihoods(
            run,
            examples,
            run.folder / f"{name}.safetensors" if self.keeps else None,
            self.processes,
            functools.partial(self.told, f"rating pairs with the base ({name})"),
        )
        return Preference(tune.preference.loss, tune.preference.beta, reference.to(run.device))

    def open_batches(self, cursors: list[dict[str, Any]] | None) -> Stream:
        """Make this process's batches from saved cursors, or from the beginning for None; close them."""
        run, settings = self.run, self.run.config.train
        part = self.processes.rank, self.processes.count
        if self.examples is not None:
            return ExampleStream(
                self.examples,
                seed=settings.seed,
                rows=settings.rows,
                length=settings.length,
                part=part,
                multiple=settings.shards if settings.numerics == "exact" else self.processes.count,
                cursors=cursors,
            )
        return BatchStream(
            run.config.data,
            run.manifest,
            run.tokenizer,
            run.tokenizer_folder,
            seed=settings.seed,
            rows=settings.rows,
            length=settings.length,
            part=part,
            cursors=cursors,
        )


def read_examples(
    config: RunConfig,
    manifest: Manifest,
    tokenizer: Tokenizer,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Examples:
    """Read and encode the examples of a tuned run.

    Raises:
        DataError: see `load_examples`.
    """
    tune, length = config.tune, config.train.length
    assert tune is not None
    return load_examples(
        manifest,
        tokenizer,
        kind="answers" if tune.preference is None else "preferences",
        length=(length if tune.preference is None else length // 2) + 1,  # the last token of a sequence is no input
        prompt_tokens=tune.prompt_tokens,
        on_bad_row=config.data.on_bad_row,
        on_long=tune.on_long,
        learn=tune.learn,
        progress=told,
    )
