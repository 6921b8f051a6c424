"""serve.py: the page, OpenAI's clients, many at once, and what is refused."""

import gc
import http.client
import io
import json
import random
import signal
import socket
import threading
import time
import wave
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_user_error, run_here, run_warm, start_warm

pytest.importorskip("starlette", reason="needs requirements-serve.txt")
import serve
from distrogpt.audio.speech import Voice
from distrogpt.benchmark import serving as bench_serve
from distrogpt.benchmark.serving import CHROMIUM, QUIET
from distrogpt.data.tokenizer import ByteTokenizer
from distrogpt.errors import UserError
from distrogpt.inference.decoder import DecodingBatch, optimize_for_inference
from distrogpt.inference.detokenizer import Detokenizer
from distrogpt.serving import engine as engine_module
from distrogpt.serving.engine import Engine, Request
from distrogpt.settings import ServeConfig
from model import GPT, GPTConfig
from sample import Sampler


class Served:
    """A server in threads of this process, on a port of its own."""

    def __init__(self, out_dir, key=None, voice=None, **settings):
        self.config = ServeConfig(out_dir=str(out_dir), **settings)
        self.sampler = Sampler(str(out_dir), device="cpu", dtype="float32")
        self.engine = Engine(self.sampler, self.config.batch_size, self.config.queue)
        self.socket = serve.listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = serve.server_of(self.config, self.sampler, self.engine, key, voice)
        work = threading.Thread(target=self.engine.work)
        answer = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.threads = [work, answer]
        for thread in self.threads:
            thread.start()

    def close(self):
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

    def open(self, body):
        """A request on a connection of its own, to be left."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        return connection

    def until(self, **state):
        """Wait until /health says so."""
        end = time.monotonic() + 20
        while (found := json.loads(self.request("GET", "/health")[2])) != state:
            assert time.monotonic() < end, found
            time.sleep(0.01)


@pytest.fixture(scope="module")
def served(trained):
    one = Served(trained, voice=Voice("a hum", 8000, lambda text: [b"\1\2" * 800 * len(text)]))
    yield one
    one.close()


@pytest.fixture
def exact():
    """fp32 products as sampling has them, whatever trained in this process before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="plain products depend on the batch")
@pytest.mark.parametrize("graph", [False, True], ids=["", "in rows as GPUs record them"])
def test_sequences_that_join_and_leave_go_on_as_they_would_alone(exact, graph, monkeypatch):
    monkeypatch.setattr("distrogpt.inference.decoder.cuda_graph", lambda function, *inputs: function)
    torch.manual_seed(1)
    shape = {"block_size": 32, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 128, "n_kv_head": 2}
    model = optimize_for_inference(GPT(GPTConfig(**shape, rotary=True)), torch.float32)
    rng, batch = random.Random(1), DecodingBatch(model, 6)
    batch.graph = graph
    rows, ended, alone = [], [], []  # the prompt of each row, and the scores so far
    with torch.no_grad():
        for _ in range(150):
            for row in reversed(range(len(rows))):
                if rng.random() < 0.04:
                    batch.remove_sequence(row)
                    ended.append(rows[row])
                    rows[row] = rows[-1]
                    rows.pop()
            copies = rng.choice([0, 0, 0, 1, 2])
            if copies and len(rows) + copies <= 6:
                prompt = [rng.randrange(50) for _ in range(rng.randint(1, 40))]
                batch.add_sequences([torch.tensor(prompt)], copies)
                rows += [(prompt, []) for _ in range(copies)]
            if rows:
                logits = batch.next_logits().clone()
                batch.append(logits.argmax(dim=-1, keepdim=True))
                for (_, found), scores in zip(rows, logits, strict=True):
                    found.append(scores)
        recorded = batch.graphs
        assert {shapes[0] for shapes in recorded} <= {1, 2, 4, 6}
        for prompt, found in ended + rows:
            batch = DecodingBatch(model, 1)
            batch.add_sequences([torch.tensor(prompt)])
            for scores in found:
                assert torch.equal(batch.next_logits()[0], scores)  # to the last bit
                batch.append(scores.argmax()[None, None])
            alone.append(len(found))
    assert len(alone) > 10 and max(alone) > 40 and graph == bool(recorded)


