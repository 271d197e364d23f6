"""`openelm serve`: a model behind OpenAI's API, and a page to talk with it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from openelm.errors import ConfigError
from openelm.model.device import choose_device
from openelm.model.folder import is_chat_tuned
from openelm.model.packed import load_packed
from openelm.text.tokenizer import load_tokenizer


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    try:
        from openelm.serve.budgets import Budget
        from openelm.serve.run import Place, Served, read_keys
        from openelm.serve.run import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("aiohttp", "prometheus_client"):
            raise
        raise ConfigError(
            f"openelm serve needs the package {error.name}", fix="pip install 'openelm-framework[serve]'"
        ) from None
    folder = Path(arguments.model)
    key_file = Path(arguments.api_key_file) if arguments.api_key_file else None
    place = Place(arguments.host, arguments.port, arguments.allow_host, read_keys(os.environ, key_file))
    model = load_packed(folder, device=choose_device(arguments.device))
    served = Served(
        model=model,
        tokenizer=load_tokenizer(folder),
        name=arguments.name or folder.resolve().name,
        chat_tuned=is_chat_tuned(folder),
        slots=arguments.slots,
        context_tokens=arguments.context,
        waiting=arguments.queue,
        budget=Budget(
            arguments.key_requests_per_minute, arguments.key_tokens_per_minute, concurrent=arguments.key_concurrent
        ),
    )
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(run(served, place, _announce))
    print("ended", file=sys.stderr)
    return 0


def _announce(address: str) -> None:
    print(f"{address}  (chat page; OpenAI's API is at {address}/v1)", flush=True)
    print("Ctrl-C ends it.", file=sys.stderr)
