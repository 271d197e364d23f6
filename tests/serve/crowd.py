"""Ask with many connections at once, from a process of its own; print how often each answer came."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections import Counter


async def one(host: str, port: int, request: bytes) -> str:
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request)
        line, _, rest = (await reader.read(65536)).partition(b"\r\n")
        writer.close()
        status = line.split()[1].decode()
        return status if status != "429" or b"Retry-After: 1" in rest else "429 without Retry-After"
    except (OSError, IndexError) as error:
        return type(error).__name__


async def everyone(host: str, port: int, count: int, request: bytes) -> list[str]:
    return await asyncio.gather(*(one(host, port, request) for _ in range(count)))


def main() -> None:
    host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * count:
        wanted = 2 * count if hard == resource.RLIM_INFINITY else min(hard, 2 * count)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    answers = asyncio.run(everyone(host, port, count, sys.stdin.buffer.read()))
    print(json.dumps(Counter(answers)))


main()