def test_32_clients_at_once_get_what_sample_py_writes_and_nothing_is_lost(served):
    asked = []
    for number in range(32):
        prompt = ["def ", "class Parser", "\n", "import os\nimport"][number % 4]
        how = {"temperature": [0.8, 0.0, 1.3][number % 3], "top_k": [None, 5][number % 2], "seed": number}
        how |= {"repetition_penalty": [1.0, 1.3][number % 5 == 0], "top_p": [1.0, 0.9][number % 7 == 0]}
        asked.append((prompt, how, 20 + number, 1 + number % 3, [(), ("e ",)][number % 2]))

    def ask(one):
        prompt, how, tokens, n, stop = one
        body = {**how, "max_tokens": tokens, "n": n, "stop": list(stop)}
        if tokens % 2:
            return served.texts(prompt, **body)
        texts = [""] * n
        for event in served.stream(prompt, **body):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        return texts

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, asked))
    for (prompt, how, tokens, n, stop), texts in zip(asked, found, strict=True):
        more = {"max_new_tokens": tokens, "num_samples": n, "stop": list(stop), "echo": False}
        assert texts == served.sampler.generate(prompt, **how, **more)
    served.until(writes=0, waits=0)


def test_what_was_served_is_kept_nowhere(served):
    for _ in range(3):
        served.stream(max_tokens=10, n=3, logprobs=3)
    served.until(writes=0, waits=0)
    gc.collect()
    kept = [one for one in gc.get_objects() if type(one) in (Request, engine_module.Sample)]
    assert kept == []


def test_openais_client(served):
    openai = pytest.importorskip("openai", reason="needs the openai package")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    how = {"model": name, "prompt": "def ", "max_tokens": 12, "seed": 3, "temperature": 0.8}
    expected = served.sampler.generate("def ", 2, 12, seed=3, top_k=None, echo=False)
    whole = client.completions.create(**how, n=2, logprobs=2)
    assert [choice.text for choice in whole.choices] == expected and whole.choices[
        0
    ].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 24)
    chances = whole.choices[1].logprobs
    tokens = list(served.sampler.tokens("def ", 12, seed=3, top_k=None))
    first = whole.choices[0].logprobs
    assert first.tokens == [token.text for token in tokens]
    assert first.token_logprobs == pytest.approx([token.logprob for token in tokens])
    assert "".join(chances.tokens) == expected[1] and chances.text_offset == list(range(12))
    assert all(len(place) == 2 for place in chances.top_logprobs)
    parts = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected[0]
    assert parts[-2].choices[0].finish_reason == "length" and parts[-1].usage.completion_tokens == 12
    assert client.completions.create(**how, echo=True).choices[0].text == "def " + expected[0]
    several = client.completions.create(**how | {"prompt": ["def ", "class "]}).choices
    assert [choice.index for choice in several] == [0, 1] and several[0].text == expected[0]
    ids = served.sampler.tokenizer.encode("def ").tolist()
    assert client.completions.create(**how | {"prompt": ids}).choices[0].text == expected[0]
    stop = expected[0][5]
    cut = client.completions.create(**how, stop=stop).choices[0]
    assert cut.text == expected[0][: expected[0].index(stop)] and cut.finish_reason == "stop"
    ours = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.2}
    (text,) = served.sampler.generate("def ", 1, 12, seed=3, echo=False, **ours)
    assert client.completions.create(**how, extra_body=ours).choices[0].text == text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**how | {"max_tokens": 10**6})


def test_the_likeliest_of_several(served):
    how = {"max_tokens": 8, "seed": 5, "temperature": 1.2}
    every = served.complete(n=6, logprobs=0, **how)["choices"]
    scores = {choice["text"]: sum(choice["logprobs"]["token_logprobs"]) for choice in every}
    assert served.texts(n=2, best_of=6, **how) == sorted(scores, key=scores.get, reverse=True)[:2]


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_ends_what_was_written_for_them(served, stream):
    leaver = served.open({"prompt": "def ", "max_tokens": 4096, "n": 3, "stream": stream})
    served.until(writes=3, waits=0)
    samples = list(served.engine.samples)
    leaver.close()
    served.until(writes=0, waits=0)
    assert all(0 < sample.made < 4096 for sample in samples)


