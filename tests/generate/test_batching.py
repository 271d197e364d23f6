"""Requests in one engine: company, arrival, cuts of the prompt, cancelling and shared prefixes change no text."""

from __future__ import annotations

import copy

import pytest
import torch

from openelm.errors import ConfigError, NumericError
from openelm.generate.engine import Engine, generate, prompt_ids
from openelm.generate.request import Generation, Token
from openelm.generate.sampling import SamplingConfig
from openelm.generate.speculative import DraftModel, PromptLookup
from openelm.kernels import native
from openelm.model import decoding
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer

PROMPTS = ("To be", "Once upon a time there was", "x", "In the beginning", "To be, or not to be", "aaaa")


def config(seed: int = 0, **fields: object) -> SamplingConfig:
    return SamplingConfig.parse({"temperature": 1.0, "max_tokens": 12, "seed": seed, **fields})


def alone(model: OpenELM, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig) -> list[int]:
    return [token.id for token in generate(model, tokenizer, prompt_ids(tokenizer, prompt), sampling)]


def finished(engine: Engine, *generations: Generation) -> list[list[int]]:
    """Step to the end; the ids of each."""
    known: list[list[Token]] = [[] for _ in generations]
    for _ in range(10_000):
        for tokens, generation in zip(known, generations, strict=True):
            tokens += generation.take()
        if all(generation.finished for generation in generations):
            assert engine.active == engine.waiting == 0
            return [[token.id for token in tokens] for tokens in known]
        assert engine.step()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_every_text_is_the_one_it_is_alone(model: OpenELM, tokenizer: Tokenizer, slots: int) -> None:
    engine = Engine(model, tokenizer, slots=slots, chunk=4)
    wanted = [config(seed, temperature=seed % 2, max_tokens=5 + seed) for seed in range(len(PROMPTS))]
    submitted = [
        engine.submit(prompt_ids(tokenizer, prompt), sampling) for prompt, sampling in zip(PROMPTS, wanted, strict=True)
    ]
    assert engine.waiting == len(PROMPTS)
    found = finished(engine, *submitted)
    assert found == [alone(model, tokenizer, *pair) for pair in zip(PROMPTS, wanted, strict=True)]


def test_those_who_come_later_change_nothing(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2)
    first = engine.submit(prompt_ids(tokenizer, "To be"), config(1))
    for _ in range(5):
        engine.step()
    second = engine.submit(prompt_ids(tokenizer, "In the"), config(2))
    assert finished(engine, first, second) == [
        alone(model, tokenizer, "To be", config(1)),
        alone(model, tokenizer, "In the", config(2)),
    ]


def test_a_long_prompt_holds_nobody_up(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2, chunk=3)
    talking = engine.submit(prompt_ids(tokenizer, "x"), config(3, max_tokens=30, logit_bias={257: -100}))
    engine.step()
    talking.take()
    reading = engine.submit(prompt_ids(tokenizer, "a long prompt that takes many steps"), config(4))
    for _ in range(10):
        engine.step()
        assert len(talking.take()) == 1 and reading.take() == []
    assert finished(engine, reading, talking)[0] == alone(
        model, tokenizer, "a long prompt that takes many steps", config(4)
    )


def test_a_cancelled_request_frees_its_slot_at_once(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2, chunk=4)
    kept, dropped, next_in_line, never = (
        engine.submit(prompt_ids(tokenizer, prompt), config(5, max_tokens=20)) for prompt in PROMPTS[:4]
    )
    for _ in range(4):
        engine.step()
    assert (engine.active, engine.waiting) == (2, 2)
    engine.cancel(never)
    engine.cancel(dropped)
    engine.cancel(dropped)
    assert (engine.active, engine.waiting) == (1, 1)
    found = finished(engine, kept, next_in_line)
    assert found == [alone(model, tokenizer, prompt, config(5, max_tokens=20)) for prompt in (PROMPTS[0], PROMPTS[2])]


