"""A page to write with, and an API for OpenAI's clients: python serve.py --out_dir=out-shakespeare-char"""

from configurator import configure
from distrogpt.settings import ServeConfig

if __name__ == "__main__":
    CONFIG = configure(ServeConfig)  # before torch is loaded, so that --help and mistakes answer at once

import asyncio
import hmac
import ipaddress
import json
import re
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrogpt.audio.speech import Voice, load_voice, wav_bytes
from distrogpt.errors import MachineError, UserError, cli_errors, exit_process, warn
from distrogpt.inference.sampler import Sampler, read_prompt
from distrogpt.serving.completions import Completion, answer, choice_json, failure, joined, read_body, usage
from distrogpt.serving.engine import Engine, EngineClosed, QueueFull, Request, RequestOutput

with cli_errors():
    try:
        import uvicorn
        from starlette import requests
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise UserError(f"serve.py needs {error.name}; run: pip install -r requirements-serve.txt") from None

PAGE = Path(__file__).with_name("distrogpt") / "serving" / "page.html"
BODY_BYTES, BODY_SECONDS = 1 << 20, 30  # of a request, at most
MOST_SPOKEN, MOST_TO_SPEAK = 10_000, 4  # characters (some ten minutes) of a text; texts that wait
MOST_UNREAD = 2_000  # news that wait for a client: some ten seconds of four samples
HERE = ["127.0.0.1", "localhost", "[::1]"]
ALLOWED = (  # to the page: nothing of others, and nobody may show it within a page of theirs
    "default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Written = AsyncIterator[tuple[int, RequestOutput]]  # with the number of the prompt


class Face:
    """What the routes answer, from one engine and, where there is one, one voice."""

    def __init__(
        self, config: ServeConfig, sampler: Sampler, engine: Engine, key: str | None, voice: Voice | None
    ) -> None:
        self.config, self.sampler, self.engine, self.key, self.voice = config, sampler, engine, key, voice
        self.speaking, self.to_speak = asyncio.Semaphore(1), 0
        from_run = config.init_from == "resume"
        self.name = Path(config.out_dir if from_run else config.init_from).resolve().name

    async def page(self, request: requests.Request) -> Response:
        about = {
            "model": self.name,
            # where files lie is no concern of whoever has no key
            "source": self.name if self.key else self.sampler.source,
            "tokens": self.config.max_new_tokens,
            "samples": min(8, self.config.batch_size),
            "key": self.key is not None,
            "speaks": self.voice is not None,
        }
        told = json.dumps(about).replace("<", "\\u003c")  # a name must not end the script that it stands in
        text = PAGE.read_text(encoding="utf-8").replace("{{about}}", told)
        return HTMLResponse(text, headers={"Content-Security-Policy": ALLOWED, "Cache-Control": "no-store"})

    async def health(self, request: requests.Request) -> Response:
        waits = sum(not request.gone for request in list(self.engine.waiting))
        return JSONResponse({"writes": len(self.engine.samples), "waits": waits})

    async def models(self, request: requests.Request) -> Response:
        self.check_key(request)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "distrogpt"}
        one = "name" in request.path_params
        return JSONResponse(model if one else {"object": "list", "data": [model]})

    async def completions(self, request: requests.Request) -> Response:
        self.check_key(request)
        body, most = await body_of(request), self.config
        try:
            limits = (most.max_new_tokens, most.batch_size, most.batch_size + most.queue)
            asked = read_body(body, self.sampler, *limits)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        news: asyncio.Queue[tuple[int, RequestOutput] | None] = asyncio.Queue()
        rows = [self.row(prompt.ids, asked, number, news) for number, prompt in enumerate(asked.prompts)]
        try:
            self.engine.submit(rows)
        except QueueFull:
            why = f"no more than {most.queue} requests may wait; try again"
            raise HTTPException(429, why, {"Retry-After": "1"}) from None
        except EngineClosed:
            raise HTTPException(503, "the server ends, or has no memory; start it again") from None
        written = written_of(request, rows, news)
        if asked.config.stream:
            return StreamingResponse(self.streamed(asked, written), media_type="text/event-stream")
        return await self.whole(asked, written)

    def row(self, ids: list[int], asked: Completion, number: int, news: asyncio.Queue) -> Request:
        """A prompt for the engine, whose news come into the queue with the prompt's number."""
        loop = asyncio.get_running_loop()

        def tell(one: RequestOutput) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever asked
                if news.qsize() > MOST_UNREAD:  # nobody reads them, and memory has an end
                    row.gone = True
                    loop.call_soon_threadsafe(news.put_nowait, None)
                loop.call_soon_threadsafe(news.put_nowait, (number, one))

        seed = asked.asked.seed + (number if asked.config.seed is None else 0)  # equal prompts, several texts
        row = Request(ids, replace(asked.asked, seed=seed), tell, asked.config.logprobs or 0)
        return row

    async def whole(self, asked: Completion, written: Written) -> Response:
        """One answer, when all is written."""
        samples: dict[tuple[int, int], list[RequestOutput]] = {}
        async for number, news in written:
            if news.ended == "error":
                status = 503 if self.engine.closed else 500
                return JSONResponse(failure(status, news.text), status)
            samples.setdefault((number, news.sample), []).append(news)
        choices, made, copies = [], 0, asked.asked.num_samples
        for number, prompt in enumerate(asked.prompts):
            done = [
                joined(samples.get((number, sample), [RequestOutput(sample)])) for sample in range(copies)
            ]
            if not all(news.ended for news in done):
                return Response(status_code=499)  # to nobody: whoever asked has left
            made += sum(news.made for news in done)
            if copies > asked.config.n:
                done = sorted(done, key=lambda news: news.score, reverse=True)[: asked.config.n]
            begin = prompt.text if asked.config.echo else ""
            for one in done:
                choices.append(choice_json(len(choices), one, asked.config, self.sampler, begin, len(begin)))
        return JSONResponse(answer(new_id(), self.name, choices, usage(asked, made)))

    async def streamed(self, asked: Completion, written: Written) -> AsyncIterator[str]:
        """An event for each news."""
        id, config = new_id(), asked.config
        told: dict[int, int] = {}  # characters of each sample's tokens
        made: dict[int, int] = {}  # its tokens
        async for number, news in written:
            if news.ended == "error":
                yield event(failure(500, news.text))
                return
            place = number * config.n + news.sample
            begin = asked.prompts[number].text if config.echo and place not in told else ""
            offset = told.get(place, len(begin))
            part = choice_json(place, news, config, self.sampler, begin, offset)
            told[place], made[place] = offset + sum(len(token.text) for token in news.tokens), news.made
            yield event(answer(id, self.name, [part]))
        if asked.tells_usage:
            yield event(answer(id, self.name, [], usage(asked, sum(made.values()))))
        yield "data: [DONE]\n\n"

    async def speech(self, request: requests.Request) -> Response:
        """OpenAI's /v1/audio/speech, in wav alone: one text after another, by the voice that there is."""
        self.check_key(request)
        if self.voice is None:
            raise HTTPException(404, "nobody speaks here; start serve.py with --voice=NAME.onnx or system")
        body = await body_of(request)
        text = body.get("input") if isinstance(body, dict) else None
        if not isinstance(text, str):
            raise HTTPException(400, 'the body has no text to speak; send {"input": "..."}')
        for name, only in {"response_format": "wav", "speed": 1}.items():
            if body.get(name, only) != only:
                raise HTTPException(400, f"{name}={body[name]!r:.40} is not served; send {only}")
        if len(text) > MOST_SPOKEN:
            raise HTTPException(400, f"{len(text)} characters are too many; send {MOST_SPOKEN} or fewer")
        if self.to_speak > MOST_TO_SPEAK:
            raise HTTPException(429, f"{self.to_speak} texts are to be spoken already; try again")
        self.to_speak += 1
        try:
            async with self.speaking:
                if await request.is_disconnected():
                    return Response(status_code=499)
                wav = await asyncio.to_thread(wav_bytes, text, self.voice)
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        finally:
            self.to_speak -= 1
        return Response(wav, media_type="audio/wav")

    def check_key(self, request: requests.Request) -> None:
        """Raises HTTPException where the key is not told."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            why = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise HTTPException(401, why, {"WWW-Authenticate": "Bearer"})

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/audio/speech", self.speech, methods=["POST"]),
        ]
        # a page of others may let the name of a server of theirs become this address
        hosts = ["*"] if self.key else [*HERE, self.config.host]
        guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
        handlers = {HTTPException: refused, Exception: broken}
        app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app


def new_id() -> str:
    return f"cmpl-{secrets.token_hex(12)}"


def event(part: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(part)}\n\n"


async def refused(request: requests.Request, error: HTTPException) -> Response:
    why = " ".join(error.detail.split())
    if error.detail in ("Not Found", "Method Not Allowed"):
        asked = f"{request.method} {request.url.path[:100]}"
        why = f"{asked} is not served; POST /v1/completions is, with a prompt"
    return JSONResponse(failure(error.status_code, why), error.status_code, error.headers)


async def broken(request: requests.Request, error: Exception) -> Response:
    return JSONResponse(failure(500, "internal error"), 500)


async def body_of(request: requests.Request) -> Any:
    """The JSON of a body. Raises HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # what pages of others can send without asking is of another type
        raise HTTPException(415, "the body is not declared to be JSON; send Content-Type: application/json")

    async def read() -> bytes:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > BODY_BYTES:
                raise HTTPException(413, f"the body has over {BODY_BYTES} bytes; send fewer")
        return data

    try:
        return json.loads(await asyncio.wait_for(read(), BODY_SECONDS))
    except requests.ClientDisconnect:
        raise HTTPException(499, "whoever asked has left") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON ({error}); send an object") from None
    except (TimeoutError, asyncio.TimeoutError):
        raise HTTPException(408, f"the body took over {BODY_SECONDS} s; send it faster") from None


