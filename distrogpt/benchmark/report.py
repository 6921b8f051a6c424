"""Everything worth knowing about a machine in one command: python bench.py --report=True --against=../nanoGPT

Parts run one after another, most important first, each in processes of its own with a time limit, so that a
part that fails or hangs leaves the others alone. report/report.md and report.json are rewritten after each.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("report")
TARGETS = {  # of val losses, by config: where to look for the seconds that a run takes to them
    "train_shakespeare_char": (1.4697, "nanoGPT's README: about 3 minutes of an A100"),
    "train_shakespeare_char_modern": (1.4697, "nanoGPT's README: about 3 minutes of an A100"),
    "train_shakespeare_cpu": (1.8857, "nanoGPT's run of these 2000 steps"),
    "train_shakespeare_10s": (1.8857, "nanoGPT's 2000 steps of the same shape"),
}
Lines = list[str]


@dataclass
class Part:
    """Commands, in words after `python`, of which each writes JSON where --json says, and what makes lines of
    a Markdown table of it. With `until_it_fits`, the first that does not run out of memory is the last.
    """

    name: str
    title: str
    commands: list[list[str]]
    show: Callable[[dict[str, Any]], Lines]
    seconds: float  # what it needs, about; it gets twice as long
    until_it_fits: bool = False
    results: list[dict[str, Any]] = field(default_factory=list)
    status: str = "not run: no time was left"
    took: float = 0.0


def end_on_sigterm() -> None:
    """Let SIGTERM end Python as Ctrl-C does, so that the part which runs then ends too."""
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def bench_report(config: BenchConfig, runtime: Runtime, parts: list[Part] | None = None) -> dict[str, Any]:
    """Run the parts, by default those for this device, and write the report. An older one is renamed."""
    began = time.monotonic()
    end_on_sigterm()
    if FOLDER.exists():
        numbers = (Path(f"{FOLDER}.previous-{number}") for number in itertools.count(1))
        FOLDER.rename(next(path for path in numbers if not path.exists()))
    FOLDER.mkdir()
    parts = parts_of(config, runtime) if parts is None else parts
    for number, part in enumerate(parts, 1):
        left = 60 * config.report_minutes - (time.monotonic() - began)
        if left < part.seconds and part.status.startswith("not run: no time"):
            part.status = f"not run: {left:.0f} s were left of {config.report_minutes:g} minutes"
        elif part.commands:
            print(f"part     {number:2}/{len(parts)} {part.title}", end="", flush=True)
            run_part(part, min(left, 2 * part.seconds))
            failed = sum(not row["passes"] for row in rows_of([part]))
            print(f": {part.status}{f', {failed} FAILED' if failed else ''}, {part.took:.0f} s", flush=True)
            for path in FOLDER.glob("*/*.pt"):
                path.unlink()
        if part.results and part.show is show_learning:
            draw_curves()
        result = write_report(parts, runtime, (time.monotonic() - began) / 60)
    print(f"report   {FOLDER / 'report.md'}, {result['minutes']:.1f} minutes")
    return result


def write_report(parts: list[Part], runtime: Runtime, minutes: float) -> dict[str, Any]:
    """Write what is known so far, as report.md and report.json; returns the latter."""
    about = [
        {"name": part.name, "status": part.status, "seconds": part.took, "results": part.results}
        for part in parts
    ]
    result = {"minutes": minutes, "commit": commit(), "parts": about}
    texts = {"report.md": as_markdown(parts, runtime, minutes), "report.json": json.dumps(result, indent=1)}
    for name, text in texts.items():
        with open(FOLDER / f"{name}.tmp", "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(FOLDER / f"{name}.tmp", FOLDER / name)
    return result


def draw_curves() -> None:
    """loss.png of the runs that have ended, if matplotlib is there."""
    runs = [str(path.parent.name) for path in sorted(FOLDER.glob("*/log.csv"))]
    if runs and find_spec("matplotlib"):
        words = [sys.executable, str(ROOT / "plot.py"), *runs, "--by=seconds", "--output=loss.png"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(words, cwd=FOLDER, capture_output=True, timeout=60)


def run_part(part: Part, limit: float) -> None:
    """Run a part's commands one after another; its results, and how it ended, are in `part` afterwards."""
    began = time.monotonic()
    part.status = "ok"
    for number, words in enumerate(part.commands):
        result = FOLDER / f"{part.name}-{number}.json"
        result.unlink(missing_ok=True)
        log = FOLDER / f"{part.name}-{number}.log"
        status = run_command(words, result, log, limit - (time.monotonic() - began))
        if result.is_file() and status == 0:
            part.results.append(json.loads(result.read_text(encoding="utf-8")))
            result.unlink()
            if part.until_it_fits:
                break
        elif status is None:
            part.status = f"stopped at its limit of {limit:.0f} s"
            break
        elif not (part.until_it_fits and "out of memory" in log.read_text(errors="replace")):
            part.status = f"failed: {last_line(log)}"
            break
    else:
        if part.until_it_fits:
            part.status = "failed: out of memory at every size"
    part.took = time.monotonic() - began


