"""Every shipped recipe is one; the pre-training ones hold the published numbers (CoreNet's YAML files, its README)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from openelm.config import read_toml
from openelm.optim.schedule import learning_rate
from openelm.train.run import RunConfig

FOLDER = Path(__file__).parents[1] / "openelm" / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
# recipe: peak and final learning rate, weights with 32,000 pieces, activation checkpointing
PUBLISHED = {
    "pretrain-270m": (5.3e-3, 5.3e-4, 271_527_168, "none"),
    "pretrain-450m": (3.9e-3, 3.9e-4, 457_179_136, "full"),
    "pretrain-1_1b": (2.4e-3, 2.4e-4, 1_079_891_456, "full"),
    "pretrain-3b": (1.2e-3, 1.2e-4, 3_036_647_424, "full"),
}
# billions of tokens; file format and text key of the published file lists
MIXTURE = {
    "refinedweb": (665, "parquet", "content"),
    "redpajama-github": (59, "jsonl", "text"),
    "redpajama-books": (26, "jsonl", "text"),
    "redpajama-arxiv": (28, "jsonl", "text"),
    "redpajama-wikipedia": (24, "jsonl", "text"),
    "redpajama-stackexchange": (20, "jsonl", "text"),
    "redpajama-c4": (175, "jsonl", "text"),
    "pile": (207, "parquet", "text"),
    "dolma-stack": (411, "json.gz", "text"),
    "dolma-reddit": (89, "json.gz", "text"),
    "dolma-pes2o": (70, "json.gz", "text"),
    "dolma-gutenberg": (6, "json.gz", "text"),
    "dolma-wiki": (4.3, "json.gz", "text"),
}


def recipe(name: str) -> RunConfig:
    path = FOLDER / f"{name}.toml"
    values = read_toml(path)
    if "tune" in values:
        values["train"].setdefault("steps", 1)  # tune.epochs and the examples decide
    return RunConfig.parse(values, file=path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_one(path: Path) -> None:
    recipe(path.stem)


def test_all_four_sizes_are_shipped() -> None:
    assert set(PUBLISHED) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_the_published_one(name: str) -> None:
    model = recipe(name).model.config(vocab_size=32_000)
    assert model.parameters == PUBLISHED[name][2]
    assert model.max_context_length == 2048 and model.rope_max_length == 4096


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_learning_rate_follows_the_published_formula(name: str) -> None:
    config, (peak, final, *_) = recipe(name), PUBLISHED[name]
    schedule, steps = config.schedule, config.train.steps
    assert learning_rate(schedule, 0, steps) == 1e-6
    assert learning_rate(schedule, 5000, steps) == pytest.approx(peak, rel=1e-12)
    assert learning_rate(schedule, 349_999, steps) == pytest.approx(final, rel=1e-6)
    for step in (0, 1, 2500, 4999, 5000, 5001, 100_000, 177_500, 300_000, 349_999):
        if step < 5000:
            published = 1e-6 + step * (peak - 1e-6) / 5000
        else:
            published = final + 0.5 * (peak - final) * (1 + math.cos(math.pi * (step - 5000) / 345_001))
        # The published code rounds to 8 decimals, and its cosine is longer by one step of 345,000.
        assert learning_rate(schedule, step, steps) == pytest.approx(published, abs=3e-8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_and_the_whole_run_are_as_large_as_published(name: str) -> None:
    train = recipe(name).train
    assert train.rows * train.length == 4_194_304
    assert train.rows * train.length * train.steps == 1_468_006_400_000
    assert train.steps == 350_000 and train.length == 2048


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_other_numbers_are_the_published_ones(name: str) -> None:
    config = recipe(name)
    optimizer, train = config.optimizer, config.train
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (train.clip_norm, train.z_loss, train.precision) == (1.0, 1e-4, "bf16")
    assert train.recompute == PUBLISHED[name][3]
    assert (config.data.min_characters, config.data.min_tokens, config.data.packing) == (200, 256, "apple")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_five_checkpoints_are_those_whose_mean_was_published(name: str) -> None:
    config = recipe(name)
    saved = range(config.checkpoints.every, config.train.steps + 1, config.checkpoints.every)
    assert list(saved[-config.checkpoints.keep_last :]) == [330_000, 335_000, 340_000, 345_000, 350_000]
    assert all(step % config.checkpoints.keep_every == 0 for step in (50_000, 100_000, 300_000))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_mixture_is_the_published_one(name: str) -> None:
    sources = {source.name: source for source in recipe(name).data.sources}
    assert {key: source.weight for key, source in sources.items()} == {key: row[0] for key, row in MIXTURE.items()}
    assert sum(source.weight for source in sources.values()) == pytest.approx(1784.3)
    for key, (_, kind, text_key) in MIXTURE.items():
        (path,) = sources[key].paths
        assert path.endswith(f".{kind}") and path.startswith("data/") and sources[key].text_key == text_key


def test_the_four_recipes_differ_in_nothing_but_the_published_numbers() -> None:
    def rest(name: str) -> dict[str, Any]:
        values = read_toml(FOLDER / f"{name}.toml")
        del values["model"]["size"], values["schedule"]["peak"], values["train"]["recompute"]
        return values

    assert all(rest(name) == rest("pretrain-270m") for name in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_beside_each_source_under_which_licence_it_is(name: str) -> None:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line == "[[data.sources]]"]
    assert len(starts) == len(MIXTURE)
    assert all(lines[start - 1].startswith("# ") for start in starts)


INSTRUCTED = {
    # epochs, peak, loss; the rest is the same for all (CoreNet's openelm-instruct.yaml and README-instruct.md)
    "instruct-270m": (5, 2e-5, "hinge"),
    "instruct-450m": (8, 3e-5, "hinge"),
    "instruct-1_1b": (5, 5e-5, "sigmoid"),
    "instruct-3b": (10, 1e-4, "hinge"),
}


@pytest.mark.parametrize("name", INSTRUCTED)
def test_instruction_tuning_is_the_published_one(name: str) -> None:
    config = recipe(name)
    assert config.tune is not None and config.tune.preference is not None
    assert (config.tune.epochs, config.schedule.peak, config.tune.preference.loss) == INSTRUCTED[name]
    assert config.tune.preference.beta == 0.01 and config.tune.prompt_tokens == 512
    assert config.train.length // 2 + 1 == 1024  # an answer with its prompt
    assert (config.train.rows, config.train.seed) == (128, 42)
    assert (config.schedule.shape, config.schedule.warmup_fraction, config.schedule.final_fraction) == (
        "cosine",
        0.1,
        0,
    )
    optimizer = config.optimizer
    assert (optimizer.kind, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == ("adamw", 0.9, 0.999, 0)


def test_the_commonsense_adapter_is_the_published_one() -> None:
    config = recipe("lora-commonsense")
    adapter, schedule = config.adapter, config.schedule
    assert adapter is not None and config.tune is not None and config.tune.learn == "answers"
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout) == ("lora", 32, 32, 0.1)
    assert set(adapter.targets) == {"token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2"}
    assert (schedule.peak, schedule.peak * schedule.final_fraction) == (3e-4, pytest.approx(3e-5))
    assert schedule.warmup_fraction == pytest.approx(1000 / 4375, abs=1e-4)
    assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0)
    assert config.train.rows == 128 and len(config.data.sources) == 8
