"""The thread that owns the engine: requests go in by one queue, tokens come out on the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from openelm.generate.engine import Engine
from openelm.generate.request import Generation, Token
from openelm.generate.sampling import SamplingConfig
from openelm.serve.refusal import busy, ending

_log = logging.getLogger("openelm.serve")
_UNREAD = 4
"""So many times the places may be answers that wait for their readers: these hold memory, but no place."""


@dataclass(frozen=True)
class Piece:
    """What became known of one choice.

    Attributes:
        index: of the choice within its request.
        finished: nothing more comes of this choice.
        error: why it ended early.
        reused_tokens: of the prompt, found in the cache.
    """

    index: int
    tokens: tuple[Token, ...]
    finished: bool = False
    error: Exception | None = None
    reused_tokens: int = 0


class Reply:
    """The choices of one request, as they are made; lives on the event loop, is read once, and must be closed.

    Args:
        made: told how many tokens were made, when they are, and not when somebody reads them.
    """

    def __init__(self, worker: Worker, choices: int, made: Callable[[int], None]) -> None:
        self._worker, self._made, self._pieces = worker, made, asyncio.Queue[Piece]()
        self._making, self._unread = set(range(choices)), set(range(choices))

    def deliver(self, piece: Piece) -> None:
        """Take what the engine made; a place is free once its choice is made, however slowly it is read."""
        self._made(len(piece.tokens))
        self._pieces.put_nowait(piece)
        if piece.finished and piece.index in self._making:
            self._making.discard(piece.index)
            self._worker.release(1)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self._unread:
            piece = await self._pieces.get()
            if piece.finished:
                self._unread.discard(piece.index)
            yield piece

    def close(self) -> None:
        """Stop what is still being made; at most one step of the engine later its slots are free."""
        self._worker.closed(self, len(self._making))
        self._making.clear()


class Worker:
    """Drives an engine; all methods but `run` belong to the event loop's thread.

    Args:
        engine: used by no one else from now on.
        waiting: choices that may wait for a slot; more are refused.
    """

    def __init__(self, engine: Engine, *, slots: int, waiting: int) -> None:
        self._engine, self._most = engine, slots + waiting
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[Generation, tuple[Reply, int]] = {}
        self._held, self._replies = 0, 0
        self._ending = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def held(self) -> int:
        """Choices that are waiting or being made."""
        return self._held

    @property
    def unread(self) -> int:
        """Answers that are not yet written to the end."""
        return self._replies

    @property
    def active(self) -> int:
        """Slots in use."""
        return self._engine.active

    def check_room(self, choices: int = 1) -> None:
        """Refuse what `hold` would refuse."""
        if self._ending:
            raise ending()
        if choices > self._most - self._held or self._replies >= _UNREAD * self._most:
            raise busy()

    def hold(self, choices: int) -> None:
        """Keep places for choices, before any work is done for them.

        Raises:
            Refusal: 429, the queue is full, or too many answers wait for readers; 503, the server is ending.
        """
        self.check_room(choices)
        self._held += choices

    def release(self, choices: int) -> None:
        """Give places back."""
        self._held -= choices

    def submit(
        self, prompts: Sequence[tuple[Sequence[int], SamplingConfig]], *, scope: str, made: Callable[[int], None]
    ) -> Reply:
        """Have prompts continued, one choice each, in places that are held; the reply gives them back."""
        reply = Reply(self, len(prompts), made)
        self._replies += 1
        self._inbox.put(lambda: self._start(reply, prompts, scope))
        return reply

    def closed(self, reply: Reply, making: int) -> None:
        """Stop the choices that are still being made for a reply that nobody reads any more."""
        self._replies -= 1
        if making:
            self.release(making)
            self._inbox.put(lambda: self._drop(reply))

    def end(self) -> None:
        """Take no more requests; those that are being made go on."""
        self._ending = True

    async def stop(self) -> None:
        """End the thread; what is still being made ends with the error that the server is shutting down."""
        self._ending = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def run(self) -> None:
        """Step while there is work, sleep while there is none; runs in the engine's thread."""
        while True:
            try:
                message = self._inbox.get(block=not self._live)
            except queue.Empty:
                self._step()
                continue
            if message is None:
                self._fail(list(self._live), ending())
                return
            message()

    def _start(self, reply: Reply, prompts: Sequence[tuple[Sequence[int], SamplingConfig]], scope: str) -> None:
        for index, (ids, config) in enumerate(prompts):
            try:
                self._live[self._engine.submit(ids, config, scope=scope)] = (reply, index)
            except Exception as error:
                self._hand_over([(reply, Piece(index, (), True, error))])

    def _drop(self, reply: Reply) -> None:
        for generation in [found for found, (owner, _) in self._live.items() if owner is reply]:
            del self._live[generation]
            self._engine.cancel(generation)

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:  # one bad step must not end the server
            _log.error("a step failed: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            # Which of the requests in the slots was at fault is not known; those that wait were not.
            self._fail([found for found in self._engine.running if found in self._live], error)
        self._collect()

    def _collect(self) -> None:
        known = []
        for generation, (reply, index) in list(self._live.items()):
            tokens = tuple(generation.take())
            if not tokens and not generation.finished:
                continue
            if generation.finished:
                del self._live[generation]
            piece = Piece(index, tokens, generation.finished, generation.error, generation.reused_tokens)
            known.append((reply, piece))
        if known:
            self._hand_over(known)

    def _fail(self, generations: list[Generation], error: Exception) -> None:
        failed = []
        for generation in generations:
            reply, index = self._live.pop(generation)
            self._engine.cancel(generation)
            failed.append((reply, Piece(index, (), True, error)))
        self._hand_over(failed)

    def _hand_over(self, pieces: list[tuple[Reply, Piece]]) -> None:
        self._loop.call_soon_threadsafe(_deliver, pieces)


def _deliver(pieces: list[tuple[Reply, Piece]]) -> None:
    for reply, piece in pieces:
        reply.deliver(piece)