def test_whoever_leaves_within_a_body_is_no_error(served, capfd):
    with socket.create_connection(("127.0.0.1", served.port)) as leaver:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        leaver.sendall(head + b"Content-Type: application/json\r\n\r\n{")
        time.sleep(0.1)
    assert served.texts(max_tokens=2) and "Traceback" not in capfd.readouterr().err


def test_who_does_not_read_is_dropped(served, monkeypatch):
    monkeypatch.setattr(serve, "MOST_UNREAD", -1)
    body = {"prompt": "def ", "max_tokens": 4096, "stream": True}
    status, _, text = served.request("POST", "/v1/completions", body)
    assert status == 200 and "[DONE]" in text and '"finish_reason": "' not in text
    served.until(writes=0, waits=0)


def test_a_full_queue_refuses_and_those_who_wait_are_served(trained):
    one = Served(trained, batch_size=1, queue=2)
    try:
        first = one.open({"prompt": "def ", "max_tokens": 4096})
        one.until(writes=1, waits=0)
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(one.texts, "class ", max_tokens=5, seed=1)
            one.until(writes=1, waits=1)
            leaver = one.open({"prompt": "def ", "max_tokens": 5})
            one.until(writes=1, waits=2)
            status, headers, text = one.request("POST", "/v1/completions", {"prompt": "def "})
            assert status == 429 and headers["Retry-After"] and "try again" in text
            leaver.close()  # while it waits, behind another
            one.until(writes=1, waits=1)
            other = one.open({"prompt": "def ", "max_tokens": 5})  # in its place
            one.until(writes=1, waits=2)
            first.close()
            assert waiting.result() == one.sampler.generate(
                "class ", 1, 5, temperature=1.0, top_k=None, seed=1, echo=False
            )
        one.until(writes=0, waits=0)
        other.close()
    finally:
        one.close()


def test_prompts_of_a_list_get_texts_of_their_own(served):
    one, other = served.texts(["def ", "def "], max_tokens=30)
    assert one != other
    assert served.texts(["def ", "def "], max_tokens=9, seed=1) == served.texts(max_tokens=9, seed=1) * 2


@pytest.fixture
def written_by_hand(served, monkeypatch):
    """A server whose tokens are bytes, and the next ones these; and its events."""
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(served.sampler, "tokenizer", tokenizer)
    monkeypatch.setattr(served.engine, "tokenizer", tokenizer)

    def events(*ids, **body):
        def read(batch):
            chances = torch.full((1, tokenizer.vocab_size), -5.0)
            chances[0, ids[served.engine.samples[0].made]] = 5.0
            return chances

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodingBatch, "next_logits", read)
            patch.setattr(engine_module, "TELL_EVERY", 0)
            return served.stream([1], max_tokens=len(ids), temperature=0, logprobs=3, **body)

    return events


def test_tokens_and_texts_agree_wherever_characters_and_stops_are_cut(written_by_hand):
    data = "a \N{EURO SIGN}b-".encode()
    for body, text, tokens, ended in (
        ({}, "a \N{EURO SIGN}b-", ["a", " ", "", "", "\N{EURO SIGN}", "b", "-"], "length"),
        (
            {"stop": [" \N{EURO SIGN}c"]},
            "a \N{EURO SIGN}b-",
            ["a", " ", "", "", "\N{EURO SIGN}", "b", "-"],
            "length",
        ),
        ({"stop": ["b-"]}, "a \N{EURO SIGN}", ["a", " ", "", "", "\N{EURO SIGN}"], "stop"),
    ):
        choices = [event["choices"][0] for event in written_by_hand(*data, **body)]
        chances = [choice["logprobs"] for choice in choices]
        assert "".join(choice["text"] for choice in choices) == text and choices[-1]["finish_reason"] == ended
        assert [token for part in chances for token in part["tokens"]] == tokens
        offsets = [offset for part in chances for offset in part["text_offset"]]
        assert offsets == [len("".join(tokens[:n])) for n in range(len(tokens))]
        places = [place for part in chances for place in part["top_logprobs"]]
        assert all(len(place) == 3 for place in places) and "bytes:\\xe2" in places[2]


