"""A report about a machine in one command: python bench.py --report=True --against=../nanoGPT

Parts run one after another, most important first, each in its own processes with a time limit, so that a part
that fails or hangs does not affect the others. report/report.md and report.json are rewritten after each.
"""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from distrogpt.benchmark.timing import dtype_name
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("report")
A100 = (1.4697, "nanoGPT's README: about 3 minutes of an A100")
TARGETS = {  # val losses, by config: the report says when a run reaches them
    "train_shakespeare_char": A100,
    "train_shakespeare_char_modern": A100,
    "train_shakespeare_cpu": (1.8857, "nanoGPT's run of these 2000 steps"),
    "train_shakespeare_10s": (1.8857, "nanoGPT's 2000 steps of the same shape"),
}
Result = dict[str, Any]


def read_json(path: Path) -> Result:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class Part:
    """Commands, as arguments of python; RESULT in them is the path of the result, which `read` loads. With
    until_it_fits, the first command that does not run out of memory is the last."""

    name: str
    title: str
    commands: list[list[str]]
    seconds: float  # an estimate; its limit is twice that
    until_it_fits: bool = False
    read: Callable[[Path], Result] = read_json
    statuses: tuple[int, ...] = (0,)  # exit statuses with a result
    results: list[Result] = field(default_factory=list)
    status: str = "not run: no time was left"
    took: float = 0.0


def bench_report(config: BenchConfig, runtime: Runtime, parts: list[Part] | None = None) -> Result:
    """Run the parts, by default those for this device, and write the report. An older report is renamed."""
    begin = time.monotonic()
    with suppress(ValueError):  # SIGTERM ends the running part too, as Ctrl-C does; not in other threads
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if FOLDER.exists():
        paths = (Path(f"{FOLDER}.previous-{number}") for number in itertools.count(1))
        FOLDER.rename(next(path for path in paths if not path.exists()))
    FOLDER.mkdir()
    parts = all_parts(config, runtime) if parts is None else parts
    for number, part in enumerate(parts, 1):
        left = 60 * config.report_minutes - (time.monotonic() - begin)
        if part.commands and left < part.seconds:
            part.status = f"not run: {left:.0f} s were left of {config.report_minutes:g} minutes"
        elif part.commands:
            print(f"part     {number:2}/{len(parts)} {part.title}", end="", flush=True)
            run_part(part, min(left, 2 * part.seconds))
            failed = sum(not row["passes"] for row in rows_of([part]))
            print(f": {part.status}{f', {failed} FAILED' if failed else ''}, {part.took:.0f} s", flush=True)
            for path in FOLDER.glob("*/*.pt"):
                path.unlink()
            if part.name in TARGETS:
                draw_curves()
        result = write_report(parts, runtime, (time.monotonic() - begin) / 60)
    print(f"report   {FOLDER / 'report.md'}, {result['minutes']:.1f} minutes")
    return result


def write_report(parts: list[Part], runtime: Runtime, minutes: float) -> Result:
    """Write the results so far to report.md and report.json; returns the latter."""
    keys = {"name": "name", "status": "status", "took": "seconds", "results": "results"}
    rows = [{key: getattr(part, name) for name, key in keys.items()} for part in parts]
    result = {"minutes": minutes, "commit": commit(), "parts": rows}
    texts = {"report.md": as_markdown(parts, runtime, minutes), "report.json": json.dumps(result, indent=1)}
    for name, text in texts.items():
        (FOLDER / f"{name}.tmp").write_text(text + "\n", encoding="utf-8")
        os.replace(FOLDER / f"{name}.tmp", FOLDER / name)
    return result


