"""What a request is answered when it cannot be served, in the shape OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"]


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what was given, what is allowed, what to do; never text of a prompt.
        param: the path of the field that is wrong, such as `messages.0.role`.
        code: for programs, such as `context_length_exceeded`.
        headers: besides the usual ones, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: Kind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def busy() -> Refusal:
    """Say that the queue is full; a second later there is often room again."""
    return Refusal(
        429,
        "as many requests are waiting as this server holds; try again",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def over_budget(what: str, wait_ns: int) -> Refusal:
    """Say that a key's budget is used up, and how long until something of it is back.

    Args:
        what: names the budget, such as "the 60 requests a minute of this key".
        wait_ns: in HTTP's header rounded up to seconds; OpenAI's clients read milliseconds first.
    """
    seconds = -(-wait_ns // 10**9)
    return Refusal(
        429,
        f"{what} are used up; try again in {seconds} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds), "retry-after-ms": str(-(-wait_ns // 10**6))},
    )


def ending() -> Refusal:
    """Say that the server was told to stop."""
    return Refusal(
        503, "the server is shutting down", kind="server_error", code="shutting_down", headers={"Retry-After": "10"}
    )


def broken(request_id: str) -> Refusal:
    """Say that something failed that is not the client's fault; the log has the rest under the same id."""
    return Refusal(
        500, f"the server failed; its log says why under request {request_id}", kind="server_error", code="internal"
    )
