"""The web application: the page, and OpenAI's /v1/completions and /v1/audio/speech."""

import asyncio
import hmac
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from distrogpt.audio.speech import Voice, wav_bytes
from distrogpt.errors import UserError
from distrogpt.inference.sampler import Sampler, read_prompt
from distrogpt.serving.completions import (
    FIELDS,
    NOT_SUPPORTED,
    Completion,
    choice_json,
    completion_json,
    parse_completion,
)
from distrogpt.serving.engine import INTERNAL_ERROR, Engine, EngineRequest, RequestOutput
from distrogpt.settings import ServeConfig

PAGE = Path(__file__).with_name("page.html")
MAX_BODY_BYTES, MAX_BODY_SECONDS = 1 << 20, 30
SPEECH_FIELDS = ("input", "response_format", "speed")  # others are ignored
MAX_SPEECH_CHARS, MAX_SPEECH_QUEUE = 10_000, 4  # about ten minutes of speech; waiting texts
MAX_UNREAD = 2_000  # outputs that a client has not read: about ten seconds of four samples
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
PAGE_HEADERS = {  # the page loads nothing from other servers, and no other page may embed it
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; media-src blob:; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
ERROR_CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "rate_limit_exceeded"}
Outputs = AsyncIterator[RequestOutput]


class App(Starlette):
    """The routes of a server with one engine and at most one voice."""

    def __init__(
        self, config: ServeConfig, sampler: Sampler, engine: Engine, key: str | None, voice: Voice | None
    ) -> None:
        self.config, self.sampler, self.engine, self.key, self.voice = config, sampler, engine, key, voice
        self.speech_lock, self.speech_queue, self.max_unread = asyncio.Lock(), 0, MAX_UNREAD
        self.name = Path(config.out_dir if config.init_from == "resume" else config.init_from).resolve().name
        self.created, self.html = int(time()), PAGE.read_text(encoding="utf-8")
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/audio/speech", self.speech, methods=["POST"]),
        ]
        handlers = dict.fromkeys((HTTPException, UserError, Exception), handle_error)
        super().__init__(routes=routes, exception_handlers=handlers)
        self.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. Without an API key, the Host header must be a local name, so that other websites
        cannot send requests by pointing their own domain at this address (DNS rebinding)."""
        host = Request(scope).headers.get("host")  # browsers always send it; in HTTP/1.0 it is optional
        if self.key is None and host and host_name(host) not in LOCAL_HOSTS:
            advice = "use localhost, or start serve.py with --api_key=SECRET"
            message = f"the host {host[:100]} is not allowed without an API key; {advice}"
            await JSONResponse(error_json(400, message), 400)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def page(self, request: Request) -> Response:
        about = {
            "model": self.name,
            "source": self.name if self.key else self.sampler.source,  # with a key, paths are hidden
            "max_tokens": self.config.max_new_tokens,
            "max_samples": min(8, self.config.batch_size),
            "needs_key": self.key is not None,
            "speaks": self.voice is not None,
        }
        text = json.dumps(about).replace("<", "\\u003c")  # a name must not close the script element
        return HTMLResponse(self.html.replace("{{about}}", text), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        waiting = sum(not request.cancelled for request in list(self.engine.waiting))
        return JSONResponse({"writes": len(self.engine.samples), "waits": waiting})

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "distrogpt"}
        if not request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        if (name := request.path_params["name"]) != self.name:
            message = f"the model {name[:100]} does not exist on this server; use {self.name}"
            return JSONResponse(error_json(404, message, "model", "model_not_found"), 404)
        return JSONResponse(model)

    async def completions(self, request: Request) -> Response:
        self.check_key(request)
        completion = parse_completion(await read_json(request), self.sampler, self.config)
        outputs = self.submit(request, completion)
        if completion.config.stream:
            return StreamingResponse(self.events(completion, outputs), media_type="text/event-stream")
        return await self.answer(completion, outputs)

    def submit(self, request: Request, completion: Completion) -> Outputs:
        """Submit the prompts to the engine; returns their outputs. Raises HTTPException."""
        loop, queue, config = asyncio.get_running_loop(), asyncio.Queue(), completion.config

        def emit(output: RequestOutput) -> None:
            with suppress(RuntimeError):  # the event loop and all connections are closed
                if queue.qsize() > self.max_unread:  # the client does not read
                    cancel(requests)
                    loop.call_soon_threadsafe(queue.put_nowait, None)
                loop.call_soon_threadsafe(queue.put_nowait, output)

        options, n = (emit, config.stream, config.logprobs or 0), config.num_samples
        prompts = enumerate(completion.prompts)
        requests = [EngineRequest(ids, settings, *options, i * n) for i, (_, ids, settings) in prompts]
        if not self.engine.submit(requests):
            if self.engine.closed:
                raise HTTPException(503, "the server is shutting down or out of memory; restart it")
            message = f"the queue is full ({self.engine.queue} waiting requests); try again later"
            raise HTTPException(429, message, {"Retry-After": "1"})
        return read_outputs(request, requests, queue)

    async def answer(self, completion: Completion, outputs: Outputs) -> Response:
        """One response when all samples have finished."""
        samples: dict[int, RequestOutput] = {}
        async for output in outputs:
            if output.finish_reason == "error":
                raise HTTPException(503 if self.engine.closed else 500, output.text)
            samples[output.index] = output
        n, num_samples, best = completion.config.n, completion.config.num_samples, []
        if len(samples) < len(completion.prompts) * num_samples:
            return Response(status_code=499)  # the client has disconnected
        for first in range(0, len(samples), num_samples):
            group = [samples[index] for index in range(first, first + num_samples)]
            if num_samples > n:
                group.sort(key=lambda sample: sample.score, reverse=True)
            best += group[:n]
        choices = [choice_json(i, one, completion, self.sampler.tokenizer) for i, one in enumerate(best)]
        num_tokens = sum(sample.num_tokens for sample in samples.values())
        return JSONResponse(completion_json(completion, self.name, choices, num_tokens))

    async def events(self, completion: Completion, outputs: Outputs) -> AsyncIterator[str]:
        """One server-sent event for each output."""
        num_tokens = {}  # of each choice
        async for output in outputs:
            if output.finish_reason == "error":
                yield event(error_json(500, output.text))
                return
            num_tokens[output.index] = output.num_tokens
            choice = choice_json(output.index, output, completion, self.sampler.tokenizer)
            yield event(completion_json(completion, self.name, [choice]))
        if completion.include_usage:
            yield event(completion_json(completion, self.name, [], sum(num_tokens.values())))
        yield "data: [DONE]\n\n"

    async def speech(self, request: Request) -> Response:
        """OpenAI's /v1/audio/speech for WAV files, one text at a time."""
        self.check_key(request)
        if self.voice is None:
            message = "speech is not enabled on this server; start serve.py with --voice=NAME.onnx or system"
            raise HTTPException(404, message)
        body = await read_json(request)
        text = body.get("input")
        if not isinstance(text, str) or len(text) > MAX_SPEECH_CHARS:
            raise UserError(f"input is not a string of at most {MAX_SPEECH_CHARS} characters; send one")
        for name, only in {"response_format": "wav", "speed": 1}.items():
            if body.get(name, only) != only:
                raise UserError(f"{name}={body[name]!r:.40} is not supported; use {only!r}")
        if self.speech_queue > MAX_SPEECH_QUEUE:
            raise HTTPException(
                429, f"the queue is full ({self.speech_queue} waiting texts); try again later"
            )
        self.speech_queue += 1
        try:
            async with self.speech_lock:
                if await request.is_disconnected():
                    return Response(status_code=499)
                wav = await asyncio.to_thread(wav_bytes, text, self.voice)
        finally:
            self.speech_queue -= 1
        return Response(wav, media_type="audio/wav")

    def check_key(self, request: Request) -> None:
        """Raises HTTPException unless the client sent the API key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            message = "the API key is missing or incorrect; send the header Authorization: Bearer KEY"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})


def find_key(config: ServeConfig) -> str | None:
    """The API key, or None. Raises UserError if there is none and other machines could connect."""
    key = None if config.api_key is None else read_prompt(config.api_key, "the api_key file").strip()
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("api_key must be one word of printable ASCII characters; choose another")
    if key is None and config.host not in LOCAL_HOSTS:
        raise UserError(f"host={config.host} lets other machines connect; set --api_key=SECRET or FILE:path")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"cannot listen on host={host} with port={port} ({reason}); choose another host or port"
        raise UserError(message) from None


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def error_json(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error response, as OpenAI's; `param` is the wrong field of the request."""
    kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
    code = code or ERROR_CODES.get(status)
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": code}}


