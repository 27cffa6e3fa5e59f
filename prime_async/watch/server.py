"""The web server: hypercorn under trio, on a socket that was opened before the node began."""

from __future__ import annotations

import os
import socket
from contextlib import closing

import structlog
import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.types import ASGIApp

from prime_async.errors import AddressInUseError

BACKLOG = 64
GOODBYE_S = 0.5
"""How long answers that are under way get when the node stops."""

log = structlog.get_logger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`AddressInUseError` with the setting's name."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise AddressInUseError(
            f"node.dashboard: cannot listen on {host}:{port}: {error.strerror or error}. Choose another port, "
            'or "" for no dashboard'
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


async def serve_until_cancelled(listener: socket.socket, app: ASGIApp) -> None:
    """Answer on ``listener``, and close it in the end.

    What goes wrong in the server is logged, and ends the server alone: the training does not depend on it.
    """
    with closing(listener):
        config = ServerConfig()
        config.accesslog = config.errorlog = None
        config.include_server_header = False
        config.graceful_timeout = GOODBYE_S
        try:
            config.bind = [f"fd://{os.dup(listener.fileno())}"]  # hypercorn closes what it is given
            # A trigger of our own: hypercorn's would take the signals that are the command's.
            await serve(app, config, shutdown_trigger=trio.sleep_forever, mode="asgi")  # type: ignore[arg-type]
        except* Exception as group:  # hypercorn raises groups
            log.error("dashboard_failed", error="; ".join(str(e) or type(e).__name__ for e in group.exceptions))
