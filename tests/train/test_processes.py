"""Several processes on one machine train the model that one process trains."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.model.config import ModelConfig
from openelm.model.folder import read_tensors
from openelm.model.transformer import OpenELM
from openelm.train import gradients
from openelm.train.checkpoint import checkpoint_folder, load_checkpoint
from openelm.train.distributed import Processes
from openelm.train.gradients import FlatGradients, Tree, leaf_order
from openelm.train.ledger import number, read_ledger

from .forks import Launch

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SETTINGS = ("train.rows=8", "data.lanes=4", "train.shards=4", "train.timeout_seconds=20")
EXACT = (*SETTINGS, "train.numerics=exact")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def launch(request: pytest.FixtureRequest, bench: Any) -> Launch:
    return Launch(bench, request.param)


@pytest.fixture(scope="module")
def forks(bench: Any) -> Launch:
    """For what one process does first: only a fork can, and CUDA does not survive one."""
    return Launch(bench)


@pytest.fixture(scope="module")
def alone(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    launch.run(folder, 1, *EXACT)
    return folder


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "ledger.jsonl").exists():
            events = read_ledger(folder / "ledger.jsonl")
            if any(event["event"] == "step" and event["step"] >= step for event in events):
                return
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_the_leaves_of_a_process_are_a_subtree(shards: int) -> None:
    """Symbolic sums: text in place of numbers shows the order of every addition."""

    def grouped(leaves: list[Any]) -> Any:
        while len(leaves) > 1:
            leaves = [frozenset(pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0]

    whole = grouped(leaf_order(shards))
    for count in (c for c in (1, 2, 4, 8) if c <= shards):
        parts = [grouped([rank + count * leaf for leaf in leaf_order(shards // count)]) for rank in range(count)]
        half = count // 2
        while half:
            parts = [frozenset((parts[rank], parts[rank ^ half])) for rank in range(count)]
            half //= 2
        assert set(parts) == {whole}


def test_a_tree_adds_neighbours_first() -> None:
    large, small = torch.tensor([1e8]), torch.tensor([3.0])
    tree = Tree()
    for leaf in (large, small, -large, small):
        tree.add(leaf)
    assert tree.total() == (large + small) + (-large + small)
    assert tree.total() != ((large + small) + -large) + small


def test_gradients_lie_in_one_tensor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    flat = FlatGradients(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    expected = sum(float(parameter.grad.sum()) for parameter in model.parameters() if parameter.grad is not None)
    assert float(flat.values.sum()) == pytest.approx(expected)
    flat.clear()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_exact_and_fast_differ_by_rounding_only(bench: Any, launch: Launch, alone: Path, tmp_path: Path) -> None:
    launch.run(tmp_path / "run", 1, *SETTINGS)
    for fast, exact in zip(bench.history(tmp_path / "run"), bench.history(alone), strict=True):
        assert fast[-1] == exact[-1]
        assert number(fast[4]) == pytest.approx(number(exact[4]), rel=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_exact_runs_give_the_same_bits_at_every_number_of_processes(
    bench: Any, launch: Launch, alone: Path, tmp_path: Path, count: int
) -> None:
    launch.run(tmp_path / "run", count, *EXACT)
    assert bench.history(tmp_path / "run") == bench.history(alone)
    assert bench.fingerprint(tmp_path / "run") == bench.fingerprint(alone)


def test_two_processes_that_save_in_the_background_give_the_same_bits(
    bench: Any, launch: Launch, alone: Path, tmp_path: Path
) -> None:
    launch.run(tmp_path / "run", 2, *EXACT, "checkpoints.background=true")
    assert bench.history(tmp_path / "run") == bench.history(alone)
    assert bench.fingerprint(tmp_path / "run") == bench.fingerprint(alone)


def test_fast_runs_see_the_same_batches_at_every_number_of_processes(
    bench: Any, launch: Launch, alone: Path, tmp_path: Path
) -> None:
    launch.run(tmp_path / "run", 2, *SETTINGS)
    for fast, exact in zip(bench.history(tmp_path / "run"), bench.history(alone), strict=True):
        assert fast[-1] == exact[-1]
        assert number(fast[4]) == pytest.approx(number(exact[4]), rel=1e-4)


def small_buckets() -> None:
    gradients._BUCKET = 1000


def test_gradients_that_are_sent_while_the_backward_pass_goes_on_are_the_same_sums(
    bench: Any, forks: Launch, tmp_path: Path
) -> None:
    """Sums of two numbers have no order, so neither the buckets nor the moment they are sent at change a bit."""
    settings = (*SETTINGS, "train.micro_rows=2")
    forks.run(tmp_path / "one", 2, *settings)
    forks.run(tmp_path / "many", 2, *settings, before={0: small_buckets, 1: small_buckets})
    assert bench.fingerprint(tmp_path / "many") == bench.fingerprint(tmp_path / "one")
    assert bench.history(tmp_path / "many") == bench.history(tmp_path / "one")


class Listing(Processes):
    """One of two processes, whose other one sends ones; remembers what was sent when."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.sent: list[int] = []

    def begin_to_add(self, values: torch.Tensor) -> None:
        values += 1
        self.sent.append(len(values))

    def finish(self, sums: Any) -> None:
        pass