async def handle_error(request: Request, error: Exception) -> Response:
    status, message, headers, param = 500, INTERNAL_ERROR, None, None
    if isinstance(error, UserError):
        status, message = 400, str(error)
        word = re.match(r"(?:the )?(\w*)", message)[1]
        param = word if word in (*FIELDS, *NOT_SUPPORTED, *SPEECH_FIELDS) else None
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
    if message in ("Not Found", "Method Not Allowed"):
        route = f"{request.method} {request.url.path[:100]}"
        message = f"{route} is not supported; use POST /v1/completions with a prompt"
    return JSONResponse(error_json(status, message, param), status, headers)


def host_name(host: str) -> str:
    """The host name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def read_json(request: Request) -> dict[str, Any]:
    """The fields of the JSON body, without those that are null. Raises HTTPException and UserError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send other types for any website, without a CORS preflight
        raise HTTPException(415, "the content type is not JSON; send Content-Type: application/json")
    try:
        body = json.loads(await asyncio.wait_for(read_body(request), MAX_BODY_SECONDS))
        json.dumps(body, ensure_ascii=False).encode()
    except ClientDisconnect:
        raise HTTPException(499, "the client has disconnected") from None
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body took longer than {MAX_BODY_SECONDS} s; send it faster") from None
    except UnicodeEncodeError:
        raise UserError("the body has an unpaired surrogate such as \\ud800; send valid Unicode") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is not valid JSON ({error}); send a JSON object") from None
    if not isinstance(body, dict):
        raise UserError('the body is not a JSON object; send {"prompt": "..."}')
    return {name: value for name, value in body.items() if value is not None}


async def read_body(request: Request) -> bytes:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(
                413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB; send a smaller one"
            )
    return data


async def read_outputs(request: Request, requests: list[EngineRequest], queue: asyncio.Queue) -> Outputs:
    """The outputs of the requests until all samples have finished. A client that disconnects cancels them."""

    async def watch_connection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        queue.put_nowait(None)

    watcher, running = asyncio.create_task(watch_connection()), sum(one.n for one in requests)
    try:
        while running and (output := await queue.get()) is not None:
            if output.finish_reason:
                running -= 1
            yield output
    finally:
        watcher.cancel()
        cancel(requests)


def cancel(requests: list[EngineRequest]) -> None:
    for request in requests:
        request.cancelled = True
