"""Who is let in: every route under every way to ask wrongly."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from openelm.errors import ConfigError
from openelm.serve.run import Place, read_keys

KEY, OTHER = "a-key-of-enough-characters", "another-key-of-some-length"
ROUTES = (
    ("GET", "/"),
    ("GET", "/page.js"),
    ("GET", "/page.css"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/docs"),  # there is none, and that is told to nobody without the key
    ("OPTIONS", "/v1/completions"),
)
routes = pytest.mark.parametrize(("method", "path"), ROUTES)


@pytest.fixture(scope="module")
def locked(start: Any, folder: Path) -> Any:
    return start(folder, keys=[KEY, OTHER], names=["models.example"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@routes
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(KEY.upper()),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(""),
        {"Authorization": KEY},
        {"Authorization": f"Digest {KEY}"},
        {"Authorization": "Basic !!!"},
        {"X-Api-Key": KEY},
    ],
    ids=["none", "other case", "shorter", "longer", "empty", "no scheme", "other scheme", "bad basic", "other header"],
)
def test_without_the_key_only_health_answers(locked: Any, method: str, path: str, headers: dict[str, str]) -> None:
    status, got, body = locked.request(method, path, headers)
    if path == "/health":
        assert (status, json.loads(body)) == (200, {"status": "ok"})
    else:
        assert status == 401
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert "www-authenticate" in got
    assert KEY not in str(got) + body.decode()


@routes
def test_with_a_key_all_routes_answer(locked: Any, method: str, path: str) -> None:
    for headers in (
        bearer(KEY),
        bearer(OTHER),
        {"Authorization": "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()},
    ):
        status, got, _ = locked.request(method, path, headers)
        expected = {"/docs": 404, "/v1/completions": 415, "/v1/chat/completions": 415}.get(path, 200)
        assert status == (405 if method == "OPTIONS" else expected)
        assert "access-control-allow-origin" not in got


@routes
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "10.0.0.7"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://[oops"}, 403),
    ],
)
@pytest.mark.parametrize("key", ["", KEY], ids=["no key", "key"])
def test_foreign_hosts_and_origins_are_refused(
    locked: Any, method: str, path: str, headers: dict[str, str], status: int, key: str
) -> None:
    got, answered, body = locked.request(method, path, {**headers, **(bearer(key) if key else {})})
    assert got == status
    assert "error" in json.loads(body)
    assert "access-control-allow-origin" not in answered


def test_our_own_names_are_let_in(locked: Any) -> None:
    port = locked.address[1]
    for host in (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        "localhost",
        f"[::1]:{port}",
        "models.example",
        "MODELS.example",
    ):
        for origin in ({}, {"Origin": f"http://{host}"}, {"Origin": f"https://{host}"}):
            assert locked.request("GET", "/v1/models", {"Host": host, **origin, **bearer(KEY)})[0] == 200


def test_another_site_reaches_no_more_than_the_page_by_a_link(base: Any) -> None:
    for site, path, expected in (
        ("cross-site", "/", 200),
        ("cross-site", "/v1/models", 403),
        ("same-site", "/v1/models", 403),
        ("same-origin", "/v1/models", 200),
        ("none", "/v1/models", 200),
    ):
        assert base.request("GET", path, {"Sec-Fetch-Site": site})[0] == expected


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_form_can_send_is_refused(base: Any, kind: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    headers = {"Content-Type": kind} if kind else {}
    assert base.request("POST", "/v1/completions", headers, body)[0] == 415


def test_headers_given_twice_are_refused(locked: Any) -> None:
    twice = {"Authorization": f"Bearer {KEY}\r\nAuthorization: Bearer wrong"}
    assert locked.request("GET", "/v1/models", twice)[0] == 400
    assert locked.request("GET", "/v1/models", {**bearer(KEY), "Origin": "null\r\nOrigin: null"})[0] == 400


def test_the_page_has_a_strict_policy(base: Any) -> None:
    for path in ("/", "/page.js", "/page.css", "/v1/models"):
        _, headers, body = base.request("GET", path)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body


def test_openai_client_tells_a_wrong_key(locked: Any) -> None:
    with locked.client(key=KEY) as client:
        assert client.models.list().data
    with locked.client(key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_log_holds_neither_prompts_nor_keys(locked: Any) -> None:
    asked = {"model": "tiny", "prompt": "my secret prompt", "max_tokens": 2}
    assert locked.ask(asked, Authorization=f"Bearer {KEY}")[0] == 200
    assert locked.ask({**asked, "secret-field": 1}, Authorization=f"Bearer {KEY}")[0] == 400
    locked.request("GET", "/v1/models?key=secret", {"Authorization": "Bearer secret\x01"})
    assert "secret" not in locked.log.read_text() and KEY not in locked.log.read_text()


def test_other_machines_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="no API key"):
            Place(host)
        Place(host, keys=[KEY])
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        Place(host)


def test_keys_come_from_the_environment_and_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n{OTHER}\n")
    file.chmod(0o600)
    assert read_keys({}, None) == ()
    assert read_keys({"OPENELM_API_KEY": KEY}, None) == (KEY,)
    assert read_keys({}, file) == (KEY, OTHER)
    for mode in (0o644, 0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="others can read"):
            read_keys({}, file)
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_keys({}, file)
    with pytest.raises(ConfigError, match="at least 16") as short:
        read_keys({"OPENELM_API_KEY": "hunter2"}, None)
    assert "hunter2" not in str(short.value)
    with pytest.raises(ConfigError, match="cannot read"):
        read_keys({}, tmp_path / "none")


def test_the_command_refuses_an_open_address_without_a_key(folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENELM_API_KEY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "openelm", "serve", str(folder), "--host", "0.0.0.0", "--port", "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no API key" in done.stderr and "--api-key-file" in done.stderr
