"""A tiny random model behind a real server, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from openai import OpenAI

from openelm.model.config import ModelConfig
from openelm.model.folder import save_model
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import ByteTokenizer

START = Path(__file__).with_name("start.py")
CONTEXT = 2048


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def client(self, key: str = "none", retries: int = 0) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=retries, timeout=60)

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"", timeout: float = 30
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request byte by byte as given; returns status, headers (lower case) and body."""
        lines = {"Host": f"{self.address[0]}:{self.address[1]}", "Connection": "close", **(headers or {})}
        if body:
            lines.setdefault("Content-Length", str(len(body)))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        with socket.create_connection(self.address, timeout=timeout) as connection:
            connection.sendall(head.encode() + b"\r\n" + body)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        top, _, rest = received.partition(b"\r\n\r\n")
        first, *others = top.decode().split("\r\n")
        return int(first.split()[1]), {n.lower(): v for n, _, v in (line.partition(": ") for line in others)}, rest

    def ask(self, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """Post JSON; returns status and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", path, {"Content-Type": "application/json", **headers}, data)
        return status, json.loads(answer)

    def as_request(self, body: Any) -> tuple[str, str, dict[str, str], bytes]:
        """Say the arguments of `request` that post JSON."""
        return "POST", "/v1/completions", {"Content-Type": "application/json"}, json.dumps(body).encode()

    def posted(self, body: Any) -> bytes:
        """Write a whole request that posts JSON."""
        data = json.dumps(body).encode()
        lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
        return "\r\n".join((*lines, f"Content-Length: {len(data)}", "", "")).encode() + data

    def metric(self, name: str) -> float:
        _, _, text = self.request("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(f"openelm_{name}"))

    def wait_until(self, claim: Callable[[], bool], seconds: float) -> float:
        """Wait until something is so; returns how long that took."""
        began = time.monotonic()
        while not claim():
            assert time.monotonic() - began < seconds, f"not so after {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - began


Start = Callable[..., Server]


def make_folder(folder: Path) -> Path:
    config = ModelConfig.parse(
        {
            "vocab_size": 258,
            "max_context_length": CONTEXT,
            "num_transformer_layers": 2,
            "model_dim": 32,
            "head_dim": 8,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 16,
            "bos_token_id": 256,
            "eos_token_id": 257,
        }
    )
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(7))
    with torch.no_grad():  # so long as its end token is unlikely, it writes to the end of the context
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 3 * parameter.shape[1] ** -0.5, generator=torch.Generator().manual_seed(8))
    save_model(folder, model, tokenizer=ByteTokenizer())
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("serve") / "base")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers; what still runs at the end is killed."""
    running: list[Server] = []

    def begin(folder: Path, **given: Any) -> Server:
        log = tmp_path_factory.mktemp("server") / "log"
        path = os.pathsep.join(filter(None, sys.path))
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(START), str(folder), json.dumps(given)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        assert process.stdout
        running.append(Server(process, process.stdout.readline().strip(), log))
        assert running[-1].url, log.read_text()
        return running[-1]

    yield begin
    for server in running:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        assert server.process.stdout
        server.process.stdout.close()


@pytest.fixture(scope="session")
def base(start: Start, folder: Path) -> Server:
    """A base model, with the limits as they are."""
    return start(folder)


@pytest.fixture(scope="session")
def chatting(start: Start, folder: Path) -> Server:
    """A model that counts as tuned to chat."""
    return start(folder, served={"chat_tuned": True})
