"""The engine's thread: failures stay with the requests they belong to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from openelm.errors import NumericError
from openelm.generate.engine import Token
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
    """Steps as an engine does; prompts choose what goes wrong: a second id 1 fails alone, 2 breaks a step."""

    def __init__(self) -> None:
        self.running: list[Made] = []
        self.cancelled: list[Made] = []
        self.steps = 0
        self.pause = threading.Event()
        self.pause.set()

    @property
    def active(self) -> int:
        return len(self.running)

    def submit(self, ids: Sequence[int], config: SamplingConfig, *, scope: str = "") -> Made:
        self.running.append(Made(ids))
        return self.running[-1]

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
                self.running.remove(made)
        return bool(self.running)

    def cancel(self, made: Made) -> None:
        self.cancelled.append(made)
        if made in self.running:
            self.running.remove(made)


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


CONFIG = SamplingConfig()


def test_an_error_of_one_choice_is_its_own() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        bad = worker.submit([([9, 1], CONFIG)], scope="")
        good = worker.submit([([9, 0], CONFIG)], scope="")
        assert [type(error) for error in (await read(bad))[1]] == [NumericError]
        text, errors = await read(good)
        assert text and not errors

    run(body)


def test_a_step_that_breaks_fails_what_was_in_it_and_the_next_request_is_served() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        broken = worker.submit([([9, 2], CONFIG)], scope="")
        assert [type(error) for error in (await read(broken))[1]] == [MemoryError]
        assert worker.alive and engine.active == 0
        text, errors = await read(worker.submit([([engine.steps + 3, 0], CONFIG)], scope=""))
        assert text == "xxx" and not errors

    run(body)


def test_cancelling_takes_at_most_one_step() -> None:
    async def body(engine: Any, worker: Worker) -> None:
        reply = worker.submit([([10**9, 0], CONFIG)], scope="")
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
        reply = worker.submit([([10**9, 0], CONFIG)], scope="")
        reading = asyncio.create_task(read(reply))
        await asyncio.sleep(0.05)
        await worker.stop()
        errors: Any = (await reading)[1]
        assert [error.code for error in errors] == ["shutting_down"]
        assert not worker.alive

    run(body)