def run_command(words: list[str], result: Path, log: Path, limit: float) -> int | None:
    """The exit status of a command; None if it was stopped at the limit, and all that it started with it."""
    words = [word.replace("RESULT", str(result.resolve())) for word in words]
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            return process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, in sessions of their own too, as torchrun's ranks are."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        parents = dict(map(int, line.split()) for line in listed.splitlines())
        family = [process.pid]
        for pid in family:  # grows while it is read
            family += [child for child, parent in parents.items() if parent == pid]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver stays
        process.wait(10)


def last_line(log: Path) -> str:
    """What a command said last, shortened."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:300]


def parts_of(config: BenchConfig, runtime: Runtime) -> list[Part]:
    """The parts for this kind of device, most important first."""
    on_gpu = runtime.device.type == "cuda"
    place = [f"--device={runtime.device}", f"--dtype={str(runtime.dtype).removeprefix('torch.')}"]
    checked = checks(place, on_gpu)
    steps = gpu_steps(place, config.against) if on_gpu else cpu_steps(place, config.against)
    parts = [*checked[:3], steps[0], *decoding(place, config.against, on_gpu), *checked[3:], *steps[1:]]
    if on_gpu:
        runs = {"train_shakespeare_char": 100, "train_shakespeare_char_modern": 100}
    else:
        runs = {"train_shakespeare_10s": 25, "train_shakespeare_cpu": 50}
    parts += [learn(name, place, seconds) for name, seconds in runs.items()]
    return parts + studies(place, on_gpu)


def against_flag(against: str | None) -> list[str]:
    """The flag for a command that runs in another folder."""
    if against is None:
        return []
    return [f"--against={against if against == 'transformers' else Path(against).resolve()}"]


def bench_command(*words: str) -> list[str]:
    return [str(ROOT / "bench.py"), *words, "--json=RESULT"]


def checks(place: list[str], on_gpu: bool) -> list[Part]:
    """Is what is computed here right?"""
    titles = {
        "machine": ("The machine", 12),
        "network": ("Logits, loss and gradients against fp32 on the CPU", 12),
        "greedy": ("Greedy text: KV cache, batches, CUDA graphs against plain forward passes", 15),
        "resume": ("20 steps, killed and resumed", 25),
        "compile": ("Compiled against not", 45),
        "fp16": ("fp16 and its loss scaler", 15),
        "ranks": ("DDP, FSDP2 and torchrun on one rank", 40),
    }
    parts = [
        Part(name, title, [bench_command(f"--check={name}", *place)], show_rows, seconds)
        for name, (title, seconds) in titles.items()
    ]
    if on_gpu and find_spec("pytest"):
        words = [
            "-c",
            PYTEST,
            "-n",
            "0",
            "-m",
            "cuda",
            "--continue-on-collection-errors",
            str(ROOT / "tests"),
            "RESULT",
        ]
        parts.append(Part("tests", "Tests marked cuda", [words], show_rows, 30))
    return parts


PYTEST = """
import json, sys, pytest
path = sys.argv.pop()
class Reports:
    def __init__(self): self.of = {"passed": [], "failed": [], "skipped": []}
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed": self.of[report.outcome].append(report.nodeid)
reports = Reports()
status = pytest.main(sys.argv[1:], plugins=[reports])
failed = reports.of["failed"]
rows = [
    {"what": f"tests, {name}", "value": str(len(ids)), "limit": None, "passes": True}
    for name, ids in reports.of.items()
]
rows += [{"what": name, "value": 1.0, "limit": 0.0, "passes": False} for name in failed]
json.dump({"rows": rows}, open(path, "w"))
sys.exit(0 if status in (0, 1) and any(reports.of.values()) else 1)
"""


def gpu_steps(place: list[str], against: str | None) -> list[Part]:
    """GPT-2 124M's training step, compiled, at the largest batch that fits."""
    other = against_flag(against)
    common = ["--real_data=False", "--compile=True", "--bench_steps=20", "--warmup_steps=5", *place]
    ours = [bench_command(f"--batch_size={B}", *common, *other) for B in (32, 16, 8)]
    recipe = str(ROOT / "config/train_gpt2_modern.py")
    modern = [
        bench_command(recipe, "--gradient_accumulation_steps=1", f"--batch_size={B}", *common)
        for B in (32, 16, 8)
    ]
    wait = bench_command("--check=synchronize", "--batch_size=8", *common)
    return [
        Part("step", "GPT-2 124M, block 1024, compiled: a training step", ours, show_step, 90, True),
        Part("step-modern", "The modern network at that size", modern, show_step, 60, True),
        Part("synchronize", "The one synchronisation of a step", [wait], show_rows, 30),
    ]


