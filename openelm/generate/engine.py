"""Continuous batching: requests come and go while others are answered, each in a slot of one cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from torch import Tensor

from openelm.errors import ConfigError, OpenELMError
from openelm.generate.request import Generation, Token, common_tokens, read_choices
from openelm.generate.sampler import Choice, Chosen
from openelm.generate.sampling import SamplingConfig
from openelm.model.decoding import Decoder
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer


class Proposer(Protocol):
    """Guesses how texts go on (`generate.speculative`); what it says changes the speed and nothing else."""

    def propose(self, slot: int, ids: Sequence[int], most: int) -> list[int]:
        """Guess up to `most` tokens after `ids`, of which the slot held a part when it was asked last."""


@dataclass(eq=False)
class _Slot:
    """A place in the cache: whose it is, and the ids that it holds, which outlive the request."""

    index: int
    generation: Generation | None = None
    scope: str = ""
    ids: list[int] = field(default_factory=list)
    last_used: int = 0

    def shared(self, generation: Generation) -> int:
        """Count the tokens of a request's prompt that stand here; one at least must be read, to predict the next."""
        if self.scope != generation.scope:
            return 0
        return min(common_tokens(self.ids, generation.ids), generation.prompt_tokens - 1)

    def will_share(self, generation: Generation) -> int:
        """Count those that will stand here when the prompt that is being read has been read."""
        if self.generation is None or self.scope != generation.scope:
            return 0
        return min(common_tokens(self.generation.ids, generation.ids), generation.prompt_tokens - 1)


