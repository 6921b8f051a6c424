"""serve.py: the page, OpenAI's clients, continuous batching, and requests that are refused."""

import contextlib
import gc
import http.client
import io
import itertools
import json
import signal
import socket
import sys
import threading
import time
import wave
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_user_error, run_here, run_warm, start_warm

pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
from configurator import read_settings
from distrogpt.audio.speech import Voice
from distrogpt.benchmark.serving import CHROMIUM, QUIET, bench_serve
from distrogpt.data.tokenizer import ByteTokenizer
from distrogpt.errors import UserError
from distrogpt.inference.decoder import DecodingBatch
from distrogpt.inference.detokenizer import Detokenizer
from distrogpt.runtime import Runtime
from distrogpt.serving.app import App, find_key, listen
from distrogpt.serving.engine import Engine, EngineRequest, Sample
from distrogpt.serving.server import SECONDS, Server
from distrogpt.settings import BenchConfig, ServeConfig
from sample import Sampler


class LocalServer:
    """A server in threads of this process, on a port of its own."""

    def __init__(self, out_dir, key=None, voice=None, tokenizer=None, make_batch=DecodingBatch, **settings):
        self.config = ServeConfig(out_dir=str(out_dir), **settings)
        self.sampler = Sampler(str(out_dir), device="cpu", dtype="float32")
        if tokenizer:
            self.sampler.tokenizer = tokenizer
        self.engine = Engine(self.sampler, self.config.batch_size, self.config.queue, make_batch)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = App(self.config, self.sampler, self.engine, key, voice)
        self.server = Server(self.app)
        decode = threading.Thread(target=self.engine.run)
        answer = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.threads = [decode, answer]
        for thread in self.threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.engine.close()
        self.server.should_exit = True
        for thread in self.threads:
            thread.join()

    def request(self, method, path, body=None, headers=(), raw=False, raw_answer=False):
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Content-Type": "application/json", **dict(headers)}
        connection.request(method, path, body if raw or body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, answer.headers, text if raw_answer else text.decode()

    def complete(self, prompt="def ", **body):
        status, _, text = self.request("POST", "/v1/completions", {"prompt": prompt, **body})
        assert status == 200, text
        return json.loads(text)

    def texts(self, prompt="def ", **body):
        return [choice["text"] for choice in self.complete(prompt, **body)["choices"]]

    def stream(self, prompt="def ", **body):
        """The events of a streamed completion."""
        status, headers, text = self.request(
            "POST", "/v1/completions", {"prompt": prompt, "stream": True, **body}
        )
        assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
        lines = text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def open(self, body, path="/v1/completions"):
        """A request on a connection of its own, to be left."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Length: {len(data)}\r\nContent-Type: application/json\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def until(self, **state):
        """Wait until /health reports this state."""
        end = time.monotonic() + 20
        while (health := json.loads(self.request("GET", "/health")[2])) != state:
            assert time.monotonic() < end, health
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server(trained):
    voice = Voice("a hum", 8000, lambda text: [b"\1\2" * 800 * len(text)])
    with LocalServer(trained, voice=voice) as server:
        yield server


def test_32_clients_at_once_get_the_texts_of_sample_py(server):
    requests = []
    for number in range(32):
        prompt = ["def ", "class Parser", "\n", "import os\nimport"][number % 4]
        params = {"temperature": [0.8, 0.0, 1.3][number % 3], "top_k": [None, 5][number % 2], "seed": number}
        params |= {"repetition_penalty": [1.0, 1.3][number % 5 == 0], "top_p": [1.0, 0.9][number % 7 == 0]}
        requests.append((prompt, params, 20 + number, 1 + number % 3, [(), ("e ",)][number % 2]))

    def complete(request):
        prompt, params, tokens, n, stop = request
        body = {**params, "max_tokens": tokens, "n": n, "stop": list(stop)}
        if tokens % 2:
            return server.texts(prompt, **body)
        texts = [""] * n
        for event in server.stream(prompt, **body):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        return texts

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(complete, requests))
    for (prompt, params, tokens, n, stop), texts in zip(requests, results, strict=True):
        params |= {"max_new_tokens": tokens, "num_samples": n, "stop": list(stop), "echo": False}
        assert texts == server.sampler.generate(prompt, **params)
    server.until(writes=0, waits=0)


def test_finished_requests_are_released(server):
    for _ in range(3):
        server.stream(max_tokens=10, n=3, logprobs=3)
    server.until(writes=0, waits=0)
    gc.collect()
    assert [one for one in gc.get_objects() if type(one) in (EngineRequest, Sample)] == []


def test_openais_client(server):
    openai = pytest.importorskip("openai", reason="needs the openai package")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    params = {"model": name, "prompt": "def ", "max_tokens": 12, "seed": 3, "temperature": 0.8}
    expected = server.sampler.generate("def ", 2, 12, seed=3, top_k=None, echo=False)
    completion = client.completions.create(**params, n=2, logprobs=2)
    first, second = completion.choices
    assert [first.text, second.text] == expected and first.finish_reason == "length"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 24)
    tokens = list(server.sampler.tokens("def ", 12, seed=3, top_k=None))
    assert first.logprobs.tokens == [token.text for token in tokens]
    assert first.logprobs.token_logprobs == pytest.approx([token.logprob for token in tokens])
    assert "".join(second.logprobs.tokens) == expected[1]
    assert second.logprobs.text_offset == list(range(12))
    for choice in (first.logprobs, second.logprobs):  # the two likeliest, and the one that was sampled
        for token, logprob, top in zip(
            choice.tokens, choice.token_logprobs, choice.top_logprobs, strict=True
        ):
            assert top[token] == logprob and len(top) == 2 + (logprob < sorted(top.values())[-2])
    (none,) = client.completions.create(**params, logprobs=0).choices
    assert [list(top) for top in none.logprobs.top_logprobs] == [[token] for token in none.logprobs.tokens]
    events = list(client.completions.create(**params, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events[:-1]) == expected[0]
    assert events[-2].choices[0].finish_reason == "length" and events[-1].usage.completion_tokens == 12
    assert client.completions.create(**params, echo=True).choices[0].text == "def " + expected[0]
    several = client.completions.create(**params | {"prompt": ["def ", "class "]}).choices
    assert [choice.index for choice in several] == [0, 1] and several[0].text == expected[0]
    ids = server.sampler.tokenizer.encode("def ").tolist()
    assert client.completions.create(**params | {"prompt": ids}).choices[0].text == expected[0]
    stop = expected[0][5]
    cut = client.completions.create(**params, stop=stop).choices[0]
    assert cut.text == expected[0][: expected[0].index(stop)] and cut.finish_reason == "stop"
    ours = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.2}
    (text,) = server.sampler.generate("def ", 1, 12, seed=3, echo=False, **ours)
    assert client.completions.create(**params, extra_body=ours).choices[0].text == text
    with pytest.raises(openai.BadRequestError, match="max_tokens") as error:
        client.completions.create(**params | {"max_tokens": 10**6})
    assert (error.value.param, error.value.type) == ("max_tokens", "invalid_request_error")
    assert client.models.retrieve(name).id == name and client.models.list().data[0].created > 1.7e9
    with pytest.raises(openai.NotFoundError, match=f"; use {name}") as error:
        client.models.retrieve("gpt-4")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_best_of_returns_the_likeliest_samples(server):
    params = {"max_tokens": 8, "seed": 5, "temperature": 1.2}
    choices = server.complete(n=6, logprobs=0, **params)["choices"]
    scores = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) for choice in choices}
    assert server.texts(n=2, best_of=6, **params) == sorted(scores, key=scores.get, reverse=True)[:2]


@pytest.mark.parametrize("stream", [True, False])
def test_best_of_and_echo_of_several_prompts(server, stream):
    params = {"max_tokens": 8, "seed": 5, "n": 2, "echo": True}
    prompts, texts = ["def ", "class "], [""] * 4
    if stream:
        for event in server.stream(prompts, **params):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        texts = server.texts(prompts, **params)
        best = [server.texts(prompt, **params | {"best_of": 3})[0] for prompt in prompts]
        assert server.texts(prompts, **params | {"best_of": 3})[::2] == best
    sampled = [server.sampler.generate(p, 2, 8, temperature=1.0, top_k=None, seed=5) for p in prompts]
    assert texts == [text for two in sampled for text in two]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_cancels_its_request(server, stream):
    client = server.open({"prompt": "def ", "max_tokens": 4096, "n": 3, "stream": stream})
    server.until(writes=3, waits=0)
    samples = list(server.engine.samples)
    client.close()
    server.until(writes=0, waits=0)
    assert all(0 < sample.num_tokens < 4096 for sample in samples)


def test_a_client_may_disconnect_within_a_body(server, capfd):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        client.sendall(head + b"Content-Type: application/json\r\n\r\n{")
        time.sleep(0.1)
    assert server.texts(max_tokens=2) and "Traceback" not in capfd.readouterr().err


def test_a_client_that_does_not_read_is_dropped(trained):
    with LocalServer(trained) as server:
        server.app.max_unread = -1
        body = {"prompt": "def ", "max_tokens": 4096, "stream": True}
        status, _, text = server.request("POST", "/v1/completions", body)
        assert status == 200 and "[DONE]" in text and '"finish_reason": "' not in text
        server.until(writes=0, waits=0)


def test_a_full_queue_refuses_requests_and_serves_those_that_wait(trained):
    with LocalServer(trained, batch_size=1, queue=2) as server, ThreadPoolExecutor(2) as pool:
        first = server.open({"prompt": "def ", "max_tokens": 4096})
        server.until(writes=1, waits=0)
        waiting = pool.submit(server.texts, "class ", max_tokens=5, seed=1)
        server.until(writes=1, waits=1)
        second = server.open({"prompt": "def ", "max_tokens": 5})
        server.until(writes=1, waits=2)
        status, headers, text = server.request("POST", "/v1/completions", {"prompt": "def "})
        assert status == 429 and headers["Retry-After"] and "try again" in text
        second.close()  # while it waits, behind another
        server.until(writes=1, waits=1)
        third = server.open({"prompt": "def ", "max_tokens": 5})  # in its place
        server.until(writes=1, waits=2)
        first.close()
        params = {"temperature": 1.0, "top_k": None, "seed": 1, "echo": False}
        assert waiting.result() == server.sampler.generate("class ", 1, 5, **params)
        server.until(writes=0, waits=0)
        third.close()


def test_truncate_keeps_the_end_of_a_prompt_as_sample_py_does(server):
    for prompt in ("def f(x):\n    return x + 1\n", "import os\n" * 20_000):
        expected = server.sampler.generate(prompt, 2, 12, temperature=1.0, top_k=None, seed=4)
        params = {"max_tokens": 12, "n": 2, "seed": 4, "truncate": True}
        assert server.texts(prompt, echo=True, **params) == expected
        ids = server.sampler.tokenizer.encode(prompt).tolist()
        assert server.texts(ids, echo=True, **params) == expected
        assert server.complete(prompt, **params)["usage"]["prompt_tokens"] == 16


def test_equal_prompts_get_different_texts_unless_there_is_a_seed(server):
    first, second = server.texts(["def ", "def "], max_tokens=30)
    assert first != second
    assert server.texts(["def ", "def "], max_tokens=9, seed=1) == server.texts(max_tokens=9, seed=1) * 2


@pytest.fixture(scope="module")
def scripted_events(trained):
    """events(*ids, **body): those of a stream whose sample has these bytes as tokens."""
    tokenizer, script = ByteTokenizer(), []

    class ScriptedBatch(DecodingBatch):
        def next_logits(self):
            logits = torch.full((1, tokenizer.vocab_size), -5.0)
            logits[0, script.pop(0)] = 5.0
            return logits

    def events(*ids, **body):
        script[:] = ids
        return server.stream([1], max_tokens=len(ids), temperature=0, logprobs=3, **body)

    with LocalServer(trained, tokenizer=tokenizer, make_batch=ScriptedBatch) as server:
        server.engine.emit_interval = 0
        yield events


def test_tokens_agree_with_the_text_if_they_cut_characters_or_stop_strings(scripted_events):
    data, euro = "a \N{EURO SIGN}b-".encode(), "\N{EURO SIGN}"
    all_tokens = ["a", " ", "", "", euro, "b", "-"]
    for body, text, tokens, finish_reason in (
        ({}, f"a {euro}b-", all_tokens, "length"),
        ({"stop": [f" {euro}c"]}, f"a {euro}b-", all_tokens, "length"),
        ({"stop": ["b-"]}, f"a {euro}", all_tokens[:5], "stop"),
    ):
        choices = [event["choices"][0] for event in scripted_events(*data, **body)]
        logprobs = [choice["logprobs"] for choice in choices]
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["finish_reason"] == finish_reason
        assert [token for part in logprobs for token in part["tokens"]] == tokens
        offsets = [offset for part in logprobs for offset in part["text_offset"]]
        assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]
        top = [top for part in logprobs for top in part["top_logprobs"]]
        assert all(len(likeliest) == 3 for likeliest in top) and "bytes:\\xe2" in top[2]


def test_a_character_that_is_never_complete(scripted_events):
    choices = [event["choices"][0] for event in scripted_events(*b"a\xe2\x82", ByteTokenizer.end_of_text)]
    assert "".join(choice["text"] for choice in choices) == "a\N{REPLACEMENT CHARACTER}"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "body, words",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "not a JSON object"),
        (r'{"prompt": "a", "\ud800": 1}', "unpaired surrogate"),
        (r'{"prompt": "\ud800", "echo": true}', "unpaired surrogate"),
        (r'{"prompt": "a", "stop": ["\udc00"]}', "unpaired surrogate"),
        (r'{"prompt": ["a", "\ud83d"]}', "unpaired surrogate"),
        (r'{"prompt": "a", "user": {"\ud800": []}}', "unpaired surrogate"),
        ('{"prompt": "a", "temperature": NaN}', "a finite number"),
        ({"prompt": 5}, "neither a string nor"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["a"] * 100}, "100 prompts"),
        ({"prompt": [0, 10**6]}, "ids from 0 to"),
        ({"prompt": [[-1]]}, "ids from 0 to"),
        ({"prompt": [[0], True]}, "neither a string nor"),
        ({"prompt": "\N{SNOWMAN}"}, "not in the vocabulary"),
        ({"prompt": "a" * 17}, "17 tokens, the context length is 16"),
        ({"prompt": "a", "max_tokens": 4097}, "at most 4096"),
        ({"prompt": "a", "max_tokens": 0}, "at least 1"),
        ({"prompt": "a", "n": 17}, "n=17 is above the server's limit; send at most 16"),
        ({"prompt": "a", "n": True}, "whole number"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "above 0"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 10**5000}, "seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": {"a": 1}}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 17}, "16 strings"),
        ({"prompt": "a", "logprobs": 21}, "at most 20"),
        ({"prompt": "a", "stream": "yes"}, "True or False"),
        ({"prompt": "a", "stream_options": 3}, "stream_options"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, "not supported"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"promt": "a"}, "did you mean prompt"),
        ({"prompt": "a", "max_new_tokens": 3}, "did you mean max_tokens"),
    ],
)
def test_mistakes_in_a_body_are_refused_with_a_reason(server, body, words):
    raw = isinstance(body, str)
    if isinstance(body, dict) and body.get("seed", 0) > 2**63:
        raw, body = True, '{"prompt": "a", "seed": 1' + "0" * 4000 + "}"
    status, _, text = server.request(
        "POST", "/v1/completions", body.encode("latin-1") if raw else body, raw=raw
    )
    assert status == 400 and words in json.loads(text)["error"]["message"], text
    assert ";" in json.loads(text)["error"]["message"]


def test_no_value_of_a_field_is_an_error_of_the_server(server, capfd):
    names = (
        "prompt model max_tokens n logprobs echo temperature top_k top_p min_p repetition_penalty seed stop"
    )
    names += r" stream_options suffix user \ud800"
    values = [r'"\ud800"', r'["a\udfff"]', r'{"\ud800": 1}', "NaN", "-Infinity", "1e400", "1e-320"]
    values += [
        "1" + "0" * 400,
        "-1",
        "true",
        "null",
        '""',
        r'"\u0000"',
        "[[]]",
        "[1.5]",
        "[" * 500 + "]" * 500,
    ]
    statuses = set()
    for name, value in itertools.product(names.split(), values):
        body = f'{{"prompt": "def ", "max_tokens": 2, "logprobs": 1, "{name}": {value}}}'
        status, _, text = server.request("POST", "/v1/completions", body.encode(), raw=True)
        assert status == 200 or (status == 400 and "; " in json.loads(text)["error"]["message"]), (body, text)
        statuses.add(status)
    assert statuses == {200, 400} and capfd.readouterr().err == ""


def test_speech(server):
    def speak(**body):
        return server.request("POST", "/v1/audio/speech", body, raw_answer=True)

    status, headers, sound = speak(input="Two words.", model="any", voice="any", response_format="wav")
    assert status == 200 and headers["Content-Type"] == "audio/wav"
    with wave.open(io.BytesIO(sound)) as wav:
        assert wav.getnframes() == 800 * 10 and wav.getframerate() == 8000
    for body in (
        {"input": "..."},
        {"input": 5},
        {"input": "a" * 10_001},
        {"input": "a", "response_format": "mp3"},
        {"input": "\ud800"},
        {"input": "a", "\ud800": 1},
    ):
        status, _, answer = speak(**body)
        assert status == 400 and b"; " in answer


def test_other_mistakes_are_refused(server):
    def refused(method, path, *more, **how):
        status, _, text = server.request(method, path, *more, **how)
        error = json.loads(text)["error"]
        types = {name: type(value) for name, value in error.items()}
        assert types in (
            {"message": str, "type": str, "param": of_param, "code": of_code}
            for of_param in (str, type(None))
            for of_code in (str, type(None))
        )
        assert "; " in error["message"]
        return status

    body = {"prompt": "a", "max_tokens": 1}
    assert refused("POST", "/v1/completions", {"prompt": "a" * (1 << 20)}) == 413
    assert refused("GET", "/v1/completions") == 405
    assert refused("POST", "/v1/chat/completions", body) == 404
    plain = {"Content-Type": "text/plain"}  # which browsers send for other websites without asking
    assert refused("POST", "/v1/completions", body, headers=plain) == 415
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[", "a" * 5000):
        assert refused("GET", "/", headers={"Host": host}) == 400
    for host in ("localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
        assert server.request("GET", "/", headers={"Host": host})[0] == 200
    assert "--api_key" in server.request("GET", "/", headers={"Host": "evil.example"})[2]
    assert exchange(server, b"GET /health HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 200")
    for data in (b"GET /health HTTP/1.1\r\n\r\n", b"\0\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000):
        assert json.loads(exchange(server, data).partition("\r\n\r\n")[2])["error"]["param"] is None
    assert server.texts(**body)  # still serves


def read_to_end(connection):
    """What the server sends until it closes the connection."""
    with connection:
        connection.settimeout(20)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def exchange(server, data):
    """What the server answers to these bytes."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(data)
    return read_to_end(connection)


def test_a_broken_body_leaves_no_trace(server, capfd):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    for kind in (b"text/plain", b"application/json"):  # one is refused before, one after its body is read
        data = head + b"Content-Type: " + kind + b"\r\n\r\n1\r\na\r\nnot a length\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for part in (data[:-14], data[-14:]):
                connection.sendall(part)
                time.sleep(0.05)
            assert b"HTTP/1.1 4" in connection.recv(1 << 16)
    assert capfd.readouterr().err == ""


@pytest.fixture
def few_files(monkeypatch):
    """The system lets a process have so few files open that a server takes 44 connections."""
    monkeypatch.setattr(pytest.importorskip("resource"), "getrlimit", lambda kind: (140, 140))


def test_connections_that_wait_do_not_keep_others_out(trained, few_files):
    get = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    unfinished, unread = (b"", b"GET / HT", get + b"Content-Length: 9\r\n\r\n"), (get + b"\r\n") * 200
    with LocalServer(trained, batch_size=1, queue=0) as server, contextlib.ExitStack() as stack:
        stream = server.open({"prompt": "def ", "max_tokens": 500, "stream": True})
        for data in (*unfinished, unread):
            for _ in range(50):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                connection.setblocking(False)
                with contextlib.suppress(OSError):  # closed already
                    connection.send(data)
            assert server.request("GET", "/health")[0] == 200
            assert len(server.server.server_state.connections) <= 44
        assert "data: [DONE]" in read_to_end(stream)


def test_slow_clients_are_closed_and_long_streams_are_not(trained, monkeypatch):
    for name in SECONDS:
        monkeypatch.setitem(SECONDS, name, 0.2)
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    slow = (b"GET / HT", post + b"\r\n", post + b"Content-Type: application/json\r\n\r\n{")
    with LocalServer(trained, voice=Voice("a hum", 8000, lambda text: [bytes(1600 * len(text))])) as server:
        unread = server.open({"input": "a" * 10_000}, "/v1/audio/speech")  # 16 MB
        stream = server.open({"prompt": "def ", "max_tokens": 1000, "stream": True})
        for data in slow:
            exchange(server, data)  # ends
        assert "data: [DONE]" in read_to_end(stream)
        end = time.monotonic() + 20
        while server.server.server_state.connections:
            assert time.monotonic() < end
            time.sleep(0.01)
        unread.close()


def test_where_few_files_may_be_open_fewer_requests_wait(trained, few_files, capsys):
    with LocalServer(trained, queue=1000) as server, contextlib.ExitStack() as stack:
        assert server.engine.queue == 12 and "only 12 requests may wait" in capsys.readouterr().err
        for _ in range(40):
            stack.enter_context(server.open({"prompt": "def ", "max_tokens": 4096}))
        server.until(writes=16, waits=12)


@pytest.mark.skipif(sys.platform != "linux", reason="changes the limit of another process")
def test_a_full_table_of_files_is_one_line(trained):
    import resource

    process = start_warm("serve.py", f"--out_dir={trained}", "--port=0", "--device=cpu")
    port = int(process.stdout.readline().split()[0].rpartition(":")[2])
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (50, 50))
    with contextlib.ExitStack() as stack:
        for _ in range(46):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).send(b"GET / HT")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143 and len(err.splitlines()) == 2 and "ulimit -n" in err


