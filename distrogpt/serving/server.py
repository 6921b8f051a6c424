"""The HTTP server: uvicorn, with time limits so that slow clients cannot block others."""

import asyncio
import errno
import json
import math
from collections.abc import Iterable
from functools import partial
from socket import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from distrogpt.errors import warn
from distrogpt.serving.app import MAX_BODY_SECONDS, App, error_json

UVICORN = {"ws": "none", "lifespan": "off", "timeout_graceful_shutdown": 1, "log_level": "error"}
UVICORN |= {"access_log": False, "server_header": False, "loop": "asyncio"}
BACKLOG, ACCEPTED_AT_ONCE = 512, 16  # new connections: queued by the system, accepted per loop step
MAX_IDLE, MIN_IDLE = 1000, 16  # connections beyond those of running and waiting requests
FREE_FILES = 96  # reserved for new connections until others are closed, and for other files
# seconds that a client has to send the headers and body of a request, and to read a response
SECONDS = {"headers": 10, "body": MAX_BODY_SECONDS + 10, "reading": 60}
TABLE_FULL = (errno.EMFILE, errno.ENFILE)


class Connection(H11Protocol):
    """A connection that waits for its client for a limited time. If there are too many connections, the
    oldest waiting one is closed or, if none is waiting, the new one."""

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_connections, self.is_unread = max_connections, False
        self.waits_for, self.timer, self.made_at = "", None, self.loop.time()

    def update_timer(self) -> None:
        if self.is_unread or self.transport.is_closing():
            waits_for = "reading"
        else:
            waits_for = {h11.IDLE: "headers", h11.SEND_BODY: "body"}.get(self.conn.their_state, "")
        if waits_for == self.waits_for:
            return
        if self.timer:
            self.timer.cancel()
        self.waits_for = waits_for
        self.timer = self.loop.call_later(SECONDS[waits_for], self.transport.abort) if waits_for else None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections and not close_oldest(self.connections):
            transport.abort()
        self.update_timer()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self.timer:
            self.timer.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle and self.conn.trailing_data[0]:  # pipelined requests, which are not supported
            self.cycle.keep_alive = False
        self.update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.update_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.is_unread = True
        self.update_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.is_unread = False
        self.update_timer()

    def send_400_response(self, message: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no response has begun
            message = "the request is not HTTP/1.1, or its headers are too long; send POST /v1/completions"
            body = json.dumps(error_json(400, message)).encode()
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server for an App."""

    def __init__(self, app: App) -> None:
        engine, possible = app.engine, max(32, max_files() - FREE_FILES)
        if engine.rows + engine.queue > possible - MIN_IDLE:
            engine.queue = max(0, possible - MIN_IDLE - engine.rows)
            limit = "the limit of open files is low; raise it: ulimit -n 4096"
            warn(f"note     only {engine.queue} requests may wait, as {limit}")
        most = min(possible, engine.rows + engine.queue + MAX_IDLE)
        protocol = partial(Connection, max_connections=most)
        super().__init__(uvicorn.Config(app, http=protocol, backlog=ACCEPTED_AT_ONCE, **UVICORN))
        self.has_warned = False

    async def startup(self, sockets: list[socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self.handle_error)
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        for connection in self.server_state.connections:
            if connection.waits_for:  # their clients may never answer
                connection.transport.abort()
        await super().shutdown(sockets)

    def handle_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Print one line if too many files are open, for which asyncio prints a hundred tracebacks per
        second."""
        if getattr(context.get("exception"), "errno", None) not in TABLE_FULL:
            loop.default_exception_handler(context)
            return
        close_oldest(self.server_state.connections)
        if not self.has_warned:
            warn("note     too many open files: connections are closed; raise the limit: ulimit -n 4096")
        self.has_warned = True


def close_oldest(connections: Iterable[Connection]) -> bool:
    """Close the oldest connection that waits for its client. Returns whether there was one."""
    waiting = [one for one in connections if one.waits_for and not one.transport.is_closing()]
    if waiting:
        min(waiting, key=lambda one: one.made_at).transport.abort()
    return bool(waiting)


def max_files() -> float:
    """The limit of open files and connections of this process."""
    try:
        import resource
    except ImportError:  # on Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit
