"""`openelm bench`: every line is whole, and its ratio is its value over its ceiling. No number of speed is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from openelm.bench import ceilings, loader, model
from openelm.bench.machine import allocator, peak_bytes
from openelm.bench.measurement import Measurement
from openelm.bench.step import fixed_batch, random_tokens, trainer, update
from openelm.cli import main
from openelm.model.sizes import model_size

Failed = Callable[..., str]
EVERY_LINE = {
    *("case", "value", "unit", "ceiling", "ratio", "repeats", "spread", "device", "torch", "threads", "precision"),
    *("allocator", "date"),
}
CEILINGS = {
    "matmul-fp32-linear": "matmul-fp32-torch",
    "train": "matmul-fp32-torch",
    "decode": "memory-read",
    "loader": "bare tokenizer",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All cases on work that takes no time, in fp32."""
    import contextlib
    import io

    words = [
        "bench",
        "--size",
        "5m",
        "--rows",
        "1",
        "--length",
        "8",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--json",
    ]
    words += ["--disk-mib", "4", "--threads", "1", "--folder", str(tmp_path_factory.mktemp("disk"))]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(ceilings, "CPU_SHAPES", ((16, 16, 16), (16, 8, 32)))
        patch.setattr(ceilings, "BUFFER_BYTES", 1 << 16)
        patch.setattr(ceilings, "multiplied_precisions", lambda device: ("fp32",))
        patch.setattr(loader, "DOCUMENTS", 120)
        patch.setattr(loader, "WORDS", 100)
        patch.setattr(loader, "VOCABULARY", 400)
        patch.setattr(model, "DECODED_TOKENS", 4)
        assert main(words) == 0
    return [json.loads(line) for line in printed.getvalue().splitlines()]


def test_all_cases_come_in_order(lines: list[dict[str, Any]]) -> None:
    found = [line["case"] for line in lines if not line["case"].startswith("matmul-bf16")]
    assert found == [
        *("matmul-fp32-torch", "matmul-fp32-linear", "memory-read", "memory-copy", "disk-write", "disk-read"),
        *("train", "decode", "loader"),
    ]


def test_every_line_is_whole(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert line.keys() >= EVERY_LINE, line["case"]
        assert line["repeats"] == 5
        low, high = line["spread"]
        assert 0 < low <= line["value"] <= high


def test_a_ratio_is_the_value_over_the_ceiling(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        if line["ceiling"] is None:
            assert line["ratio"] is None
        else:
            assert line["ratio"] == line["value"] / line["ceiling"]


def test_ceilings_are_the_measured_ones(lines: list[dict[str, Any]]) -> None:
    by_case = {line["case"]: line for line in lines}
    assert {case: by_case[case]["ceiling_from"] for case in CEILINGS} == CEILINGS
    train, decode = by_case["train"], by_case["decode"]
    assert train["ceiling"] == 1e9 * by_case["matmul-fp32-torch"]["value"] / train["flops_per_token"]
    assert decode["ceiling"] == 1e9 * by_case["memory-read"]["value"] / decode["bytes_per_token"]


def test_the_costs_of_a_token_are_those_of_the_model(lines: list[dict[str, Any]]) -> None:
    by_case, config = {line["case"]: line for line in lines}, model_size("5m")
    flops = config.plan.training_flops_per_token(config.vocab_size, 8)
    assert by_case["train"]["flops_per_token"] == flops
    context = model.PROMPT_TOKENS + 4 / 2
    number_bytes = 4
    expected = config.parameters * number_bytes + config.plan.kv_bytes_per_token(number_bytes) * context
    assert by_case["decode"]["bytes_per_token"] == expected


def test_what_is_measured_of_the_disk_is_said(lines: list[dict[str, Any]]) -> None:
    read = next(line for line in lines if line["case"] == "disk-read")
    assert read["file_bytes"] == 4 << 20
    assert read["cache"] in ("dropped", "not dropped", "unknown")
    assert list(Path(read["folder"]).iterdir()) == []


def test_without_json_there_is_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "--case", "disk", "--disk-mib", "4", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("cpu ")
    assert [line.split()[0] for line in shown if line.startswith("disk-")][:2] == ["disk-write", "disk-read"]


def test_the_threads_are_those_of_before_afterwards(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert main(["bench", "--case", "disk", "--threads", "3", "--disk-mib", "4", "--folder", str(tmp_path)]) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--repeats", "4"], ["--repeats 4", "5"]),
        (["--rows", "0"], ["--rows is 0"]),
        (["--disk-mib", "0"], ["--disk-mib is 0"]),
        (["--threads", "-1"], ["--threads is -1"]),
        (["--size", "270"], ["'270'", "270m"]),
        (["--length", "5000"], ["--length 5000", "4096"]),
        (["--case", "disk", "--folder", "not-here"], ["not-here", "folder"]),
    ],
)
def test_bad_input_is_a_line_that_says_what_is_allowed(failed: Failed, words: list[str], named: list[str]) -> None:
    line = failed(2, "bench", *words)
    assert all(word in line for word in named)


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["bench", "--case", "trian"])
    assert refused.value.code == 2
    assert "train" in capsys.readouterr().err


def test_a_value_is_the_median_of_its_repeats() -> None:
    values = (3.0, 1.0, 8.0, 2.0, 9.0)
    measured = Measurement("case", values, "GB/s", ceiling=6.0, ceiling_from="another")
    line = measured.to_json()
    assert (line["value"], line["ratio"], line["spread"]) == (median(values), 0.5, [1.0, 9.0])


def test_the_timed_update_is_the_published_loss_of_the_batch() -> None:
    """The first losses are those of the initial weights, by the plain formula."""
    config = model_size("5m")
    updater = trainer(config, 2, 8, precision="fp32", device=torch.device("cpu"))
    tokens = random_tokens(config.vocab_size, 2, 8)
    with torch.no_grad():
        logits = updater.model(tokens[:, :-1]).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        expected_z_loss = 1e-4 * logits.logsumexp(-1).square().mean()
    batch = fixed_batch(tokens)
    first, second = update(updater, batch), update(updater, batch)
    assert first.cross_entropy == pytest.approx(float(expected), rel=1e-5)
    assert first.z_loss == pytest.approx(float(expected_z_loss), rel=1e-4)
    assert second.cross_entropy < first.cross_entropy


def test_the_machine_is_named() -> None:
    assert allocator()
    assert peak_bytes() > 1 << 20