def test_an_error_ends_the_running_requests_alone(trained, capfd):
    errors = []

    class FailingBatch(DecodingBatch):
        def next_logits(self):
            if errors:
                raise errors.pop()
            return super().next_logits()

    with LocalServer(trained, make_batch=FailingBatch) as server:
        for error, words in (
            (RuntimeError("out of memory"), "out of memory; "),
            (ValueError("a bug"), "internal error"),
        ):
            errors.append(error)
            status, _, text = server.request("POST", "/v1/completions", {"prompt": "a"})
            assert status == 500 and words in text
            errors.append(error)
            body = {"prompt": "a", "stream": True}
            assert words in server.request("POST", "/v1/completions", body)[2]
            assert server.texts(max_tokens=3)
    assert "a bug" in capfd.readouterr().err


def test_an_error_in_one_sample_leaves_the_others_alone(server, monkeypatch, capfd):
    pop_tokens = Detokenizer.pop_tokens

    def fail(detokenizer):
        if len(detokenizer.tokens) > 3 and detokenizer.stop == ("never",):
            raise ValueError("a bug")
        return pop_tokens(detokenizer)

    monkeypatch.setattr(Detokenizer, "pop_tokens", fail)
    with ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 2000, "stop": ["never"]}
        bad = pool.submit(server.request, "POST", "/v1/completions", body)
        assert len(server.texts(max_tokens=1500)[0]) == 1500
        assert bad.result()[0] == 500 and "a bug" in capfd.readouterr().err