async def written_of(request: requests.Request, rows: list[Request], news: asyncio.Queue) -> Written:
    """All news of some rows, until all have ended, or whoever asked has left; then the engine drops them."""

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        news.put_nowait(None)

    gone, left = asyncio.create_task(wait_until_gone()), sum(row.asked.num_samples for row in rows)
    try:
        while left:
            found = await news.get()
            if found is None:
                return
            left -= found[1].ended is not None
            yield found
    finally:
        gone.cancel()
        for row in rows:
            row.gone = True


def listen(host: str, port: int) -> socket.socket:
    """The address, taken. Raises UserError where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"host={host} is no address; choose one of this machine, such as 0.0.0.0") from None
    except OSError as error:
        why = error.strerror
        raise UserError(f"port={port} of host={host} cannot be used ({why}); choose another") from None


def find_key(config: ServeConfig) -> str | None:
    """The key that whoever asks must tell. Raises UserError where others would get in without one."""
    try:
        key = None if config.api_key is None else read_prompt(config.api_key).strip()
    except UserError:
        raise UserError(f"api_key={config.api_key} is no file of text; write the key into one") from None
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("api_key is empty, or has other signs than ASCII's in one word; choose a long word")
    with suppress(ValueError):
        if config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback:
            return key
    if key is None:
        raise UserError(f"host={config.host} lets other machines in; set --api_key=SECRET or FILE:path, too")
    return key


class Server(uvicorn.Server):
    """Before it ends, whoever waits is told."""

    engine: Engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.engine.close)
        await super().shutdown(sockets)


def server_of(
    config: ServeConfig, sampler: Sampler, engine: Engine, key: str | None, voice: Voice | None = None
) -> uvicorn.Server:
    """What answers: run it with a socket that listens."""
    quiet = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off"}
    app = Face(config, sampler, engine, key, voice).app()
    server = Server(uvicorn.Config(app, ws="none", timeout_graceful_shutdown=1, **quiet))
    server.engine = engine
    return server


def main(config: ServeConfig) -> None:
    """Serve until Ctrl-C. Raises UserError."""
    key = find_key(config)
    voice = load_voice(config.voice) if config.voice else None
    with listen(config.host, config.port) as address:
        sampler = Sampler(config.out_dir, config.init_from, config.device, config.dtype, int8=config.int8)
        engine = Engine(sampler, config.batch_size, config.queue)
        server = server_of(config, sampler, engine, key, voice)
        host, port = address.getsockname()[:2]
        warn(f"{sampler.source} ({sampler.runtime.describe()})")
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends)", flush=True)
        exit_process(run(server, engine, address))


def run(server: uvicorn.Server, engine: Engine, address: socket.socket) -> int:
    """Serve until SIGINT or SIGTERM; the exit status. Raises MachineError.

    This thread computes, and another answers: OpenMP gives each thread that computes workers of its own, and
    with those of the one that loaded the model beside them, decoding would take three times as long.
    """
    caught: list[int] = []

    def stop(number: int, frame: object) -> None:
        server.should_exit, server.force_exit = True, bool(caught)
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    def answer() -> None:
        try:
            server.run(sockets=[address])
        finally:
            engine.close()

    answers = threading.Thread(target=answer)
    answers.start()
    engine.work()
    server.should_exit = True
    answers.join()
    if not caught:
        raise MachineError("there is no memory to go on; lower --batch_size")
    return 128 + caught[0]


if __name__ == "__main__":
    with cli_errors("lower --batch_size"):
        main(CONFIG)