def test_a_character_that_is_never_whole(written_by_hand):
    choices = [event["choices"][0] for event in written_by_hand(*b"a\xe2\x82", ByteTokenizer.end_of_text)]
    assert "".join(choice["text"] for choice in choices) == "a\N{REPLACEMENT CHARACTER}"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "body, words",
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("\xff", "no JSON"),
        ("[]", "no JSON object"),
        ({"prompt": 5}, "neither text nor"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["a"] * 100}, "100 prompts"),
        ({"prompt": [0, 10**6]}, "ids from 0 to"),
        ({"prompt": [[-1]]}, "ids from 0 to"),
        ({"prompt": [[0], True]}, "neither text nor"),
        ({"prompt": "\N{SNOWMAN}"}, "not in the vocabulary"),
        ({"prompt": "a" * 17}, "17 tokens, the model reads 16"),
        ({"prompt": "a", "max_tokens": 4097}, "4096 or fewer"),
        ({"prompt": "a", "max_tokens": 0}, "at least 1"),
        ({"prompt": "a", "n": 17}, "16 or fewer"),
        ({"prompt": "a", "n": True}, "whole number"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "above 0"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 10**5000}, "seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": {"a": 1}}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 17}, "over 16"),
        ({"prompt": "a", "logprobs": 21}, "at most 20"),
        ({"prompt": "a", "stream": "yes"}, "True or False"),
        ({"prompt": "a", "stream_options": 3}, "stream_options"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, "not served"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"promt": "a"}, "did you mean prompt"),
        ({"prompt": "a", "max_new_tokens": 3}, "did you mean max_tokens"),
    ],
)
def test_what_is_wrong_is_refused_with_a_reason(served, body, words):
    raw = isinstance(body, str)
    if isinstance(body, dict) and body.get("seed", 0) > 2**63:
        raw, body = True, '{"prompt": "a", "seed": 1' + "0" * 4000 + "}"
    status, _, text = served.request(
        "POST", "/v1/completions", body.encode("latin-1") if raw else body, raw=raw
    )
    assert status == 400 and words in json.loads(text)["error"]["message"], text
    assert ";" in json.loads(text)["error"]["message"]


def test_a_text_is_read_aloud(served):
    def say(**body):
        return served.request("POST", "/v1/audio/speech", body, raw_answer=True)

    status, headers, sound = say(input="Two words.", model="any", voice="any", response_format="wav")
    assert status == 200 and headers["Content-Type"] == "audio/wav"
    with wave.open(io.BytesIO(sound)) as wav:
        assert wav.getnframes() == 800 * 10 and wav.getframerate() == 8000
    for body in (
        {"input": "..."},
        {"input": 5},
        {"input": "a" * 10_001},
        {"input": "a", "response_format": "mp3"},
    ):
        status, _, answer = say(**body)
        assert status == 400 and b"; " in answer


def test_other_mistakes_are_refused(served):
    def refused(method, path, *more, **how):
        status, _, text = served.request(method, path, *more, **how)
        assert json.loads(text)["error"]["code"] == status
        return status

    body = {"prompt": "a", "max_tokens": 1}
    assert refused("POST", "/v1/completions", {"prompt": "a" * (1 << 20)}) == 413
    assert refused("GET", "/v1/completions") == 405
    assert refused("POST", "/v1/chat/completions", body) == 404
    plain = {"Content-Type": "text/plain"}  # what another page can send without being asked
    assert refused("POST", "/v1/completions", body, headers=plain) == 415
    status, _, text = served.request("GET", "/", headers={"Host": "evil.example"})
    assert status == 400 and "{{" not in text
    assert served.request("GET", "/", headers={"Host": "localhost:8000"})[0] == 200
    assert served.texts(**body)  # and goes on


def test_a_failure_is_told_and_others_are_served(served, monkeypatch, capfd):
    good = DecodingBatch.next_logits
    for error, words in (
        (RuntimeError("out of memory"), "out of memory; "),
        (ValueError("a bug"), "internal error"),
    ):

        def fail(batch, error=error):
            raise error

        monkeypatch.setattr(DecodingBatch, "next_logits", fail)
        status, _, text = served.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 500 and words in text
        body = {"prompt": "a", "stream": True}
        assert words in served.request("POST", "/v1/completions", body)[2]
        monkeypatch.setattr(DecodingBatch, "next_logits", good)
        assert served.texts(max_tokens=3)
    assert "a bug" in capfd.readouterr().err


