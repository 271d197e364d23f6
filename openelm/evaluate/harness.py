"""lm-evaluation-harness asks, our models answer: its tasks, prompts and metrics as they are."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from openelm.errors import ConfigError, DataError
from openelm.evaluate.answers import Answers
from openelm.evaluate.trees import Answer, Scores, Tree, answer_likelihoods

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""
_FIRST_TOKENS, _MOST_TOKENS = 256, 16_384
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens")
"""What tasks call the tokens that a model may write."""


class Encodes(Protocol):
    """A tokenizer as the harness uses it."""

    @property
    def start_id(self) -> int:
        """What stands before a text that has nothing before it."""

    def encode(self, text: str, *, starts: bool) -> list[int]:
        """Encode a text; one that `starts` begins as prompts of the model do, with BOS or without."""


@dataclass(frozen=True)
class Writing:
    """A text to be continued greedily.

    Attributes:
        ids: of the prompt.
        until: the text ends before any of these.
    """

    ids: tuple[int, ...]
    until: tuple[str, ...]
    most_tokens: int


class Writes(Protocol):
    """Continues texts, in order; they are whole when they are yielded."""

    def __call__(self, writings: Sequence[Writing]) -> Iterator[str]: ...


class Pace:
    """How many tokens pass the model together: twice as many as long as that is faster and memory suffices.

    Args:
        tokens: as many, always.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens, self._grows, self._rate = tokens or _FIRST_TOKENS, tokens is None, 0.0
        self._seen = 0

    def took(self, tokens: int, seconds: float) -> None:
        """Take note of what a row of tokens took."""
        self._seen += 1
        if not self._grows or self._seen < 2 or 2 * tokens < self.tokens:  # the first one warms caches up
            return
        rate = tokens / max(seconds, 1e-9)
        if rate < 1.05 * self._rate or 2 * self.tokens > _MOST_TOKENS:
            self._grows = False
        else:
            self._rate, self.tokens, self._seen = rate, 2 * self.tokens, 0

    def failed(self) -> bool:
        """Use half as many after memory ran out; returns whether that is possible."""
        self._grows, self.tokens = False, self.tokens // 2
        return self.tokens >= 1


class Examinee(TemplateLM):
    """A model as the harness asks it. A prompt is computed once for all of its answers.

    Args:
        writes: for tasks that let a model write.
        answers: what is known already, and where new answers are kept.
        most_tokens: tokens that pass the model together; found out by default. It changes no choice.
    """

    def __init__(
        self,
        scores: Scores,
        tokenizer: Encodes,
        answers: Answers,
        *,
        writes: Writes | None = None,
        most_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._scores, self._encodes, self._answers, self._writes = scores, tokenizer, answers, writes
        self._pace, self._progress = Pace(most_tokens), progress or (lambda what, done, total: None)

    @property
    def eot_token_id(self) -> int:
        """What the harness puts before texts without a prompt."""
        return self._encodes.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Encode a text that begins as prompts do, unless told otherwise."""
        return self._encodes.encode(string, starts=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        found = self._answered([self._fitting(prompt, answer) for _, prompt, answer in requests])
        return [(answer.nats, answer.is_greedy) for answer in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the context, as the harness cuts them."""
        pairs, counts = list[tuple[tuple[int, ...], tuple[int, ...]]](), list[int]()
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self._encodes.encode(text, starts=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scores.context_tokens,
                context_len=1,
            )
            cut = [make_disjoint_window(window) for window in windows]
            pairs += [(tuple(prompt), tuple(answer)) for prompt, answer in cut]
            counts.append(len(cut))
        found = iter(self._answered(pairs))
        return [sum(next(found).nats for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily until one of the task's ends."""
        if self._writes is None:
            raise ConfigError("this task lets the model write", fix="use a model folder of OpenELM")
        writings = list[Writing]()
        for request in requests:
            prompt, options = request.args
            until = options.get("until", [])
            most = next((options[name] for name in _MOST if name in options), 256)
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise ConfigError("this task samples", fix="choose one that decodes greedily")
            room = self._scores.context_tokens - most
            if room < 1:
                raise ConfigError(
                    f"this task lets the model write {most} tokens, and its context is {self._scores.context_tokens}",
                    fix="use a model with a longer context",
                )
            ids = self._encodes.encode(prompt, starts=True)[-room:]
            writings.append(Writing(tuple(ids), tuple([until] if isinstance(until, str) else until), most))
        return self._written(writings, self._writes)

    def _written(self, writings: Sequence[Writing], writes: Writes) -> list[str]:
        """Return what is written, in order, of which only that which is not known is."""
        keys = [self._answers.text_key(writing.ids, writing.until, writing.most_tokens) for writing in writings]
        new = {key: one for key, one in zip(keys, writings, strict=True) if self._answers.find_text(key) is None}
        texts = writes(list(new.values())) if new else ()
        for done, (key, text) in enumerate(zip(new, texts, strict=True), start=1):
            self._answers.add_text(key, text)
            self._progress("texts", done, len(new))
        return [known for key in keys if (known := self._answers.find_text(key)) is not None]

    def _fitting(self, prompt: list[int], answer: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut the beginning of what is longer than the context, as the harness does."""
        if not answer:
            raise DataError("an answer is nothing but what its prompt ends with", fix="look at the task's answers")
        prompt = prompt or [self._encodes.start_id]
        kept = (prompt + answer)[-(self._scores.context_tokens + 1) :]
        first = max(1, len(kept) - len(answer))
        return tuple(kept[:first]), tuple(kept[first:])

    def _answered(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Answer]:
        """Return the answers' log-likelihoods, in order, of which only those that are not known are computed."""
        keys = [self._answers.key(*pair) for pair in pairs]
        wanted = defaultdict[tuple[int, ...], dict[tuple[int, ...], str]](dict)
        for pair, key in zip(pairs, keys, strict=True):
            if self._answers.find(key) is None:
                wanted[pair[0]][pair[1]] = key
        trees = sorted((Tree(prompt, tuple(answers)) for prompt, answers in wanted.items()), key=_by_length)
        done, total = 0, sum(tree.tokens for tree in trees)
        while trees:
            row = self._next_row(trees)
            began = time.perf_counter()
            try:
                found = answer_likelihoods(self._scores, row)
            except RuntimeError as error:
                if not _ran_out(error) or len(row) == 1 or not self._pace.failed():
                    raise
                continue
            del trees[: len(row)]
            tokens = sum(tree.tokens for tree in row)
            self._pace.took(tokens, time.perf_counter() - began)
            done += tokens
            self._progress("tokens", done, total)
            for tree, answers in zip(row, found, strict=True):
                of_tree = wanted[tree.prompt]
                self._answers.add((of_tree[ids], answer) for ids, answer in zip(tree.answers, answers, strict=True))
        return [answer for key in keys if (answer := self._answers.find(key))]

    def _next_row(self, trees: Sequence[Tree]) -> list[Tree]:
        """Take from the front as many trees as pass together, one at least."""
        row, tokens = list[Tree](), 0
        for tree in trees:
            if row and tokens + tree.tokens > self._pace.tokens:
                break
            row.append(tree)
            tokens += tree.tokens
        return row


def _ran_out(error: RuntimeError) -> bool:
    """Tell whether memory ran out: of a GPU, or of the machine, about which torch has no error of its own."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def _by_length(tree: Tree) -> tuple[int, tuple[int, ...]]:
    """Order by falling length: what does not fit fails first."""
    return -tree.tokens, tree.prompt
