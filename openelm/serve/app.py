"""The routes: what is asked, checked, handed to the engine, and written back as it is made."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from aiohttp import web

from openelm.errors import ConfigError
from openelm.serve.access import Access
from openelm.serve.answers import Answers, ChatAnswers, Choice, TextAnswers
from openelm.serve.budgets import Account, Admitted, Budgets
from openelm.serve.limits import Bodies, Connections
from openelm.serve.metrics import CONTENT_TYPE, Metrics
from openelm.serve.prepare import Prepared, Preparer
from openelm.serve.refusal import Refusal, broken
from openelm.serve.worker import Piece, Reply, Worker
from openelm.text.tokenizer import Tokenizer

_log = logging.getLogger("openelm.serve")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@dataclass(frozen=True)
class Service:
    """All that the routes need.

    Attributes:
        model: the object that /v1/models tells.
        scope_of: the access check; it returns whose cached prompts may be used.
        threads: for parsing and tokenising, so that the event loop goes on.
    """

    model: dict[str, Any]
    tokenizer: Tokenizer
    preparer: Preparer
    worker: Worker
    access: Access
    budgets: Budgets
    bodies: Bodies
    connections: Connections
    metrics: Metrics
    threads: Executor


def make_app(service: Service) -> web.Application:
    """Make the application."""
    routes = _Routes(service)
    app = web.Application(middlewares=[routes.guard])
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/v1/models/{model}", routes.model)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.text)
    for path, (name, kind) in _PAGE.items():
        app.router.add_get(path, _page(name, kind))
    return app


def _page(name: str, kind: str) -> _Handler:
    content = resources.files("openelm.serve").joinpath("web", name).read_bytes()

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=content, content_type=kind, charset="utf-8")

    return handler


class _Routes:
    """The handlers, and the guard before them."""

    def __init__(self, service: Service) -> None:
        self._service = service

    @web.middleware
    async def guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Check who asks, give every answer its headers, and turn every error into OpenAI's shape."""
        began, request_id = time.monotonic(), secrets.token_hex(8)
        request["id"] = request_id
        status = 499  # the client left, in the words of nginx's log
        if not request.can_read_body:
            self._service.connections.asked(request.protocol)
        try:
            request["scope"] = self._service.access.check(request)
            response = await handler(request)
            status = response.status
        except Refusal as refusal:
            response, status = _refused(refusal), refusal.status
        except web.HTTPException as error:  # no such path, another method
            response, status = _refused(_of_http(error)), error.status
        except asyncio.CancelledError:
            self._service.metrics.cancelled.inc()
            raise
        except ConnectionError:
            self._service.metrics.cancelled.inc()
            raise
        except Exception as error:
            # The error's own words may hold a prompt's.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s %s\n%s", request_id, type(error).__name__, frames)
            response, status = _refused(broken(request_id)), 500
        finally:
            self._service.connections.answered(request.protocol)
            route = request.match_info.route.resource.canonical if request.match_info.route.resource else "none"
            self._service.metrics.requests.labels(route, status).inc()
            _log.info(
                "%s %s %s %d %.0f ms", request_id, request.method, route, status, 1e3 * (time.monotonic() - began)
            )
        if not response.prepared:
            response.headers.update(_headers(request))
        return response

    async def health(self, _: web.Request) -> web.StreamResponse:
        """Say whether the engine's thread lives."""
        alive = self._service.worker.alive
        return web.json_response({"status": "ok" if alive else "failed"}, status=200 if alive else 503)

    async def metrics(self, _: web.Request) -> web.StreamResponse:
        """Tell the counters."""
        return web.Response(body=self._service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, _: web.Request) -> web.StreamResponse:
        """List the one model."""
        return web.json_response({"object": "list", "data": [self._service.model]})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """Tell what the model is, layer by layer."""
        if request.match_info["model"] != self._service.model["id"]:
            raise Refusal(404, "no such model here", param="model", code="model_not_found")
        return web.json_response(self._service.model)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        return await self._answer(request, self._service.preparer.chat, ChatAnswers)

    async def text(self, request: web.Request) -> web.StreamResponse:
        """Continue a text."""
        return await self._answer(request, self._service.preparer.text, TextAnswers)

    async def _answer(
        self, request: web.Request, prepare: Callable[[bytes], Prepared], kind: type[Answers]
    ) -> web.StreamResponse:
        service = self._service
        if request.content_type != "application/json":  # a form of another site can send text/plain unasked
            raise Refusal(415, "Content-Type must be application/json", code="unsupported_media_type")
        if "Content-Encoding" in request.headers:  # a few bytes may unfold to very many
            raise Refusal(415, "compressed bodies are not taken", code="unsupported_media_type")
        account = request["account"] = service.budgets.of(request["scope"])
        service.worker.check_room()  # before the body is read: refusing must cost next to nothing
        with account.request() as admitted:
            body = await service.bodies.read(request)
            began = time.monotonic()
            service.connections.asked(request.protocol)
            prepared = await self._prepared(body, prepare, admitted)
            account.take_tokens(prepared.prompt_tokens)
            reply = service.worker.submit(prepared.choices, scope=request["scope"], made=account.take_tokens)
            try:
                answers = kind(
                    service.tokenizer,
                    model=service.model["id"],
                    alternatives=prepared.alternatives,
                    echoed=prepared.echoed,
                    prompt_tokens=prepared.prompt_tokens,
                    usage_in_stream=prepared.asked.stream_options.include_usage,
                )
                made = _Made(service.metrics, prepared, began, request["id"])
                if prepared.asked.stream:
                    return await _stream(request, reply, made, answers)
                async for piece in reply:
                    made.add(piece)
                return web.json_response(answers.whole(made.choices, made.usage(answers)))
            finally:
                reply.close()

    async def _prepared(self, body: bytes, prepare: Callable[[bytes], Prepared], admitted: Admitted) -> Prepared:
        """Parse and tokenise; the places of all choices are held afterwards."""
        worker = self._service.worker
        worker.hold(1)  # before the work of preparing; the other choices when their number is known
        try:
            prepared = await asyncio.get_running_loop().run_in_executor(self._service.threads, prepare, body)
            admitted.hold(len(prepared.choices))
            worker.hold(len(prepared.choices) - 1)
        except BaseException:
            worker.release(1)
            raise
        return prepared