def run_part(part: Part, limit: float) -> None:
    """Run a part's commands one after another; sets its results, status and seconds."""
    begin, part.status = time.monotonic(), "ok"
    for number, words in enumerate(part.commands):
        result, log = (FOLDER / f"{part.name}-{number}.{suffix}" for suffix in ("json", "log"))
        status = run_command(words, result, log, limit - (time.monotonic() - begin))
        if status in part.statuses:
            part.results.append(part.read(result) | {"output": log.read_text("utf-8", "replace")[-3000:]})
            result.unlink(missing_ok=True)
            if part.until_it_fits:
                break
        elif status is None:
            part.status = f"stopped at its limit of {limit:.0f} s"
            break
        elif not (part.until_it_fits and "out of memory" in log.read_text(errors="replace")):
            part.status = f"failed: {last_line(log)}"
            break
    if part.until_it_fits and part.status == "ok" and not part.results:
        part.status = "failed: out of memory at every size"
    part.took = time.monotonic() - begin


def run_command(words: list[str], result: Path, log: Path, limit: float) -> int | None:
    """The exit status of a command; None if it was stopped at the limit, with all that it had started."""
    words = [word.replace("RESULT", str(result.resolve())) for word in words]
    with open(log, "w", encoding="utf-8") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, *words], cwd=FOLDER, **streams)
        try:
            return process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and its descendants, also those in their own sessions, as torchrun's ranks are."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        parents = dict(map(int, line.split()) for line in listing.splitlines())
        family = [process.pid]
        for pid in family:  # grows while it is read
            family += [child for child, parent in parents.items() if parent == pid]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver stays
        process.wait(10)


def last_line(log: Path) -> str:
    """The last error that a command printed, or else its last line, shortened."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:300]


def bench(words: str, other: Iterable[str] = ()) -> list[str]:
    """A command of bench.py."""
    return [str(ROOT / "bench.py"), *words.split(), *other, "--json=RESULT"]


def prepared(dataset: str) -> bool:
    return (ROOT / "data" / dataset / "train.bin").is_file()


def all_parts(config: BenchConfig, runtime: Runtime) -> list[Part]:
    """The parts for this kind of device, most important first."""
    on_gpu, other = runtime.device.type == "cuda", []
    device = f"--device={runtime.device} --dtype={dtype_name(runtime.dtype)}"
    if config.against:  # the commands run in another folder
        against = config.against if config.against == "transformers" else Path(config.against).resolve()
        other = [f"--against={against}"]
    checks = check_parts(device, on_gpu)
    steps = gpu_steps(device, other) if on_gpu else cpu_steps(device, other)
    runs = {"train_shakespeare_10s": 25, "train_shakespeare_cpu": 50}
    if on_gpu:
        runs = {"train_shakespeare_char": 100, "train_shakespeare_char_modern": 100}
    training = [training_run(name, device, seconds) for name, seconds in runs.items()]
    decode = decoding(device, other, on_gpu)
    return [*checks[:3], steps[0], decode, *checks[3:], *steps[1:], *training, *studies(device, on_gpu)]


def check_parts(device: str, on_gpu: bool) -> list[Part]:
    """Are the results computed here right?"""
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
        Part(name, title, [bench(f"--check={name} {device}")], seconds)
        for name, (title, seconds) in titles.items()
    ]
    if on_gpu and find_spec("pytest"):
        words = "-m pytest -n 0 -m cuda --continue-on-collection-errors --junitxml=RESULT".split()
        tests = Part("tests", "Tests marked cuda", [[*words, str(ROOT / "tests")]], 30)
        parts.append(replace(tests, read=read_tests, statuses=(0, 1)))
    return parts


def gpu_steps(device: str, other: list[str]) -> list[Part]:
    """GPT-2 124M's training step, compiled, at the largest batch that fits."""
    step = f"--real_data=False --compile=True --bench_steps=20 --warmup_steps=5 {device}"
    modern = f"train_gpt2_modern --gradient_accumulation_steps=1 {step}"
    sizes = [f"--batch_size={B}" for B in (32, 16, 8)]
    plain, modern = [bench(step, [B, *other]) for B in sizes], [bench(modern, [B]) for B in sizes]
    wait = bench(f"--check=synchronize --batch_size=8 {step}")
    return [
        Part("step", "GPT-2 124M, block 1024, compiled: a training step", plain, 90, True),
        Part("step-modern", "The modern network at that size", modern, 60, True),
        Part("synchronize", "The one synchronisation of a step", [wait], 30),
    ]


