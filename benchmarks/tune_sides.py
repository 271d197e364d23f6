"""One side of `benchmarks.tune` in a process: python -m benchmarks.tune_sides SIDE FOLDER PRECISION THREADS.

SIDE is `ours` or `trl-KIND-ROWS`: trl's SFTTrainer with so many examples a forward pass, `padded` to the longest of
them, or `flat`, joined to one row whose examples do not see each other. Answers each word of standard input, `step` or
`stop`, with one JSON line.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from queue import Queue
from typing import Any

import torch

from benchmarks.turns import answer, side_options
from openelm.bench.machine import peak_bytes
from openelm.cli.train import find_recipe, read_recipe
from openelm.config import apply_overrides
from openelm.data.example_stream import ExampleStream
from openelm.data.examples import Examples
from openelm.model.device import reuse_freed_memory
from openelm.train.run import Run, RunConfig, open_run
from openelm.train.update import Updater
from openelm.train.work import Work

STEPS = 64  # what trl's rows suffice for


@dataclass(frozen=True)
class Side:
    """What a side's maker gives: a step of one update that returns its loss and real tokens, and what is said of it."""

    step: Callable[[], dict[str, float]]
    learning: int
    facts: dict[str, Any]


def main() -> None:
    options, answers = side_options(__doc__)
    torch.set_num_threads(options.threads)
    kind, _, how = options.side.partition("-")
    given = json.loads((options.folder / "work.json").read_text())
    run = open_run(options.folder / f"run-{options.side}", config(given, options.precision))
    side = our_side(run) if kind == "ours" else their_side(run, *how.split("-"))
    print(json.dumps({"learning": side.learning, "torch": torch.__version__, **side.facts}), file=answers)
    answer(side.step, answers, peak_bytes)


def config(given: dict[str, Any], precision: str) -> RunConfig:
    """Take the shipped recipe, with the model, the data and the settings that are given."""
    settings = [f"train.precision={precision}", "train.device=cpu", f"train.steps={STEPS}"]
    settings += ["schedule.warmup_fraction=0.0", "schedule.final_fraction=1.0", *given["settings"]]
    values = apply_overrides(read_recipe(find_recipe(f"tune-{given['method']}")), settings)
    values["tune"]["base"] = given["model"]
    values["data"]["sources"] = [{"name": "examples", "paths": [given["data"]]}]
    return RunConfig.parse(values)


def our_side(run: Run) -> Side:
    """Make what `openelm tune` runs: its batches, its updater and its setting of the allocator."""
    reuse_freed_memory()
    work = Work(run, keeps=False)
    batches, updater = work.open_batches(None), Updater(run, work.objective)
    examples = work.examples
    assert examples is not None

    def step() -> dict[str, float]:
        batch = next(batches)
        events, error = updater.update(batch)
        assert error is None and batch.examples is not None
        loss = float.fromhex(events[-1]["loss"])
        return {"loss": loss, "tokens": real_tokens(examples, batch.examples), "positions": batch.inputs.size}

    learning = sum(parameter.numel() for parameter in updater.model.parameters() if parameter.requires_grad)
    return Side(step, learning, {"sequences": len(examples)})


def real_tokens(examples: Examples, chosen: Any) -> int:
    return int(examples.sizes[chosen[chosen >= 0]].sum())


def steps_of(run: Run, examples: Examples) -> Iterator[list[int]]:
    """Yield the examples of our steps, each step's by their length, so that trl pads the least."""
    settings = run.config.train
    with ExampleStream(examples, seed=settings.seed, rows=settings.rows, length=settings.length) as stream:
        for batch in stream:
            assert batch.examples is not None
            chosen = batch.examples[batch.examples >= 0]
            yield chosen[examples.sizes[chosen].argsort(kind="stable")[::-1]].tolist()


def their_side(run: Run, kind: str, rows: str) -> Side:
    """Make trl's trainer, which takes the ids, targets and steps of ours, and waits in a callback for each turn."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    examples = Work(run, keeps=False).examples
    assert examples is not None and run.config.tune is not None
    steps = list(islice(steps_of(run, examples), STEPS))
    base = run.config.tune.base
    go: Queue[None] = Queue()
    done: Queue[float | BaseException] = Queue()

    class Recorded(trl.SFTTrainer):  # type: ignore[misc]
        loss = 0.0

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            self.loss += float(loss)
            return loss

    class Turns(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            done.put(trainer.loss)
            trainer.loss = 0.0
            go.get()

    trainer = Recorded(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
        their_settings(run, int(rows), kind == "flat"),
        train_dataset=datasets.Dataset.from_list([row_of(examples, index) for step in steps for index in step]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=their_adapter(run),
        callbacks=[Turns()],
    )

    def train() -> None:
        go.get()
        torch.set_num_threads(int(sys.argv[4]))  # OpenMP's, which are a thread's own
        try:
            trainer.train()
        except BaseException as error:
            done.put(error)

    threading.Thread(target=train, daemon=True).start()
    numbers = count()

    def step() -> dict[str, float]:
        go.put(None)
        loss = done.get()
        if isinstance(loss, BaseException):
            raise loss
        sizes = examples.sizes[steps[next(numbers)]]
        groups = sizes.reshape(-1, int(rows))
        positions = sizes.sum() if kind == "flat" else (groups.max(1) * groups.shape[1]).sum()
        return {"loss": loss, "tokens": int(sizes.sum()), "positions": int(positions)}

    learning = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return Side(step, learning, {"trl": trl.__version__, "optimizer": trainer.args.optim.value})


def row_of(examples: Examples, index: int) -> dict[str, Any]:
    (sequence,) = examples.sequences(index)
    tokens = sequence.tokens.tolist()
    labels = [token if learned else -100 for token, learned in zip(tokens, sequence.learned, strict=True)]
    return {"input_ids": tokens, "labels": labels}


def their_settings(run: Run, rows: int, flat: bool) -> Any:
    from trl import SFTConfig

    settings, optimizer = run.config.train, run.config.optimizer
    return SFTConfig(
        output_dir=str(run.folder / "trainer"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.rows // rows,
        padding_free=flat,
        max_length=None,  # the ids are as long as they may be
        max_steps=STEPS,
        learning_rate=run.config.schedule.peak,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=settings.clip_norm,
        bf16=run.precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def their_adapter(run: Run) -> Any:
    from peft import LoraConfig

    adapter = run.config.adapter
    if adapter is None:
        return None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        use_dora=adapter.kind == "dora",
        task_type="CAUSAL_LM",
    )


if __name__ == "__main__":
    main()
