"""A server under load for a long time does not grow: `make soak` takes 30 minutes, the slice here two."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest

MINUTES = float(os.environ.get("OPENELM_SOAK_MINUTES", "2"))
CLIENTS = 8


def load(server: Any, number: int, until: float, failures: list[str]) -> None:
    """Ask one request after the other, of every kind; leave a third of them early."""
    random_ = random.Random(number)
    while time.monotonic() < until:
        prompt = random_.choice(["Once upon a time ", "The king ", ""]) + "x" * random_.randrange(300)
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": random_.randint(1, 200)}
        asked |= {
            "n": random_.choice([1, 1, 2]),
            "stream": random_.random() < 0.5,
            "logprobs": random_.choice([None, 0, 5]),
        }
        try:
            if random_.random() < 0.33:
                with socket.create_connection(server.address, timeout=30) as connection:
                    connection.sendall(server.posted(asked))
                    connection.settimeout(random_.random() * 0.2 + 0.001)
                    connection.recv(100)
            else:
                status, _, _ = server.request(*server.as_request(asked))
                if status not in (200, 429):
                    failures.append(f"status {status}")
        except TimeoutError:
            pass
        except OSError as error:
            failures.append(repr(error))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(0)
def test_neither_memory_nor_files_grow(start: Any, folder: Any) -> None:
    server = start(folder)
    failures: list[str] = []
    until = time.monotonic() + 60 * MINUTES
    clients = [threading.Thread(target=load, args=(server, number, until, failures)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    warm = time.monotonic() + min(60, 15 * MINUTES)  # caches, pools and the allocator's arenas fill
    minutes, mib = [], []
    while time.monotonic() < until:
        time.sleep(0.5)
        if time.monotonic() > warm:
            minutes.append(time.monotonic() / 60)
            mib.append(server.rss_bytes() / 2**20)
    for client in clients:
        client.join()
    slope = float(np.polyfit(minutes, mib, 1)[0])
    answered = int(server.metric("requests_total"))
    said = f"{MINUTES:g} minutes, {answered} requests, {slope:+.3f} MiB a minute at {mib[-1]:.0f} MiB"
    assert failures == []
    assert slope < 1, said
    server.wait_until(lambda: server.metric("active_slots") + server.metric("waiting_choices") == 0, 1)
    assert server.open_files() <= 24, said
    print(said)