def test_without_memory_for_a_new_batch_the_server_closes(trained):
    released = []

    class FailingBatch(DecodingBatch):
        def next_logits(self):
            raise RuntimeError("out of memory")

    def make_batch(model, rows):
        if not released:
            batch = FailingBatch(model, rows)
            released.append(weakref.ref(batch))
            return batch
        gc.collect()
        released.append(released[0]() is None)  # before the next one is made, its memory is free
        raise RuntimeError("out of memory")

    with LocalServer(trained, make_batch=make_batch) as server:
        assert server.request("POST", "/v1/completions", {"prompt": "a"})[0] in (500, 503)
        assert server.request("POST", "/v1/completions", {"prompt": "a"})[0] in (500, 503)
        status, _, text = server.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and "restart it" in text
    assert released[1:] == [True]


def test_an_api_key_is_required(trained):
    with LocalServer(trained, key="secret") as server:
        body = {"prompt": "a", "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s\xe9cret"}):
            status, answered, text = server.request("POST", "/v1/completions", body, headers)
            assert status == 401 and "Bearer KEY" in text and answered["WWW-Authenticate"]
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
            assert server.request("GET", "/v1/models", headers=headers)[0] == 401
        right = {"Authorization": "Bearer secret", "Host": "my.example"}
        assert server.request("POST", "/v1/completions", body, right)[0] == 200
        assert server.request("GET", "/", headers={"Host": "my.example"})[0] == 200