def cpu_steps(place: list[str], against: str | None) -> list[Part]:
    """Training steps of three sizes."""
    other = against_flag(against)
    config, more = str(ROOT / "config"), ["--compile=False", *place]
    data = [] if prepared("shakespeare_char") else ["--real_data=False"]
    small = bench_command(f"{config}/train_shakespeare_cpu.py", "--bench_steps=100", *data, *more, *other)
    char = f"{config}/train_shakespeare_char.py"
    middle = bench_command(
        char, "--batch_size=16", "--bench_steps=5", "--warmup_steps=1", *data, *more, *other
    )
    common = ["--real_data=False", "--batch_size=1", "--bench_steps=3", "--warmup_steps=1", *more]
    modern = f"{config}/train_gpt2_modern.py"
    return [
        Part("step", "A training step: 4/4/128, 12 x 64", [small], show_step, 20),
        Part("step-middle", "A training step: 6/6/384, 16 x 256", [middle], show_step, 30),
        Part(
            "step-large",
            "A training step: GPT-2 124M, 1 x 1024",
            [bench_command(*common, *other)],
            show_step,
            45,
        ),
        Part(
            *("step-modern", "The modern network at 124M"),
            [bench_command(modern, "--gradient_accumulation_steps=1", *common)],
            *(show_step, 25),
        ),
    ]


def decoding(place: list[str], against: str | None, on_gpu: bool) -> list[Part]:
    """Tokens per second of GPT-2 124M."""
    other = against_flag(against)
    sizes = ((8, 256, other), (64, 256, [])) if on_gpu else ((8, 32, other), (64, 16, []))
    commands = [
        bench_command(
            *("--generate=True", "--real_data=False", f"--num_samples={B}", f"--max_new_tokens={new}"),
            *("--rounds=2", *more, *place),
        )
        for B, new, more in sizes
    ]
    return [Part("decode", "GPT-2 124M: sampling", commands, show_generate, 45 if on_gpu else 60)]


def prepared(dataset: str) -> bool:
    return (ROOT / "data" / dataset / "train.bin").is_file()


def learn(name: str, place: list[str], seconds: float) -> Part:
    """A run in full, from config/NAME.py."""
    out_dir = (FOLDER / name).resolve()
    words = [str(ROOT / "train.py"), str(ROOT / f"config/{name}.py"), f"--out_dir={out_dir}"]
    words += ["--loss_plot=False", *place[:1]]
    title = f"config/{name}.py in full"
    part = Part(name, title, [["-c", LEARN, *words, "RESULT"]], show_learning, seconds)
    if not prepared("shakespeare_char"):
        part.commands = []
        part.status = "not run: first python data/shakespeare_char/prepare.py"
    return part


LEARN = """
import csv, json, pathlib, subprocess, sys
*command, result = sys.argv[1:]
status = subprocess.call([sys.executable, *command])
out_dir = pathlib.Path(command[2].removeprefix("--out_dir="))
if status == 0:
    curve, seconds = [], 0.0
    with open(out_dir / "log.csv") as file:
        for row in csv.DictReader(file):
            seconds = float(row["seconds"] or seconds)  # an evaluation alone has none
            if row["val_loss"]:
                curve.append([int(row["step"]), seconds, float(row["val_loss"])])
    with open(result, "w") as file:
        json.dump({"config": pathlib.Path(command[1]).stem, "curve": curve}, file)
sys.exit(status)
"""


