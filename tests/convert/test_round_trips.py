"""A model that goes to another layout and back is the same model, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.errors import CheckpointError, ConfigError
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, weights_sha256
from openelm.model.weights import INDEX, open_weights
from openelm.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import PUBLISHED, Publish, odd_config, shallow

FILES = {"hf": "", "mlx": "", "gguf": "model.gguf", "corenet": "checkpoint.pt"}


def converted(source: Path, out: Path, to: str, **options: object) -> Path:
    """Convert, and return what the next conversion reads."""
    chosen = Options(to=to, **options)  # type: ignore[arg-type]
    with open_source(source) as opened:
        write(prepared(opened, chosen), out, chosen)
    return out / FILES[to]


def digest(folder: Path) -> str:
    return weights_sha256(load_model(folder).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("to", FILES)
def test_weights_come_back_byte_for_byte(publish: Publish, tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    first = publish(dtype=dtype)
    there = converted(first, tmp_path / "there", to)
    back = converted(there, tmp_path / "back", "hf")
    assert digest(back) == digest(first)
    found, given = (load_model(folder).config for folder in (back, first))
    assert (found.plan, found.vocab_size) == (given.plan, given.vocab_size)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("to", FILES)
def test_every_published_shape_comes_back(publish: Publish, tmp_path: Path, to: str, size: str) -> None:
    first = publish(shallow(size), dtype=torch.bfloat16)
    there = converted(first, tmp_path / "there", to)
    assert digest(converted(there, tmp_path / "back", "hf")) == digest(first)


def test_a_config_that_follows_the_published_rule_is_written_by_it_again(publish: Publish, tmp_path: Path) -> None:
    fields = {"num_transformer_layers": 4, "model_dim": 256, "head_dim": 16, "vocab_size": 300}
    config = ModelConfig.parse(fields)
    back = converted(converted(publish(config), tmp_path / "there", "corenet"), tmp_path / "back", "hf")
    assert load_model(back).config == config


def test_weights_in_several_files_are_the_same_weights(publish: Publish, tmp_path: Path) -> None:
    first = publish()
    cut = converted(first, tmp_path / "cut", "hf", shard_bytes=40_000)
    assert len(list(cut.glob("model-*-of-*.safetensors"))) > 3 and (cut / INDEX).is_file()
    assert digest(cut) == digest(first)
    assert digest(converted(cut, tmp_path / "whole", "hf")) == digest(first)
    assert not (tmp_path / "whole" / INDEX).exists()


def test_the_tokenizer_goes_along(publish: Publish, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "The lazy dog talks, naïvely; 12 quick foxes\n\n listen 🦊."
    gguf = converted(publish(), tmp_path / "gguf", "gguf")
    back = converted(gguf, tmp_path / "back", "hf")
    assert load_tokenizer(back).encode(text) == tokenizer.encode(text)
    config = load_model(back).config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("chat_tuned", [True, False])
def test_only_a_model_tuned_to_chat_has_a_chat_template(
    publish: Publish, tmp_path: Path, to: str, chat_tuned: bool
) -> None:
    there = converted(publish(), tmp_path / "there", to, chat_tuned=chat_tuned)
    with open_source(there) as source:
        assert source.chat_tuned is chat_tuned
    assert (tmp_path / "there" / "chat_template.jinja").exists() is (chat_tuned and to == "hf")


@pytest.mark.parametrize("rows", [290, 300, 384])
def test_rows_of_the_vocabulary_are_cut_off_or_zeros(publish: Publish, tmp_path: Path, rows: int) -> None:
    first = publish(odd_config(vocab_size=320))
    if rows < 300:
        with pytest.raises(ConfigError, match="290 rows for a vocabulary of 300 ids"):
            converted(first, tmp_path / "there", "hf", rows=rows)
        return
    there = load_model(converted(first, tmp_path / "there", "hf", rows=rows))
    assert there.config.vocab_size == rows
    kept = min(rows, 320)
    assert torch.equal(there.head_weight[:kept], load_model(first).head_weight[:kept])
    assert not there.head_weight[kept:].any()


def test_rounding_is_torchs_own(publish: Publish, tmp_path: Path) -> None:
    first = publish()
    there = load_model(converted(first, tmp_path / "there", "hf", dtype="bf16"))
    assert weights_sha256(there.state_dict()) == weights_sha256(load_model(first, dtype=torch.bfloat16).state_dict())


def test_an_untied_output_matrix_stays_its_own(publish: Publish, tmp_path: Path) -> None:
    first = publish(odd_config(share_input_output_layers=False))
    for to in ("hf", "corenet", "mlx"):
        back = converted(converted(first, tmp_path / f"{to} there", to), tmp_path / f"{to} back", "hf")
        assert digest(back) == digest(first)
        assert not load_model(back).config.share_input_output_layers


def test_what_a_runtime_cannot_compute_is_refused(publish: Publish, tmp_path: Path) -> None:
    rounded = publish(odd_config(rope_bf16_frequencies=True))
    for to in ("gguf", "mlx"):
        with pytest.raises(ConfigError, match="rounds no rotary frequencies"):
            converted(rounded, tmp_path / "there", to)
    untied = publish(odd_config(share_input_output_layers=False), name="untied")
    with pytest.raises(ConfigError, match="no output matrix of its own"):
        converted(untied, tmp_path / "there", "gguf")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen", "a layer"])
def test_a_tensor_too_few_or_too_many_stops_a_conversion(publish: Publish, tmp_path: Path, change: str) -> None:
    folder = publish()
    tensors = {name: tensor.read() for name, tensor in open_weights(folder).items()}
    name = "transformer.layers.1.ffn.proj_2.weight"
    {
        "missing": lambda: tensors.pop(name),
        "unknown": lambda: tensors.update({"transformer.layers.1.ffn.proj_3.weight": tensors[name].clone()}),
        "misshapen": lambda: tensors.update({name: tensors[name][:-1].contiguous()}),
        "a layer": lambda: tensors.update({name.replace(".1.", ".3."): tensors[name].clone()}),
    }[change]()
    (folder / "manifest.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    torch.save(bare, tmp_path / "bare.pt")
    for source in (folder, tmp_path / "bare.pt"):
        with pytest.raises(CheckpointError, match=r"proj_[23]|layers\.3|layer"):
            converted(source, tmp_path / "there", "hf")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("bits", [None, "4"])
def test_apples_mlx_folder_is_read(publish: Publish, tmp_path: Path, bits: str | None) -> None:
    """Names without their prefix, another file name, and a config of three fields."""
    config = shallow("270m")
    ours = converted(publish(config, dtype=torch.float16), tmp_path / "ours", "mlx", quantize=bits)
    apple = tmp_path / "apple"
    apple.mkdir()
    tensors = {name: tensor.read() for name, tensor in open_weights(ours, packed=True).items()}
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, apple / "weights.safetensors")
    settings: dict[str, object] = {"model_name": "OpenELM", "vocab_size": 384, "max_context_length": 1024}
    if bits is not None:
        settings["quantization"] = {"group_size": 64, "bits": int(bits)}
    (apple / "config.json").write_text(json.dumps(settings))
    back = load_model(converted(apple, tmp_path / "back", "hf"))
    assert digest(tmp_path / "back") == digest(converted(ours, tmp_path / "plain", "hf"))
    assert (back.config.plan, back.config.max_context_length) == (config.plan, 1024)
