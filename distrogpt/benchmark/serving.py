"""Time serve.py beside sample.py, and its throughput with 32 concurrent clients: bench.py --serve=True"""

import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from distrogpt.benchmark.timing import ROOT, quartiles, ratio, spread
from distrogpt.errors import MachineError, UserError
from distrogpt.inference.sampler import Sampler
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

TOKENS = 64  # of a client's request
BODY = {"prompt": "\n", "temperature": 0.8, "top_k": 200, "stop_at_end": False, "stream": True}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
QUIET = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update").split()  # fmt: skip


@contextmanager
def running_server(config: BenchConfig) -> Iterator[tuple[int, int]]:
    """Run serve.py with the model of out_dir in its own process; yields its port and process id."""
    flags = [f"--{name}={getattr(config, name)}" for name in ("out_dir", "device", "dtype")]
    command = [sys.executable, str(ROOT / "serve.py"), *flags, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            words = process.stdout.readline().split()
            if not words:
                raise UserError("serve.py did not start; see its message above")
            yield int(words[0].rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def resident_memory(pid: int) -> float | None:
    """The resident memory of a process in MiB; None on other systems than Linux."""
    with suppress(OSError, KeyError):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1024
    return None


def time_items(items: Iterable[Any]) -> tuple[float, float]:
    """Seconds to the first item and to the last."""
    begin, first = time.perf_counter(), 0.0
    for _ in items:
        first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin


def completion_chunks(port: int, max_tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed completion. Raises OSError if it fails or is incomplete."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({**BODY, "max_tokens": max_tokens, "seed": seed})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response, finished = connection.getresponse(), False
    for line in response:
        if line.startswith(b"data: {"):
            yield (chunk := json.loads(line[6:]))
            finished = finished or chunk["choices"][0]["finish_reason"] == "length"
    connection.close()
    if response.status != 200 or not finished:
        raise ConnectionError(f"status {response.status}, incomplete response")


@contextmanager
def open_page(port: int) -> Iterator[Any]:
    """The page in a headless Chromium; None if that or playwright is missing."""
    if CHROMIUM is None or find_spec("playwright") is None:
        print("note     the page is not timed; that needs Chromium and: pip install playwright")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = chromium.new_page()
        page.set_default_timeout(600_000)
        page.goto(f"http://127.0.0.1:{port}")
        for name, value in {"n": 1, "temperature": 0.8, "top_k": 200}.items():
            page.fill(f"[name={name}]", str(value))
        yield page
        chromium.close()


def time_page(page: Any, max_tokens: int, seed: int) -> tuple[float, float]:
    """Seconds from the click to the first token on the page, and to the last."""
    for name, value in {"prompt": "\n", "max_tokens": max_tokens, "seed": seed}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    state = page.locator("#state")
    first, rate = (float(state.get_attribute(f"data-{name}")) for name in ("first", "rate"))
    return first / 1000, first / 1000 + (max_tokens - 1) / rate


def bench_serve(config: BenchConfig, runtime: Runtime, n_clients: int = 32, n_requests: int = 4) -> dict:
    """Time a text from the sampler, the API and the page, in turns; then n_clients at once. Raises
    UserError."""
    sampler = Sampler(config.out_dir, device=config.device, dtype=config.dtype)
    tokens = config.max_new_tokens or 256
    result: dict[str, Any] = {}
    with running_server(config) as (port, pid), open_page(port) as page:
        times: dict[str, list[tuple[float, float]]] = {"sample.py": [], "API": []}
        for seed in range(config.rounds + 1):
            text = sampler.stream("\n", tokens, seed=seed, stop_at_end=False)
            times["sample.py"].append(time_items(text))
            times["API"].append(time_items(completion_chunks(port, tokens, seed)))
            if page:
                times.setdefault("page", []).append(time_page(page, tokens, seed))
        per_token = {}
        for name, (_, *seconds) in times.items():  # the first is a warm-up
            first_ms = 1000 * median(first for first, _ in seconds)
            per_token[name] = [(last - first) / (tokens - 1) for first, last in seconds]
            rate = spread([1 / s for s in per_token[name]])
            factor = ratio(per_token[name], per_token["sample.py"])
            result[name] = {"first_ms": first_ms, "tokens_per_second": rate, "times_the_seconds": factor}
            print(
                f"{name:10} first token after {first_ms:7.1f} ms, then {rate['median']:8.1f} tokens/s, "
                f"{factor['median']:.3f} times sample.py's time per token {quartiles(factor, 3)}"
            )
        result["clients"] = time_clients(port, pid, n_clients, n_requests)
    return result


def request(port: int, seed: int) -> tuple[float, float] | str:
    """The times of a client's request, or its error."""
    try:
        return time_items(completion_chunks(port, TOKENS, seed))
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def time_clients(port: int, pid: int, n_clients: int, n_requests: int) -> dict[str, Any]:
    """Run all clients at once, in three rounds, as memory may grow; the times of the last round. Raises
    MachineError."""
    memory, seconds = [], 0.0
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            answers = list(pool.map(partial(request, port), range(n_clients * n_requests)))
        seconds = time.perf_counter() - begin
        memory.append(resident_memory(pid))
    lost = [answer for answer in answers if isinstance(answer, str)]
    served = [answer for answer in answers if not isinstance(answer, str)]
    if len(served) < 2:
        raise MachineError(
            f"{len(lost)} of {len(answers)} requests failed ({lost[0]}); see serve.py's output"
        )
    first, last = (quantiles(times, n=100, method="inclusive") for times in zip(*served, strict=True))
    rate = len(served) * TOKENS / seconds
    print(
        f"{n_clients} clients, {n_requests} requests each for {TOKENS} tokens: {len(served)} served, "
        f"{len(lost)} lost; latency p50 {last[49]:.2f} s, p99 {last[98]:.2f} s; time to first token "
        f"p50 {first[49]:.2f} s, p99 {first[98]:.2f} s; {rate:,.0f} tokens/s in total"
    )
    if memory[0] is not None:
        print("memory of serve.py after each round: " + ", ".join(f"{size:,.1f} MiB" for size in memory))
    return {
        "served": len(served), "lost": lost, "p50": last[49], "p99": last[98], "first_p50": first[49],
        "first_p99": first[98], "tokens_per_second": rate, "memory_mib": memory,
    }  # fmt: skip