def test_the_trouble_of_one_text_is_its_own(served, monkeypatch, capfd):
    good = Detokenizer.take_tokens

    def fail(writer):
        if len(writer.tokens) > 3 and writer.stop == ("never",):
            raise ValueError("a bug")
        return good(writer)

    monkeypatch.setattr(Detokenizer, "take_tokens", fail)
    with ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "max_tokens": 2000, "stop": ["never"]}
        bad = pool.submit(served.request, "POST", "/v1/completions", body)
        assert len(served.texts(max_tokens=1500)[0]) == 1500
        assert bad.result()[0] == 500 and "a bug" in capfd.readouterr().err


def test_without_memory_for_a_new_batch_nobody_waits_for_ever(trained, monkeypatch):
    one = Served(trained)
    held = weakref.ref(one.engine.batch)

    def fail(*args):
        raise RuntimeError("out of memory")

    try:
        monkeypatch.setattr(DecodingBatch, "next_logits", fail)
        assert one.request("POST", "/v1/completions", {"prompt": "a"})[0] == 500
        end = time.monotonic() + 20
        while held() is not None and time.monotonic() < end:  # the engine answers, then lets go of it
            gc.collect()
        assert held() is None  # before the next one is made, its memory is free
        monkeypatch.setattr(engine_module, "DecodingBatch", fail)
        assert one.request("POST", "/v1/completions", {"prompt": "a"})[0] in (500, 503)
        status, _, text = one.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and "start it again" in text
    finally:
        one.close()


def test_a_key_is_asked_for(trained):
    one = Served(trained, key="secret")
    try:
        body = {"prompt": "a", "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer s\xe9cret"}):
            status, more, text = one.request("POST", "/v1/completions", body, headers)
            assert status == 401 and "Bearer KEY" in text and more["WWW-Authenticate"]
            assert one.request("GET", "/v1/models", headers=headers)[0] == 401
        right = {"Authorization": "Bearer secret", "Host": "my.example"}
        assert one.request("POST", "/v1/completions", body, right)[0] == 200
        assert one.request("GET", "/", headers={"Host": "my.example"})[0] == 200
    finally:
        one.close()


def test_other_machines_get_in_with_a_key_alone(tmp_path):
    for host in ("0.0.0.0", "192.168.1.2", "::", "my.example"):
        with pytest.raises(UserError, match="api_key"):
            serve.find_key(ServeConfig(host=host))
    for host in ("127.0.0.1", "localhost", "::1"):
        assert serve.find_key(ServeConfig(host=host)) is None
    (tmp_path / "key").write_text("secret\n")
    assert serve.find_key(ServeConfig(host="0.0.0.0", api_key=f"FILE:{tmp_path / 'key'}")) == "secret"
    for key in ("", "schl\xfcssel", "two words", f"FILE:{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="api_key"):
            serve.find_key(ServeConfig(api_key=key))
    with pytest.raises(UserError, match="no address"):
        serve.listen("no.such.host.example", 0)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_as_a_command_until_a_signal(trained, number, status):
    process = start_warm("serve.py", f"--out_dir={trained}", "--port=0", "--device=cpu")
    url = process.stdout.readline().split()[0]
    port = int(url.rpartition(":")[2])
    assert url.startswith("http://127.0.0.1:")
    taken = run_warm("serve.py", f"--out_dir={trained}", f"--port={port}") if status == 130 else None
    ask = {"Content-Type": "application/json"}
    connections = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(3)]
    connections[0].putrequest("GET", "/")  # never ends
    for connection, stream in zip(connections[1:], (True, False), strict=True):
        body = {"prompt": "a", "max_tokens": 4096, "stream": stream, "n": 8}
        connection.request("POST", "/v1/completions", json.dumps(body), ask)
    answer = connections[1].getresponse()
    assert answer.readline().startswith(b"data: {")
    process.send_signal(number)
    assert b"the server ends" in answer.read()
    answer = connections[2].getresponse()
    assert answer.status == 503 and b"the server ends" in answer.read()
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and len(err.splitlines()) <= 2 and "ckpt.pt, step 20" in err
    if taken:
        assert_user_error(taken, f"port={port}", "another")


