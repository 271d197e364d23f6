"""The parts of `benchmarks/` that decide whether a comparison is fair; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import compare, peers, runtimes, turns, work

    class Modules:
        pass

    modules = Modules()
    modules.__dict__.update(compare=compare, peers=peers, runtimes=runtimes, turns=turns, work=work)
    return modules


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
