"""Hugging Face transformers loads our folders, with openelm imported and without it, and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, write
from openelm.model.folder import load_model, weights_sha256

from .conftest import PUBLISHED, Publish, odd_config, shallow

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")

TOKENS = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ours(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(tokens)


@pytest.mark.parametrize("size", ["odd", "untied", "rounded", *PUBLISHED])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_ours(publish: Publish, size: str, attention: str) -> None:
    odd = {"odd": {}, "untied": {"share_input_output_layers": False}, "rounded": {"rope_bf16_frequencies": True}}
    folder = publish(odd_config(**odd[size]) if size in odd else shallow(size))
    with torch.no_grad():
        theirs = loaded(folder, attn_implementation=attention)(TOKENS).logits
    assert (theirs - ours(folder, TOKENS)).abs().max() < 1e-4


def test_saving_and_loading_changes_nothing(publish: Publish, tmp_path: Path) -> None:
    folder = publish()
    loaded(folder).save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert weights_sha256(again.state_dict()) == weights_sha256(load_model(folder).state_dict())
    assert again.config == load_model(folder).config


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_generation_without(publish: Publish, cache: str) -> None:
    model = loaded(publish())
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kept = model.generate(TOKENS[:, :9], cache_implementation=cache, disable_compile=True, **options)
    plain = model.generate(TOKENS[:, :9], use_cache=False, **options)
    assert torch.equal(kept, plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(publish: Publish, side: str) -> None:
    model = loaded(publish())
    rows = [TOKENS[0, :5], TOKENS[1, :12]]
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        padded[number, place], mask[number, place] = row, 1
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
        for number, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            assert (logits[number][mask[number].bool()] - alone).abs().max() < 1e-4
    if side == "left":
        options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        together = model.generate(padded, attention_mask=mask, **options)
        for number, row in enumerate(rows):
            assert torch.equal(together[number, 12:], model.generate(row[None], **options)[0, len(row) :])


def test_gradients_are_ours_and_checkpointing_changes_none(publish: Publish) -> None:
    folder = publish()
    mine, found = load_model(folder), []
    logits = mine(TOKENS).flatten(0, 1)
    torch.nn.functional.cross_entropy(mine(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert logits.requires_grad
    for checkpointing in (False, True):
        model = loaded(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None
        assert (found[0][name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max() + 1e-7
        assert torch.equal(found[0][name], found[1][name])


def test_hidden_states_and_attentions_can_be_asked_for(publish: Publish) -> None:
    model = loaded(publish(), attn_implementation="eager")
    output = model(TOKENS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and [a.shape[1] for a in output.attentions] == [2, 6, 3]
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)


ALONE = """
import sys
sys.modules["openelm"] = None  # as if it were not installed
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save([model(torch.load(sys.argv[2])).logits, tokenizer("The fox talks.").input_ids], sys.argv[3])
"""


def test_a_self_contained_folder_needs_transformers_alone(publish: Publish, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    with open_source(publish()) as source:
        write(source, folder, Options(to="hf", self_contained=True))
    torch.save(TOKENS, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "tokens.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={"HF_HOME": str(tmp_path), "PATH": ""}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits, ids = torch.load(tmp_path / "out.pt")
    assert (logits - ours(folder, TOKENS)).abs().max() < 1e-4
    with open_source(folder) as source:
        assert source.tokenizer is not None
        assert ids == [source.tokenizer.bos_id, *source.tokenizer.encode("The fox talks.")]


@pytest.mark.parametrize("alone", [True, False], ids=["its own files", "openelm imported"])
def test_a_quantised_folder_is_refused_with_the_way_out(publish: Publish, tmp_path: Path, alone: bool) -> None:
    options = Options(to="mlx", quantize="4", self_contained=alone)
    with open_source(publish()) as source:
        write(source, tmp_path / "packed", options)
    if not alone:
        with pytest.raises(ValueError, match="openelm convert"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        return
    command = [sys.executable, "-c", ALONE, str(tmp_path / "packed"), "no tokens", "no output"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={"HF_HOME": str(tmp_path), "PATH": ""}
    )
    assert done.returncode != 0 and "the matrices are quantised" in done.stderr


def test_a_self_contained_folder_stays_so_when_it_is_saved_again(publish: Publish, tmp_path: Path) -> None:
    plain = publish()
    with open_source(plain) as source:
        write(source, tmp_path / "alone", Options(to="hf", self_contained=True))
    loaded(tmp_path / "alone").save_pretrained(tmp_path / "again")
    files = {file.name: file.read_bytes() for file in (tmp_path / "alone").glob("*.py")}
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").glob("*.py")} == files and len(files) == 2
    configs = [json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("alone", "again")]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    loaded(plain).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))


def test_the_tokenizer_of_transformers_gives_our_ids(publish: Publish) -> None:
    folder = publish()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with open_source(folder) as source:
        assert source.tokenizer is not None
        for text in ("The quick brown fox", "  two  spaces\n\nand lines ", "naïve 🦊 12345", "", "a"):
            ids = theirs(text).input_ids
            assert ids == [source.tokenizer.bos_id, *source.tokenizer.encode(text)]
            assert theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("first", ["openelm", "transformers"])
def test_importing_registers_the_model_in_any_order(publish: Publish, first: str) -> None:
    second = {"openelm": "transformers", "transformers": "openelm"}[first]
    code = f"import {first}, {second}, sys; c = transformers.AutoConfig.from_pretrained(sys.argv[1]); "
    code += "print(type(transformers.AutoModelForCausalLM.from_config(c)).__module__)"
    command = [sys.executable, "-c", code, str(publish())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "openelm.huggingface.modeling_openelm", done.stderr[-2000:]


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "GradientCheckpointingLayer", "PreTrainedModel"])
def test_other_models_may_be_what_makes_transformers_define_its_auto_classes(publish: Publish, name: str) -> None:
    """Half-way through a module that ours needs too: transformers imports a name when it is asked for."""
    code = f"import openelm, sys, transformers; transformers.{name}; "
    code += "c = transformers.AutoConfig.from_pretrained(sys.argv[1]); "
    code += "print(type(transformers.AutoModelForCausalLM.from_config(c)).__module__)"
    command = [sys.executable, "-c", code, str(publish())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "openelm.huggingface.modeling_openelm", done.stderr[-2000:]


def test_packed_rows_are_separate_documents(publish: Publish) -> None:
    """Positions that begin again say where a document of a row begins; each attends to itself alone."""
    model = loaded(publish())
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None].expand(2, -1)
    with torch.no_grad():
        apart = torch.cat([model(TOKENS[:, :25]).logits, model(TOKENS[:, 25:]).logits], dim=1)
        for use_cache in (True, False):
            packed = model(TOKENS, position_ids=positions, use_cache=use_cache).logits
            assert (packed - apart).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["tie_word_embeddings", "share_input_output_layers"])
def test_an_output_matrix_of_its_own_is_saved_and_read(publish: Publish, tmp_path: Path, name: str) -> None:
    """`tie_word_embeddings` is what programs of the ecosystem set, after they trained the output matrix alone."""
    model = loaded(publish())
    setattr(model.config, name, False)
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())
    model.save_pretrained(tmp_path / "untied")
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert torch.equal(loaded(tmp_path / "untied")(TOKENS).logits, expected)
        assert (ours(tmp_path / "untied", TOKENS) - expected).abs().max() < 1e-4


def test_a_config_that_says_both_is_tied_only_if_both_are(publish: Publish) -> None:
    config = transformers.AutoConfig.from_pretrained(publish())
    values = config.to_dict()
    assert "tie_word_embeddings" not in values, "one word for it in the file"
    assert config.auto_map == {} and "auto_map" not in values
    for share, tie in ((True, False), (False, True), (False, False), (True, True)):
        both = type(config)(**{**values, "share_input_output_layers": share, "tie_word_embeddings": tie})
        assert both.share_input_output_layers == both.tie_word_embeddings == (share and tie)
    untied = loaded(publish(name="again"), tie_word_embeddings=False)
    assert untied.config.share_input_output_layers is untied.config.tie_word_embeddings is False


def test_more_rows_of_the_vocabulary_are_saved_and_read(publish: Publish, tmp_path: Path) -> None:
    model = loaded(publish())
    model.resize_token_embeddings(308)
    model.save_pretrained(tmp_path / "wider")
    with torch.no_grad():
        assert (ours(tmp_path / "wider", TOKENS) - model(TOKENS).logits).abs().max() < 1e-4
    assert load_model(tmp_path / "wider").config.vocab_size == 308


GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_beam_search_with_a_cache_is_beam_search_without(publish: Publish) -> None:
    model, beams = loaded(publish()), {**GREEDY, "max_new_tokens": 8, "num_beams": 3}
    plain = model.generate(TOKENS[:, :9], use_cache=False, **beams)
    for cache in ("dynamic", "static"):
        kept = model.generate(TOKENS[:, :9], cache_implementation=cache, disable_compile=True, **beams)
        assert torch.equal(kept, plain)
    greedy = model.generate(TOKENS[:, :9], **{**beams, "num_beams": 1})
    assert not torch.equal(greedy, plain), "a search that finds more than greed"


@pytest.mark.parametrize("drafts", ["prompt lookup", "assistant"])
def test_drafts_change_no_token(publish: Publish, drafts: str) -> None:
    model, row = loaded(publish()), TOKENS[:1, :9].repeat(1, 2)
    other = loaded(
        publish(
            odd_config(num_transformer_layers=1, num_query_heads=[2], num_kv_heads=[1], ffn_multipliers=[0.5]),
            name="draft",
        )
    )
    options = {"assistant_model": other} if drafts == "assistant" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(row, **options, **GREEDY), model.generate(row, **GREEDY))


def test_a_pipeline_writes_what_generate_writes(publish: Publish) -> None:
    folder = publish()
    pipeline = transformers.pipeline("text-generation", model=folder, device="cpu")
    ids = pipeline.tokenizer("The fox", return_tensors="pt").input_ids
    expected = pipeline.tokenizer.decode(loaded(folder).generate(ids, **GREEDY)[0], skip_special_tokens=True)
    (found,) = pipeline("The fox", **GREEDY)
    assert found["generated_text"] == expected


def test_weights_can_be_rounded_while_they_are_loaded(publish: Publish, tmp_path: Path) -> None:
    folder = publish()
    loaded(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    rounded = {name: value.bfloat16() for name, value in load_model(folder).state_dict().items()}
    assert weights_sha256(load_model(tmp_path / "rounded").state_dict()) == weights_sha256(rounded)


def test_layers_can_lie_on_the_disk(publish: Publish, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = publish()
    parts = ("transformer.token_embeddings", "transformer.norm", "lm_head", "transformer.layers.0")
    places = {**dict.fromkeys(parts, "cpu"), "transformer.layers.1": "disk", "transformer.layers.2": "disk"}
    offloaded = loaded(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert offloaded.transformer.layers[2].ffn.proj_1.weight.device.type == "meta"
    expected = loaded(folder, device_map="auto").generate(TOKENS[:, :9], **GREEDY)
    assert torch.equal(offloaded.generate(TOKENS[:, :9], **GREEDY), expected)


def test_a_compiled_model_is_two_graphs_without_a_break(publish: Publish) -> None:
    """One graph for the prompt and one for all steps; a static cache keeps its shape, so none is compiled again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = loaded(publish())
    expected = [model.generate(TOKENS[:, :length], **GREEDY) for length in (9, 9)]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    model.generation_config.cache_implementation = "static"
    model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
    for tokens in expected:
        assert torch.equal(model.generate(tokens[:, :9], **GREEDY), tokens)
        assert graphs.frame_count == 2


@pytest.mark.slow
def test_compiled_code_writes_the_same_tokens(publish: Publish) -> None:
    model = loaded(publish())
    rows, mask = TOKENS[:, :9].clone(), torch.ones(2, 9, dtype=torch.long)
    rows[0, :5], mask[0, :5] = 0, 0
    expected = model.generate(rows, attention_mask=mask, **GREEDY)
    everywhere = transformers.CompileConfig(fullgraph=True, mode="default")
    everywhere._compile_all_devices = True  # generate compiles by itself where there is a GPU
    options = {"cache_implementation": "static", "compile_config": everywhere, **GREEDY}
    assert torch.equal(model.generate(rows, attention_mask=mask, **options), expected)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    options = {"cache_implementation": "static", **GREEDY}
    assert torch.equal(model.generate(rows, attention_mask=mask, **options), expected)