def test_other_machines_need_a_key(tmp_path):
    for host in ("0.0.0.0", "192.168.1.2", "::", "my.example"):
        with pytest.raises(UserError, match="api_key"):
            find_key(ServeConfig(host=host))
    for host in ("127.0.0.1", "localhost", "::1"):
        assert find_key(ServeConfig(host=host)) is None
    (tmp_path / "key").write_text("secret\n")
    assert find_key(ServeConfig(host="0.0.0.0", api_key=f"FILE:{tmp_path / 'key'}")) == "secret"
    for key in ("", "schl\xfcssel", "two words", f"FILE:{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="api_key"):
            find_key(ServeConfig(api_key=key))
    with pytest.raises(UserError, match=r"host=no\.such\.host\.example with port=0"):
        listen("no.such.host.example", 0)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_as_a_command_until_a_signal(trained, number, status):
    process = start_warm("serve.py", f"--out_dir={trained}", "--port=0", "--device=cpu")
    url = process.stdout.readline().split()[0]
    port = int(url.rpartition(":")[2])
    assert url.startswith("http://127.0.0.1:")
    taken = run_warm("serve.py", f"--out_dir={trained}", f"--port={port}") if status == 130 else None
    headers = {"Content-Type": "application/json"}
    connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(3)]
    connections[0].putrequest("GET", "/")  # never ends
    for connection, stream in zip(connections[1:], (True, False), strict=True):
        body = {"prompt": "a", "max_tokens": 4096, "stream": stream, "n": 8}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connections[1].getresponse()
    assert answer.readline().startswith(b"data: {")
    process.send_signal(number)
    assert b"the server is shutting down" in answer.read()
    answer = connections[2].getresponse()
    assert answer.status == 503 and b"the server is shutting down" in answer.read()
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and len(err.splitlines()) <= 2 and "ckpt.pt, step 20" in err
    if taken:
        assert_user_error(taken, f"port={port}", "another")


