"""A request's choices: what is counted, what is reported, and that penalties are those of other projects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.errors import ConfigError
from openelm.generate.engine import generate, prompt_ids
from openelm.generate.sampler import Sampler
from openelm.generate.sampling import SamplingConfig, choose, filter_logits
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer, Tokenizer

SIZE = ByteTokenizer().vocab_size


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2), st.lists(st.integers(0, SIZE - 1), max_size=40))
@settings(max_examples=60, deadline=None)
def test_count_penalties_are_those_of_openai(seed: int, presence: float, frequency: float, ids: list[int]) -> None:
    """`mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence`, in numpy."""
    logits = random_logits(seed)
    c = np.bincount(ids, minlength=SIZE)
    expected = logits.double().numpy() - c * frequency - (c > 0).astype(float) * presence
    config = SamplingConfig(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    actual = filter_logits(logits, config, counts=torch.tensor(c, dtype=torch.float32))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-4)


def test_bias_penalty_and_filters_are_those_of_transformers_in_its_order() -> None:
    transformers = pytest.importorskip("transformers")
    processors = transformers.generation.logits_process
    biases = {3: 4.0, 200: -100.0, 17: 0.5}
    config = SamplingConfig(temperature=0.7, top_k=60, top_p=0.9, min_p=0.02, repetition_penalty=1.4, logit_bias=biases)
    bias = torch.zeros(SIZE)
    for token_id, value in biases.items():
        bias[token_id] = value
    for seed in range(20):
        logits = random_logits(seed)
        ids = torch.randint(0, SIZE, (1, 30), generator=torch.Generator().manual_seed(seed))
        expected = logits[None]
        for processor in (
            processors.SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in biases.items()}),
            processors.RepetitionPenaltyLogitsProcessor(1.4),
            processors.TemperatureLogitsWarper(0.7),
            processors.TopKLogitsWarper(60),
            processors.TopPLogitsWarper(0.9),
            processors.MinPLogitsWarper(0.02),
        ):
            expected = processor(ids, expected)
        seen = torch.zeros(SIZE, dtype=torch.bool)
        seen[ids[0]] = True
        actual = filter_logits(logits, config, seen, bias=bias)
        torch.testing.assert_close(actual.softmax(-1), expected[0].softmax(-1))


def test_the_order_is_constraint_bias_repetition_counts() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, 5.0])
    allowed = torch.tensor([True, True, True, False])
    config = SamplingConfig(temperature=0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    actual = filter_logits(
        logits,
        config,
        torch.tensor([True, True, False, True]),
        counts=torch.tensor([2.0, 0.0, 1.0, 3.0]),
        bias=torch.tensor([-3.0, 3.0, 0.0, 100.0]),
        allowed=allowed,
    )
    assert actual.tolist() == [-2.0 * 2 - 0.5 - 0.5, 2.0 / 2, 2.0 - 0.25 - 0.5, -torch.inf]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_plain_request_is_chosen_as_choose_does_with_one_number_a_draw(temperature: float) -> None:
    config = SamplingConfig(temperature=temperature, seed=9, top_k=50)
    sampler, generator = Sampler(config, ByteTokenizer(), [65], "cpu"), torch.Generator().manual_seed(9)
    for seed in range(20):
        choice = sampler.choose(random_logits(seed))
        assert choice.id == choose(random_logits(seed), config, generator)
        sampler.accept(int(choice.id))


def test_the_prompt_counts_for_repetition_alone_and_the_text_for_all_three() -> None:
    logits = torch.zeros(SIZE)
    logits[65], logits[66], logits[67] = 3.0, 2.9, 2.8

    def greedy(tokenizer: Tokenizer, **penalty: float) -> list[int]:
        sampler = Sampler(SamplingConfig(temperature=0, **penalty), tokenizer, [65], "cpu")  # type: ignore[arg-type]
        ids = []
        for _ in range(4):
            ids.append(int(sampler.choose(logits).id))
            sampler.accept(ids[-1])
        return ids

    assert greedy(ByteTokenizer()) == [65, 65, 65, 65]
    assert greedy(ByteTokenizer(), repetition_penalty=1.05) == [66, 65, 65, 65]
    assert greedy(ByteTokenizer(), presence_penalty=0.15) == [65, 66, 65, 65]
    assert greedy(ByteTokenizer(), frequency_penalty=0.15) == [65, 66, 65, 67]
    assert greedy(ByteTokenizer(), frequency_penalty=-2) == [65, 65, 65, 65]


def test_a_bias_forbids_and_forces_and_the_reported_probability_is_still_the_models() -> None:
    logits = random_logits(4)
    best, second = logits.topk(2).indices.tolist()
    for biases, expected in (({best: -100}, second), ({7: 100}, 7), ({}, best)):
        config = SamplingConfig.parse({"temperature": 0, "logit_bias": biases, "top_logprobs": 3})
        choice = Sampler(config, ByteTokenizer(), [65], "cpu").choose(logits)
        assert choice.id == expected
        assert choice.logprob == logits.log_softmax(-1)[expected]
        assert choice.top_ids.tolist() == logits.topk(3).indices.tolist()
        assert torch.equal(choice.top_logprobs, logits.log_softmax(-1)[choice.top_ids])


def test_a_biased_id_outside_the_vocabulary_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"258.*0\.\.257"):
        Sampler(SamplingConfig(logit_bias={257: 1.0, 258: 1.0}), ByteTokenizer(), [65], "cpu")


def test_ids_of_a_bias_may_be_text_as_in_json() -> None:
    assert SamplingConfig.parse({"logit_bias": {"65": 1}}).logit_bias == {65: 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {65: 101}),
        ("logit_bias", {65: float("nan")}),
        ("logit_bias", {65: "1"}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("logit_bias", [1]),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("top_logprobs", True),
        ("json_schema", "{}"),
        ("regex", 1),
    ],
)
def test_a_bad_value_is_a_config_error_that_names_it(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        SamplingConfig.parse({key: value})


def test_generated_tokens_carry_the_likeliest_ones(model: OpenELM, tokenizer: Tokenizer) -> None:
    config = SamplingConfig(temperature=1.0, max_tokens=6, top_logprobs=4)
    for token in generate(model, tokenizer, prompt_ids(tokenizer, "abc"), config):
        values = [logprob for _, logprob in token.top]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        assert token.logprob <= values[0]
        assert dict(token.top).get(token.id, token.logprob) == token.logprob


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and `pytest -m gpu`")
def test_a_step_never_waits_for_the_device() -> None:
    config = SamplingConfig(
        temperature=0.9,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        logit_bias={65: 1.0},
        top_logprobs=5,
        regex="[a-z]*",
    )
    sampler = Sampler(config, ByteTokenizer(), [65], "cuda")
    logits = random_logits(1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        choices = [sampler.choose(logits) for _ in range(3)]
        sampler.accept(97)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Sampler(config, ByteTokenizer(), [65], "cpu")
    assert [int(choice.id) for choice in choices] == [int(on_cpu.choose(logits.cpu()).id) for _ in range(3)]
