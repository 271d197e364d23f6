"""A chat has the same ids in every runtime: those that the model was tuned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.model.folder import load_model
from openelm.text.chat import Message, encode_chat
from openelm.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

from .conftest import Publish, odd_config
from .test_runtimes import APART, FIRST_PIECE, llama_server

CHAT = [
    Message("system", "the quick brown fox"),
    Message("user", "jumps over\nthe lazy dog; "),
    Message("assistant", "a model talks"),
    Message("user", "and nobody listens"),
]
MESSAGES = [{"role": message.role, "content": message.content} for message in CHAT]


def tuned(folder: Path, out: Path, to: str) -> Path:
    options = Options(to=to, chat_tuned=True)
    with open_source(folder) as source:
        write(prepared(source, options), out, options)
    return out


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_transformers(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer if kind == "sentencepiece" else ByteTokenizer()
    tokenizer.save(tmp_path, chat_template=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for generation_prompt in (True, False):
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=generation_prompt)["input_ids"]
        assert ids == encode_chat(tokenizer, CHAT, generation_prompt)


def test_llama_cpp(publish: Publish, tmp_path: Path) -> None:
    folder = publish(odd_config(max_context_length=256, rope_max_length=512))
    path = tuned(folder, tmp_path / "gguf", "gguf") / "model.gguf"
    banned = [[number, False] for number in range(FIRST_PIECE)]
    request: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1, "temperature": 0, "logit_bias": banned}
    request |= {"logprobs": True, "top_logprobs": 20}
    reply = llama_server(path, 256).handle_chat_completions(request)
    ids = encode_chat(load_tokenizer(folder), CHAT)
    assert reply["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        expected = load_model(folder)(torch.tensor([ids]))[0, -1].log_softmax(-1)
    (step,) = reply["choices"][0]["logprobs"]["content"]
    for entry in step["top_logprobs"]:
        assert abs(entry["logprob"] - expected[entry["id"]]) < APART
