"""Log-likelihoods of answers behind prompts: a prompt is computed once for all of its answers.

Prompts and answers of many questions pass the layers as one row of tokens without padding, each at its own position;
attention keeps them apart. The first token of an answer is predicted by the last one of its prompt, and its last one
predicts nothing, so an answer of one token costs nothing beside its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from openelm.errors import NumericError
from openelm.kernels.attention import attention
from openelm.model.transformer import OpenELM

_SCORED_AT_ONCE = 512
"""Positions whose logits exist at once."""


@dataclass(frozen=True)
class Tree:
    """A prompt and its answers, as ids; none is empty."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.prompt and self.answers and all(self.answers)

    @property
    def tokens(self) -> int:
        """Count the tokens that pass the layers."""
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)

    @property
    def length(self) -> int:
        """Count the positions of the longest text that passes the layers."""
        return len(self.prompt) + max(len(answer) for answer in self.answers) - 1


@dataclass(frozen=True)
class Answer:
    """What a model says of an answer.

    Attributes:
        nats: natural logarithm of its probability after the prompt.
        is_greedy: whether each of its tokens is the likeliest one.
    """

    nats: float
    is_greedy: bool


@dataclass(frozen=True)
class Branch:
    """Where in a row of tokens a text goes on: after `prompt`, in `own`."""

    prompt: slice
    own: slice


class Forest:
    """Trees as one row of tokens.

    Attributes:
        tokens, positions: int64 (R,).
        trees: of each tree its prompt, and a branch for every answer of more than one token.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        ids, positions, self.sources, self.targets = list[int](), list[int](), list[int](), list[int]()
        self.trees: list[tuple[slice, list[Branch]]] = []
        for tree in trees:
            prompt = slice(len(ids), len(ids) + len(tree.prompt))
            ids += tree.prompt
            positions += range(len(tree.prompt))
            branches = []
            for answer in tree.answers:
                own = slice(len(ids), len(ids) + len(answer) - 1)
                ids += answer[:-1]
                positions += range(len(tree.prompt), len(tree.prompt) + len(answer) - 1)
                self.sources += [prompt.stop - 1, *range(own.start, own.stop)]
                self.targets += answer
                if own.stop > own.start:
                    branches.append(Branch(prompt, own))
            self.trees.append((prompt, branches))
        self.tokens, self.positions = torch.tensor(ids), torch.tensor(positions)

    @cached_property
    def visible(self) -> Tensor:
        """Which tokens each one sees: bool (R, R)."""
        found = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for prompt, branches in self.trees:
            for part in (prompt, *(branch.own for branch in branches)):
                found[part, part] = torch.ones(part.stop - part.start, part.stop - part.start).tril().bool()
            for branch in branches:
                found[branch.own, prompt] = True
        return found


class Scores(Protocol):
    """A model as trees are scored by it."""

    context_tokens: int
    vocab_size: int

    def states(self, forest: Forest) -> Tensor:
        """Return the final states (R, D)."""

    def logits(self, states: Tensor) -> Tensor:
        """Predict from states (N, D): (N, vocab_size)."""


class OurScores:
    """A model of ours; with packed matrices and C++ kernels an answer's bits do not depend on the other trees.

    Args:
        vocab_size: the tokenizer's, whose ids probabilities are over; padding rows of the embedding are not.
    """

    def __init__(self, model: OpenELM, vocab_size: int) -> None:
        self._model, self.vocab_size = model, vocab_size
        self.context_tokens = min(model.config.max_context_length, model.config.rope_max_length)

    def states(self, forest: Forest) -> Tensor:
        """Return the final states (R, D)."""
        apart = _Apart(forest)
        layers = [apart] * self._model.config.num_transformer_layers
        device = self._model.transformer.norm.weight.device
        return self._model.next_states(forest.tokens.to(device), forest.positions.to(device), layers)

    def logits(self, states: Tensor) -> Tensor:
        """Predict from states (N, D): (N, vocab_size)."""
        return self._model.logits(states)[:, : self.vocab_size]


class _Apart:
    """Attention within the trees of a row, a layer after the other: nothing is kept between layers."""

    def __init__(self, forest: Forest) -> None:
        self._trees = forest.trees

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in each prompt, and in each answer to its prompt too; (1, heads, R, hd) -> (1, R, heads · hd)."""
        parts = []
        for prompt, branches in self._trees:
            parts.append(attention(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt]))
            for branch in branches:
                seen = (torch.cat((part[:, :, branch.prompt], part[:, :, branch.own]), dim=2) for part in (key, value))
                parts.append(attention(query[:, :, branch.own], *seen))
        return torch.cat(parts, dim=1)


@torch.inference_mode()
def answer_likelihoods(model: Scores, trees: Sequence[Tree]) -> list[list[Answer]]:
    """Score the answers of trees that pass the model together.

    Raises:
        NumericError: a log-likelihood is not finite.
    """
    forest = Forest(trees)
    states = model.states(forest)
    targets = torch.tensor(forest.targets, device=states.device)
    sources = torch.tensor(forest.sources, device=states.device)
    nats, greedy = list[np.ndarray](), list[np.ndarray]()
    for start in range(0, len(targets), _SCORED_AT_ONCE):
        piece = slice(start, start + _SCORED_AT_ONCE)
        logits = model.logits(states[sources[piece]])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(1, targets[piece, None])[:, 0]
        nats.append((chosen - logits.logsumexp(dim=-1)).cpu().double().numpy())
        greedy.append((logits.argmax(dim=-1) == targets[piece]).cpu().numpy())
    of_tokens, likeliest = np.concatenate(nats), np.concatenate(greedy)
    if not np.isfinite(of_tokens).all():
        raise NumericError(
            f"the log-likelihood of a token of an answer is {of_tokens[~np.isfinite(of_tokens)][0]}",
            fix="the weights are damaged, or too wide for their dtype: try float32",
        )
    lengths = [len(answer) for tree in trees for answer in tree.answers]
    ends = list(accumulate(lengths))
    found = iter(
        Answer(float(of_tokens[end - length : end].sum()), bool(likeliest[end - length : end].all()))
        for length, end in zip(lengths, ends, strict=True)
    )
    return [[next(found) for _ in tree.answers] for tree in trees]