def shakespeare_ids() -> str:
    return "" if prepared("shakespeare_char") else "--real_data=False"


def cpu_steps(device: str, other: list[str]) -> list[Part]:
    """Training steps of three sizes."""
    common = f"--compile=False {device}"
    small = f"train_shakespeare_cpu --bench_steps=100 {shakespeare_ids()} {common}"
    middle = f"train_shakespeare_char --batch_size=16 --bench_steps=5 --warmup_steps=1 {shakespeare_ids()} {common}"
    large = f"--real_data=False --batch_size=1 --bench_steps=3 --warmup_steps=1 {common}"
    modern = f"train_gpt2_modern --gradient_accumulation_steps=1 {large}"
    return [
        Part("step", "A training step: 4/4/128, 12 x 64", [bench(small, other)], 20),
        Part("step-middle", "A training step: 6/6/384, 16 x 256", [bench(middle, other)], 30),
        Part("step-large", "A training step: GPT-2 124M, 1 x 1024", [bench(large, other)], 45),
        Part("step-modern", "The modern network at 124M", [bench(modern)], 25),
    ]


def decoding(device: str, other: list[str], on_gpu: bool) -> Part:
    """Tokens per second of GPT-2 124M: of one sequence and 8 next to the other's, then of 64."""
    common = f"--generate=True --real_data=False --rounds=2 {device}"
    few = bench(f"{common} --num_samples=8 --max_new_tokens={256 if on_gpu else 32}", other)
    many = bench(f"{common} --num_samples=64 --max_new_tokens={256 if on_gpu else 16}")
    return Part("decode", "GPT-2 124M: sampling", [few, many], 45 if on_gpu else 60)


def training_run(name: str, device: str, seconds: float) -> Part:
    """A full run of config/NAME.py."""
    words = [str(ROOT / "train.py"), name, f"--out_dir={name}", "--loss_plot=False", device.split()[0]]
    part = Part(name, f"config/{name}.py in full", [words], seconds)
    part.read = lambda _: {"config": name, "curve": read_curve(FOLDER / name / "log.csv")}
    if not prepared("shakespeare_char"):
        part.commands, part.status = [], "not run: first python data/shakespeare_char/prepare.py"
    return part


def studies(device: str, on_gpu: bool) -> list[Part]:
    """What each improvement gains, what a checkpoint costs, and the memory of a large model."""
    data = f"--real_data=False {device}"
    save = f"--checkpoint=True --rounds=1 --bench_steps=3 --warmup_steps=1 --compile=False {data}"
    if on_gpu:
        name, large, save = (
            "GPT-2 xl",
            "--n_layer=48 --n_head=25 --n_embd=1600 --batch_size=4",
            f"{save} --batch_size=8",
        )
        ladder = f"--ladder=True --batch_size=8 --bench_steps=10 {data}"
    else:
        name, large, save = "GPT-2 124M", "--batch_size=2", f"{save} --block_size=256"
        ladder = f"train_shakespeare_cpu --ladder=True --bench_steps=30 --compile=False {shakespeare_ids()} {device}"
    memory = f"--check=memory {large} {data} --activation_checkpointing"
    title = f"{name}: memory {{}} activation checkpointing"
    return [
        Part("checkpoint", "A checkpoint of 124M", [bench(save)], 35),
        Part("memory", title.format("without"), [bench(f"{memory}=False")], 25),
        Part("memory-checkpointing", title.format("with"), [bench(f"{memory}=True")], 25),
        Part(
            "ladder",
            "The ladder: one improvement after another",
            [bench(ladder)],
            90 if on_gpu else 45,
        ),
    ]


