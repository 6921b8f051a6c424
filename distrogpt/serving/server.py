"""The server around the app: its address, its API key, its two threads and how it ends."""

import asyncio
import ipaddress
import re
import signal
import socket
import threading
from contextlib import suppress
from typing import Any

import uvicorn

from distrogpt.errors import MachineError, UserError
from distrogpt.inference.sampler import read_prompt
from distrogpt.serving.app import App
from distrogpt.settings import ServeConfig


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"host={host} is not an address of this machine; try 127.0.0.1 or 0.0.0.0") from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"port={port} of host={host} cannot be used ({reason}); choose another") from None


def find_key(config: ServeConfig) -> str | None:
    """The API key. Raises UserError if other machines could connect without one."""
    try:
        key = None if config.api_key is None else read_prompt(config.api_key).strip()
    except UserError:
        raise UserError(f"api_key={config.api_key} is not a text file; write the key into one") from None
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("api_key is not one word of ASCII characters; choose a long one")
    local = config.host == "localhost"
    with suppress(ValueError):  # a name
        local = local or ipaddress.ip_address(config.host).is_loopback
    if key is None and not local:
        raise UserError(f"host={config.host} lets other machines connect; set --api_key=SECRET or FILE:path")
    return key


class Server(uvicorn.Server):
    """A uvicorn server that fails the engine's requests, so that their clients get an answer, and ends."""

    def __init__(self, app: App) -> None:
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(app, ws="none", lifespan="off", timeout_graceful_shutdown=1, **quiet))
        self.engine = app.engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.engine.close)
        await super().shutdown(sockets)

    def serve_until_signal(self, address: socket.socket) -> int:
        """Serve until SIGINT or SIGTERM; the exit status. Raises MachineError.

        The engine runs in this thread and HTTP in another one: OpenMP has workers for each thread that
        computes, and beside those of the thread that loaded the model, decoding takes three times as long.
        """
        signals: list[int] = []

        def stop(number: int, frame: object) -> None:
            self.should_exit, self.force_exit = True, bool(signals)
            signals.append(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

        def answer() -> None:
            try:
                self.run(sockets=[address])
            finally:
                self.engine.close()

        http = threading.Thread(target=answer)
        http.start()
        self.engine.run()
        self.should_exit = True
        http.join()
        if not signals:
            raise MachineError("out of memory; lower --batch_size")
        return 128 + signals[0]
