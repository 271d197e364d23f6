"""Suites score files as their documents would be scored by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openelm.errors import ConfigError, DataError
from openelm.evaluate.score import bits_per_byte
from openelm.evaluate.suites import evaluate_suite, read_texts
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer


def test_the_bpb_suite_scores_every_document_of_a_folder(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["first document\n", "sécond", "third"]
    (tmp_path / "a.txt").write_text(texts[0], "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]), "utf-8")
    score = evaluate_suite(f"bpb:{tmp_path}", model, tokenizer)
    names = ["a.txt:0", "b.jsonl:0", "b.jsonl:1"]
    assert read_texts([str(tmp_path)]) == (texts, names)
    assert score == bits_per_byte(model, tokenizer, texts, names)


@pytest.mark.parametrize("suite", ["bpb", "bpb:", "bits:text.txt", ""])
def test_an_unknown_suite_is_a_config_error_that_lists_the_suites(
    model: OpenELM, tokenizer: Tokenizer, suite: str
) -> None:
    with pytest.raises(ConfigError, match="bpb:PATH"):
        evaluate_suite(suite, model, tokenizer)


def test_a_missing_file_is_a_data_error(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        evaluate_suite(f"bpb:{tmp_path / 'missing.txt'}", model, tokenizer)