def read_tests(path: Path) -> Result:
    """Rows of pytest's results: how many there were, and those that failed."""
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag for child in case}
        failed = outcomes & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in outcomes else "passed"
        names[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    counts = {f"tests, {outcome}": str(len(cases)) for outcome, cases in names.items()}
    rows = [{"what": what, "value": n, "limit": None, "passes": True} for what, n in counts.items()]
    rows += [{"what": name, "value": 1.0, "limit": 0.0, "passes": False} for name in names["failed"]]
    return {"rows": rows}


def read_curve(path: Path) -> list[tuple[int, float, float]]:
    """Step, seconds and val loss of each evaluation in a log.csv."""
    curve, seconds = [], 0.0
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seconds = float(row["seconds"] or seconds)  # an evaluation alone has none
            if row["val_loss"]:
                curve.append((int(row["step"]), seconds, float(row["val_loss"])))
    return curve


def draw_curves() -> None:
    """loss.png of the runs that have ended, if matplotlib is there."""
    runs = [path.parent.name for path in sorted(FOLDER.glob("*/log.csv"))]
    if runs and find_spec("matplotlib"):
        words = [sys.executable, str(ROOT / "plot.py"), *runs, "--by=seconds", "--output=loss.png"]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(words, cwd=FOLDER, capture_output=True, timeout=60)


def rows_of(parts: list[Part]) -> list[Result]:
    """The rows of all checks that ran."""
    return [row for part in parts for result in part.results for row in result.get("rows", [])]


def headline(result: Result) -> str:
    """The most important figures of a result; "" if it has none."""
    if "steps" in result:
        (_, ours), *others = result["steps"].items()
        text = f"{ours['median'] * 1000:,.1f} ms, {ours['tokens_per_second']:,.0f} tokens/s, MFU {ours['mfu']:.0%}"
        return text + "".join(f", {result['ratio']['median']:.2f} times {name}'s speed" for name, _ in others)
    if "runs" in result:
        rates = [f"{run['decode']['median']:,.0f} at {run['batch']}" for run in result["runs"]]
        return f"tokens/s by sequences: {rates[0]}, {rates[1]}"  # the others have 8-bit weights
    if "curve" in result:
        step, seconds, best = min(result["curve"], key=lambda row: row[2])
        target, source = TARGETS[result["config"]]
        reached = next(
            (f"after {row[1]:.1f} s" for row in result["curve"] if row[2] <= target), "not reached"
        )
        text = f"best val loss {best:.4f} at step {step}, after {seconds:.0f} s"
        return f"{text}; {target} ({source}) {reached}"
    return ""


def as_markdown(parts: list[Part], runtime: Runtime, minutes: float) -> str:
    """The report: failures and headlines first, then a section for each part."""
    done = [part for part in parts if part.status == "ok"]
    checked = [row for row in rows_of(parts) if row["limit"] is not None]
    failed = [row for row in checked if not row["passes"]]
    headlines = [(part.title, headline(result)) for part in done for result in part.results]
    lines = [
        f"# {runtime.describe()}",
        "",
        f"`python bench.py --report=True`, torch {torch.__version__}, commit {commit()}, "
        f"{time.strftime('%Y-%m-%d')}; {len(done)} of {len(parts)} parts in {minutes:.1f} minutes.",
        "",
        f"**{len(checked) - len(failed)} of {len(checked)} checks passed.**",
        "",
        *(f"- FAILED: {row['what']}: {row['value']}, at most {row['limit']}" for row in failed),
        *(f"- {part.title}: {part.status}" for part in parts if part.status != "ok"),
        *(f"- {title}: {text}" for title, text in headlines if text),
    ]
    for part in parts:
        if not part.results and part.status.startswith("not run"):
            continue
        lines += ["", f"## {part.title}", ""]
        for result in part.results:
            lines += ["```", result["output"].strip(), "```", ""]
        lines.append(f"{part.took:.0f} s" + ("" if part.status == "ok" else f"; {part.status}"))
    pictures = sorted(path.name for path in FOLDER.glob("*.png"))
    return "\n".join([*lines, "", *(f"![{name}]({name})" for name in pictures)])


def commit() -> str:
    """The repository's commit, and whether files differ from it."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