def studies(place: list[str], on_gpu: bool) -> list[Part]:
    """What each improvement gains, what a checkpoint costs, and the memory of a large model."""
    random_ids = ["--real_data=False", *place]
    if on_gpu:
        ladder = bench_command("--ladder=True", "--batch_size=8", "--bench_steps=10", *random_ids)
        large = ["--n_layer=48", "--n_head=25", "--n_embd=1600", "--batch_size=4"]
        name = "GPT-2 xl"
    else:
        data = [] if prepared("shakespeare_char") else ["--real_data=False"]
        config = str(ROOT / "config/train_shakespeare_cpu.py")
        ladder = bench_command(config, "--ladder=True", "--bench_steps=30", "--compile=False", *data, *place)
        large = ["--batch_size=2"]
        name = "GPT-2 124M"
    memory = [
        Part(
            f"memory{suffix}",
            f"{name}: memory {way} activation checkpointing",
            [
                bench_command(
                    "--check=memory", *large, *random_ids, f"--activation_checkpointing={bool(suffix)}"
                )
            ],
            *(show_rows, 25),
        )
        for suffix, way in (("", "without"), ("-checkpointing", "with"))
    ]
    save = ["--checkpoint=True", "--rounds=1", "--bench_steps=3", "--warmup_steps=1", "--compile=False"]
    checkpoint = bench_command(*save, *random_ids, "--batch_size=8" if on_gpu else "--block_size=256")
    return [
        Part("checkpoint", "A checkpoint of 124M", [checkpoint], show_checkpoint, 35),
        *memory,
        Part(
            "ladder", "The ladder: one improvement after another", [ladder], show_ladder, 90 if on_gpu else 45
        ),
    ]


def show_rows(result: dict[str, Any]) -> Lines:
    """Rows of bench_checks."""
    lines = ["| what | result | |", "|---|---|---|"]
    for row in result["rows"]:
        value, limit = row["value"], row["limit"]
        value = value if isinstance(value, str) else f"{value:.1e}" if value else "0"
        verdict = "" if limit is None else "ok" if row["passes"] else f"**FAILED**, at most {limit:g}"
        lines.append(f"| {row['what']} | {value} | {verdict} |")
    return lines


def show_step(result: dict[str, Any]) -> Lines:
    settings, peak = result["settings"], result["peak_flops"]
    product = result.get("measured_flops", peak)  # a CPU's peak is that of a matrix product already
    lines = ["| | ms | tokens/s | MFU | share of a matrix product |", "|---|---|---|---|---|"]
    for name, step in result["steps"].items():
        share = step["mfu"] * peak / product
        ms, low, high = (step[key] * 1000 for key in ("median", "low", "high"))
        lines.append(
            f"| {name} | {ms:,.2f} ({low:,.2f} to {high:,.2f}) "
            f"| {step['tokens_per_second']:,.0f} | {step['mfu']:.1%} | {share:.1%} |"
        )
    lines += ["", f"Batch {settings['batch_size']} x {settings['block_size']}, {result['device']}."]
    if result["memory_bytes"]:
        lines[-1] += f" Memory {result['memory_bytes'] / 2**30:.2f} GiB."
    if "ratio" in result:
        ratio = result["ratio"]
        lines[-1] += f" **{ratio['median']:.2f} times as fast** ({ratio['low']:.2f} to {ratio['high']:.2f})."
    return lines


