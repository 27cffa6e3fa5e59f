"""The web page and what it reads, as an ASGI application. It answers GET and HEAD, and changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prime_async.watch.board import MAX_VIEWERS, Board, events
from prime_async.watch.metrics import CONTENT_TYPE, exposition

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Nothing from elsewhere, nothing inline, no frames: a node's name is text and stays it.
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class _WithHeaders:
    """Adds the headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def build_app(board: Board) -> Starlette:
    """The application that shows ``board``."""

    async def run(_: Request) -> Response:
        return JSONResponse(board.whole(), headers=_fresh())

    async def status(_: Request) -> Response:
        return JSONResponse(board.status(), headers=_fresh())

    async def live(_: Request) -> Response:
        if board.is_full:
            return JSONResponse({"error": f"{MAX_VIEWERS} look at it already"}, 503, headers={"retry-after": "30"})
        return StreamingResponse(events(board), media_type="text/event-stream", headers=_fresh())

    async def metrics(_: Request) -> Response:
        return Response(exposition(board), media_type=CONTENT_TYPE, headers=_fresh())

    async def healthz(_: Request) -> Response:
        return JSONResponse({"alive": True}, headers=_fresh())

    async def readyz(_: Request) -> Response:
        ready, reason = board.readiness()
        return JSONResponse({"ready": ready, "reason": reason}, 200 if ready else 503, headers=_fresh())

    routes = [
        Route("/api/run", run),
        Route("/api/status", status),
        Route("/api/events", live),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        *(Route(path, answer) for path, answer in _assets().items()),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_WithHeaders)])


def _fresh() -> dict[str, str]:
    return {"cache-control": "no-store"}


def _assets() -> dict[str, Callable[[Request], Any]]:
    """A handler for each file of the page, read once."""
    found = {}
    for file in files("prime_async.watch").joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES:
            handler = _asset(file.read_bytes(), TYPES[suffix])
            found["/" if file.name == "index.html" else f"/{file.name}"] = handler
    return found


def _asset(data: bytes, media_type: str) -> Callable[[Request], Any]:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=media_type, headers=headers)

    return answer
