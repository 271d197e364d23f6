"""The arithmetic of `openelm plan` beside sums done by hand, real tensors and real measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from openelm.errors import ConfigError
from openelm.kernels import cross_entropy, cross_entropy_gpu
from openelm.kernels.native import kernels_name
from openelm.model.budget import (
    CHUNK_BYTES,
    Held,
    Work,
    activation_bytes,
    layer_activation_bytes,
    layouts,
    measured_mfu,
    memory,
    nearest_measurement,
    predicted_again,
    recompute_within,
    run_time,
)
from openelm.model.config import ModelConfig
from openelm.model.measured import DEVICES, MEASURED
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM, Recompute
from openelm.optim.config import Kind, OptimizerConfig, Weights
from openelm.optim.optimizer import Optimizer
from openelm.train.gradients import FlatGradients

RESULTS = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("weights", get_args(Weights))
def test_weights_gradients_and_moments_are_the_bytes_of_real_tensors(kind: Kind, weights: Weights) -> None:
    config = model_size("5m", vocab_size=300)
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = Optimizer(OptimizerConfig(kind=kind, weights=weights), model)
    gradients = FlatGradients(model.parameters())
    counted = memory(config.plan, 300, Work(1, 4), held=Held(kind, weights))
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *optimizer.weights().values())}
    assert counted.weights == sum(tensor.nbytes for tensor in held.values())
    assert counted.gradients == pytest.approx(gradients.values.nbytes, rel=1e-3)
    moments = [t for name, t in optimizer.state().items() if not name.endswith("/step")]
    assert counted.moments == sum(t.nbytes for t in moments)


def kept_bytes(
    config: ModelConfig, rows: int, length: int, recompute: Recompute | tuple[Recompute, ...], documents: bool
) -> int:
    """Count the bytes that a real forward pass keeps for its backward pass, weights and rotary tables aside."""
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    model.recompute = recompute
    tables = model.rotary.at(0, length, torch.device("cpu"))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    places = (torch.arange(length) // 40).expand(rows, length) if documents else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.ones(rows, length, dtype=torch.long), documents=places)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


MIXED: tuple[Recompute, ...] = ("none", "full", "selective", "none", "none", "full")


@pytest.mark.skipif(kernels_name() == "torch", reason="plain torch keeps more than the C++ kernels")
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [*get_args(Recompute), MIXED], ids=str)
@pytest.mark.parametrize("normalises", [True, False])
def test_activations_are_what_a_real_forward_pass_keeps(
    documents: bool, recompute: Recompute, normalises: bool
) -> None:
    config, rows, length = model_size("5m", vocab_size=300, normalize_qk_projections=normalises), 2, 128
    found = kept_bytes(config, rows, length, recompute, documents)
    work = Work(rows, length, "fp32", "cpu", recompute, documents)
    layers = sum(layer_activation_bytes(config.plan, layer, work) for layer in range(config.plan.layers))
    norm = 4 * config.plan.dim * work.tokens  # the last one's input; the loss keeps what it gives
    assert layers + norm == pytest.approx(found, rel=0.03)
    assert (activation_bytes(config.plan, work) == layers + 2 * norm) is (recompute == "none")


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.4])
def test_layers_compute_again_only_as_far_as_memory_asks(share: float) -> None:
    """What a real forward pass keeps is within the budget, and one step less of recomputing would not be."""
    config, work = model_size("5m", vocab_size=300), Work(2, 128, "fp32", "cpu")
    most = int(share * activation_bytes(config.plan, work))
    kinds = recompute_within(config.plan, work, most)
    assert (set(kinds) == {"none"}) is (share == 1.0)
    assert activation_bytes(config.plan, replace(work, recompute=kinds)) <= most
    assert kept_bytes(config, 2, 128, kinds, False) <= most
    assert "full" not in kinds or "none" not in kinds, "the cheaper way first"
    order: dict[Recompute, Recompute] = {"full": "selective", "selective": "none"}
    for layer, kind in enumerate(kinds):
        if kind in order:
            less = (*kinds[:layer], order[kind], *kinds[layer + 1 :])
            if activation_bytes(config.plan, replace(work, recompute=less)) > most:
                break
    else:
        assert share == 1.0


def test_a_budget_that_nothing_fits_is_an_error_that_says_what_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.activation_gb 0\.001 is too little for 2 rows of 128 tokens: .* needs 0\.0"
    ):
        recompute_within(model_size("5m", vocab_size=300).plan, Work(2, 128, "fp32", "cpu"), 1_000_000)


def test_peak_memory_on_an_h100_is_within_two_percent_of_what_was_measured() -> None:
    found = [check for check in predicted_again() if check.what == "peak GB"]
    assert len(found) == 3
    assert all(check.error is not None and abs(check.error) < 0.02 for check in found)


def test_tokens_a_second_are_within_a_quarter_when_a_size_is_predicted_from_the_others() -> None:
    errors = [check.error for check in predicted_again() if check.what == "tokens/s" and check.error is not None]
    assert len(errors) == 6 and max(map(abs, errors)) < 0.26


def test_measurements_are_those_of_the_result_files() -> None:
    for run in MEASURED:
        result = json.loads((RESULTS / run.file).read_text())
        if run.device == "cpu":
            names = {"ours": ("tokens_per_second", "mfu"), "baseline": ("baseline_tokens_per_second", "baseline_mfu")}
            speed, mfu = (result[name] for name in names[run.side])
            assert run.flops_per_second == result["matmul_gflops"] * 1e9 and result["case"] == run.size
        else:
            side = {"compiled": "ours, compiled layers"}.get(run.side, run.side)
            (row,) = [r for r in result["training"] if (r["size"], r["rows"], r["side"]) == (run.size, run.rows, side)]
            speed, mfu = row["tokens_per_second"], row["mfu"]
            assert run.peak_bytes in (None, row["peak_bytes"])
        assert run.tokens_per_second == speed
        assert measured_mfu(run) == pytest.approx(mfu, abs=1.5e-3)


def test_time_is_work_over_rate() -> None:
    plan = model_size("270m").plan
    time = run_time(plan, 32_000, tokens=10**9, length=2048, devices=8, flops_per_second=1e15, mfu=0.25)
    weights = 51_609_600 + 178_913_280 + 32_000 * 1280  # published counts: attention, feed-forward, tied head
    attention = 4 * 252 * 64 * 2049 / 2  # 252 query heads of 64 over all layers, half the square
    flops = 3 * (2 * weights + attention)
    assert time.flops_per_token == pytest.approx(flops)
    assert time.seconds == pytest.approx(10**9 * flops / (8 * 1e15 * 0.25))
    assert time.device_hours == pytest.approx(8 * time.seconds / 3600)


def test_recomputation_repeats_the_forward_pass_of_the_layers() -> None:
    arguments = {"tokens": 10, "length": 64, "devices": 1, "flops_per_second": 1e12, "mfu": 0.5}
    plan = model_size("5m").plan
    times = [run_time(plan, 8192, recompute=kind, **arguments).seconds for kind in get_args(Recompute)]  # type: ignore[arg-type]
    forward = plan.forward_flops_per_token(8192, 64)
    attention = forward - 2 * plan.matmul_parameters(8192)
    assert times[1] - times[0] == pytest.approx(10 * attention / 0.5e12)
    assert times[2] - times[0] == pytest.approx(10 * (forward - 2 * 8192 * plan.dim) / 0.5e12), "all but the head"
    mixed = run_time(plan, 8192, recompute=("full", *["selective"] * 5), **arguments).seconds  # type: ignore[arg-type]
    assert times[1] < mixed < times[2]


def test_bytes_of_one_layer_and_token_by_hand() -> None:
    plan = model_size("270m").plan  # first layer: 12 query heads, 3 KV heads of 64, feed-forward 768, dim 1280
    narrow = 2 * 1280 + (12 + 6) * 64 + 2 * 15 * 64 + 2 * 12 * 64 + 4 * 768  # numbers of 2 bytes
    assert layer_activation_bytes(plan, 0, Work(1, 1)) == 2 * narrow + 4 * 2 * 1280


def test_sharding_divides_the_state_and_nothing_else() -> None:
    plan, work = model_size("3b").plan, Work(1, 2048)
    found = layouts(plan, 32_000, work, 128)
    kinds = ("", ", selective recompute", ", full recompute")
    assert list(found) == [f"{name}{kind}" for name in ("replicated", "sharded") for kind in kinds]
    whole, part = found["replicated"], found["sharded"]
    assert whole.weights + whole.gradients + whole.moments == 16 * 3_036_647_424
    assert part.weights + part.gradients + part.moments == pytest.approx(16 * 3_036_647_424 / 128, rel=1e-6)
    assert (part.activations, part.loss) == (whole.activations, whole.loss)
    assert found["sharded, selective recompute"].activations < part.activations * 0.7
    assert found["sharded, full recompute"].activations < part.activations / 5


def test_the_optimizers_options_save_bytes_of_the_projections_only() -> None:
    plan, work = model_size("270m").plan, Work(1, 2048)
    projections = plan.attention_parameters + plan.ffn_parameters
    plain = memory(plan, 32_000, work)
    assert plain.total - memory(plan, 32_000, work, held=Held("muon")).total == 4 * projections
    assert plain.total == memory(plan, 32_000, work, held=Held(weights="bf16")).total, "copies take as much"
    assert plain.total - memory(plan, 32_000, work, held=Held(weights="bf16-stochastic")).total == 4 * projections
    assert not any("sharded" in name for name in layouts(plan, 32_000, work, 8, Held(weights="bf16")))


def test_chunks_are_those_of_the_loss() -> None:
    assert CHUNK_BYTES == {**cross_entropy._CHUNK_BYTES, "gpu": cross_entropy_gpu.CHUNK_BYTES}


def test_the_nearest_measured_size_gives_the_mfu() -> None:
    sizes = {name: nearest_measurement(model_size(name).parameters, DEVICES["h100"]) for name in ("450m", "3b")}
    assert {name: found.size for name, found in sizes.items() if found is not None} == {"450m": "270m", "3b": "3b"}
    other = nearest_measurement(10**9, DEVICES["a100"])  # never measured: from the H100
    assert other is not None and (other.device, other.size) == ("h100", "1.1b")
