"""Who may ask: Host and Origin against pages of other sites, keys against everybody else."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web

from openelm.serve.refusal import Refusal

OPEN_PATH = "/health"
"""The one path that needs no key; it says nothing but whether the server lives."""


class Access:
    """Checks each request before anything of it is looked at.

    Args:
        address: what the server is bound to; on a loopback address only loopback names are taken in Host.
        names: more names the server is reached by, such as that of a reverse proxy.
        keys: any of these opens the server; none: everybody on this machine may use it. Only hashes are kept.
    """

    def __init__(self, address: str, *, names: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
        self._loopback = is_loopback(address)
        self._names = {"localhost", *(name.lower() for name in names)}
        self._keys = [_hash(key.encode()) for key in keys]

    def check(self, request: web.Request) -> str:
        """Let a request in; returns the scope of its cached prompts, another one for each key.

        Raises:
            Refusal: 400 for headers given twice, 421 for a foreign Host, 403 for a foreign Origin, 401 for the key.
        """
        for name in ("Host", "Origin", "Authorization"):
            if len(request.headers.getall(name, ())) > 1:
                raise Refusal(400, f"{name} was given more than once", code="duplicate_header")
        host = _host_of(request.headers.get("Host", ""))
        if not self._is_ours(host):
            raise Refusal(
                421, "this Host is not served here; the server's --allow-host adds a name", code="foreign_host"
            )
        self._check_origin(request, host)
        if not self._keys or request.path == OPEN_PATH:
            return ""
        return self._check_key(request)

    def _is_ours(self, host: str) -> bool:
        # Another site can give its own name our address, never an address our name: literals are safe.
        if host in self._names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback if self._loopback else True

    def _check_origin(self, request: web.Request, host: str) -> None:
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "none")
        # A link on another site may lead to our page, but nothing else of another site may reach us.
        if origin is None and (site in ("none", "same-origin") or request.path == "/"):
            return
        if origin is None or _netloc(origin) != request.headers.get("Host", "").lower():
            raise Refusal(403, "pages of other sites may not use this server", kind="permission_error", code="origin")

    def _check_key(self, request: web.Request) -> str:
        given = _key_of(request.headers.get("Authorization", ""))
        digest = _hash(given)
        # All keys are compared, each in constant time: neither which one nor how much of it fits can be timed.
        found = [hmac.compare_digest(digest, key) for key in self._keys]
        if given and any(found):
            return digest.hex()[:16]
        # A browser asks its user for a password, which is the key, when the page itself is refused.
        scheme = 'Basic realm="openelm: the password is the API key"' if request.path == "/" else "Bearer"
        raise Refusal(
            401,
            "this server needs its API key: Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": scheme},
        )


def is_loopback(address: str) -> bool:
    """Tell whether only this machine can reach an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _host_of(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _key_of(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