def test_the_bench_serves_and_tells_what_was_lost(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_serve, "CLIENTS", 3)
    monkeypatch.setattr(bench_serve, "EACH", 2)
    monkeypatch.setattr(bench_serve, "CHROMIUM", None)
    flags = (f"--out_dir={trained}", "--device=cpu", "--rounds=2", "--max_new_tokens=9")
    done = run_here("bench.py", "--serve=True", *flags, f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["clients"]["served"] == 6 and found["clients"]["lost"] == []
    assert found["API"]["first_ms"] > 0 and "6 served, 0 lost" in done.stdout and "page" not in found
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
def page(browser, served, request):
    context = browser.new_context(**getattr(request, "param", {}))
    page = context.new_page()
    page.set_default_timeout(20_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    yield page
    said = [line for line in said if "400 (Bad Request)" not in line]  # which tests provoke
    assert said == []  # no error, and nothing that its own rules forbid
    assert all(url.startswith((served.url, "data:", "blob:")) for url in asked)
    context.close()


def samples_of(page) -> list[str]:
    return [sample.text_content() for sample in page.locator("article pre").all()]


def test_the_page_writes_several_samples_that_go_on(page, served):
    page.fill("[name=prompt]", "def ")
    for name, value in {"max_tokens": 30, "n": 3, "seed": 7, "temperature": 0.9, "top_k": 20}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    expected = served.sampler.generate("def ", 3, 30, temperature=0.9, top_k=20, seed=7)
    assert samples_of(page) == expected
    assert "90 tokens" in page.inner_text("#state")
    page.locator("article").nth(1).get_by_text("Go on").click()
    page.locator("#state", has_text="30 tokens").wait_for()
    page.locator("#go", has_text="Write").wait_for()
    (more,) = served.sampler.generate("def " + expected[1][-12:], 1, 1)  # the block holds 16 tokens
    assert [len(text) for text in samples_of(page)] == [34, 64, 34] and more


def test_a_sample_is_read_aloud(page):
    page.fill("[name=prompt]", "def ")
    page.fill("[name=max_tokens]", "5")
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    with page.expect_response("**/v1/audio/speech") as said:
        page.locator("article").first.get_by_text("Speak").click()
    assert said.value.status == 200


def test_hovering_tells_how_likely_a_token_was(page, served):
    page.fill("[name=prompt]", "class ")
    for name, value in {"max_tokens": 12, "n": 1, "seed": 2}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    tokens = list(served.sampler.tokens("class ", 12, temperature=0.8, top_k=200, seed=2))
    page.locator("article pre b").nth(4).hover()
    row = page.locator("#hint tr.taken td").all_text_contents()
    shown = json.dumps(tokens[4].text)[1:-1].replace('\\"', '"').replace(" ", "\N{OPEN BOX}")
    assert row[0] == shown and float(row[1].split()[0]) == pytest.approx(
        100 * 2.718281828 ** tokens[4].logprob, abs=0.06
    )
    assert page.locator("#hint tr").count() in (5, 6)


def test_the_pages_settings_fit_the_server(browser, trained):
    one = Served(trained, batch_size=1, max_new_tokens=30)
    try:
        page = browser.new_page()
        page.goto(one.url)
        page.click("#go")
        page.locator("#state", has_text="30 tokens").wait_for()
        assert page.locator("article").count() == 1
        page.close()
    finally:
        one.close()


def test_text_appears_while_it_is_written_and_stops(page, served):
    page.fill("[name=max_tokens]", "4096")
    page.fill("[name=n]", "2")
    page.press("[name=prompt]", "Control+Enter")
    page.locator("article pre b").first.wait_for(state="attached")  # it may be a new line, which has no width
    before = len(samples_of(page)[0])
    page.wait_for_timeout(150)
    assert len(samples_of(page)[0]) > before and page.inner_text("#go") == "Stop"
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    served.until(writes=0, waits=0)
    assert len(samples_of(page)[0]) < 4096
    page.fill("[name=prompt]", "\N{SNOWMAN}")
    page.click("#go")
    page.locator("#wrong", has_text="not in the vocabulary").wait_for()
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
