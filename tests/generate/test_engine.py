"""The token loop against full forward passes, and against itself under every cut."""

from __future__ import annotations

import copy

import pytest
import torch

from openelm.errors import ConfigError, NumericError
from openelm.generate import engine as engine_module
from openelm.generate.engine import generate, generate_text, prompt_ids
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer, Tokenizer

GREEDY = SamplingConfig(temperature=0.0, max_tokens=30)


def run(model: OpenELM, tokenizer: Tokenizer, prompt: str, **config: object) -> list[Token]:
    values = {"max_tokens": 30, **config}
    return list(generate(model, tokenizer, prompt_ids(tokenizer, prompt), SamplingConfig.parse(values)))


class Scripted:
    """Stands in for a model: predicts the ids of a script, one after the other, each with certainty."""

    def __init__(self, like: OpenELM, script: list[int]) -> None:
        self.config, self.script = like.config, script


class ScriptedDecoder:
    """Stands in for the decoder of a `Scripted` model with one slot."""

    device = torch.device("cpu")

    def __init__(self, model: Scripted) -> None:
        self.model, self.position, self.held = model, -1, 0

    def used(self, slot: int) -> int:
        return self.held

    def truncate(self, slot: int, tokens: int) -> None:
        self.held = tokens

    def clear(self, slot: int) -> None:
        self.held = 0

    def copy(self, source: int, slot: int, tokens: int) -> None:
        self.held = tokens

    def prefill(self, slot: int, ids: list[int]) -> torch.Tensor:
        self.held += len(ids)
        self.position += 1
        logits = torch.full((self.model.config.vocab_size,), -50.0)
        logits[self.model.script[min(self.position, len(self.model.script) - 1)]] = 50.0
        return logits

    def step(self, ids: list[int], slots: list[int]) -> torch.Tensor:
        return self.prefill(0, ids)[None]


@pytest.fixture(autouse=True)
def scripts_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine_module.Decoder

    def decoder(model: OpenELM | Scripted, slots: int, length: int, **options: bool) -> object:
        return ScriptedDecoder(model) if isinstance(model, Scripted) else real(model, slots, length, **options)

    monkeypatch.setattr(engine_module, "Decoder", decoder)


def scripted(like: OpenELM, text: str) -> OpenELM:
    return Scripted(like, [*text.encode(), 257])  # type: ignore[return-value]


def test_cached_greedy_decoding_is_the_argmax_of_a_full_forward_at_every_step(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    ids = prompt_ids(tokenizer, "In the")
    for token in generate(model, tokenizer, ids, GREEDY):
        logits = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size]
        assert token.id == logits.argmax()
        assert token.logprob == pytest.approx(logits.log_softmax(-1)[token.id].item(), abs=1e-5)
        ids = [*ids, token.id]


def test_the_last_token_alone_says_why_it_ended(model: OpenELM, tokenizer: Tokenizer) -> None:
    tokens = run(model, tokenizer, "abc", max_tokens=5, seed=3)
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]


def test_generation_ends_at_eos_and_eos_has_no_text(model: OpenELM, tokenizer: Tokenizer) -> None:
    tokens = run(scripted(model, "héllo"), tokenizer, "x", temperature=0.0)
    assert "".join(token.text for token in tokens) == "héllo"
    assert (tokens[-1].id, tokens[-1].text, tokens[-1].finish_reason) == (257, "", "stop")


@pytest.mark.parametrize("stop", ["h", "é", "ll", "llo w", "é☃", "w😀", "😀", "😀!"])
def test_text_ends_before_a_stop_string_that_spans_tokens(model: OpenELM, tokenizer: Tokenizer, stop: str) -> None:
    text = "Hhé☃llo w😀!"
    tokens = run(scripted(model, text), tokenizer, "x", temperature=0.0, stop=[stop])
    assert "".join(token.text for token in tokens) == text[: text.index(stop)]
    assert tokens[-1].finish_reason == "stop"


