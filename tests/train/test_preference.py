"""Preference losses against their formulas, on whole sequences that stand alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.data.stream import Batch
from openelm.kernels.attention_gpu import visible_documents
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.train.objectives import Preference, PreferenceLoss, Rows, answer_log_likelihoods

# Two pairs in one row and one in another; each answer is (prompt, what is learned).
PAIRS = (
    (([3, 4, 5], [6, 7, 8]), ([3, 4, 5], [9, 2])),
    (([10, 11], [12]), ([10, 11], [13, 14, 15, 16])),
    (([20, 21, 22, 23], [24, 25]), ([20, 21, 22, 23], [26, 27, 28])),
)
LAYOUT = ((0, 1), (2,))
LENGTH = 24


def small_model(seed: int = 0) -> OpenELM:
    model = OpenELM(
        ModelConfig.parse(
            {
                "vocab_size": 32,
                "num_transformer_layers": 2,
                "model_dim": 32,
                "head_dim": 8,
                "num_gqa_groups": 2,
                "ffn_dim_divisor": 16,
                "max_context_length": 64,
                "rope_max_length": 64,
            }
        )
    )
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def packed() -> Rows:
    inputs = torch.zeros(len(LAYOUT), LENGTH, dtype=torch.long)
    targets = torch.full_like(inputs, -100)
    documents = torch.full(inputs.shape, 9, dtype=torch.int32)
    examples = torch.full((len(LAYOUT), 2), -1)
    for row, places in enumerate(LAYOUT):
        start = 0
        for place, pair in enumerate(places):
            examples[row, place] = pair
            for side, (prompt, answer) in enumerate(PAIRS[pair]):
                whole = torch.tensor([*prompt, *answer])
                part = slice(start, start + len(whole) - 1)
                inputs[row, part], documents[row, part] = whole[:-1], 2 * place + side
                targets[row, part.stop - len(answer) : part.stop] = whole[-len(answer) :]
                start = part.stop
    return Rows(inputs, targets, visible_documents(documents, torch.float32, torch.device("cpu")), documents, examples)


def alone(model: OpenELM, prompt: list[int], answer: list[int]) -> Tensor:
    """Sum the log-probabilities of an answer's tokens, from logits of the sequence alone."""
    whole = torch.tensor([[*prompt, *answer]])
    logs = torch.log_softmax(model(whole[:, :-1]).double(), dim=-1)[0]
    return logs.gather(1, whole[0, 1:, None])[-len(answer) :].sum()


def expected(model: OpenELM, reference: OpenELM, loss: PreferenceLoss, beta: float) -> tuple[Tensor, Tensor]:
    total, margins = torch.zeros((), dtype=torch.float64), []
    for pair in PAIRS:
        ratios = []
        for prompt, answer in pair:
            with torch.no_grad():
                there = alone(reference, prompt, answer)
            ratios.append(alone(model, prompt, answer) - there)
        margins.append(beta * (ratios[0] - ratios[1]).detach())
        lengths = [len(answer) if loss == "ipo" else 1 for _, answer in pair]
        preferred = ratios[0] / lengths[0] - ratios[1] / lengths[1]
        if loss == "sigmoid":
            total = total + torch.log1p(torch.exp(-beta * preferred))
        elif loss == "hinge":
            total = total + F.relu(1 - beta * preferred)
        else:
            total = total + (preferred - 0.5 / beta) ** 2
    return total, torch.stack(margins)


def reference_table(reference: OpenELM) -> Tensor:
    with torch.no_grad():
        return torch.tensor([[float(alone(reference, *answer)) for answer in pair] for pair in PAIRS])


def test_answers_packed_together_have_the_likelihoods_that_they_have_alone() -> None:
    model, rows = small_model().requires_grad_(False), packed()
    values, tokens = answer_log_likelihoods(model, rows)
    assert rows.examples is not None
    for row, places in enumerate(LAYOUT):
        for place, pair in enumerate(places):
            for side, (prompt, answer) in enumerate(PAIRS[pair]):
                assert float(values[row, place, side]) == pytest.approx(
                    float(alone(model, prompt, answer)), rel=2e-6, abs=1e-5
                )
                assert int(tokens[row, place, side]) == len(answer)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("beta", [0.01, 0.3])
def test_losses_and_gradients_are_those_of_the_formula(loss: PreferenceLoss, beta: float) -> None:
    model, reference = small_model(0), small_model(1)
    ours, sums = Preference(loss, beta, reference_table(reference))(model, packed())
    theirs, margins = expected(model, reference, loss, beta)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=2e-6, abs=1e-5)
    assert float(sums[0]) == pytest.approx(float(theirs.detach()), rel=2e-6, abs=1e-5)
    assert int(sums[1]) == int((margins > 0).sum())
    assert float(sums[2]) == pytest.approx(float(margins.sum()), rel=2e-6, abs=1e-5)
    weights = list(model.parameters())
    for mine, yours in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert float((mine - yours).norm()) <= 1e-5 * float(yours.norm())


def test_a_model_that_is_its_own_reference_prefers_nothing() -> None:
    model = small_model()
    loss, sums = Preference("sigmoid", 0.1, reference_table(model))(model, packed())
    assert float(loss.detach()) == pytest.approx(len(PAIRS) * float(np.log(2)), rel=2e-6, abs=1e-5)
    assert float(sums[2]) == pytest.approx(0, rel=2e-6, abs=1e-5)


def test_a_batch_weighs_its_pairs() -> None:
    rows = packed()
    assert rows.examples is not None
    batch = Batch(
        rows.inputs.numpy(),
        rows.targets.numpy(),
        rows.documents.numpy(),
        0,
        np.zeros((2, 32), np.uint8),
        examples=rows.examples.numpy(),
    )
    assert Preference("ipo", 0.1, torch.zeros(3, 2)).weight(batch) == len(PAIRS)