def test_the_benchmark_of_the_server(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "playwright", None)  # the page is not timed
    flags = (f"--out_dir={trained}", "--device=cpu", "--rounds=2", "--max_new_tokens=9")
    runtime = Runtime(torch.device("cpu"), torch.float32)
    result = bench_serve(read_settings(BenchConfig, flags), runtime, n_clients=3, n_requests=2)
    assert result["clients"]["served"] == 6 and result["clients"]["lost"] == []
    assert result["API"]["first_ms"] > 0 and "page" not in result
    assert "3 clients, 2 requests each for 64 tokens: 6 served, 0 lost" in capsys.readouterr().out
    assert_user_error(run_here("bench.py", "--serve=True", f"--out_dir={tmp_path}"), "train first")


# ---- the page


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    if not CHROMIUM:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server, request):
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.set_default_timeout(20_000)
    messages, urls = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server.url)
    yield page
    messages = [line for line in messages if "400 (Bad Request)" not in line]  # which tests provoke
    assert messages == []  # no error, and nothing that the content security policy forbids
    assert all(url.startswith((server.url, "data:", "blob:")) for url in urls)
    context.close()


def samples_of(page) -> list[str]:
    return [sample.text_content() for sample in page.locator("article pre").all()]


def test_the_page_writes_samples_and_continues_one(page, server):
    page.fill("[name=prompt]", "def ")
    for name, value in {"max_tokens": 30, "n": 3, "seed": 7, "temperature": 0.9, "top_k": 20}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    expected = server.sampler.generate("def ", 3, 30, temperature=0.9, top_k=20, seed=7)
    assert samples_of(page) == expected
    assert "90 tokens" in page.inner_text("#state")
    page.locator("article").nth(1).get_by_text("Continue").click()
    page.locator("#state", has_text="30 tokens").wait_for()
    page.locator("#go", has_text="Write").wait_for()
    (more,) = server.sampler.generate("def " + expected[1][-12:], 1, 1)  # the block holds 16 tokens
    assert [len(text) for text in samples_of(page)] == [34, 64, 34] and more