class Engine:
    """Generates for many requests with one model; belongs to one thread.

    A step reads at most one stretch of one prompt, so that those who are being answered wait for no long prompt, and
    takes every other request one token on. What a text says depends on its own request alone, and on how an earlier
    answer was rounded, if its scope left one in the cache.

    Args:
        slots: requests answered at a time; others wait in order.
        length: tokens a slot holds; by default the model's context, which is also the most.
        chunk: tokens of a prompt that are read in a step.
        proposer: guesses tokens that are then computed together.
        compiles: whether steps go through torch.compile where no C++ kernel takes them: for GPUs.

    Raises:
        ConfigError: the tokenizer is not the model's.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        slots: int = 1,
        length: int | None = None,
        chunk: int = 256,
        proposer: Proposer | None = None,
        compiles: bool = False,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model.config.vocab_size}",
                fix="use the tokenizer the model was trained with",
            )
        context = model.config.max_context_length
        self._length = min(context, length or context)
        self._tokenizer, self._chunk, self._proposer = tokenizer, chunk, proposer
        self._decoder = Decoder(model, slots, self._length, compiles=compiles)
        self._slots = [_Slot(index) for index in range(slots)]
        self._waiting: deque[Generation] = deque()
        self._reading: deque[_Slot] = deque()
        self._time = count(1)

    @property
    def active(self) -> int:
        """Slots in use."""
        return sum(slot.generation is not None for slot in self._slots)

    @property
    def running(self) -> tuple[Generation, ...]:
        """Requests that have a slot."""
        return tuple(slot.generation for slot in self._slots if slot.generation is not None)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], config: SamplingConfig, *, scope: str = "") -> Generation:
        """Take a request; it starts with the next step that finds a slot for it.

        Args:
            prompt_ids: ids with the BOS id first, at most a slot long.
            scope: requests of one scope use each other's prompts in the cache, others never do.

        Raises:
            ConfigError: the prompt is empty, too long, or holds an id the tokenizer does not have; or a bias or a
                constraint of `config` cannot be used with the tokenizer.
        """
        limit_tokens = min(config.max_tokens, self._room_tokens(prompt_ids))
        generation = Generation(prompt_ids, config, self._tokenizer, limit_tokens, scope, self._decoder.device)
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request now; its slot is free at once."""
        generation.finished = True
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._free(generation)

    def step(self) -> bool:
        """Go one step on with everything; returns whether there was anything to do."""
        if self._waiting:
            self._place_waiting()
        running = [slot for slot in self._slots if slot.generation is not None and slot not in self._reading]
        if not (running or self._reading):
            return False
        first = self._read_stretch()
        if first is not None:
            self._choose([first])
        if running:
            self._choose(self._decoded(running))
        return True

    def stream(self, prompt_ids: Sequence[int], config: SamplingConfig, *, scope: str = "") -> Iterator[Token]:
        """Submit a request and hand its tokens over as they are known; leaving early cancels it.

        Raises:
            ConfigError: as `submit`, with the first token.
            NumericError: the model's logits are not finite.
        """
        generation = self.submit(prompt_ids, config, scope=scope)
        try:
            while not generation.finished:
                self.step()
                yield from generation.take()
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise generation.error

    def _room_tokens(self, prompt_ids: Sequence[int]) -> int:
        """Count tokens that can follow: the rest of a slot and one more, as the last is not read back."""
        if not prompt_ids:
            raise ConfigError("the prompt is empty", fix="give some text, or a tokenizer with a BOS id")
        if len(prompt_ids) > self._length:
            raise ConfigError(
                f"the prompt has {len(prompt_ids)} tokens and the context is {self._length}",
                fix="shorten the prompt",
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._tokenizer.vocab_size:
            raise ConfigError(
                f"a prompt id is outside 0..{self._tokenizer.vocab_size - 1}", fix="encode with the model's tokenizer"
            )
        return self._length - len(prompt_ids) + 1

    def _place_waiting(self) -> None:
        """Give free slots to those who wait, but not while somebody else reads their prompt."""
        for generation in list(self._waiting):
            free = [slot for slot in self._slots if slot.generation is None]
            if not free:
                return
            source = max(self._slots, key=lambda slot: slot.shared(generation))
            shared = source.shared(generation)
            if any(slot.will_share(generation) > shared + 1 for slot in self._reading):  # 1: a BOS id
                continue
            self._waiting.remove(generation)
            slot = min(free, key=lambda slot: slot.last_used)
            if source in free and 2 * shared >= len(source.ids):
                slot = source  # otherwise more would be lost than is shared
            if slot is source:
                self._decoder.truncate(slot.index, shared)
            else:
                self._decoder.copy(source.index, slot.index, shared)
            slot.generation, slot.scope, slot.ids = generation, generation.scope, generation.ids[:shared]
            generation.reused_tokens = shared
            self._reading.append(slot)

    def _read_stretch(self) -> tuple[_Slot, Tensor] | None:
        """Read a stretch of the prompt that waited longest; returns its logits (1, V) where the prompt ends."""
        if not self._reading:
            return None
        slot = self._reading.popleft()
        assert slot.generation is not None
        new = slot.generation.ids[len(slot.ids) :][: self._chunk]
        logits = self._decoder.prefill(slot.index, new)
        slot.ids += new
        if len(slot.ids) < slot.generation.prompt_tokens:
            self._reading.append(slot)
            return None
        return slot, logits[None]

    def _decoded(self, running: list[_Slot]) -> list[tuple[_Slot, Tensor]]:
        """Compute the last token of each, and what the proposer guesses; returns logits (1 + guesses, V) of each."""
        ids, slots, counts = list[int](), list[int](), list[int]()
        for slot in running:
            generation = slot.generation
            assert generation is not None
            new = generation.ids[-1:]
            if self._proposer is not None:
                most = generation.limit_tokens - generation.generated_tokens - 1
                guesses = self._proposer.propose(slot.index, generation.ids, most)[:most]
                generation.proposed_tokens += len(guesses)
                new = [*new, *guesses]
            slot.ids += new
            ids += new
            slots += [slot.index] * len(new)
            counts.append(len(new))
        logits = self._decoder.step(ids, slots)
        return list(zip(running, logits.split_with_sizes(counts), strict=True))

    def _choose(self, found: list[tuple[_Slot, Tensor]]) -> None:
        """Choose a token for each; where the guess was right the next one too, until a guess was wrong."""
        self._choose_at(0, found)
        for place in count(1):
            found = [
                (slot, logits) for slot, logits in found if place < len(logits) and self._goes_on(slot, logits, place)
            ]
            if not found:
                return
            self._choose_at(place, found)

    def _choose_at(self, place: int, found: list[tuple[_Slot, Tensor]]) -> None:
        """Choose from the logits at a place of the last step; the device is read once."""
        choices = list[tuple[_Slot, Choice | Chosen]]()
        for slot, logits in found:
            assert slot.generation is not None
            try:
                row = logits[place, : self._tokenizer.vocab_size]
                choices.append((slot, slot.generation.sampler.choose(row)))
            except OpenELMError as error:
                self._fail(slot, error)
        read = iter(read_choices([choice for _, choice in choices if isinstance(choice, Choice)]))
        for slot, choice in choices:
            self._add(slot, choice if isinstance(choice, Chosen) else next(read))

    def _goes_on(self, slot: _Slot, logits: Tensor, place: int) -> bool:
        """Tell whether the ids at a place of the last step are the ones chosen; forget those that are not."""
        generation = slot.generation
        if generation is None:
            return False
        computed = len(slot.ids) - len(logits) + place
        if slot.ids[computed] == generation.ids[computed]:
            generation.accepted_tokens += 1
            return True
        del slot.ids[computed:]
        self._decoder.truncate(slot.index, computed)
        return False

    def _add(self, slot: _Slot, choice: Chosen) -> None:
        generation = slot.generation
        assert generation is not None
        try:
            generation.add(choice)
        except OpenELMError as error:
            self._fail(slot, error)
        if generation.finished:
            self._free(generation)

    def _fail(self, slot: _Slot, error: OpenELMError) -> None:
        assert slot.generation is not None
        slot.generation.fail(error)
        self._free(slot.generation)
        self._decoder.clear(slot.index)
        slot.ids = []

    def _free(self, generation: Generation) -> None:
        """Take a request out of its slot; what the slot holds of the text stays for others of its scope."""
        for slot in self._slots:
            if slot.generation is generation:
                kept = min(common_tokens(slot.ids, generation.ids), self._decoder.used(slot.index))
                del slot.ids[kept:]
                self._decoder.truncate(slot.index, kept)
                slot.generation, slot.last_used = None, next(self._time)
                if slot in self._reading:
                    self._reading.remove(slot)


def generate(
    model: OpenELM, tokenizer: Tokenizer, prompt_ids: Sequence[int], config: SamplingConfig
) -> Iterator[Token]:
    """Continue a prompt, token by token, with an engine of its own; see `Engine.stream`."""
    length = max(1, min(model.config.max_context_length, len(prompt_ids) + config.max_tokens))
    yield from Engine(model, tokenizer, length=length).stream(prompt_ids, config)


def generate_text(model: OpenELM, tokenizer: Tokenizer, prompt: str, config: SamplingConfig) -> str:
    """Continue a text and return what was added; raises what `generate` raises."""
    return "".join(token.text for token in generate(model, tokenizer, prompt_ids(tokenizer, prompt), config))


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text to be continued: BOS, where the tokenizer puts one, then the text's ids."""
    return [*tokenizer.start_ids, *tokenizer.encode(text)]
