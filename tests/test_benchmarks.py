"""The parts of `benchmarks/` that decide whether a comparison is fair; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.evaluate.score import bits_per_byte
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, save_model
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import load_tokenizer

from .conftest import randomise

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import compare, decode, peers, quality, runtimes, speakers, speculate, turns, work

    class Modules:
        pass

    modules = Modules()
    modules.__dict__.update(compare=compare, decode=decode, peers=peers, quality=quality, runtimes=runtimes)
    modules.__dict__.update(speakers=speakers, speculate=speculate, turns=turns, work=work)
    return modules


@pytest.fixture
def folder(benchmarks: Any, tmp_path: Path) -> Path:
    """A small random model whose context is 32, with the made-up tokenizer of 600 ids."""
    config = ModelConfig.parse(
        {
            "vocab_size": 640,  # the last 40 stand for no token
            "max_context_length": 32,
            "rope_max_length": 128,
            "num_transformer_layers": 2,
            "model_dim": 64,
            "head_dim": 16,
            "num_query_heads": [2, 4],
            "num_kv_heads": [1, 2],
            "ffn_multipliers": [0.5, 1.5],
            "ffn_dim_divisor": 32,
        }
    )
    model = randomise(OpenELM(config))
    with torch.no_grad():
        model.transformer.token_embeddings.weight[600:] = 0
    save_model(tmp_path / "model", model, tokenizer=benchmarks.runtimes.made_up_tokenizer(600))
    return tmp_path / "model"


def test_each_turn_asks_every_side_once_and_another_one_first(benchmarks: Any) -> None:
    names = ["a", "b", "c"]
    orders = [benchmarks.turns.in_turn(names, turn) for turn in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)
    assert orders[1] == orders[0][::-1]


@pytest.mark.parametrize("case", ["tiny", "small5m", "demo", "270m"])
def test_the_uniform_model_of_a_case_costs_nearly_the_same(benchmarks: Any, case: str) -> None:
    work = benchmarks.work
    ours, theirs = (work.model_config(work.CASES[case], layers) for layers in ("layer-wise", "uniform"))
    length = work.CASES[case].length
    assert theirs.parameters == pytest.approx(ours.parameters, rel=0.01)
    flops = [c.plan.training_flops_per_token(c.vocab_size, length) for c in (ours, theirs)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    plan = theirs.plan
    assert plan.dim % plan.query_heads[0] == 0  # what LLaMA of transformers asks for
    assert len({*zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)}) == 1


def test_first_losses_that_differ_stop_the_comparison(benchmarks: Any) -> None:
    kinds = {"ours": "layer-wise", "plain": "layer-wise", "litgpt": "uniform"}
    steps = {
        "ours": [{"loss": 9.01, "cross_entropy": 9.0}],
        "plain": [{"loss": 9.01}],
        "litgpt": [{"loss": 8.7}],
    }
    benchmarks.compare.check_first_losses(kinds, steps, 1e-3)
    steps["plain"] = [{"loss": 9.0}]
    with pytest.raises(SystemExit, match="first losses differ"):
        benchmarks.compare.check_first_losses(kinds, steps, 1e-3)


def test_renamed_weights_are_all_the_weights_there_are(benchmarks: Any, tmp_path: Path) -> None:
    """Each number of the uniform model goes to one place of the peer, but the norms that it does not have."""
    work = benchmarks.work.write_work(tmp_path / "uniform", benchmarks.work.Case("5m", 1, 4, {}), "uniform")
    _, _, weights = benchmarks.work.tensors(tmp_path / "uniform")
    norms = sum(weight.numel() for name, weight in weights.items() if name.endswith(("q_norm.weight", "k_norm.weight")))
    for names in (benchmarks.peers.llama_names, benchmarks.peers.litgpt_names):
        named = names(weights, work)
        embedding = work.vocab_size * work.dim  # tied: under two names
        assert sum(weight.numel() for weight in named.values()) == work.parameters - norms + embedding


@pytest.mark.slow  # starts four interpreters with torch
def test_ours_and_the_plain_side_do_the_same_and_a_missing_peer_is_named(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lightning.py").write_text("raise ImportError('not for this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    case = benchmarks.work.Case("5m", 1, 8, {})
    result = benchmarks.compare.compare(case, ["ours", "plain", "litgpt"], "fp32", 1, 1, peers_python=sys.executable)
    ours, plain, litgpt = (result["sides"][side] for side in ("ours", "plain", "litgpt"))
    assert litgpt["skipped"] == "ImportError: not for this test"
    assert ours["parameters"] == plain["parameters"]
    assert ours["last_loss"] < ours["first_loss"] == pytest.approx(plain["first_loss"], abs=1e-3)
    assert ours["ratio"] == 1
    assert plain["ratio"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"], abs=1e-3)
    assert ours["torch"] == torch.__version__


def test_positions_of_another_top_20_are_counted_with_the_gap_of_what_changed_places(benchmarks: Any) -> None:
    expected = -torch.arange(30.0).repeat(4, 1)
    found = expected.clone()
    found[1, [0, 5]] = expected[1, [5, 0]]  # another order of the same twenty
    found[2, [19, 20]] = expected[2, [20, 19]]
    found[3, [18, 22]] = expected[3, [22, 18]]
    counted = benchmarks.runtimes.other_likeliest(found, expected)
    assert counted == {"positions of another top 20": 2, "widest gap in them": 4.0}
    assert benchmarks.runtimes.other_likeliest(expected, expected)["positions of another top 20"] == 0


@pytest.mark.filterwarnings("default")
def test_the_onnx_side_carries_its_cache_and_forgets_the_text_before(benchmarks: Any, folder: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    graph = benchmarks.runtimes.export(folder, folder.parent / "onnx", "onnx") / "model.onnx"
    start, step = benchmarks.speakers.onnx_steps(runtime.InferenceSession(graph))
    model = load_model(folder)
    for prompt in ([1, 300, 301, 302, 303], [1, 400, 401]):
        ids = [start(prompt)]
        while len(ids) < 8:
            ids.append(step(ids[-1]))
        rows = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
        assert rows.argmax(-1).tolist() == ids


def test_a_slow_peer_is_asked_for_fewer_tokens_and_less_often(benchmarks: Any) -> None:
    decode = benchmarks.decode
    assert decode.asked_of("mlx-lm", "decode 256 64 1") == "decode 64 8 1"
    assert decode.asked_of("mlx-lm", "prefill 1024") == "prefill 64"
    assert decode.asked_of("mlx-lm", "decode 16 4 1") == "decode 16 4 1"
    assert decode.asked_of("llama.cpp", "decode 256 64 1") == "decode 256 64 1"
    asked = "decode 256 64 1"
    seconds = {"ours": [1.0, 2.0, 9.0], "mlx-lm": [2.0, 6.0]}
    found = {f"{side} {asked}": [{"seconds": s, "tokens": 6} for s in times] for side, times in seconds.items()}
    slow, gone = decode.beside(
        "decode-bf16", found, {"onnxruntime": "no"}, asked, ["mlx-lm", "onnxruntime"], "bf16", {}
    )
    assert slow["ratio"] == 2.5  # of the turns that both took
    assert (slow["peer_asked"], slow["peer_turns"], slow["peer_dtype"]) == ("decode 64 8 1", 2, "bf16")
    assert gone == {"case": "decode-bf16", "peer": "onnxruntime", "skipped": "no"}


@pytest.mark.slow  # starts three interpreters with torch, one with MLX
def test_every_side_answers_and_a_missing_one_is_named(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx_lm.py").write_text("raise ImportError('not for this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    decode = benchmarks.decode
    monkeypatch.setattr(decode, "PROMPT", 8)
    monkeypatch.setattr(decode, "TOKENS", 2)
    decode.prepare(tmp_path, "tiny", list(decode.PEERS))
    lines = list(decode.measured("decode-bf16", tmp_path, 1, 1, list(decode.PEERS)))
    assert [line["peer"] for line in lines] == list(decode.PEERS)
    *there, missing = lines
    assert missing["skipped"] == "not for this test"
    assert all(line["ratio"] > 0 and line["peer_tokens_per_second"] > 0 for line in there)
    assert [line["peer_dtype"] for line in there] == ["bf16", "bf16", "bf16", "fp32"]


def test_the_mlx_side_counts_the_tokens_that_it_times(benchmarks: Any, folder: Path) -> None:
    pytest.importorskip("mlx_lm")
    save_model(folder.parent / "bf16", load_model(folder).bfloat16())
    speaker = benchmarks.speakers.mlx_lm(folder.parent, "bf16", 1)
    assert speaker["decode"](8, 3, 1)["tokens"] == 3
    assert speaker["prefill"](8)["tokens"] == 8


@pytest.mark.filterwarnings("default")
def test_what_llama_cpp_says_of_a_document_is_its_score(benchmarks: Any, folder: Path) -> None:
    """With plain matrices llama.cpp rounds little: windows, BOS, bytes and rows that are no tokens must be ours."""
    pytest.importorskip("xllamacpp")
    quality, tokenizer = benchmarks.quality, load_tokenizer(folder)
    texts = [" ".join(f"word{300 + number * step % 299}" for number in range(90)) for step in (7, 11)]
    with quality.open_source(folder) as source:
        path = quality.for_llama_cpp(source, tokenizer, folder.parent / "gguf", "F32")
    found = quality.forced_bits(quality.llama_cpp(path, 32, 1), tokenizer, texts, ["a", "b"], 32)
    assert found == pytest.approx(bits_per_byte(load_model(folder), tokenizer, texts).value, rel=1e-4)


@pytest.mark.filterwarnings("default")
def test_a_document_that_llama_cpp_does_not_say_in_whole_characters_is_refused(benchmarks: Any, folder: Path) -> None:
    pytest.importorskip("xllamacpp")
    quality, tokenizer = benchmarks.quality, load_tokenizer(folder)
    with quality.open_source(folder) as source:
        path = quality.for_llama_cpp(source, tokenizer, folder.parent / "gguf", "F32")
    with pytest.raises(SystemExit, match=r"hamlet: .* not ASCII"):
        quality.forced_bits(quality.llama_cpp(path, 32, 1), tokenizer, ["na\u00efve"], ["hamlet"], 32)


def test_the_bounds_of_guessing_are_bounds(benchmarks: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speculate = benchmarks.speculate
    monkeypatch.setattr(speculate, "PROMPT", 8)
    monkeypatch.setattr(speculate, "TOKENS", 11)
    model, tokenizer = load_model(folder).requires_grad_(False), load_tokenizer(folder)
    texts = [[1, *range(300, 307)], [1, *range(400, 407)]]

    def found(guesses: str) -> dict[str, Any]:
        result: dict[str, Any] = speculate.compared(model, tokenizer, model, guesses, texts, 1)
        return result

    right, wrong, same = found("right 4"), found("wrong 4"), found("draft")
    assert (right["accepted"], right["tokens_a_step"]) == (1, 5)
    assert (wrong["accepted"], wrong["tokens_a_step"]) == (0, 1)
    assert (same["accepted"], same["tokens_a_step"]) == (1, 5)  # the model guesses its own text


def test_a_text_that_guesses_change_stops_the_comparison(
    benchmarks: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculate = benchmarks.speculate
    monkeypatch.setattr(speculate, "PROMPT", 8)
    monkeypatch.setattr(speculate, "TOKENS", 11)
    model, tokenizer = load_model(folder).requires_grad_(False), load_tokenizer(folder)
    honest = speculate.said

    def broken(engine: Any, ids: list[int], tokenizer: Any) -> Any:
        answer = honest(engine, ids, tokenizer)
        return answer if engine._proposer is None else answer._replace(ids=[*answer.ids[:-1], answer.ids[-1] + 1])

    monkeypatch.setattr(speculate, "said", broken)
    with pytest.raises(SystemExit, match="wrong 4: the text of prompt 0 changed with guesses"):
        speculate.compared(model, tokenizer, None, "wrong 4", [[1, *range(300, 307)]], 1)


def test_prompts_are_as_long_as_each_other_and_repeat_what_they_should(benchmarks: Any, folder: Path) -> None:
    speculate, tokenizer = benchmarks.speculate, load_tokenizer(folder)
    (folder.parent / "text.txt").write_text(" ".join(f"word{300 + number % 299}" for number in range(400)))
    found = speculate.prompts(tokenizer, [str(folder.parent / "text.txt")], 3)
    period = speculate.PERIOD
    assert {len(ids) for texts in found.values() for ids in texts} == {speculate.PROMPT + 1}
    for ordinary, repeating in zip(found["held-out"], found["repeating"], strict=True):
        assert repeating[: period + 1] == ordinary[: period + 1]
        assert repeating[1 + period : 1 + 2 * period] == repeating[1 : 1 + period]
