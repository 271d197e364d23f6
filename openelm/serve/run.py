"""A server's life: start refused or granted, signals, and an end in which answers are finished."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from openelm.errors import ConfigError
from openelm.generate.engine import Engine
from openelm.model.transformer import OpenELM
from openelm.serve.access import Access, is_loopback
from openelm.serve.app import Service, make_app
from openelm.serve.budgets import Budget, Budgets
from openelm.serve.door import Door
from openelm.serve.limits import Bodies, Connections, Limits
from openelm.serve.metrics import Metrics
from openelm.serve.prepare import Preparer
from openelm.serve.worker import Worker
from openelm.text.tokenizer import Tokenizer

KEY_VARIABLE = "OPENELM_API_KEY"
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_ACCEPTED = 64  # at a turn of the event loop, so that it turns within a burst too
_THREADS = 4  # for parsing and tokenising; a hard constraint can keep one for seconds
_SEND_BUFFER_BYTES = 128 << 10  # of a socket; what a reader does not read piles up there first
_OPEN_FILES = 16_384
_quiet = logging.Logger("openelm.serve.http", level=logging.CRITICAL + 1)  # aiohttp's words quote requests


@dataclass(frozen=True)
class Place:
    """Where a server is, and who may come.

    Attributes:
        port: 0 takes a free one.
        names: that the server is reached by, besides localhost and addresses.
        keys: see `read_keys`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: Sequence[str] = ()
    keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.keys:
            raise ConfigError(
                f"--host {self.host} lets other machines in, and there is no API key",
                fix=f"set {KEY_VARIABLE}, or name a file of mode 0600 with --api-key-file",
            )


@dataclass(frozen=True)
class Served:
    """A model to serve.

    Attributes:
        name: that requests give.
        slots: sequences side by side.
        context_tokens: of each, at most the model's own.
        waiting: choices that may wait for a slot.
        budget: of each key, or of all callers together where there are no keys.
    """

    model: OpenELM
    tokenizer: Tokenizer
    name: str
    chat_tuned: bool
    slots: int = 4
    context_tokens: int | None = None
    waiting: int = 64
    limits: Limits = field(default_factory=Limits)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        longest = self.model.config.max_context_length
        for what, value, most in (
            ("--slots", self.slots, 1024),
            ("--context", self.length_tokens, longest),
            ("--queue", self.waiting, 65_536),
        ):
            least = 0 if what == "--queue" else 1
            if not least <= value <= most:
                raise ConfigError(f"{what} {value} is not between {least} and {most}", fix="choose another number")

    @property
    def length_tokens(self) -> int:
        """Tokens of a slot."""
        return self.model.config.max_context_length if self.context_tokens is None else self.context_tokens


def read_keys(environment: Mapping[str, str], file: Path | None) -> tuple[str, ...]:
    """Read API keys from the environment, and from the lines of a file that only its owner can read.

    Never from the command line, which every user of the machine can see.

    Raises:
        ConfigError: the file is missing, readable by others, or empty; a key is shorter than 16 characters.
    """
    keys = [environment[KEY_VARIABLE]] if environment.get(KEY_VARIABLE) else []
    if file is not None:
        try:
            with file.open(encoding="utf-8") as opened:
                if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o077:
                    raise ConfigError("others can read the key file", file=file, fix=f"chmod 600 {file}")
                found = [line.strip() for line in opened if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the key file: {error}", file=file, fix="give a text file") from None
        if not found:
            raise ConfigError("the key file is empty", file=file, fix="write one key a line")
        keys += found
    if short := [key for key in keys if len(key) < 16]:
        raise ConfigError(
            f"an API key has {len(short[0])} characters; at least 16 are needed", fix="openssl rand -hex 24 makes one"
        )
    return tuple(keys)


def describe(served: Served) -> dict[str, Any]:
    """Return the object of /v1/models: OpenAI's fields, and what the model is, layer by layer."""
    plan = served.model.config.plan
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "openelm",
        "context_tokens": served.length_tokens,
        "chat_tuned": served.chat_tuned,
        "parameters": served.model.config.parameters,
        "vocab_size": served.tokenizer.vocab_size,
        "slots": served.slots,
        "layers": [
            {"query_heads": query, "kv_heads": kv, "ffn_dim": ffn}
            for query, kv, ffn in zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)
        ],
    }


async def serve(served: Served, place: Place, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is being made, for some seconds.

    Args:
        announce: called with the address once it answers.

    Raises:
        ConfigError: the address cannot be had; the model and the tokenizer do not fit.
    """
    _raise_file_limit()
    told = _told_to_stop()  # before the address is known, for whoever knows it may end us
    listening = _listen(place)
    limits = served.limits
    engine = Engine(served.model, served.tokenizer, slots=served.slots, length=served.length_tokens)
    worker = Worker(engine, slots=served.slots, waiting=served.waiting)
    opened: list[Any] = []
    connections = Connections(limits, lambda: opened[0].connections if opened else ())
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="prepare") as threads:
        runner = web.AppRunner(
            make_app(_service(served, place, worker, connections, threads)),
            access_log=None,
            logger=_quiet,
            handler_cancellation=True,  # a client that leaves ends its request at once
            keepalive_timeout=limits.arrive_seconds,  # for the headers of the first request too
            lingering_time=2.0,  # for a client that sends on after a refusal, so that it can read it
            auto_decompress=False,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        opened.append(runner.server)
        assert runner.server is not None
        door = Door(runner.server, connections)
        site = await asyncio.get_running_loop().create_server(door, sock=listening, backlog=_ACCEPTED)
        listening.listen(_BACKLOG)  # asyncio takes one number for both
        watch = asyncio.create_task(connections.watch())
        gc.collect()
        gc.freeze()  # what is loaded stays, and need not be looked through for garbage again and again
        try:
            host, port = listening.getsockname()[:2]
            announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            await told.wait()
            site.close()
            worker.end()
            await _drained(worker, limits.drain_seconds)
        finally:
            watch.cancel()
            await worker.stop()
            await runner.cleanup()


def _service(
    served: Served, place: Place, worker: Worker, connections: Connections, threads: ThreadPoolExecutor
) -> Service:
    return Service(
        model=describe(served),
        tokenizer=served.tokenizer,
        preparer=Preparer(
            served.tokenizer,
            name=served.name,
            context_tokens=served.length_tokens,
            chat_tuned=served.chat_tuned,
        ),
        worker=worker,
        access=Access(place.host, names=place.names, keys=place.keys),
        budgets=Budgets(served.budget),
        bodies=Bodies(served.limits),
        connections=connections,
        metrics=Metrics(active=lambda: worker.active, waiting=lambda: max(0, worker.held - worker.active)),
        threads=threads,
    )


def _told_to_stop() -> asyncio.Event:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


async def _drained(worker: Worker, seconds: float) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while worker.unread and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.02)


def _listen(place: Place) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {place.host} port {place.port}: {error.strerror or error}",
            fix="choose another --host or --port",
        ) from None
    return listening


def _raise_file_limit() -> None:
    """Let a thousand connections be open: each is a file, and many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