def test_a_bucket_is_sent_when_it_is_complete_and_a_parameter_without_a_gradient_delays_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "_BUCKET", 16)
    weights = [torch.nn.Parameter(torch.ones(20)) for _ in range(4)]
    for unused, early in ((None, 4), (1, 2)):
        listing = Listing()
        flat = FlatGradients(weights, listing)
        flat.expect(last=False)
        sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
        assert listing.sent == []
        flat.expect(last=True)
        sum(weight.sum() for place, weight in enumerate(weights) if place != unused).backward()  # type: ignore[union-attr]
        assert listing.sent == [32] * early
        flat.add_up()
        assert listing.sent == [32] * 4 + [16]
        for place, weight in enumerate(weights):
            assert weight.grad is not None and weight.grad.tolist() == [2.0 if place == unused else 3.0] * 20


def test_a_killed_run_goes_on_at_other_numbers_of_processes(
    bench: Any, launch: Launch, alone: Path, tmp_path: Path
) -> None:
    for count, step in ((1, 4), (4, 8)):
        processes = launch.start(tmp_path / "run", count, *EXACT)
        wait_for_step(tmp_path / "run", step)
        for process in processes:
            process.kill()
            process.communicate()
    launch.run(tmp_path / "run", 2, *EXACT)
    assert bench.history(tmp_path / "run") == bench.history(alone)
    assert bench.fingerprint(tmp_path / "run") == bench.fingerprint(alone)


def test_a_stop_signal_to_any_process_saves_and_stops_all(
    bench: Any, launch: Launch, alone: Path, tmp_path: Path
) -> None:
    first, second = launch.start(tmp_path / "run", 2, *EXACT, "train.steps=100000")
    wait_for_step(tmp_path / "run", 4)
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 75, errors
        assert "everything is saved" in errors
    assert bench.events(tmp_path / "run", "stop")


SHARDED = (*SETTINGS, "train.shard_processes=2")