def test_a_sample_is_read_aloud(page):
    page.fill("[name=prompt]", "def ")
    page.fill("[name=max_tokens]", "5")
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    with page.expect_response("**/v1/audio/speech") as said:
        page.locator("article").first.get_by_text("Speak").click()
    assert said.value.status == 200


def test_hovering_shows_how_likely_a_token_was(page, server):
    page.fill("[name=prompt]", "class ")
    for name, value in {"max_tokens": 12, "n": 1, "seed": 2}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    tokens = list(server.sampler.tokens("class ", 12, temperature=0.8, top_k=200, seed=2))
    page.locator("article pre b").nth(4).hover()
    row = page.locator("#hint tr.chosen td").all_text_contents()
    shown = json.dumps(tokens[4].text)[1:-1].replace('\\"', '"').replace(" ", "\N{OPEN BOX}")
    assert row[0] == shown and float(row[1].split()[0]) == pytest.approx(
        100 * 2.718281828 ** tokens[4].logprob, abs=0.06
    )
    assert page.locator("#hint tr").count() in (5, 6)


def test_the_settings_of_the_page_fit_the_server(browser, trained):
    with LocalServer(trained, batch_size=1, max_new_tokens=30) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.click("#go")
        page.locator("#state", has_text="30 tokens").wait_for()
        assert page.locator("article").count() == 1
        page.close()


