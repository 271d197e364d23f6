"""Log-likelihoods of token rows, equal for every batch size.

A row passes the model at a length that depends on the row alone, and the head sees one row at a time, so its
score does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from openelm.errors import ConfigError, NumericError
from openelm.model.transformer import OpenELM

_LENGTH_MULTIPLE = 64  # rows of nearly the same length share a batch
_HEAD_POSITIONS = 512  # positions whose logits exist at once


@dataclass(frozen=True)
class Row:
    """A stretch of tokens whose last `scored` are scored, given all before them.

    Attributes:
        ids: (length,) int64, from scored + 1 to the model's context + 1 tokens.
        name: what an error calls it.
    """

    ids: np.ndarray
    scored: int
    name: str


def windows(tokens: int, window_tokens: int, stride_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Cover `tokens` positions with windows (start, end, scored).

    A window reads positions start..end-1 and its last `scored` predict. Every position predicts in exactly
    one window, and all windows but a lone one are full.
    """
    end = min(window_tokens, tokens)
    yield 0, end, end
    while end < tokens:
        scored = min(stride_tokens, tokens - end)
        end += scored
        yield end - window_tokens, end, scored


@torch.inference_mode()
def log_likelihoods(model: OpenELM, rows: Sequence[Row], *, vocab_size: int, batch_rows: int = 8) -> list[np.ndarray]:
    """Score rows: per row the natural log-probability of each of its last `scored` tokens, float64 (scored,).

    Args:
        vocab_size: the probabilities are over ids below this; padding rows of the embedding are not.
        batch_rows: rows per forward pass.

    Raises:
        ConfigError: a row is too long for the model.
        NumericError: a log-probability is not finite; names the row.
    """
    context_tokens, device = model.config.max_context_length, next(model.parameters()).device
    for row in rows:
        assert 0 < row.scored < len(row.ids)
        if len(row.ids) - 1 > context_tokens:
            raise ConfigError(
                f"{row.name}: {len(row.ids) - 1} tokens, and the model's context is {context_tokens}",
                fix="cut the row, or score it in windows",
            )

    def padded_tokens(index: int) -> int:
        multiples = -(-(len(rows[index].ids) - 1) // _LENGTH_MULTIPLE)
        return min(multiples * _LENGTH_MULTIPLE, context_tokens)

    results: dict[int, np.ndarray] = {}
    for length, same in groupby(sorted(range(len(rows)), key=padded_tokens, reverse=True), padded_tokens):
        indices = list(same)
        for first in range(0, len(indices), batch_rows):
            batch = indices[first : first + batch_rows]
            # A row cannot see the zeros that follow it.
            tokens = np.zeros((len(batch), length), dtype=np.int64)
            for place, index in enumerate(batch):
                ids = rows[index].ids[:-1]
                tokens[place, : len(ids)] = ids
            hidden = model.hidden(torch.from_numpy(tokens).to(device))
            for place, index in enumerate(batch):
                results[index] = _score(model, hidden[place], rows[index], vocab_size)
    return [results[index] for index in range(len(rows))]


def _score(model: OpenELM, hidden: Tensor, row: Row, vocab_size: int) -> np.ndarray:
    """Score one row from its states (length, dim), a bounded number of positions at a time."""
    end = len(row.ids) - 1
    hidden = hidden[end - row.scored : end]
    targets = torch.from_numpy(row.ids[-row.scored :]).to(hidden.device)
    parts = []
    for first in range(0, row.scored, _HEAD_POSITIONS):
        piece = slice(first, first + _HEAD_POSITIONS)
        logits = model.logits(hidden[piece])[:, :vocab_size]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        parts.append(logits.log_softmax(dim=-1).gather(1, targets[piece, None])[:, 0])
    values: np.ndarray = torch.cat(parts).cpu().double().numpy()
    if not np.isfinite(values).all():
        raise NumericError(
            f"{row.name}: the log-likelihood of a token is {values[~np.isfinite(values)][0]}",
            fix="the weights are damaged, or too wide for their dtype: try float32",
        )
    return values