@pytest.fixture(scope="module")
def sharded(launch: Launch, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that share one copy of the model."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    launch.run(folder, 2, *SHARDED)
    return folder


def test_two_processes_that_share_a_copy_train_as_two_that_hold_one_each(
    bench: Any, launch: Launch, sharded: Path, tmp_path: Path
) -> None:
    """Sums of two numbers have no order; what differs is the last bit of norms and of updates of short vectors."""
    launch.run(tmp_path / "run", 2, *SETTINGS)
    expected = load_checkpoint(tmp_path / "run", 12).weights
    for name, weight in load_checkpoint(sharded, 12).weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    for found, wanted in zip(bench.history(sharded), bench.history(tmp_path / "run"), strict=True):
        assert found[-1] == wanted[-1]
        assert number(found[4]) == pytest.approx(number(wanted[4]), rel=1e-5)


def test_a_shared_model_writes_samples(bench: Any, launch: Launch, tmp_path: Path) -> None:
    """Without held-out text they are the first that is asked of the model after an update."""
    launch.run(tmp_path / "run", 2, *SHARDED, 'evaluation.prompts=["To be"]', "evaluation.sample_tokens=4")
    assert bench.events(tmp_path / "run", "sample")


def test_a_shared_model_starts_with_the_bits_that_the_seed_stands_for(launch: Launch, tmp_path: Path) -> None:
    """At a learning rate this small an update changes no bit, so the first checkpoint holds the initial weights."""
    launch.run(
        tmp_path / "run",
        2,
        *SHARDED,
        "train.steps=1",
        "schedule.warmup_steps=1",
        "schedule.peak=1e-30",
        "schedule.warmup_from=1e-30",
    )
    model = ModelConfig.model_validate(json.loads((tmp_path / "run" / "run.json").read_text())["model"])
    expected = dict(OpenELM(model).initial_weights(torch.Generator().manual_seed(0)))
    found = load_checkpoint(tmp_path / "run", 1).weights
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def count_gradient_sums(into: Path) -> None:
    """Write down each time that gradients of shared parameters are added up over processes."""
    reduce_scatter = torch.distributed.reduce_scatter_single

    def counted(*values: Any, **options: Any) -> Any:
        with into.open("a") as file:
            file.write("x")
        return reduce_scatter(*values, **options)

    torch.distributed.reduce_scatter_single = counted


def test_accumulation_over_parts_of_a_batch_sends_no_more_gradients(forks: Launch, tmp_path: Path) -> None:
    counts = {}
    for rows in (4, 1):
        log = tmp_path / f"{rows}.log"
        settings = (*SHARDED, "train.steps=3", f"train.micro_rows={rows}")
        forks.run(tmp_path / str(rows), 2, *settings, before={0: functools.partial(count_gradient_sums, log)})
        counts[rows] = len(log.read_text())
    assert counts[4] >= 9  # each of two layers and the rest, in each of three steps
    assert counts[1] == counts[4]


def test_a_shared_model_is_saved_in_parts_and_read_whole(sharded: Path) -> None:
    folder = checkpoint_folder(sharded, 12)
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {f"{stem}-0000{part}-of-00002.safetensors" for stem in ("model", "optimizer") for part in (1, 2)}
    whole = load_checkpoint(sharded, 12)
    model = ModelConfig.model_validate(json.loads((sharded / "run.json").read_text())["model"])
    expected = {name: tuple(value.shape) for name, value in OpenELM(model).state_dict().items()}
    assert {name: tuple(value.shape) for name, value in whole.weights.items()} == expected
    sizes = [sum(value.numel() for value in read_tensors(folder / name).values()) for name in sorted(names)[:2]]
    assert max(sizes) < 0.6 * sum(sizes)


@pytest.mark.parametrize("count", [1, 4])
def test_a_shared_run_goes_on_alone_and_at_more_processes(
    bench: Any, launch: Launch, sharded: Path, tmp_path: Path, count: int
) -> None:
    """4 processes with 2 a copy are the hybrid of both. Sums are taken in another order: losses within 1e-3."""
    shutil.copytree(sharded, tmp_path / "run")
    for step in (9, 12):
        shutil.rmtree(checkpoint_folder(tmp_path / "run", step))
    launch.run(tmp_path / "run", count, *SHARDED)
    for found, expected in zip(bench.history(tmp_path / "run"), bench.history(sharded), strict=True):
        assert found[-1] == expected[-1]
        assert number(found[4]) == pytest.approx(number(expected[4]), rel=1e-3)
    assert bench.fingerprint(tmp_path / "run", 6) == bench.fingerprint(sharded, 6)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_the_layers_of_a_shared_model_changes_no_bit(
    bench: Any, launch: Launch, sharded: Path, tmp_path: Path, kind: str
) -> None:
    launch.run(tmp_path / "run", 2, *SHARDED, f"train.recompute={kind}")
    assert bench.fingerprint(tmp_path / "run") == bench.fingerprint(sharded)


def test_exact_sums_need_whole_gradients(bench: Any) -> None:
    from openelm.errors import ConfigError

    with pytest.raises(ConfigError, match="shard_processes 1"):
        bench.config(*EXACT, "train.shard_processes=2")


@pytest.mark.parametrize("settings", [EXACT, SETTINGS, (*SETTINGS, "train.shard_processes=2")])
def test_when_a_process_dies_the_others_say_which_and_stop(
    launch: Launch, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    first, second = launch.start(tmp_path / "run", 2, *settings, "train.steps=100000")
    wait_for_step(tmp_path / "run", 4)
    second.kill()
    second.communicate()
    _, errors = first.communicate(timeout=30)
    assert first.returncode == 75
    assert "E_PROCESS" in errors and "waited for process 1" in errors
    assert "Traceback" not in errors


def test_when_a_process_hangs_the_others_stop_in_time(launch: Launch, tmp_path: Path) -> None:
    first, second = launch.start(tmp_path / "run", 2, *EXACT, "train.steps=100000", "train.timeout_seconds=5")
    wait_for_step(tmp_path / "run", 4)
    second.send_signal(signal.SIGSTOP)
    _, errors = first.communicate(timeout=30)
    second.kill()
    second.communicate()
    assert first.returncode == 75
    assert "waited for process 1" in errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "3"}, "power of two"),
        ({"WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_an_environment_that_torchrun_would_not_make_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    from openelm.errors import ConfigError
    from openelm.train.distributed import open_processes

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), open_processes("cpu", 1.0):
        pass


def test_shards_must_be_a_power_of_two_that_divides_the_rows(bench: Any) -> None:
    from openelm.errors import ConfigError

    for shards in (3, 8):
        with pytest.raises(ConfigError, match=f"shards {shards}"):
            bench.config("train.numerics=exact", f"train.shards={shards}")
