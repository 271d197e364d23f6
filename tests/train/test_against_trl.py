"""Losses and gradients of tuning are those of trl's own trainers: ours on packed rows, theirs on padded ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.adapters.adapter import adapter_weights, add_adapter, save_adapter
from openelm.adapters.config import EMBEDDING, PROJECTIONS, TARGETS, AdapterConfig
from openelm.data.encoding import Encoded, Encoder
from openelm.data.example_stream import ExampleStream
from openelm.data.examples import Examples
from openelm.data.shapes import answer_of, pair_of
from openelm.kernels.attention_gpu import visible_documents
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, save_model
from openelm.model.transformer import OpenELM
from openelm.text.chat import CHAT_TEMPLATE
from openelm.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from openelm.train.objectives import NextToken, Objective, Preference, PreferenceLoss, Rows, answer_log_likelihoods

from ..conftest import ODD, randomise

trl, datasets, peft, transformers = (pytest.importorskip(name) for name in ("trl", "datasets", "peft", "transformers"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

LENGTH = 192
MODEL = {**ODD, "max_context_length": 256}
TEXT = "The quick brown fox jumps over the lazy dog; a model talks, and nobody listens to what it says. " * 40
ANSWERS = [
    {"prompt": "The quick brown", "completion": " fox jumps"},
    {"prompt": "A model talks, and", "completion": " nobody listens to what it says, as the lazy dog"},
    {"prompt": "the lazy", "completion": " dog"},
    {"prompt": "over the lazy dog; a model talks, and nobody", "completion": " listens"},
    {"prompt": "what it", "completion": " says."},
]
PAIRS = [
    {"prompt": "The quick brown", "chosen": " fox jumps", "rejected": " dog"},
    {"prompt": "A model talks, and", "chosen": " nobody listens", "rejected": " it says what the lazy dog says"},
    {"prompt": "the lazy", "chosen": " dog jumps over the quick fox", "rejected": " fox"},
    {"prompt": "what it", "chosen": " says.", "rejected": " jumps; and"},
]
CHATS = [
    {"messages": [{"role": role, "content": content} for role, content in turns]}
    for turns in (
        [("user", "The quick?"), ("assistant", "brown fox"), ("user", "and?"), ("assistant", "the lazy dog")],
        [("system", "it says"), ("user", "what"), ("assistant", "a model talks")],
        [("user", "nobody"), ("assistant", "listens to what it says")],
    )
]
# Our template, with marks around what an assistant writes, as trl asks for.
MARKED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}",
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\\n' }}",
)

Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library asks the Hub about folders that are here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Publish a model, and another one to be its reference."""
    place, tokenizer = tmp_path_factory.mktemp("models"), train_tokenizer([TEXT], 300)
    for seed, name in enumerate(("policy", "reference")):
        model = randomise(OpenELM(ModelConfig.parse(MODEL)), seed)
        save_model(place / name, model, tokenizer=tokenizer)
    return {name: place / name for name in ("policy", "reference")}


@pytest.fixture(scope="module")
def tokenizer(folders: Mapping[str, Path]) -> Tokenizer:
    return load_tokenizer(folders["policy"])


def their_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def their_tokenizer(folder: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(folder)
    found.chat_template = MARKED_TEMPLATE
    return found


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        max_length=LENGTH,
        **quiet,
        **more,
    )


def sft_trainer(model: Any, tokens: Any, rows: Sequence[Any], folder: Path, **more: Any) -> Any:
    about = {"completion_only_loss": True} if "completion" in rows[0] else {"assistant_only_loss": True}
    loss = more.pop("compute_loss_func", None)
    return trl.SFTTrainer(
        model,
        settings(trl.SFTConfig, folder, **about, **more),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=tokens,
        compute_loss_func=loss,
    )


