"""What each key may use: requests, tokens and choices at once, counted exactly and apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from openelm.serve.budgets import Account, Bucket, Budget, Budgets
from openelm.serve.refusal import Refusal

KEY, OTHER = "a-key-of-enough-characters", "another-key-of-some-length"
SHORT: dict[str, Any] = {"model": "tiny", "prompt": [256, 65], "max_tokens": 1, "logit_bias": {"257": -100}}
SECOND = 10**9


class Clock:
    """A clock that moves when it is told to, for a server in another process too."""

    def __init__(self, file: Path) -> None:
        self.file, self.now = file, 5 * SECOND
        self.forward(0)

    def __call__(self) -> int:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)
        new = self.file.with_suffix(".new")
        new.write_text(str(self.now))
        os.replace(new, self.file)


class Limited:
    """A server with budgets, and the clock it goes by."""

    def __init__(
        self,
        start: Any,
        folder: Path,
        file: Path,
        *,
        keys: Sequence[str] = (KEY, OTHER),
        served: Any = None,
        **budget: int,
    ) -> None:
        self.clock = Clock(file)
        self.server = start(folder, keys=keys, served=served or {}, budget={**budget, "clock": str(file)})

    def ask(self, asked: Any, key: str = KEY) -> tuple[int, dict[str, str], Any]:
        method, path, headers, body = self.server.as_request(asked)
        status, got, answer = self.server.request(method, path, {**headers, "Authorization": f"Bearer {key}"}, body)
        return status, got, json.loads(answer) if got["content-type"].startswith("application/json") else answer

    @contextlib.contextmanager
    def asking(self, asked: Any) -> Iterator[socket.socket]:
        """Keep a request going until the block ends; then leave."""
        body = self.server.posted(asked)
        top, _, rest = body.partition(b"\r\n\r\n")
        with socket.create_connection(self.server.address, timeout=30) as connection:
            connection.sendall(top + f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode() + rest)
            yield connection

    def active(self) -> float:
        _, _, text = self.server.request("GET", "/metrics", {"Authorization": f"Bearer {KEY}"})
        names = ("openelm_active_slots ", "openelm_waiting_choices ")
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(names))


@pytest.fixture
def begin(start: Any, folder: Path, tmp_path: Path) -> Iterator[Callable[..., Limited]]:
    """Start servers with budgets, and end them after the test."""
    begun: list[Limited] = []

    def one(**given: Any) -> Limited:
        begun.append(Limited(start, folder, tmp_path / "clock", **given))
        return begun[-1]

    yield one
    for limited in begun:
        limited.server.process.terminate()
        limited.server.process.wait()


def left(limited: Limited, unit: str = "tokens", key: str = KEY) -> int:
    """Ask what is left by a request that is wrong, and so takes no tokens."""
    _, headers, _ = limited.ask({**SHORT, "model": "wrong"}, key)
    return int(headers[f"x-ratelimit-remaining-{unit}"])


def test_over_the_requests_a_minute_the_answer_is_429_until_one_is_back(
    begin: Any,
) -> None:
    limited = begin(requests_per_minute=7)
    remaining = [limited.ask(SHORT)[1]["x-ratelimit-remaining-requests"] for _ in range(7)]
    assert remaining == ["6", "5", "4", "3", "2", "1", "0"]
    for _ in range(3):  # being refused costs nothing
        status, headers, body = limited.ask(SHORT)
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error" and body["error"]["code"] == "rate_limit_exceeded"
        assert "7 requests a minute" in body["error"]["message"]
        assert headers["retry-after"] == "9" and headers["retry-after-ms"] == "8572"  # 60/7 = 8.5714… s
        assert headers["x-ratelimit-limit-requests"] == "7" and headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-ratelimit-reset-requests"] == "1m0s"
        assert "x-ratelimit-limit-tokens" not in headers
    limited.clock.forward(8.571)
    assert limited.ask(SHORT)[0] == 429
    limited.clock.forward(0.001)
    assert limited.ask(SHORT)[0] == 200
    assert limited.ask(SHORT)[0] == 429
    limited.clock.forward(3600)
    assert [limited.ask(SHORT)[0] for _ in range(8)] == [200] * 7 + [429]  # a minute's worth, however long it rested


def test_keys_do_not_touch_each_others_budgets(begin: Any) -> None:
    limited = begin(requests_per_minute=3, tokens_per_minute=100)
    assert [limited.ask(SHORT)[0] for _ in range(4)] == [200, 200, 200, 429]
    status, headers, _ = limited.ask(SHORT, OTHER)
    assert (status, headers["x-ratelimit-remaining-requests"], headers["x-ratelimit-remaining-tokens"]) == (
        200,
        "2",
        "97",
    )
    assert limited.ask(SHORT, "a wrong key of no account")[0] == 401


def test_every_token_of_every_choice_and_prompt_is_counted(begin: Any) -> None:
    limited = begin(tokens_per_minute=100_000)
    spent = 0
    for asked in (
        {"max_tokens": 40},
        {"n": 5, "max_tokens": 30},
        {"prompt": ["one", "two three", "four"], "n": 2, "max_tokens": 7},
        {"prompt": [[256, 1, 2], [256, 1, 2, 3]], "max_tokens": 3},
        {"n": 3, "stop": ["e"], "max_tokens": 60},
        {"prompt": "a" * 1000, "max_tokens": 2},  # found in the cache the second time, and still counted
        {"prompt": "a" * 1000, "max_tokens": 2},
        {"echo": True, "n": 3},
    ):
        status, headers, body = limited.ask({**SHORT, **asked})
        assert status == 200
        spent += body["usage"]["total_tokens"]
        assert int(headers["x-ratelimit-remaining-tokens"]) == 100_000 - spent == left(limited)
    status, headers, _ = limited.ask({**SHORT, "n": 2, "max_tokens": 50, "stream": True})
    assert status == 200 and headers["x-ratelimit-limit-tokens"] == "100000"
    assert 100_000 - spent - 2 - 100 <= int(headers["x-ratelimit-remaining-tokens"]) < 100_000 - spent
    assert left(limited) == 100_000 - spent - 2 - 100


def test_what_is_overdrawn_has_to_come_back(begin: Any) -> None:
    limited = begin(tokens_per_minute=60)
    status, headers, body = limited.ask({**SHORT, "max_tokens": 90})
    assert status == 200 and body["usage"]["completion_tokens"] == 90  # more than its budget, and finished
    assert headers["x-ratelimit-remaining-tokens"] == "0" and headers["x-ratelimit-reset-tokens"] == "1m32s"
    status, headers, body = limited.ask(SHORT)
    assert (status, headers["retry-after"], body["error"]["code"]) == (429, "33", "rate_limit_exceeded")
    assert "60 tokens a minute" in body["error"]["message"]
    limited.clock.forward(32.999)
    assert limited.ask(SHORT)[0] == 429
    limited.clock.forward(0.001)
    assert limited.ask(SHORT)[0] == 200


def test_a_request_that_is_left_pays_for_what_was_made(begin: Any) -> None:
    limited = begin(tokens_per_minute=100_000)
    for stream in (True, False):
        before = left(limited)
        with limited.asking({**SHORT, "max_tokens": 1900, "n": 2, "stream": stream}):
            limited.server.wait_until(lambda: before - left(limited) > 100, 10)  # noqa: B023
            assert limited.active() == 2
        limited.server.wait_until(lambda: limited.active() == 0, 2)
        assert 100 < before - left(limited) < 2 + 3800


def test_choices_at_once_are_held_until_the_answer_is_written(begin: Any) -> None:
    limited = begin(concurrent=3, requests_per_minute=1000)
    assert limited.ask({**SHORT, "n": 3})[0] == 200
    for asked in ({"n": 4}, {"prompt": ["a", "b"], "n": 2}):
        status, _, body = limited.ask({**SHORT, **asked})
        assert status == 400 and "4 choices, and a key may have 3 at once" in body["error"]["message"]
    before = left(limited, "requests")
    with limited.asking({**SHORT, "max_tokens": 1900, "n": 2}):
        limited.server.wait_until(lambda: limited.active() == 2, 10)
        status, headers, body = limited.ask({**SHORT, "n": 2})
        assert (status, headers["retry-after"], body["error"]["code"]) == (429, "1", "rate_limit_exceeded")
        assert "3 choices at once" in body["error"]["message"]
        assert limited.ask({**SHORT, "n": 3}, OTHER)[0] == 200
        assert limited.ask(SHORT)[0] == 200
        with limited.asking({**SHORT, "max_tokens": 1900, "stream": True}):
            limited.server.wait_until(lambda: limited.active() == 3, 10)
            assert limited.ask(SHORT)[0] == 429
    limited.server.wait_until(lambda: limited.active() == 0, 2)
    assert limited.ask({**SHORT, "n": 3})[0] == 200
    assert before - left(limited, "requests") == 5  # those let in, and the one that asks; not those of 429


def test_a_request_the_queue_has_no_room_for_costs_nothing(begin: Any) -> None:
    limited = begin(served={"slots": 1, "waiting": 1}, requests_per_minute=50, tokens_per_minute=1000)
    status, headers, body = limited.ask({**SHORT, "n": 3})
    assert status == 429 and body["error"]["code"] == "queue_full"
    assert headers["x-ratelimit-remaining-requests"] == "50" and headers["x-ratelimit-remaining-tokens"] == "1000"


def test_without_keys_all_callers_have_one_budget(begin: Any) -> None:
    limited = begin(keys=(), requests_per_minute=2)
    assert [limited.ask(SHORT, key)[0] for key in (KEY, OTHER, "a third")] == [200, 200, 429]
    with socket.socket() as elsewhere:  # another address of this machine is no other caller
        elsewhere.bind(("127.0.0.2", 0))
        elsewhere.connect(limited.server.address)
        elsewhere.sendall(limited.server.posted(SHORT))
        assert elsewhere.recv(65536).split()[1] == b"429"


def test_other_routes_are_free_and_say_nothing(begin: Any) -> None:
    limited = begin(requests_per_minute=1, tokens_per_minute=1, concurrent=1)
    assert limited.ask(SHORT)[0] == 200
    for path in ("/", "/health", "/metrics", "/v1/models"):
        for _ in range(3):
            status, headers, _ = limited.server.request("GET", path, {"Authorization": f"Bearer {KEY}"})
            assert status == 200 and not any(name.startswith("x-ratelimit") for name in headers)


def test_without_budgets_no_answer_speaks_of_them(base: Any) -> None:
    _, headers, _ = base.request(*base.as_request(SHORT))
    assert not any("ratelimit" in name for name in headers)


def test_many_at_once_get_no_more_than_there_is(begin: Any) -> None:
    limited = begin(requests_per_minute=10)
    found: list[int] = []
    asking = [threading.Thread(target=lambda: found.append(limited.ask(SHORT)[0])) for _ in range(25)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(found) == [200] * 10 + [429] * 15


def test_openai_client_sees_the_limit_and_comes_again(begin: Any) -> None:
    limited = begin(tokens_per_minute=600)
    whole: Any = {**SHORT, "max_tokens": 598}
    with limited.server.client(key=KEY) as client:
        assert client.completions.create(**whole).usage.total_tokens == 600
        with pytest.raises(openai.RateLimitError) as limit:
            client.completions.create(**SHORT)
    assert limit.value.code == "rate_limit_exceeded" and limit.value.type == "rate_limit_error"
    assert limit.value.response.headers["retry-after"] == "1"
    assert limit.value.response.headers["retry-after-ms"] == "100"
    statuses: list[int] = []

    def answered(response: httpx.Response) -> None:
        statuses.append(response.status_code)
        if response.status_code == 429:
            limited.clock.forward(float(response.headers["retry-after-ms"]) / 1000)

    web = httpx.Client(event_hooks={"response": [answered]})
    with OpenAI(base_url=f"{limited.server.url}/v1", api_key=KEY, http_client=web, max_retries=2) as client:
        done = client.completions.with_raw_response.create(**SHORT)
    assert statuses == [429, 200]
    assert done.headers["x-ratelimit-remaining-tokens"] == "0"


def test_keys_are_neither_in_the_log_nor_in_the_metrics(begin: Any) -> None:
    limited = begin(requests_per_minute=1)
    said = [limited.ask(SHORT)[1:] for _ in range(2)]
    metrics = limited.server.request("GET", "/metrics", {"Authorization": f"Bearer {KEY}"})[2].decode()
    for text in (limited.server.log.read_text(), metrics, str(said)):
        assert KEY not in text and hashlib.sha256(KEY.encode()).hexdigest()[:12] not in text
    assert 'openelm_requests_total{route="/v1/completions",status="429"} 1.0' in metrics


def test_a_bucket_is_exact(tmp_path: Path) -> None:
    random_ = random.Random(0)
    for per_minute in (1, 7, 60, 999_983):
        clock = Clock(tmp_path / "clock")
        bucket, level, rate = Bucket(per_minute, clock), Fraction(per_minute), Fraction(per_minute, 60 * SECOND)
        for _ in range(300):
            nanoseconds = random_.choice([0, 1, random_.randrange(100 * SECOND), bucket.until_one_ns])
            clock.now += nanoseconds
            level = min(Fraction(per_minute), level + nanoseconds * rate)
            assert bucket.left == max(0, level // 1)
            wait = bucket.until_one_ns
            assert level + wait * rate >= 1 and (wait == 0 or level + (wait - 1) * rate < 1)
            full = bucket.until_full_ns
            assert level + full * rate >= per_minute and (full == 0 or level + (full - 1) * rate < per_minute)
            units = random_.choice([1, 1, random_.randrange(1 + per_minute)])
            bucket.take(units)
            level -= units


def test_an_account_does_not_grow(tmp_path: Path) -> None:
    def size(account: Account) -> int:
        return len(repr([vars(bucket) for bucket in account._buckets.values()]))

    clock = Clock(tmp_path / "clock")
    budgets = Budgets(Budget(requests_per_minute=10, tokens_per_minute=1000, concurrent=2, clock=clock))
    account = budgets.of("one")
    before = size(account)
    for _ in range(10_000):
        with contextlib.suppress(Refusal), account.request():
            account.take_tokens(50)
        clock.now += SECOND
    assert budgets.of("one") is account and budgets.of("two") is not account
    assert size(account) < before + 20


@pytest.mark.parametrize("option", ["--key-requests-per-minute", "--key-tokens-per-minute", "--key-concurrent"])
@pytest.mark.parametrize("value", ["0", "-1", "1000000001"])
def test_budgets_that_cannot_be_are_errors_of_the_user(
    folder: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from openelm.cli import main

    assert main(["serve", str(folder), "--port", "0", option, value]) == 2
    assert f"{option} {value} is not between 1 and" in capsys.readouterr().err
