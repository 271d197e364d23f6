"""The published numbers hold what their pages say: sums, repeated cells and the headline check the transcription."""

from __future__ import annotations

import math

import pytest

from openelm.evaluate.presets import PRESETS
from openelm.evaluate.published import PUBLISHED, SOURCES, PublishedRow
from openelm.model.sizes import model_size

WITH_TASKS = [row for row in PUBLISHED if row.values]
ONLY_AVERAGES = {
    ("zero-shot", "OLMo"),
    ("openllm", "OPT"),
    ("openllm", "Pythia"),
    ("openllm", "MobiLlama"),
    ("openllm", "OLMo"),
    ("llm360", "OLMo"),
}
SIZES = ("270M", "450M", "1.1B", "3B")
FAMILY = {f"OpenELM-{size}{tuned}" for size in SIZES for tuned in ("", "-Instruct")}


def row_of(suite: str, model: str) -> PublishedRow:
    (row,) = [row for row in PUBLISHED if (row.suite, row.model) == (suite, model)]
    return row


@pytest.mark.parametrize("row", WITH_TASKS, ids=lambda row: f"{row.suite}-{row.model}")
def test_a_published_average_is_the_unweighted_mean_of_its_row(row: PublishedRow) -> None:
    assert row.average == pytest.approx(math.fsum(row.values.values()) / len(row.values), abs=0.01)


def test_only_known_rows_have_no_tasks() -> None:
    assert {(row.suite, row.model) for row in PUBLISHED if not row.values} == ONLY_AVERAGES


@pytest.mark.parametrize("row", WITH_TASKS, ids=lambda row: f"{row.suite}-{row.model}")
def test_a_row_has_every_column_of_its_suite(row: PublishedRow) -> None:
    assert list(row.values) == [spec.task for spec in PRESETS[row.suite].tasks]


@pytest.mark.parametrize("suite", ["zero-shot", "openllm", "llm360"])
def test_every_suite_of_pre_trained_models_has_the_whole_family_once(suite: str) -> None:
    models = [row.model for row in PUBLISHED if row.suite == suite]
    assert len(models) == len(set(models))
    assert {row.model for row in PUBLISHED if row.suite == suite and row.is_openelm} == FAMILY


@pytest.mark.parametrize("model", sorted(FAMILY))
def test_piqa_is_zero_shot_in_two_tables_and_equal(model: str) -> None:
    assert row_of("zero-shot", model).values["piqa"] == row_of("llm360", model).values["piqa"]


def test_what_was_fine_tuned_says_how_it_was_asked() -> None:
    (row,) = [row for row in PUBLISHED if row.suite == "commonsense"]
    assert row.is_openelm and row.note is not None and "the correct answer is" in row.note
    assert row.parameters == row_of("zero-shot", "OpenELM-270M").parameters


def test_the_headline_of_the_paper_follows() -> None:
    ours, olmo = row_of("openllm", "OpenELM-1.1B"), row_of("openllm", "OLMo")
    assert ours.average is not None and olmo.average is not None
    assert ours.average - olmo.average == pytest.approx(2.36)
    assert ours.tokens is not None and olmo.tokens == 2 * ours.tokens


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_size(size: str) -> None:
    for model in (f"OpenELM-{size}", f"OpenELM-{size}-Instruct"):
        assert row_of("zero-shot", model).parameters == model_size(size.lower()).parameters


def test_every_source_is_explained() -> None:
    assert {row.source for row in PUBLISHED} == set(SOURCES)


def test_suites_are_named_by_their_keys_and_have_no_column_twice() -> None:
    counts = {key: len(suite.tasks) for key, suite in PRESETS.items()}
    assert counts == {"zero-shot": 7, "openllm": 5, "llm360": 8, "commonsense": 8}
    for key, suite in PRESETS.items():
        assert suite.name == key
        assert len({spec.task for spec in suite.tasks}) == len({spec.title for spec in suite.tasks}) == len(suite.tasks)


def test_llm360_measures_what_it_shares_with_openllm_in_the_same_way() -> None:
    assert set(PRESETS["openllm"].tasks) < set(PRESETS["llm360"].tasks)