def theirs(trainer: Any) -> tuple[float, Gradients]:
    """Take the trainer's loss and gradients on all of its rows at once."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters()}


def examples_of(sequences: Sequence[Sequence[Encoded]]) -> Examples:
    flat = [one for several in sequences for one in several]
    return Examples(
        np.concatenate([one.tokens for one in flat]),
        np.concatenate([one.learned for one in flat]),
        np.cumsum([len(one.tokens) for one in flat]),
        len(sequences[0]),
        np.ones(MODEL["vocab_size"], np.int32),  # type: ignore[arg-type]
        {},
        (),
    )


def encoded(tokenizer: Tokenizer, rows: Sequence[Any]) -> Examples:
    recognise: Callable[[Any], Any] = pair_of if "chosen" in rows[0] else answer_of
    found = Encoder(tokenizer, LENGTH).encode([recognise(row) for row in rows])
    return examples_of([sequences for sequences in found if isinstance(sequences, tuple)])


def packed(examples: Examples) -> tuple[Rows, int]:
    """Put all examples into one batch, as a run does; returns how many targets it has, too."""
    batch = next(ExampleStream(examples, seed=0, rows=len(examples), length=LENGTH))
    assert batch.examples is not None and len(batch.inputs) < len(examples), "several share a row"
    documents = torch.from_numpy(batch.documents)
    rows = Rows(
        torch.from_numpy(batch.inputs),
        torch.from_numpy(batch.targets),
        visible_documents(documents, torch.float32, torch.device("cpu")),
        documents,
        torch.from_numpy(batch.examples),
    )
    return rows, NextToken().weight(batch)


def ours(model: OpenELM, objective: Objective, rows: Rows, weight: int) -> tuple[list[float], Gradients]:
    """Take the means of an objective's sums, and the gradients of the first."""
    loss, sums = objective(model.train(), rows)
    (loss / weight).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and bool(gradient.any()) for gradient in found.values())
    return (sums / weight).tolist(), {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_equal(mine: Gradients, yours: Gradients) -> None:
    assert mine.keys() == {name for name, gradient in yours.items() if gradient is not None}
    away = {name: float((mine[name] - yours[name]).norm() / yours[name].norm()) for name in mine}
    assert max(away.values()) <= 1e-5, {name: value for name, value in away.items() if value > 1e-5}


@pytest.mark.parametrize("rows", [ANSWERS, CHATS], ids=["prompts", "chats"])
def test_trl_finds_the_same_tokens_and_the_same_targets(
    folders: Mapping[str, Path], tokenizer: Tokenizer, rows: Sequence[Any], tmp_path: Path
) -> None:
    folder = folders["policy"]
    trainer = sft_trainer(their_model(folder), their_tokenizer(folder), rows, tmp_path)
    examples = encoded(tokenizer, rows)
    for index, row in enumerate(trainer.train_dataset):
        (mine,) = examples.sequences(index)
        assert mine.tokens.tolist() == row["input_ids"]
        assert mine.learned.tolist() == [label != -100 for label in row["labels"]]


def test_trl_finds_the_same_answers_of_pairs(folders: Mapping[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer = dpo_trainer(folders, tmp_path, "sigmoid", 0.1)
    examples = encoded(tokenizer, PAIRS)
    for index, row in enumerate(trainer.train_dataset):
        for mine, side in zip(examples.sequences(index), ("chosen_ids", "rejected_ids"), strict=True):
            assert mine.tokens.tolist() == row["prompt_ids"] + row[side]
            assert mine.tokens[mine.learned].tolist() == row[side]


@pytest.mark.parametrize("rows", [ANSWERS, CHATS], ids=["prompts", "chats"])
def test_learning_answers_is_that_of_trl(
    folders: Mapping[str, Path], tokenizer: Tokenizer, rows: Sequence[Any], tmp_path: Path
) -> None:
    folder = folders["policy"]
    loss, gradients = theirs(sft_trainer(their_model(folder), their_tokenizer(folder), rows, tmp_path))
    (mine,), my_gradients = ours(load_model(folder), NextToken(z_loss=0), *packed(encoded(tokenizer, rows)))
    assert mine == pytest.approx(loss, rel=1e-5)
    assert_equal(my_gradients, gradients)


def dpo_trainer(folders: Mapping[str, Path], folder: Path, loss: str, beta: float) -> Any:
    return trl.DPOTrainer(
        their_model(folders["policy"]),
        their_model(folders["reference"]),
        settings(trl.DPOConfig, folder, loss_type=loss, beta=beta),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=their_tokenizer(folders["policy"]),
    )


@torch.no_grad()
def reference_table(model: OpenELM, rows: Rows) -> Tensor:
    assert rows.examples is not None
    values, _ = answer_log_likelihoods(model, rows)
    there = rows.examples >= 0
    table = torch.zeros(len(PAIRS), 2)
    table[rows.examples[there]] = values[there]
    return table


@pytest.mark.parametrize("beta", [0.1, 0.01])
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_learning_preferences_is_that_of_trl(
    folders: Mapping[str, Path], tokenizer: Tokenizer, loss: PreferenceLoss, beta: float, tmp_path: Path
) -> None:
    trainer = dpo_trainer(folders, tmp_path, loss, beta)
    their_loss, gradients = theirs(trainer)
    rows, _ = packed(encoded(tokenizer, PAIRS))
    objective = Preference(loss, beta, reference_table(load_model(folders["reference"]), rows))
    (mine, accuracy, margin), my_gradients = ours(load_model(folders["policy"]), objective, rows, len(PAIRS))
    assert mine == pytest.approx(their_loss, rel=1e-5)
    assert_equal(my_gradients, gradients)
    (their_accuracy,), (their_margin,) = (
        trainer._metrics["train"][f"rewards/{name}"] for name in ("accuracies", "margins")
    )
    assert 0 < their_accuracy < 1, "some pairs of each kind"
    assert accuracy == their_accuracy
    assert margin == pytest.approx(their_margin, rel=1e-5)


def with_adapter(folder: Path, config: AdapterConfig, out: Path) -> OpenELM:
    """Put an adapter that changes something on a model, and publish it."""
    model = load_model(folder)
    add_adapter(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapter_weights(model).items():
        if name.endswith("magnitude_vector"):
            weight.mul_(torch.empty_like(weight).uniform_(0.8, 1.2, generator=generator))
        else:
            weight.normal_(0, 0.1, generator=generator)
    save_adapter(out, model, config, base=folder)
    return model


def through_the_models_own_head(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Take the loss of the logits: trl's own multiplies with the bare matrix and knows of no adapter of it."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("targets", [PROJECTIONS, TARGETS, (EMBEDDING,)], ids=["projections", "all", "embedding"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_learning_an_adapter_is_that_of_trl_and_peft(
    folders: Mapping[str, Path], tokenizer: Tokenizer, kind: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    folder = folders["policy"]
    config = AdapterConfig.parse({"kind": kind, "rank": 4, "alpha": 8, "dropout": 0, "targets": list(targets)})
    model = with_adapter(folder, config, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(their_model(folder), tmp_path / "adapter", is_trainable=True)
    loss_of = through_the_models_own_head if EMBEDDING in targets else None
    trainer = sft_trainer(adapted, their_tokenizer(folder), ANSWERS, tmp_path / "run", compute_loss_func=loss_of)
    loss, gradients = theirs(trainer)
    (mine,), my_gradients = ours(model, NextToken(z_loss=0), *packed(encoded(tokenizer, ANSWERS)))
    assert mine == pytest.approx(loss, rel=1e-5)
    assert_equal(my_gradients, gradients)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_a_tied_embedding_is_worth_what_its_merged_model_is_to_trl(
    folders: Mapping[str, Path], tokenizer: Tokenizer, kind: str, tmp_path: Path
) -> None:
    folder = folders["policy"]
    config = AdapterConfig.parse({"kind": kind, "rank": 4, "alpha": 8, "dropout": 0, "targets": [EMBEDDING]})
    model = with_adapter(folder, config, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(their_model(folder), tmp_path / "adapter").merge_and_unload()
    loss, _ = theirs(sft_trainer(merged.requires_grad_(), their_tokenizer(folder), ANSWERS, tmp_path / "run"))
    (mine,), _ = ours(model, NextToken(z_loss=0), *packed(encoded(tokenizer, ANSWERS)))
    assert mine == pytest.approx(loss, rel=1e-5)
