"""The engine's thread: failures stay with the requests they belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from openelm.errors import NumericError
from openelm.generate.request import Token
from openelm.generate.sampling import SamplingConfig
from openelm.serve.refusal import Refusal
from openelm.serve.worker import Reply, Worker


class Made:
    """A generation of the fake engine: a token a step, until its prompt's first id many are made."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.reused_tokens, self.finished, self.error = ids, 0, False, None
        self.known: list[Token] = []

    def take(self) -> list[Token]:
        known, self.known = self.known, []
        return known


class FakeEngine:
    """Steps as an engine of two slots does; a prompt's second id chooses what goes wrong: 1 fails, 2 breaks a step."""

    def __init__(self) -> None:
        self.all: list[Made] = []
        self.cancelled: list[Made] = []
        self.steps = 0
        self.pause = threading.Event()
        self.pause.set()

    @property
    def active(self) -> int:
        return len(self.running)

    @property
    def running(self) -> list[Made]:
        return self.all[:2]

    def submit(self, ids: Sequence[int], config: SamplingConfig, *, scope: str = "") -> Made:
        self.all.append(Made(ids))
        return self.all[-1]

    def step(self) -> bool:
        self.pause.wait()
        self.steps += 1
        for made in list(self.running):
            if made.ids[1] == 2:
                raise MemoryError("out of memory")
            if made.ids[1] == 1:
                made.error, made.finished = NumericError("not finite"), True  # type: ignore[assignment]
            else:
                made.known.append(Token(5, "x", 0.0))
                made.finished = self.steps >= made.ids[0]
            if made.finished:
                self.all.remove(made)
        return bool(self.running)

    def cancel(self, made: Made) -> None:
        self.cancelled.append(made)
        if made in self.all:
            self.all.remove(made)


async def read(reply: Reply) -> tuple[str, list[Exception]]:
    text, errors = "", []
    async for piece in reply:
        text += "".join(token.text for token in piece.tokens)
        errors += [piece.error] if piece.error else []
    return text, errors


def run(body: Any) -> None:
    async def inside() -> None:
        engine: Any = FakeEngine()
        worker = Worker(engine, slots=4, waiting=4)
        try:
            await body(engine, worker)
        finally:
            await worker.stop()

    asyncio.run(inside())


def submitted(worker: Worker, ids: Sequence[int], made: Callable[[int], None] = lambda _: None) -> Reply:
    return worker.submit([(ids, SamplingConfig())], scope="", made=made)


def test_an_error_of_one_choice_is_its_own() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        bad = submitted(worker, [9, 1])
        good = submitted(worker, [9, 0])
        assert [type(error) for error in (await read(bad))[1]] == [NumericError]
        text, errors = await read(good)
        assert text and not errors

    run(body)


def test_a_step_that_breaks_fails_what_was_in_it_and_those_that_waited_are_served() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        engine.pause.clear()
        replies = [submitted(worker, [1, kind]) for kind in (0, 2, 2, 0, 0)]
        await asyncio.sleep(0.05)
        engine.pause.set()
        found = [[type(error) for error in errors] for _, errors in [await read(reply) for reply in replies]]
        assert found == [[], [MemoryError], [MemoryError], [], []]  # the first was done before the step broke
        assert worker.alive and engine.active == 0

    run(body)


def test_cancelling_takes_at_most_one_step() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        reply = submitted(worker, [10**9, 0])
        async for _ in reply:
            break
        engine.pause.clear()
        reply.close()
        steps = engine.steps
        engine.pause.set()
        while engine.active:
            await asyncio.sleep(0.001)
        assert engine.cancelled and engine.steps - steps <= 2  # one may have begun before the pause

    run(body)


def test_tokens_are_told_as_they_are_made_though_nobody_reads_them() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        made: list[int] = []
        reply = submitted(worker, [10**9, 0], made.append)
        while sum(made) < 5:
            await asyncio.sleep(0.001)
        engine.pause.clear()
        reply.close()
        engine.pause.set()
        while engine.active:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert sum(made) == engine.steps  # those of the step that was on when the reply was closed too

    run(body)


def test_places_are_bounded() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        worker.hold(8)
        with pytest.raises(Refusal) as refused:
            worker.hold(1)
        assert refused.value.status == 429
        worker.release(1)
        worker.hold(1)
        worker.end()
        worker.release(8)
        with pytest.raises(Refusal) as ending:
            worker.hold(1)
        assert ending.value.status == 503

    run(body)


def test_stopping_tells_those_that_wait() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        reply = submitted(worker, [10**9, 0])
        reading = asyncio.create_task(read(reply))
        await asyncio.sleep(0.05)
        await worker.stop()
        errors: Any = (await reading)[1]
        assert [error.code for error in errors] == ["shutting_down"]
        assert not worker.alive

    run(body)