def test_the_start_of_a_stop_string_is_handed_over_when_the_text_ends_with_it(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    for limit, reason in ((3, "length"), (30, "stop")):
        tokens = run(scripted(model, "abE"), tokenizer, "x", temperature=0.0, stop=["END"], max_tokens=limit)
        assert ([token.text for token in tokens][:2], tokens[-1].finish_reason) == (["a", "b"], reason)
        assert "".join(token.text for token in tokens) == "abE"


def test_streamed_text_is_the_decoded_ids_and_every_piece_is_whole_characters(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    text = "né ☃ 😀 日本"
    tokens = run(scripted(model, text), tokenizer, "x", temperature=0.0)
    assert "".join(token.text for token in tokens) == text == tokenizer.decode([token.id for token in tokens])
    assert all("\ufffd" not in token.text for token in tokens)


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_the_decoded_ids_for_random_bytes(model: OpenELM, tokenizer: Tokenizer, seed: int) -> None:
    tokens = run(model, tokenizer, "x", temperature=1.5, seed=seed, max_tokens=60)
    assert "".join(token.text for token in tokens) == tokenizer.decode([token.id for token in tokens])


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: OpenELM, tokenizer: Tokenizer) -> None:
    first, again, other = (run(model, tokenizer, "Once", seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_neither_the_global_generator_nor_a_request_between_changes_the_text(
    model: OpenELM, tokenizer: Tokenizer
) -> None:
    alone = run(model, tokenizer, "Once", seed=5)
    state = torch.get_rng_state()
    one = generate(model, tokenizer, prompt_ids(tokenizer, "Once"), SamplingConfig(seed=5, max_tokens=30))
    two = generate(model, tokenizer, prompt_ids(tokenizer, "Two!!"), SamplingConfig(seed=9, max_tokens=30))
    assert [token for token, _ in zip(one, two, strict=True)] == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_fills_the_context_and_ends_with_length(model: OpenELM, tokenizer: Tokenizer) -> None:
    context = model.config.max_context_length
    for prompt_tokens in (context - 3, context):
        ids = [tokenizer.bos_id, *[65] * (prompt_tokens - 1)]
        greedy = SamplingConfig(temperature=0.0, max_tokens=1000)
        tokens = list(generate(scripted(model, "b" * 200), tokenizer, ids, greedy))  # type: ignore[arg-type]
        assert len(tokens) == context - prompt_tokens + 1
        assert tokens[-1].finish_reason == "length"


def test_a_real_model_runs_to_the_end_of_its_context(model: OpenELM, tokenizer: Tokenizer) -> None:
    tokens = run(model, tokenizer, "a" * 90, max_tokens=1000, temperature=0.0)
    assert len(tokens) <= model.config.max_context_length - 91 + 1


def test_ids_the_tokenizer_does_not_have_are_never_chosen(model: OpenELM, tokenizer: Tokenizer) -> None:
    wide = copy.deepcopy(model)
    with torch.no_grad():
        wide.head_weight[258:] = 40 * wide.head_weight[:258].mean(0)
        wide.head_weight[259] *= -1
    for temperature in (0.0, 1.0):
        assert all(token.id < 258 for token in run(wide, tokenizer, "some text", temperature=temperature))


def test_generated_tokens_leave_the_model_trainable(model: OpenELM, tokenizer: Tokenizer) -> None:
    fresh = OpenELM(model.config)
    fresh.initialise(torch.Generator().manual_seed(0))
    generate_text(fresh, tokenizer, "abc", GREEDY)
    fresh(torch.tensor([[1, 2, 3]])).sum().backward()


def test_a_prompt_the_model_cannot_take_is_a_config_error(model: OpenELM, tokenizer: Tokenizer) -> None:
    for ids, words in (([], "empty"), ([65] * 97, "97 tokens"), ([65, 258], "outside"), ([-1], "outside")):
        with pytest.raises(ConfigError, match=words):
            next(generate(model, tokenizer, ids, GREEDY))


def test_logits_that_are_not_finite_are_a_numeric_error(model: OpenELM, tokenizer: Tokenizer) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.norm.weight[0] = torch.nan
    for temperature in (0.0, 0.8):
        with pytest.raises(NumericError):
            run(broken, tokenizer, "abc", temperature=temperature)


@pytest.mark.parametrize(("prompt", "expected"), [("", "b c"), ("a", " b c")])
def test_the_first_space_belongs_to_the_text_only_after_other_text(model: OpenELM, prompt: str, expected: str) -> None:
    class LeadingSpace(ByteTokenizer):
        """Puts a space before each text, as LLaMA's tokenizer does."""

        def __init__(self) -> None:
            super().__init__()
            self._leading_space = True

    assert generate_text(scripted(model, " b c"), LeadingSpace(), prompt, GREEDY) == expected
