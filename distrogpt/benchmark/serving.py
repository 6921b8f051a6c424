"""What a text loses on its way through serve.py, and what 32 who ask at once get: bench.py --serve=True"""

import http.client
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from distrogpt.benchmark.timing import ratio, spread
from distrogpt.errors import MachineError, UserError
from distrogpt.inference.sampler import Sampler
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

CLIENTS, EACH, TOKENS = 32, 4, 64  # who ask at once, how often each, and for how many tokens
BODY = {"prompt": "\n", "temperature": 0.8, "top_k": 200, "stop_at_end": False}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
QUIET = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update").split()  # fmt: skip


@contextmanager
def served(config: BenchConfig) -> Iterator[tuple[int, int]]:
    """serve.py in a process of its own, for the model of out_dir: its port and its process."""
    flags = [
        f"--out_dir={config.out_dir}",
        f"--device={config.device}",
        f"--dtype={config.dtype}",
        "--port=0",
    ]
    command = [sys.executable, str(Path(__file__).resolve().parents[2] / "serve.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        if not words:
            raise UserError("serve.py did not start; it says above why")
        yield int(words[0].rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait()


def memory_of(pid: int) -> float | None:
    """MiB that a process has in memory; None where that is not told (outside Linux)."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return None


def ask(port: int, **body: Any) -> tuple[float, float]:
    """A streamed completion: seconds to its first and to its last token. Raises OSError where it is lost."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    head = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps({**BODY, **body, "stream": True}), head)
    answer = connection.getresponse()
    first, ended = 0.0, False
    for line in answer:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begin
            ended = ended or json.loads(line[6:])["choices"][0]["finish_reason"] == "length"
    connection.close()
    if answer.status != 200 or not ended:
        raise ConnectionError(f"status {answer.status}, without an end")
    return first, time.perf_counter() - begin


def written_here(sampler: Sampler, tokens: int, seed: int) -> tuple[float, float]:
    """Seconds to the first and to the last token of sample.py's way."""
    begin, first = time.perf_counter(), 0.0
    for _ in sampler.stream("\n", tokens, seed=seed, stop_at_end=False):
        first = first or time.perf_counter() - begin
    return first, time.perf_counter() - begin


@contextmanager
def page_of(port: int) -> Iterator[Any]:
    """The page in a headless Chromium; None where that, or playwright, is missing."""
    if CHROMIUM is None or find_spec("playwright") is None:
        print("the page is not timed: that needs playwright and Chromium")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = chromium.new_page()
        page.set_default_timeout(600_000)
        page.goto(f"http://127.0.0.1:{port}")
        for name, value in {"n": 1, "temperature": 0.8, "top_k": 200}.items():
            page.fill(f"[name={name}]", str(value))
        yield page
        chromium.close()


def written_on(page: Any, tokens: int, seed: int) -> tuple[float, float]:
    """Seconds from the click to the first token on the page, and to the last."""
    for name, value in {"prompt": "\n", "max_tokens": tokens, "seed": seed}.items():
        page.fill(f"[name={name}]", str(value))
    page.click("#go")
    page.locator("#go", has_text="Write").wait_for()
    told = page.locator("#state")
    first, rate = (float(told.get_attribute(f"data-{name}")) for name in ("first", "rate"))
    return first / 1000, first / 1000 + (tokens - 1) / rate


def bench_serve(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """A text by sample.py's way, by the API and on the page, in turns; then 32 clients. Raises UserError."""
    sampler = Sampler(config.out_dir, device=config.device, dtype=config.dtype)
    tokens = config.max_new_tokens or 256
    result: dict[str, Any] = {}
    with served(config) as (port, pid), page_of(port) as page:
        ways = {"sample.py": lambda n: written_here(sampler, tokens, n)}
        ways |= {"API": lambda n: ask(port, max_tokens=tokens, seed=n)}
        ways |= {"page": lambda n: written_on(page, tokens, n)} if page else {}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(-1, config.rounds):
            for name, way in ways.items():
                seconds = way(number + 1)
                if number >= 0:  # the first is a warm-up
                    took[name].append(seconds)
        for name, seconds in took.items():
            firsts = [first for first, _ in seconds]
            each = [(last - first) / (tokens - 1) for first, last in seconds]
            beside = [(last - first) / (tokens - 1) for first, last in took["sample.py"]]
            rate, times = spread([1 / s for s in each]), ratio(each, beside)
            first = 1000 * median(firsts)
            result[name] = {"first_ms": first, "tokens_per_second": rate, "times_the_seconds": times}
            print(
                f"{name:10} first token after {first:7.1f} ms, then {rate['median']:8.1f} tokens/s: in "
                f"{times['median']:.3f} times sample.py's seconds ({times['low']:.3f} to {times['high']:.3f})"
            )
        result["clients"] = clients(port, pid)
    return result


def clients(port: int, pid: int) -> dict[str, Any]:
    """CLIENTS at once, each of which asks EACH times, one after another; thrice, as memory may grow.
    Raises MachineError where nobody was served."""

    def one(number: int) -> list[tuple[float, float] | str]:
        found: list[tuple[float, float] | str] = []
        for turn in range(EACH):
            try:
                found.append(ask(port, max_tokens=TOKENS, seed=number * EACH + turn))
            except (OSError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    memory, seconds = [], 0.0
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = [answer for answers in pool.map(one, range(CLIENTS)) for answer in answers]
        seconds = time.perf_counter() - begin
        memory.append(memory_of(pid))
    good = [answer for answer in found if not isinstance(answer, str)]
    lost = [answer for answer in found if isinstance(answer, str)]
    if len(good) < 2:
        raise MachineError(f"none of {len(found)} requests was served ({found[0]})")
    cuts = quantiles([last for _, last in good], n=100, method="inclusive")
    firsts = quantiles([first for first, _ in good], n=100, method="inclusive")
    rate = len(good) * TOKENS / seconds
    print(
        f"{CLIENTS} clients, {EACH} requests each for {TOKENS} tokens: {len(good)} served, {len(lost)} lost; "
        f"seconds p50 {cuts[49]:.2f}, p99 {cuts[98]:.2f}; to the first token p50 {firsts[49]:.2f}, p99 "
        f"{firsts[98]:.2f}; {rate:,.0f} tokens/s in all"
    )
    if memory[0] is not None:
        print("memory after each of three such rounds: " + ", ".join(f"{size:,.1f} MiB" for size in memory))
    return {
        "served": len(good), "lost": lost, "p50": cuts[49], "p99": cuts[98], "first_p50": firsts[49],
        "first_p99": firsts[98], "tokens_per_second": rate, "memory_mib": memory,
    }  # fmt: skip