def test_a_stream_that_is_left_frees_its_slot(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    stream = engine.stream(prompt_ids(tokenizer, "To be"), config())
    next(stream)
    assert engine.active == 1
    stream.close()
    assert engine.active == 0


def test_a_prompt_that_was_read_before_is_not_read_again(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2)
    ids = prompt_ids(tokenizer, "To be, or not to be")
    first = engine.submit(ids, config(6))
    said = finished(engine, first)[0]
    assert first.reused_tokens == 0
    for prompt, reused in ((ids + said, len(ids) + len(said) - 1), (ids, len(ids) - 1), ([*ids[:7], 65], 7)):
        again = engine.submit(prompt, config(7))
        assert finished(engine, again) == [[token.id for token in generate(model, tokenizer, prompt, config(7))]]
        assert again.reused_tokens == reused


@pytest.mark.skipif(native.kernels_name() == "torch", reason="torch's products depend on the number of rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_found_in_the_cache_is_the_one_that_was_read(
    model: OpenELM, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    engine = Engine(copy.deepcopy(model).to(dtype), tokenizer, chunk=5)
    ids = prompt_ids(tokenizer, "What stands there already")
    answers = [[token.logprob for token in engine.stream(ids, config(8))] for _ in range(2)]
    assert answers[0] == answers[1]


def test_a_scope_never_uses_what_another_one_left(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2)
    ids = prompt_ids(tokenizer, "the same prompt")
    finished(engine, engine.submit(ids, config(8), scope="one"))
    other = engine.submit(ids, config(8), scope="two")
    finished(engine, other)
    third = engine.submit(ids, config(8), scope="one")
    finished(engine, third)
    assert (other.reused_tokens, third.reused_tokens) == (0, len(ids) - 1)


def test_several_answers_read_their_prompt_once(model: OpenELM, tokenizer: Tokenizer) -> None:
    ids = prompt_ids(tokenizer, "a prompt that is long enough")
    engine = Engine(model, tokenizer, slots=3, chunk=8)
    answers = [engine.submit(ids, config(seed)) for seed in range(3)]
    found = finished(engine, *answers)
    assert found == [[token.id for token in generate(model, tokenizer, ids, config(seed))] for seed in range(3)]
    assert [answer.reused_tokens for answer in answers] == [0, len(ids) - 1, len(ids) - 1]


def test_what_fails_ends_alone(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2)
    engine._decoder.prefill = _poisoned(engine._decoder.prefill)  # type: ignore[method-assign]
    bad = engine.submit(prompt_ids(tokenizer, "!"), config(9))
    good = engine.submit(prompt_ids(tokenizer, "In the"), config(9))
    assert finished(engine, bad, good)[1] == alone(model, tokenizer, "In the", config(9))
    assert isinstance(bad.error, NumericError) and good.error is None


def test_numbers_of_a_request_that_failed_reach_nobody(
    model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "pack_model", lambda model: None)  # steps of fixed shapes read whole slots
    wanted = alone(model, tokenizer, "In the", config(9))
    engine = Engine(model, tokenizer)
    engine._decoder.prefill = _poisoned(engine._decoder.prefill)  # type: ignore[method-assign]
    for part in (*engine._decoder._cache.keys, *engine._decoder._cache.values):
        part.fill_(torch.nan)
    bad = engine.submit(prompt_ids(tokenizer, "!"), config(9))
    finished(engine, bad)
    assert isinstance(bad.error, NumericError)
    assert finished(engine, engine.submit(prompt_ids(tokenizer, "In the"), config(9))) == [wanted]


def _poisoned(prefill):  # type: ignore[no-untyped-def]
    """Let the logits after "!" be NaN."""

    def poisoned(slot: int, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = prefill(slot, ids)
        return logits * torch.nan if ids[-1] == ord("!") else logits

    return poisoned


def test_a_shorter_slot_is_the_context(model: OpenELM, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, length=10)
    with pytest.raises(ConfigError, match="11 tokens"):
        engine.submit([65] * 11, config())
    tokens = list(engine.stream([65] * 8, config(max_tokens=50, temperature=0, stop=[])))
    assert len(tokens) <= 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lookup", "itself", "other"])
def test_guesses_change_no_text(model: OpenELM, tokenizer: Tokenizer, kind: str, temperature: float) -> None:
    other = OpenELM(model.config)
    other.initialise(torch.Generator().manual_seed(1))
    proposer = {
        "lookup": lambda: PromptLookup(),
        "itself": lambda: DraftModel(model, model, slots=2, length=96),
        "other": lambda: DraftModel(other, model, slots=2, length=96),
    }[kind]()
    engine = Engine(model, tokenizer, slots=2, proposer=proposer)
    asked = [config(seed, temperature=temperature, max_tokens=40) for seed in range(4)]
    prompts = ["to be or not to be or not", "abcabcabcabc", "xyz", "so so so so so"]
    generations = [
        engine.submit(prompt_ids(tokenizer, prompt), each) for prompt, each in zip(prompts, asked, strict=True)
    ]
    found = finished(engine, *generations)
    assert found == [alone(model, tokenizer, *pair) for pair in zip(prompts, asked, strict=True)]
    proposed = sum(generation.proposed_tokens for generation in generations)
    accepted = sum(generation.accepted_tokens for generation in generations)
    assert 0 <= accepted <= proposed and proposed > 0
    if kind == "itself" and temperature == 0.0:
        assert accepted == proposed - sum(_unused(generation) for generation in generations)


def _unused(generation: Generation) -> int:
    """Guesses behind the end of a text are not asked for their worth."""
    return generation.proposed_tokens - generation.accepted_tokens if generation.ids[-1] == 257 else 0


def test_guesses_of_a_prompt_are_what_followed_there() -> None:
    lookup = PromptLookup(most=3, longest=2)
    assert lookup.propose(0, [1, 2, 3, 4, 9, 1, 2], 8) == [3, 4, 9]
    assert lookup.propose(0, [1, 2, 3, 4, 9, 1, 2], 2) == [3, 4]
    assert lookup.propose(0, [5, 2, 7, 2], 8) == [7, 2]
    assert lookup.propose(0, [1, 2, 3], 8) == []
    assert lookup.propose(0, [1], 8) == []
    assert lookup.propose(0, [256, 1, 0, 256 * 256, 1], 8) == [0, 256 * 256, 1]  # not within the bytes of an id


def test_a_draft_model_of_another_vocabulary_is_refused(model: OpenELM) -> None:
    other = OpenELM(model.config.model_copy(update={"vocab_size": 261}))
    with pytest.raises(ConfigError, match="261"):
        DraftModel(other, model, slots=1, length=8)


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_the_distribution_of_two_tokens_is_the_models_own(model: OpenELM, tokenizer: Tokenizer, kind: str) -> None:
    """Chi-squared over the likeliest first tokens and what follows the likeliest of them, 2,000 texts."""
    sharp = copy.deepcopy(model)
    with torch.no_grad():
        sharp.transformer.norm.weight.mul_(3)
    ids = prompt_ids(tokenizer, "abab")
    proposer = PromptLookup() if kind == "lookup" else DraftModel(sharp, sharp, slots=8, length=96)
    engine = Engine(sharp, tokenizer, slots=8, proposer=proposer)
    generations = [engine.submit(ids, config(seed, max_tokens=3)) for seed in range(2000)]
    found = finished(engine, *generations)
    with torch.no_grad():
        first = sharp(torch.tensor([ids]))[0, -1, :258].softmax(-1)
        best = int(first.argmax())
        second = sharp(torch.tensor([[*ids, best]]))[0, -1, :258].softmax(-1)
    for probabilities, drawn in (
        (first, [text[0] for text in found]),
        (second, [text[1] for text in found if text[0] == best and len(text) > 1]),
    ):
        likely = probabilities.topk(8).indices.tolist()
        expected = [float(probabilities[token]) * len(drawn) for token in likely]
        counts = [drawn.count(token) for token in likely]
        expected.append(len(drawn) - sum(expected))
        counts.append(len(drawn) - sum(counts))
        statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
        assert statistic < 26.1  # 8 degrees of freedom, 1 in 1,000