def show_generate(result: dict[str, Any]) -> Lines:
    lines = [
        "| | sequences | tokens/s | share of the bandwidth | prefill, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        decode = run["decode"]
        lines.append(
            f"| {run['name']} | {run['batch']} | {decode['median']:,.1f} | {run['share']:.0%} "
            f"| {run['prefill']:,.0f} |"
        )
    lines += ["", f"The memory is read at {result['bandwidth'] / 1e9:,.0f} GB/s."]
    if "ratio" in result:
        ours, other = (result["whole"][key]["median"] for key in ("ours", "other"))
        lines[-1] += f" Prompt included, ours {ours:,.1f} tokens/s, the other {other:,.1f}: "
        lines[-1] += f"**{result['ratio']['median']:.1f} times as fast**."
    return lines


def show_learning(result: dict[str, Any]) -> Lines:
    step, seconds, best = min(result["curve"], key=lambda row: row[2])
    target, whose = TARGETS[result["config"]]
    reached = next((row for row in result["curve"] if row[2] <= target), None)
    when = f"{reached[1]:.1f} s, step {reached[0]}" if reached else "not reached"
    return [
        "| best val loss | at | whole run | to reach | took |",
        "|---|---|---|---|---|",
        f"| {best:.4f} | step {step}, {seconds:.1f} s | {result['curve'][-1][1]:.1f} s "
        f"| {target} ({whose}) | {when} |",
    ]


def show_checkpoint(result: dict[str, Any]) -> Lines:
    wait, lost, write = (result[key]["median"] for key in ("wait", "lost", "write"))
    return [
        "| file | a step waits for | a checkpoint costs in all | if steps waited for the disk |",
        "|---|---|---|---|",
        f"| {result['bytes'] / 1e6:,.0f} MB | {wait:.2f} s | {lost:.2f} s | {write:.2f} s |",
    ]


def show_ladder(result: dict[str, Any]) -> Lines:
    lines = ["| rung | ms | gain | in all |", "|---|---|---|---|"]
    for rung in result["rungs"]:
        lines.append(f"| {rung['rung']} | {rung['ms']:,.2f} | {rung['gain']:.2f} | {rung['total']:.2f} |")
    return lines


def rows_of(parts: list[Part]) -> list[dict[str, Any]]:
    """The rows of all checks that were made."""
    return [row for part in parts for result in part.results for row in result.get("rows", [])]


def headline(part: Part) -> Lines:
    """What a reader wants to know first of a part, a line for each result."""
    lines = []
    for result in part.results:
        if "steps" in result:
            ours = result["steps"]["ours"]
            text = f"{ours['median'] * 1000:,.1f} ms, {ours['tokens_per_second']:,.0f} tokens/s"
            text += f", MFU {ours['mfu']:.0%}"
            others = [name for name in result["steps"] if name != "ours"]
            text += f", {result['ratio']['median']:.2f} times {others[0]}'s speed" if others else ""
        elif "runs" in result:
            rates = [f"{run['decode']['median']:,.0f} at {run['batch']}" for run in result["runs"]]
            text = f"tokens/s by sequences: {rates[0]}, {rates[1]}"  # the others have 8-bit weights
        elif "curve" in result:
            step, seconds, best = min(result["curve"], key=lambda row: row[2])
            text = f"best val loss {best:.4f} at step {step}, after {seconds:.0f} s"
        else:
            continue
        lines.append(f"- {part.title}: {text}")
    return lines


def as_markdown(parts: list[Part], runtime: Runtime, minutes: float) -> str:
    """The report: what failed and the headlines first, then a section for each part."""
    done = [part for part in parts if part.status == "ok"]
    judged = [row for row in rows_of(parts) if row["limit"] is not None]
    failed = [row for row in judged if not row["passes"]]
    lines = [
        f"# {runtime.describe()}",
        "",
        f"`python bench.py --report=True`, torch {torch.__version__}, commit {commit()}, "
        f"{time.strftime('%Y-%m-%d')}; {len(done)} of {len(parts)} parts in {minutes:.1f} minutes.",
        "",
        f"**{len(judged) - len(failed)} of {len(judged)} checks passed.**",
        "",
        *(f"- FAILED: {row['what']}: {row['value']}, at most {row['limit']}" for row in failed),
        *(f"- {part.title}: {part.status}" for part in parts if part.status != "ok"),
        *(line for part in done for line in headline(part)),
    ]
    for part in parts:
        if not part.results and part.status.startswith("not run"):
            continue
        lines += ["", f"## {part.title}", ""]
        for result in part.results:
            lines += [*part.show(result), ""]
        lines.append(f"{part.took:.0f} s" + ("" if part.status == "ok" else f"; {part.status}"))
    pictures = sorted(path.name for path in FOLDER.glob("*.png"))
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join(lines)


def commit() -> str:
    """The repository's commit, and whether files differ from it."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