class _Made:
    """What was made of a request so far."""

    def __init__(self, metrics: Metrics, prepared: Prepared, began: float, request_id: str) -> None:
        self._metrics, self._request_id = metrics, request_id
        self.choices = [Choice() for _ in prepared.choices]
        self._last = [began] * len(self.choices)
        self._cached_tokens = 0
        metrics.prompt_tokens.inc(prepared.prompt_tokens)

    def add(self, piece: Piece) -> None:
        """Take a piece.

        Raises:
            Refusal: the choice failed.
        """
        if piece.error is not None:
            raise _of_engine(piece.error, self._request_id)
        choice, now = self.choices[piece.index], time.monotonic()
        for token in piece.tokens:
            timer = self._metrics.between_tokens if choice.tokens else self._metrics.first_token
            timer.observe(now - self._last[piece.index])
            self._last[piece.index] = now
            choice.tokens.append(token)
            choice.text += token.text
            choice.finish_reason = token.finish_reason
        self._metrics.generated_tokens.inc(len(piece.tokens))
        if piece.finished:
            self._cached_tokens += piece.reused_tokens
            self._metrics.cached_tokens.inc(piece.reused_tokens)

    def usage(self, answers: Answers) -> dict[str, Any]:
        """Count the tokens."""
        return answers.usage(sum(len(choice.tokens) for choice in self.choices), self._cached_tokens)


async def _stream(request: web.Request, reply: Reply, made: _Made, answers: Answers) -> web.StreamResponse:
    """Write server-sent events; what fails before the first token still gets a status of its own."""
    response = web.StreamResponse(headers={**_headers(request), "Content-Type": "text/event-stream"})
    try:
        async for piece in reply:
            made.add(piece)
            if not response.prepared:
                await response.prepare(request)
                await _write(response, answers.begin())
            if piece.tokens and (event := answers.piece(piece.index, piece.tokens)):
                await _write(response, [event])
        await _write(response, answers.end(made.usage(answers)))
    except Refusal as refusal:
        if not response.prepared:
            raise
        await _write(response, [refusal.body()])
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _headers(request: web.Request) -> dict[str, str]:
    """Return what every answer carries; those to who has a budget, what is left of it."""
    account: Account | None = request.get("account")
    return {**_HEADERS, "X-Request-Id": request["id"], **(account.headers() if account else {})}


async def _write(response: web.StreamResponse, events: Sequence[dict[str, Any]]) -> None:
    if events:
        await response.write(b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events))


def _refused(refusal: Refusal) -> web.Response:
    response = web.json_response(refusal.body(), status=refusal.status, headers=refusal.headers)
    if refusal.headers.get("Connection") == "close":
        response.force_close()
    return response


def _of_http(error: web.HTTPException) -> Refusal:
    words = {404: "no such path", 405: "no such method here", 413: "the body is too large"}
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return Refusal(error.status, words.get(error.status, error.reason), headers=headers)


def _of_engine(error: Exception, request_id: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ConfigError):
        return Refusal(400, f"{error.what}; {error.fix}" if error.fix else error.what, code="invalid_value")
    _log.error("%s %s", request_id, type(error).__name__)
    return broken(request_id)
