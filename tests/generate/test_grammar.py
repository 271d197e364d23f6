"""Constrained text: whatever the model wants, what comes out is what was asked for, and it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch

from openelm.errors import ConfigError
from openelm.generate import grammar
from openelm.generate.engine import generate, prompt_ids
from openelm.generate.grammar import Constraint
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_tokenizer

CORPUS = ['{"name": "The quick brown fox", "tags": ["a", "b"], "age": 12}\n', "To be, or not to be: é 🦙 [1, 2]\n"]
CONTEXT = 600


def byte_level() -> Tokenizer:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return HuggingFaceTokenizer(library.to_str().encode())


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": ByteTokenizer,
    "SentencePiece": lambda: train_tokenizer(CORPUS, 330),
    "byte-level with a leading space": byte_level,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def model() -> OpenELM:
    """Untrained, with tokens up to some hundred times as likely as others."""
    fields = {"vocab_size": 340, "max_context_length": CONTEXT, "num_transformer_layers": 1, "model_dim": 16}
    made = OpenELM(ModelConfig.parse({**fields, "head_dim": 8, "num_gqa_groups": 1, "ffn_dim_divisor": 16}))
    made.initialise(torch.Generator().manual_seed(3))
    with torch.no_grad():
        made.head_weight.mul_(4)
    return made


def run(model: OpenELM, tokenizer: Tokenizer, prompt: str = "x", **config: object) -> list[Token]:
    ids = prompt_ids(tokenizer, prompt) or tokenizer.encode(" ")[:1]
    return list(generate(model, tokenizer, ids, SamplingConfig.parse({"max_tokens": 560, **config})))


def text_of(tokens: list[Token]) -> str:
    assert tokens[-1].finish_reason == "stop", "".join(token.text for token in tokens)[-200:]
    return "".join(token.text for token in tokens)


def any_text(tokenizer: Tokenizer, seed: int, **config: object) -> str:
    """Choose among the allowed tokens with equal chances."""
    constraint = Constraint.of(SamplingConfig.parse(config), tokenizer, tokenizer.encode("x"))
    assert constraint is not None
    chance, data = random.Random(seed), b""
    while (chosen := chance.choice(constraint.allowed().nonzero().flatten().tolist())) != tokenizer.eos_id:
        constraint.accept(chosen)
        data += tokenizer.token_bytes(chosen)
    return data.decode()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "role": {"enum": ["cat", "Dog é", None, 1.5]},
        "tags": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            "maxItems": 3,
        },
        "note": {"type": "string", "pattern": "^[a-c]{2}$"},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        {"name", "age", "role", "tags"} <= value.keys() <= {"name", "age", "role", "tags", "note"}
        and 1 <= len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and value["role"] in ["cat", "Dog é", None, 1.5]
        and len(value["tags"]) <= 3
        and all(len(row) <= 2 and all(type(item) is bool for item in row) for row in value["tags"])
        and re.fullmatch("[a-c]{2}", value.get("note", "aa")) is not None
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 5.0])
def test_an_untrained_model_writes_json_that_its_schema_accepts(
    model: OpenELM, tokenizer: Tokenizer, temperature: float
) -> None:
    texts = set()
    for seed in range(8):
        text = text_of(run(model, tokenizer, json_schema=PERSON, temperature=temperature, seed=seed))
        assert is_person(json.loads(text)), text
        texts.add(text)
    assert (len(texts) == 1) == (temperature == 0.0)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"logit_bias": {0: 100, 257: 100}}])
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 2.0, "presence_penalty": 2, "frequency_penalty": -2}])
def test_no_other_control_breaks_the_constraint(
    model: OpenELM, filters: dict[str, Any], penalties: dict[str, Any]
) -> None:
    text = text_of(run(model, ByteTokenizer(), json_schema=PERSON, temperature=1.0, **filters, **penalties))
    assert is_person(json.loads(text))


def test_the_empty_schema_is_any_json(model: OpenELM) -> None:
    kinds = set()
    for seed in range(60):
        tokens = run(model, ByteTokenizer(), json_schema={}, temperature=3.0, seed=seed, max_tokens=80)
        if tokens[-1].finish_reason == "stop":
            kinds.add(type(json.loads(text_of(tokens))))
    assert len(kinds) >= 4


def test_json_is_written_as_json_dumps_does(model: OpenELM) -> None:
    schema = {"const": {"a": [1, True], "b": {"c": "d"}}}
    assert text_of(run(model, ByteTokenizer(), json_schema=schema)) == '{"a": [1, true], "b": {"c": "d"}}'


def test_a_recursive_schema_nests() -> None:
    tree = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    texts = {any_text(ByteTokenizer(), seed, json_schema=tree) for seed in range(12)}
    assert all(re.fullmatch(r"\[+\]+", text) and json.loads(text) is not None for text in texts)
    assert len(texts) > 2


@pytest.mark.parametrize(
    "regex", [r"\d{3}-[a-f]{2,4}", "(yes|no|perhaps)", "a/b?[/]c{3}", r"[^a]é.{2}🦙", "^ab?$", r"(\w{1,5} ){2}end", ""]
)
def test_a_regex_is_matched_as_python_matches_ascii(model: OpenELM, tokenizer: Tokenizer, regex: str) -> None:
    for seed in range(6):
        text = text_of(run(model, tokenizer, regex=regex, temperature=1.0, seed=seed, max_tokens=590))
        assert re.fullmatch(regex, text, re.ASCII), text


ARITHMETIC = """start: term (("+" | "-") term)?
term: NUMBER | "(" start ")"
NUMBER: /[1-9]/ /[0-9]/?
"""


def test_a_grammar_is_followed(tokenizer: Tokenizer) -> None:
    texts = [any_text(tokenizer, seed, grammar=ARITHMETIC) for seed in range(20)]
    for text in texts:
        reduced = re.sub(r"[1-9][0-9]?", "n", text)
        for _ in range(len(text)):
            reduced = re.sub(r"\(n([+-]n)?\)", "n", reduced)
        assert re.fullmatch("n([+-]n)?", reduced), text
    assert len(set(texts)) > 1


@pytest.mark.parametrize("prompt", ["", "x"])
def test_the_text_is_exact_where_a_tokenizer_takes_a_leading_space_off(model: OpenELM, prompt: str) -> None:
    tokenizer = byte_level()
    assert tokenizer.leading_space
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eos_id]
    for regex in ("ab", " ab"):
        config = SamplingConfig(regex=regex, seed=1)
        assert text_of(list(generate(model, tokenizer, ids, config))) == regex  # type: ignore[arg-type]


def test_eos_is_allowed_exactly_where_the_text_may_end_and_alone_where_it_must(tokenizer: Tokenizer) -> None:
    pattern = re.compile("ab?(cd)*")
    for seed in range(10):
        chance = random.Random(seed)
        constraint = Constraint.of(SamplingConfig(regex=pattern.pattern), tokenizer, tokenizer.encode("x"))
        assert constraint is not None
        text = b""
        for _ in range(8):
            ids = constraint.allowed().nonzero().flatten().tolist()
            assert (tokenizer.eos_id in ids) == (pattern.fullmatch(text.decode()) is not None)
            others = [token_id for token_id in ids if token_id != tokenizer.eos_id]
            assert all(tokenizer.token_bytes(token_id) for token_id in others)
            constraint.accept(chosen := chance.choice(others))
            text += tokenizer.token_bytes(chosen)
    done = Constraint.of(SamplingConfig(regex="a"), tokenizer, tokenizer.encode("x"))
    assert done is not None
    done.accept(next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"a"))
    assert done.allowed().nonzero().flatten().tolist() == [tokenizer.eos_id]


def test_every_token_that_fits_is_allowed_whatever_its_length(tokenizer: Tokenizer) -> None:
    words = ["brown fox", "be, or"]
    constraint = Constraint.of(SamplingConfig(regex="|".join(words)), tokenizer, tokenizer.encode("x"))
    assert constraint is not None
    expected = {
        token_id
        for token_id in range(tokenizer.vocab_size)
        if (piece := tokenizer.token_bytes(token_id)) and any(word.encode().startswith(piece) for word in words)
    }
    assert set(constraint.allowed().nonzero().flatten().tolist()) == expected


def test_a_text_that_is_cut_by_max_tokens_says_so(model: OpenELM) -> None:
    assert run(model, ByteTokenizer(), regex="a{50}", max_tokens=20)[-1].finish_reason == "length"


WRONG = [
    *(
        ("json_schema", schema, word)
        for schema, word in [
            ({"type": "strnig"}, "strnig"),
            ({"not": {"type": "null"}}, "not"),
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"$ref": "#/nowhere"}, "nowhere"),
            ({"$ref": "http://example.org/schema"}, "example.org"),
            ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
            ({"type": "string", "format": "nonsense"}, "nonsense"),
            ({"$ref": "#"}, "followed"),
            ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
            ({"enum": [float]}, "read"),
        ]
    ),
    *(
        ("regex", regex, word)
        for regex, word in [("(", "unclosed"), ("(?=a)b", "look"), (r"(a)\1", "backref"), ("a\ud800", "read")]
    ),
    *(
        ("grammar", text, word)
        for text, word in [
            ("", "start rule"),
            ("start: other", "other"),
            ('start: ("a"', "Expected"),
            ('start: start "a"', "followed"),
            ("start: @x", "@x"),
        ]
    ),
]


@pytest.mark.parametrize(("field", "value", "word"), WRONG)
def test_a_constraint_that_cannot_be_met_is_a_config_error_before_any_token(
    field: str, value: object, word: str
) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        Constraint.of(SamplingConfig(**{field: value}), ByteTokenizer(), [65])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 500


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


RULES = "\n".join(["start: a0", *(f"a{i}: a{i + 1} | /x{i}/" for i in range(2500)), 'a2500: "x"'])
HOSTILE = {
    "nesting": {"json_schema": nested(150)},
    "much nesting": {"json_schema": nested(5000)},
    "many bytes": {"json_schema": {"enum": ["x" * 70_000]}},
    "a huge divisor": {"json_schema": {"anyOf": [{"type": "integer", "multipleOf": 999_983 - i} for i in range(4)]}},
    "brackets": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "intersection": {"grammar": "start: A\nA: /(.*a.{20}.*)/ & ~/(.*b.{20}.*)/ & /(..)*/"},
    "a chain of rules": {"grammar": RULES},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constraint_is_a_config_error_in_seconds(name: str) -> None:
    before = time.process_time()
    with pytest.raises(ConfigError):
        Constraint.of(SamplingConfig(**HOSTILE[name]), ByteTokenizer(), [65])  # type: ignore[arg-type]
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "config",
    [
        {"grammar": 'start: start start | "a" | "b" | ""'},
        {"regex": "(.*a.{30})|(.*b.{31})|(.*c.{32})|(.{0,200}d.{0,50})"},
        {"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}},
        {"json_schema": {"allOf": [{"type": "string", "pattern": f"^(.*[{c}].{{12}})*$"} for c in "abcdefgh"]}},
        {"json_schema": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}},
    ],
)
def test_a_constraint_that_is_hard_to_follow_costs_little_or_ends_the_request(config: dict[str, Any]) -> None:
    chance, ids = random.Random(0), list(range(97, 101))
    started, steps = time.process_time(), 0
    with contextlib.suppress(ConfigError):
        constraint = Constraint.of(SamplingConfig(**config), ByteTokenizer(), [65])
        assert constraint is not None
        while steps < 100:
            steps += 1
            allowed = constraint.allowed().nonzero().flatten().tolist()
            constraint.accept(chance.choice([i for i in ids if i in allowed] or allowed))
    assert time.process_time() - started < 1 + 0.05 * steps


def test_one_request_leaves_nothing_behind_for_the_next() -> None:
    """Copies of one matcher would share a lexer, and with it how much work is left."""
    regex = "(.*a.{30})|(.*b.{31})|(.*c.{32})|(.{0,200}d.{0,50})"

    def followed_tokens() -> int:
        constraint, chance = Constraint.of(SamplingConfig(regex=regex), ByteTokenizer(), [65]), random.Random(0)
        assert constraint is not None
        tokens = 0
        with contextlib.suppress(ConfigError):
            while tokens < 400:
                constraint.accept(chance.choice(constraint.allowed().nonzero().flatten().tolist()))
                tokens += 1
        return tokens

    assert followed_tokens() == followed_tokens() > 10


def test_a_grammar_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SamplingConfig(regex="tried only once")
    Constraint.of(config, ByteTokenizer(), [65])
    monkeypatch.setattr(grammar.subprocess, "run", None)
    Constraint.of(config, ByteTokenizer(), [65])


def test_a_tokenizer_without_an_end_is_a_config_error() -> None:
    endless = ByteTokenizer()
    endless.eos_id = None
    with pytest.raises(ConfigError, match="EOS"):
        Constraint.of(SamplingConfig(regex="a"), endless, [65])


def test_a_missing_package_is_a_config_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llguidance.*openelm-framework\[grammar\]"):
        Constraint.of(SamplingConfig(regex="a"), ByteTokenizer(), [65])
    assert Constraint.of(SamplingConfig(), ByteTokenizer(), [65]) is None


@pytest.mark.parametrize("one", ["json_schema", "regex", "grammar"])
def test_at_most_one_constraint_is_allowed(one: str) -> None:
    given: dict[str, Any] = {"json_schema": {}, "regex": "a", "grammar": 'start: "a"'}
    SamplingConfig.parse({one: given.pop(one)})
    with pytest.raises(ConfigError, match="at most one"):
        SamplingConfig.parse(given)
