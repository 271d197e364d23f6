"""Through the cache, in whatever pieces, a sequence gives what one full pass gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.model.cache import KeyValueCache
from openelm.model.transformer import OpenELM

MakeModel = Callable[..., OpenELM]


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def cache_for(model: OpenELM, length: int = 13, rows: int = 3) -> KeyValueCache:
    return KeyValueCache(model.config.plan, rows, length, dtype=next(model.parameters()).dtype)


def in_pieces(model: OpenELM, tokens: Tensor, ends: list[int], cache: KeyValueCache) -> Tensor:
    starts = [0, *ends[:-1]]
    return torch.cat([model(tokens[:, a:b], cache=cache) for a, b in zip(starts, ends, strict=True)], dim=1)


def test_one_token_at_a_time_is_the_full_pass(model: OpenELM, tokens: Tensor) -> None:
    found = in_pieces(model, tokens, list(range(1, 14)), cache_for(model))
    torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", range(1, 13))
def test_continuing_at_any_point_is_the_full_pass(model: OpenELM, tokens: Tensor, split: int) -> None:
    full = model(tokens)
    for ends in ([split, 13], [split, *range(split + 1, 14)]):
        cache = cache_for(model)
        torch.testing.assert_close(in_pieces(model, tokens, ends, cache), full, rtol=0, atol=1e-12)
        assert cache.used == 13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str)
def test_narrow_dtypes_agree_to_their_digits(
    make_model: MakeModel, tokens: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(dtype)
    full = model(tokens)
    found = in_pieces(model, tokens, [1, 5, 6, 13], cache_for(model))
    torch.testing.assert_close(found, full, rtol=0, atol=tolerance * float(full.abs().max()))


@pytest.mark.parametrize("kept", range(13))
def test_truncating_forgets_exactly_what_came_after(model: OpenELM, tokens: Tensor, kept: int) -> None:
    cache = cache_for(model)
    model((tokens + 5) % 31, cache=cache)  # a wrong guess, all of it
    cache.truncate(0)
    model(torch.cat((tokens[:, :kept], (tokens[:, kept:] + 11) % 31), dim=1), cache=cache)
    cache.truncate(kept)
    torch.testing.assert_close(model(tokens[:, kept:], cache=cache), model(tokens)[:, kept:], rtol=0, atol=1e-12)


def test_a_longer_cache_than_needed_changes_nothing(model: OpenELM, tokens: Tensor) -> None:
    short, long = cache_for(model), cache_for(model, 200)
    for cache in (short, long):
        cache.keys[0].fill_(float("nan"))  # what is not filled is not read
        cache.values[2].fill_(float("nan"))
    torch.testing.assert_close(
        in_pieces(model, tokens, [4, 5, 13], short), in_pieces(model, tokens, [4, 5, 13], long), rtol=0, atol=1e-12
    )


def test_two_callers_share_a_model_without_meeting(model: OpenELM, tokens: Tensor) -> None:
    first, second = cache_for(model), cache_for(model)
    other = (tokens + 9) % 31
    found, found_other = [], []
    for position in range(13):
        found.append(model(tokens[:, position : position + 1], cache=first))
        found_other.append(model(other[:, position : position + 1], cache=second))
    torch.testing.assert_close(torch.cat(found, 1), model(tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(found_other, 1), model(other), rtol=0, atol=1e-12)


def test_a_full_cache_refuses_and_stays_usable(model: OpenELM, tokens: Tensor) -> None:
    cache = cache_for(model)
    model(tokens[:, :10], cache=cache)
    with pytest.raises(ConfigError, match="14 tokens do not fit in a cache of 13"):
        model(tokens[:, :4], cache=cache)
    assert cache.used == 10
    torch.testing.assert_close(model(tokens[:, 10:], cache=cache), model(tokens)[:, 10:], rtol=0, atol=1e-12)


def test_a_cache_holds_each_layers_own_heads(model: OpenELM) -> None:
    cache = cache_for(model, 7, rows=2)
    assert [tuple(key.shape) for key in cache.keys] == [(2, 1, 7, 6), (2, 2, 7, 6), (2, 3, 7, 6)]
    assert [tuple(value.shape) for value in cache.values] == [(2, 1, 7, 6), (2, 2, 7, 6), (2, 3, 7, 6)]