def test_text_appears_while_it_is_written_and_stops(page, server):
    page.fill("[name=max_tokens]", "4096")
    page.fill("[name=n]", "2")
    page.press("[name=prompt]", "Control+Enter")
    page.locator("article pre b").first.wait_for(state="attached")  # it may be a new line, which has no width
    before = len(samples_of(page)[0])
    page.wait_for_timeout(150)
    assert len(samples_of(page)[0]) > before and page.inner_text("#go") == "Stop"
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    server.until(writes=0, waits=0)
    assert len(samples_of(page)[0]) < 4096
    page.fill("[name=prompt]", "\N{SNOWMAN}")
    page.click("#go")
    page.locator("#error", has_text="not in the vocabulary").wait_for()
    assert page.locator("article").count() == 0


@pytest.mark.parametrize(
    "page",
    [{"color_scheme": "dark", "viewport": {"width": 360, "height": 640}, "has_touch": True}],
    indirect=True,
)
def test_on_a_phone_and_in_the_dark(page):
    def brightness() -> int:
        return sum(
            map(
                int,
                page.evaluate_handle("() => getComputedStyle(document.body).backgroundColor")
                .json_value()[4:-1]
                .split(","),
            )
        )

    assert brightness() < 200
    page.click("#theme")
    assert brightness() > 600
    page.fill("[name=max_tokens]", "60")
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    wide = page.evaluate_handle("() => document.documentElement.scrollWidth").json_value()
    assert wide <= 360
    page.locator("article pre b:visible").nth(3).tap()  # a new line has no width
    assert page.locator("#hint").is_visible()
