"""vLLM loads our folders through the plugin and computes the same: whole prompts, in pieces, and from its paged cache.

vLLM wants its own versions of torch and transformers, so it lives in an environment of its own, which docs/vllm.md
makes. OPENELM_VLLM_PYTHON names its interpreter; without it the tests that need vLLM are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.errors import ConfigError
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model
from openelm.model.plan import LayerPlan
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM
from openelm.model.weights import WEIGHTS, open_weights, write_safetensors
from openelm.text.chat import Message, encode_chat
from openelm.vllm.sharding import kv_copies, with_copies

from .conftest import PUBLISHED, Publish, odd_config, shallow

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = os.environ.get("OPENELM_VLLM_PYTHON")
HOW = "OPENELM_VLLM_PYTHON=/path/to/bin/python pytest -m slow tests/convert/test_vllm.py; see docs/vllm.md"


def needs_vllm(test: Any) -> Any:
    """Mark a test that starts vLLM, which takes a minute."""
    for mark in (pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(VLLM_PYTHON is None, reason=HOW)):
        test = mark(test)
    return test


APART = 1e-3
NEW = 20
CACHE_BYTES, BLOCK_TOKENS = 1 << 28, 32
ODD_HEADS = {"head_dim": 32, "num_query_heads": [2, 6, 4], "num_kv_heads": [2, 2, 1]}


def test_the_entry_point_is_what_registers() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = groups["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load().__name__ == "register"


@pytest.mark.parametrize("action", ["import openelm", "import openelm.vllm as plugin; plugin.register()"])
def test_without_vllm_nothing_is_imported_and_nothing_happens(action: str) -> None:
    code = f"import sys; sys.modules['vllm'] = None; {action}; print([n for n in sys.modules if n.startswith('vllm')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['vllm']", done.stderr


def plan_of(query_heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> LayerPlan:
    return LayerPlan(dim=64, head_dim=16, query_heads=query_heads, kv_heads=kv_heads, ffn_dims=(96,) * len(kv_heads))


def test_heads_are_held_as_often_as_processes_need_them() -> None:
    plan = plan_of((12, 12, 12, 12), (12, 4, 3, 1))
    assert kv_copies(plan, 1) == (1, 1, 1, 1)
    assert kv_copies(plan, 2) == (1, 1, 2, 2)
    assert kv_copies(plan, 4) == (1, 1, 4, 4)
    assert kv_copies(plan, 12) == (1, 3, 4, 12)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_run_in_four_processes(size: str) -> None:
    plan = model_size(size).plan
    for heads, kv_heads, copies in zip(plan.query_heads, plan.kv_heads, kv_copies(plan, 4), strict=True):
        assert kv_heads * copies % 4 == 0 and heads % (kv_heads * copies) == 0


def test_a_layer_that_processes_cannot_share_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot share layer 1, of 6 query heads .*--tensor-parallel-size.*: 1, 2$"):
        kv_copies(plan_of((4, 6), (2, 2)), 4)


def test_copies_leave_every_query_head_its_keys_and_values() -> None:
    query_heads, kv_heads, copies, head_dim = 12, 3, 2, 4
    qkv = torch.randn((query_heads + 2 * kv_heads) * head_dim, 5)
    heads = qkv.view(-1, head_dim, 5)
    more = with_copies(qkv, query_heads, kv_heads, copies).view(-1, head_dim, 5)
    assert torch.equal(more[:query_heads], heads[:query_heads])
    keys, values = heads[query_heads:].chunk(2)
    more_keys, more_values = more[query_heads:].chunk(2)
    for head in range(query_heads):
        before, after = head // (query_heads // kv_heads), head // (query_heads // (kv_heads * copies))
        assert torch.equal(more_keys[after], keys[before]) and torch.equal(more_values[after], values[before])


def environment(scratch: Path) -> dict[str, str]:
    """One thread for each of two processes, for tests run beside others; no network, no caches of the user."""
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_NO_USAGE_STATS": "1"}
    places = {"HF_HOME": str(scratch), "VLLM_CACHE_ROOT": str(scratch), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings, **places, "HF_HUB_OFFLINE": "1"}


def ask(folder: Path, scratch: Path, asked: list[Any], **options: Any) -> tuple[dict[str, Any] | None, str]:
    """Return what vLLM answers, or None where it fails, and what it printed."""
    assert VLLM_PYTHON is not None
    usual = {"dtype": "float32", "enforce_eager": True, "max_logprobs": -1, "kv_cache_memory_bytes": CACHE_BYTES}
    question = {"options": {"model": str(folder), **usual, "block_size": BLOCK_TOKENS, **options}, "asked": asked}
    (scratch / "question.json").write_text(json.dumps(question))
    files = [str(scratch / "question.json"), str(scratch / "answers.json")]
    command = [VLLM_PYTHON, str(ROOT / "benchmarks" / "ask_vllm.py"), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=environment(scratch), cwd=scratch)
    printed = done.stdout + done.stderr
    return (json.loads(Path(files[1]).read_text()) if done.returncode == 0 else None), printed


def logits(model: OpenELM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def greedy(model: OpenELM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def furthest(found: list[list[tuple[int, float]]], expected: Tensor) -> float:
    """Return the largest difference of log-probabilities at successive positions from logits (positions, V)."""
    rows = expected.log_softmax(-1)[: len(found)]
    return max(
        abs(value - float(row[number])) for pairs, row in zip(found, rows, strict=True) for number, value in pairs
    )


def are_likeliest(ids: list[int], expected: Tensor) -> bool:
    """Tell whether every id is the likeliest of its logits (positions, V), or one as likely."""
    return all(row.max() - row[number] < APART for number, row in zip(ids, expected, strict=True))


CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "odd": (odd_config(**ODD_HEADS), {}),
    "heads of 16, kept as 32": (odd_config(), {}),
    "untied": (odd_config(**ODD_HEADS, share_input_output_layers=False), {}),
    "rounded": (odd_config(**ODD_HEADS, rope_bf16_frequencies=True), {}),
    "270m": (shallow("270m"), {"max_num_batched_tokens": 64, "max_num_seqs": 3}),
    "270m, two processes": (shallow("270m"), {"tensor_parallel_size": 2}),
}


@needs_vllm
@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_what_we_compute(publish: Publish, tmp_path: Path, case: str) -> None:
    """Rows of unequal lengths together; then the whole texts as prompts; then with prompts that are cached."""
    config, options = CASES[case]
    folder = publish(config)
    model, generator = load_model(folder), torch.Generator().manual_seed(0)
    lengths = (1, 5, 17, 40, 33) if config.max_context_length == 64 else (1, 5, 150, 300, 77)
    prompts = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    texts = [prompt + greedy(model, prompt, NEW) for prompt in prompts]
    generate = {"temperature": 0, "max_tokens": NEW, "logprobs": -1, "ignore_eos": True}
    asked = [
        {"prompts": prompts, "options": generate},
        {"prompts": texts, "options": {"temperature": 0, "max_tokens": 1, "prompt_logprobs": -1}},
        {"prompts": prompts, "options": generate},
    ]
    found, printed = ask(folder, tmp_path, asked, **options)
    assert found is not None, printed[-4000:]
    first, whole, again = found["answers"]
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert furthest(whole[number]["prompt"], logits(model, text)) < APART
        for answer in (first[number], again[number]):
            expected = logits(model, prompt + answer["ids"])[len(prompt) - 1 : -1]
            assert furthest(answer["steps"], expected) < APART
            assert are_likeliest(answer["ids"], expected)
        assert first[number]["cached"] == 0
        assert again[number]["cached"] == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    processes = options.get("tensor_parallel_size", 1)
    copies = kv_copies(config.plan, processes)
    heads = sum(heads * times for heads, times in zip(config.num_kv_heads, copies, strict=True)) // processes
    block_bytes = 2 * heads * max(config.head_dim, 32) * 4 * BLOCK_TOKENS
    assert found["block_tokens"] == BLOCK_TOKENS
    assert found["blocks"] == CACHE_BYTES // block_bytes, "each layer's cache is as wide as its heads"


@needs_vllm
def test_the_270m_as_it_is(publish: Publish, tmp_path: Path) -> None:
    """The real size, prompts of unequal lengths together; the 20 likeliest tokens of each position."""
    folder, generator = publish(model_size("270m")), torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 32_000, (length,), generator=generator).tolist() for length in (1024, 7, 300)]
    options = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 20}
    found, printed = ask(folder, tmp_path, [{"prompts": prompts, "options": options}], kv_cache_memory_bytes=1 << 29)
    assert found is not None, printed[-4000:]
    model = load_model(folder)
    for prompt, answer in zip(prompts, found["answers"][0], strict=True):
        assert len(answer["prompt"]) == len(prompt) - 1
        assert furthest(answer["prompt"], logits(model, prompt)) < APART


@needs_vllm
def test_a_missing_tensor_is_refused(publish: Publish, tmp_path: Path) -> None:
    folder = publish(odd_config(**ODD_HEADS))
    weights = dict(open_weights(folder))
    del weights["transformer.layers.1.ffn.proj_2.weight"]
    weights["transformer.layers.9.attn_norm.weight"] = weights["transformer.norm.weight"]
    write_safetensors(tmp_path / "fewer", weights, {"format": "pt"})
    (tmp_path / "fewer").replace(folder / WEIGHTS)
    found, printed = ask(folder, tmp_path, [])
    assert found is None
    assert "missing transformer.layers.1.ffn.proj_2.weight" in printed
    assert "unexpected transformer.layers.9.attn_norm.weight" in printed


@needs_vllm
def test_heads_of_a_size_that_a_device_lacks_are_refused(publish: Publish, tmp_path: Path) -> None:
    found, printed = ask(publish(odd_config(head_dim=264)), tmp_path, [])
    assert found is None
    assert "heads of 264 numbers, but CPU_ATTN of vLLM has 32, 64" in printed


@contextmanager
def served(folder: Path, scratch: Path, *options: str) -> Iterator[str]:
    """Serve a folder as `vllm serve` does; yields the address."""
    assert VLLM_PYTHON is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    # The module behind `vllm serve`; the command itself does not start where the distribution is called vllm-cpu.
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *where, *options]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(CACHE_BYTES)]
    log = scratch / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(scratch), start_new_session=True
        )
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        assert server.poll() is None, log.read_text()[-4000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@needs_vllm
@pytest.mark.parametrize("options", [(), ("--trust-remote-code",)], ids=["without code", "with a folder's code"])
def test_a_chat_is_continued_as_we_do(publish: Publish, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder, chosen = tmp_path / "chat", Options(to="hf", chat_tuned=True, self_contained=True)
    with open_source(publish(shallow("270m"))) as source:
        write(prepared(source, chosen), folder, chosen)
        assert source.tokenizer is not None
        prompt = encode_chat(source.tokenizer, [Message("user", "the quick brown fox")])
    body = {
        "messages": [{"role": "user", "content": "the quick brown fox"}],
        "model": str(folder),
        "temperature": 0,
        "max_tokens": NEW,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with served(folder, tmp_path, *options) as address:
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as response:
            reply = json.load(response)
    assert reply["prompt_token_ids"] == prompt
    ids = reply["choices"][0]["token_ids"]
    assert len(ids) == NEW and are_likeliest(ids, logits(load_model(folder), prompt + ids)[len(prompt) - 1 : -1])
