"""Answers behind shared prompts, against each text computed whole and alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openelm.errors import ConfigError, NumericError
from openelm.evaluate.foreign import TransformersScores
from openelm.evaluate.trees import Answer, Forest, OurScores, Tree, answer_likelihoods
from openelm.kernels import native
from openelm.model.packed import pack_model
from openelm.model.transformer import OpenELM

SHAPES = ((5, (1, 1)), (17, (4, 7, 1, 9)), (1, (3,)), (40, (2, 6)))


def drawn(vocab_size: int) -> list[Tree]:
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=generator).tolist())

    return [Tree(ids(prompt), tuple(ids(answer) for answer in answers)) for prompt, answers in SHAPES]


def alone(logits: Tensor, tree: Tree, answer: tuple[int, ...]) -> Answer:
    """Read an answer off the logits (T, V) of its whole text."""
    rows = logits[len(tree.prompt) - 1 : -1]
    nats = sum(float(row.log_softmax(-1)[token]) for row, token in zip(rows, answer, strict=True))
    return Answer(nats, [int(row.argmax()) for row in rows] == list(answer))


def test_answers_are_those_of_whole_texts(model: OpenELM) -> None:
    wide = model.to(torch.float64)
    try:
        trees = drawn(257)
        found = answer_likelihoods(OurScores(wide, 257), trees)
        for tree, answers in zip(trees, found, strict=True):
            for ids, answer in zip(tree.answers, answers, strict=True):
                with torch.no_grad():
                    wanted = alone(wide(torch.tensor([[*tree.prompt, *ids]]))[0, :, :257], tree, ids)
                assert answer.nats == pytest.approx(wanted.nats, abs=1e-9)
                assert answer.is_greedy == wanted.is_greedy
    finally:
        model.to(torch.float32)


def test_the_likeliest_answer_is_greedy(model: OpenELM) -> None:
    prompt, text = (256, 10, 20), [256, 10, 20]
    with torch.no_grad():
        for _ in range(4):
            text.append(int(model(torch.tensor([text]))[0, -1, :257].argmax()))
    likeliest = tuple(text[3:])
    other = (*likeliest[:-1], (likeliest[-1] + 1) % 257)
    found = answer_likelihoods(OurScores(model, 257), [Tree(prompt, (likeliest, other))])
    assert [answer.is_greedy for answer in found[0]] == [True, False]


@pytest.mark.skipif(native.kernels_name() == "torch", reason="torch's products depend on the company")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_changes_no_bit(model: OpenELM, dtype: torch.dtype) -> None:
    narrow = OpenELM(model.config).to(dtype)
    narrow.load_state_dict(model.state_dict())
    packed = pack_model(narrow)
    assert packed is not None
    scores, trees = OurScores(packed, 257), drawn(257)
    assert answer_likelihoods(scores, trees) == [answer_likelihoods(scores, [tree])[0] for tree in trees]


def test_each_token_sees_its_prompt_and_itself_alone() -> None:
    trees = drawn(100)
    forest = Forest(trees)
    owner = list[tuple[int, int]]()  # tree, and answer or -1
    for number, tree in enumerate(trees):
        owner += [(number, -1)] * len(tree.prompt)
        for place, answer in enumerate(tree.answers):
            owner += [(number, place)] * (len(answer) - 1)
    for i, (tree, part) in enumerate(owner):
        for j, (other, of) in enumerate(owner):
            assert bool(forest.visible[i, j]) == (j <= i and tree == other and of in (-1, part))
    assert len(owner) == sum(tree.tokens for tree in trees) == len(forest.tokens)
    assert int(forest.positions.max()) + 1 == max(tree.length for tree in trees)


SHAPE = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 64, "max_position_embeddings": 64}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"num_key_value_heads": 2}),
        ("Granite", {"logits_scaling": 8.0}),  # does more to its states than a product
        ("GPTNeoX", {}),
    ],
)
def test_models_of_transformers_answer_as_they_do_alone(name: str, options: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
    trees = drawn(101)
    for tree, answers in zip(trees, answer_likelihoods(TransformersScores(model), trees), strict=True):
        for ids, answer in zip(tree.answers, answers, strict=True):
            with torch.no_grad():
                wanted = alone(model(torch.tensor([[*tree.prompt, *ids]])).logits[0], tree, ids)
            assert answer.nats == pytest.approx(wanted.nats, abs=1e-6) and answer.is_greedy == wanted.is_greedy


@pytest.mark.filterwarnings("ignore")
def test_texts_beyond_a_window_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MistralConfig(**SHAPE, sliding_window=16, num_key_value_heads=2)
    scores = TransformersScores(transformers.MistralForCausalLM(config).eval())
    assert answer_likelihoods(scores, [Tree(tuple(range(10)), ((1, 2, 3), (4,)))])
    with pytest.raises(ConfigError, match="longer than the 16"):
        answer_likelihoods(scores, [Tree(tuple(range(16)), ((1, 2, 3),))])


@pytest.mark.filterwarnings("ignore")
def test_models_that_choose_positions_themselves_are_refused() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match="lm-evaluation-harness itself"):
        TransformersScores(transformers.BloomForCausalLM(config).eval())


def test_a_model_that_is_not_finite_is_told(model: OpenELM) -> None:
    damaged = OpenELM(model.config)
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.transformer.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="log-likelihood"):
        answer_likelihoods(OurScores(damaged, 257), drawn(257))
