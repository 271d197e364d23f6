"""Adapters of peft, and the trainers of transformers and trl, work on our folders; the results open here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.convert.convert import Options, open_source, write
from openelm.model.folder import load_model, weights_sha256

from .conftest import Publish

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
OURS = ["qkv_proj", "out_proj", "proj_1", "proj_2"]
TEXTS = ["the quick brown fox jumps over the lazy dog", "a model talks, and nobody listens to what it says"] * 4

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library asks the Hub about folders that are here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies the Python files of folders; it imports a file once a process."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(params=["registered", "self-contained"])
def load(request: pytest.FixtureRequest, publish: Publish, tmp_path: Path, modules: Path) -> Load:
    """Return what loads the model: by the class that `import openelm` registers, or by the folder's own files."""
    folder = publish()
    if request.param == "registered":
        return lambda: transformers.AutoModelForCausalLM.from_pretrained(folder)
    alone = tmp_path / "alone"
    with open_source(folder) as source:
        write(source, alone, Options(to="hf", self_contained=True))
    found = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_openelm.OpenELMForCausalLM", alone
    )
    assert found.__module__.startswith("transformers_modules")
    return lambda: found.from_pretrained(alone)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def losses(model: Any, steps: int = 8) -> list[float]:
    """Learn the same two rows again and again."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    model.train()
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("target", "dora"), [("all-linear", False), (OURS, True), (["qkv_proj"], False)])
def test_adapters_of_peft_learn_and_merge(load: Load, tmp_path: Path, target: Any, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    plain, base = load(), load()
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=target, use_dora=dora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == set(OURS if target == "all-linear" else target), "and the output matrix is left alone"
    assert torch.allclose(logits(model), logits(plain), atol=1e-4), "a new adapter changes nothing"
    found = losses(model)
    assert found[-1] < found[0] - 0.5
    frozen = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(frozen[name], p) for name, p in plain.named_parameters()), "only adapters learn"

    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert (logits(merged) - expected).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (load_model(tmp_path / "merged")(TOKENS) - expected).abs().max() < 1e-4


def test_gradients_of_adapters_survive_checkpointing(load: Load) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 24 and all(grad.abs().max() > 0 for grad in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_trained_output_matrix_is_saved_and_read(publish: Publish, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(publish())
    base.config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=OURS, modules_to_save=["lm_head"]))
    losses(model)
    merged = model.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, merged.transformer.token_embeddings.weight)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (load_model(tmp_path / "merged")(TOKENS) - logits(merged)).abs().max() < 1e-4


def arguments(settings: Any, folder: Path, **more: Any) -> Any:
    """Ten steps on a CPU, a checkpoint at the end."""
    return settings(
        output_dir=str(folder),
        max_steps=10,
        save_steps=10,
        logging_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_of_transformers_learns_and_goes_on(publish: Publish, tmp_path: Path) -> None:
    """It learns; its checkpoint is a model folder; a run that was cut goes on to the weights of one that was not."""
    pytest.importorskip("accelerate")
    folder = publish()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS] * 4

    def trainer(name: str) -> Any:
        settings = arguments(transformers.TrainingArguments, tmp_path / name, learning_rate=1e-2)
        settings.save_steps = 5
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return transformers.Trainer(model, settings, train_dataset=rows)

    whole = trainer("whole")
    whole.train()
    assert logged(whole)[-1] < logged(whole)[0] - 2
    last = load_model(tmp_path / "whole" / "checkpoint-10")
    with torch.no_grad():
        assert (last(TOKENS) - logits(whole.model)).abs().max() < 1e-4
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    again = load_model(tmp_path / "resumed" / "checkpoint-10")
    assert weights_sha256(again.state_dict()) == weights_sha256(last.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_sft_of_trl_learns(load: Load, publish: Publish, tmp_path: Path, adapter: bool) -> None:
    trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(publish(name="for its tokenizer"))
    trainer = trl.SFTTrainer(
        load(),
        arguments(trl.SFTConfig, tmp_path / "sft", learning_rate=1e-2, max_length=64),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
    )
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 1.5
    checkpoint, expected = tmp_path / "sft" / "checkpoint-10", logits(trainer.model)
    if adapter:
        again = peft.PeftModel.from_pretrained(load(), checkpoint)
        assert torch.equal(logits(again), expected)
        checkpoint = tmp_path / "merged"
        again.merge_and_unload().save_pretrained(checkpoint)
    with torch.no_grad():
        assert (load_model(checkpoint)(TOKENS) - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_sft_of_trl_on_packed_rows_is_the_loss_of_separate_rows(publish: Publish, tmp_path: Path) -> None:
    trl, datasets = (pytest.importorskip(name) for name in ("trl", "datasets"))
    folder = publish()
    found = []
    for packing in (False, True):
        settings = arguments(trl.SFTConfig, tmp_path / str(packing), max_length=64, packing=packing)
        settings.max_steps, settings.per_device_train_batch_size = 1, 8
        trainer = trl.SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(folder),
            settings,
            train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
        found += logged(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.slow
def test_trainers_of_trl_open_folders(publish: Publish, tmp_path: Path) -> None:
    trl, datasets = (pytest.importorskip(name) for name in ("trl", "datasets"))
    folder, data = publish(), datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(str(folder), arguments(trl.SFTConfig, tmp_path / "sft", max_length=64), train_dataset=data)
    assert isinstance(trainer.model, type(transformers.AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.slow
def test_dpo_of_trl_learns(load: Load, publish: Publish, tmp_path: Path) -> None:
    trl, datasets = (pytest.importorskip(name) for name in ("trl", "datasets"))
    rows = {"prompt": ["the quick"] * 8, "chosen": [" brown fox"] * 8, "rejected": [" lazy dog"] * 8}
    trainer = trl.DPOTrainer(
        load(),
        args=arguments(trl.DPOConfig, tmp_path / "dpo", learning_rate=1e-3, max_length=64),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(publish(name="for its tokenizer")),
    )
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(0.6931, abs=1e-3), "ln 2: nothing learned yet"
    assert logged(trainer)[-1] < 0.3
    with torch.no_grad():
        assert (load_model(tmp_path / "dpo" / "checkpoint-10")(TOKENS) - logits(trainer.model)).abs().max() < 1e-4
