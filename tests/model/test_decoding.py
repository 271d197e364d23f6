"""Slots of one cache against full forward passes: positions, company, forgetting and copies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.kernels import native
from openelm.model import decoding
from openelm.model.config import ModelConfig
from openelm.model.decoding import Decoder

from .conftest import random_model, some_ids

LENGTH = 40
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15}
"""Between logits of about 5. In bf16 the C++ step keeps fp32 where the layers round to bf16."""


@pytest.fixture(params=["native", "static"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The C++ kernel, or the step of fixed shapes that serves other devices."""
    if request.param == "native" and native.kernels_name() == "torch":
        pytest.skip("no C++ kernels were built for this CPU")
    if request.param == "static":
        monkeypatch.setattr(decoding, "pack_model", lambda model: None)
    yield request.param


@pytest.mark.parametrize("normalises", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_after_prompts_of_any_length_are_the_full_forward(
    odd_config: ModelConfig, path: str, dtype: torch.dtype, normalises: bool
) -> None:
    model = random_model(odd_config.model_copy(update={"normalize_qk_projections": normalises}), dtype)
    ids = some_ids(model, 3, LENGTH)
    with torch.no_grad():
        full = model(ids).float()
    decoder = Decoder(model, 4, LENGTH)
    assert (decoder._kernel is None) == (path == "static")
    starts = {3: 7, 0: 1, 2: 20}  # slot -> prompt
    for row, (slot, start) in enumerate(starts.items()):
        found = decoder.prefill(slot, ids[row, :start].tolist())
        assert (found - full[row, start - 1]).abs().max() <= TOLERANCE[dtype]
    for step in range(LENGTH - 20):
        here = [start + step for start in starts.values()]
        found = decoder.step([int(ids[row, place]) for row, place in enumerate(here)], list(starts))
        wanted = torch.stack([full[row, place] for row, place in enumerate(here)])
        assert (found - wanted).abs().max() <= TOLERANCE[dtype]
        assert [decoder.used(slot) for slot in starts] == [place + 1 for place in here]


@pytest.mark.skipif(native.kernels_name() == "torch", reason="torch's products depend on the number of rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stretches_in_which_a_prompt_is_read_change_no_bit(odd_config: ModelConfig, dtype: torch.dtype) -> None:
    """What is found of a prompt in the cache is as if it had been read."""
    model = random_model(odd_config, dtype)
    ids = some_ids(model, LENGTH).tolist()
    decoder = Decoder(model, 2, LENGTH)
    whole = decoder.prefill(0, ids)
    for cuts in ((1,), (LENGTH - 1,), (7, 8, 30)):
        decoder.truncate(1, 0)
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            logits = decoder.prefill(1, ids[start:end])
        assert torch.equal(logits, whole)
        for part in (*decoder._cache.keys, *decoder._cache.values):
            assert torch.equal(part[1], part[0])


def test_several_tokens_of_a_slot_follow_one_another(odd_config: ModelConfig, path: str) -> None:
    model = random_model(odd_config)
    ids = some_ids(model, 2, 12)
    with torch.no_grad():
        full = model(ids)
    decoder = Decoder(model, 2, LENGTH)
    for row in range(2):
        decoder.prefill(row, ids[row, :3].tolist())
    order = [(0, 3), (1, 3), (0, 4), (0, 5), (1, 4)]
    found = decoder.step([int(ids[row, place]) for row, place in order], [row for row, _ in order])
    for logits, (row, place) in zip(found, order, strict=True):
        torch.testing.assert_close(logits, full[row, place], atol=2e-5, rtol=0)


def test_forgotten_and_copied_tokens(odd_config: ModelConfig, path: str) -> None:
    model = random_model(odd_config)
    ids, other = some_ids(model, 2, 12)
    decoder = Decoder(model, 2, LENGTH)
    decoder.prefill(0, [*ids[:8].tolist(), *other[8:].tolist()])
    decoder.copy(0, 1, 8)
    decoder.truncate(0, 8)
    with torch.no_grad():
        wanted = model(ids[None, :9])[0, -1]
    for logits in decoder.step([int(ids[8])] * 2, [0, 1]):
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=0)


def test_more_tokens_than_go_through_the_kernel_together(odd_config: ModelConfig, path: str) -> None:
    model = random_model(odd_config)
    slots = 2 * decoding._TOKENS_AT_ONCE + 3
    ids = some_ids(model, slots)
    decoder = Decoder(model, slots, 4)
    with torch.no_grad():
        wanted = model(ids[:, None])[:, 0]
    torch.testing.assert_close(decoder.step(ids.tolist(), list(range(slots))), wanted, atol=2e-5, rtol=0)


def test_a_full_slot_is_an_error_and_nothing_changes(odd_config: ModelConfig, path: str) -> None:
    decoder = Decoder(random_model(odd_config), 2, 3)
    decoder.prefill(0, [1, 2, 3])
    with pytest.raises(ConfigError, match="3 tokens is full"):
        decoder.step([1, 1], [1, 0])
    assert (decoder.used(0), decoder.used(1)) == (3, 0)
    with pytest.raises(ConfigError, match="4 tokens"):
        decoder.prefill(1, [1, 2, 3, 4])
    with pytest.raises(ConfigError, match="rotary table"):
        Decoder(random_model(odd_config), 1, odd_config.rope_max_length + 1)


def test_a_step_that_fails_counts_no_token(odd_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(random_model(odd_config), 2, 5)
    decoder.prefill(0, [1, 2])

    def broken(*arguments: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(decoder, "_computed", broken)
    with pytest.raises(MemoryError):
        decoder.step([3, 4, 5], [0, 1, 0])
    assert (decoder.used(0), decoder.used(1)) == (2, 0)


def test_weights_that_the_kernel_does_not_take_run_through_the_layers(odd_config: ModelConfig) -> None:
    decoder = Decoder(random_model(odd_config, torch.float64), 1, 4)
    assert decoder._kernel is None
    assert decoder.step([1], [0]).dtype == torch.float32
