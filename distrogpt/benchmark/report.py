"""A report about a machine in one command: python bench.py --report=True --against=../nanoGPT

The parts run one after another, most important first. Each runs in its own processes with a time limit, so
that a part that fails or hangs does not affect the others. report/report.md and report.json are rewritten
after each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from distrogpt.benchmark.timing import ROOT, dtype_name
from distrogpt.errors import UserError, command
from distrogpt.files import locked
from distrogpt.plotting import draw, points, read_log, write_figure
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

FOLDER = Path("report")
SHAKESPEARE = ROOT / "data/shakespeare_char/train.bin"
# target val losses, by config, and their sources: the report says when a run reaches its target
A100 = (1.4697, "nanoGPT's README: after about 3 minutes on an A100")
CPU = (1.8857, "nanoGPT after 2000 steps with this shape")
TARGETS = {"train_shakespeare_char": A100, "train_shakespeare_char_modern": A100}
TARGETS |= {"train_shakespeare_cpu": CPU, "train_shakespeare_10s": CPU}
# Parts: name, estimated seconds and title. The lines below a part are the arguments of bench.py, one command
# per line; the default is --check=NAME. BATCH: try the sizes 32, 16 and 8 until one fits. AGAINST: that flag,
# if given. SHAKESPEARE: use that dataset if it is prepared; all other parts use random token ids.
CHECKS = """
machine 12 The machine
network 12 Logits, loss and gradients compared with fp32 on the CPU
greedy 15 Greedy decoding: KV cache, batches and CUDA graphs compared with plain forward passes"""
MORE_CHECKS = """
resume 25 Resuming a killed run
compile 45 torch.compile compared with eager mode
fp16 15 fp16 with loss scaling compared with fp32
ranks 40 DDP, FSDP2 and torchrun on one rank"""
CPU_PARTS = f"""{CHECKS}
step 20 Training step: 4 layers, 4 heads, width 128; 12 sequences of 64 tokens
  train_shakespeare_cpu --bench_steps=100 --compile=False SHAKESPEARE AGAINST
decode 60 Sampling: GPT-2 124M
  --generate=True --rounds=2 --num_samples=8 --max_new_tokens=32 AGAINST
  --generate=True --rounds=2 --num_samples=64 --max_new_tokens=16 {MORE_CHECKS}
step-middle 30 Training step: 6 layers, 6 heads, width 384; 16 sequences of 256 tokens
  train_shakespeare_char --batch_size=16 --bench_steps=5 --warmup_steps=1 --compile=False SHAKESPEARE AGAINST
step-large 45 Training step: GPT-2 124M; 1 sequence of 1024 tokens
  --batch_size=1 --bench_steps=3 --warmup_steps=1 --compile=False AGAINST
step-modern 25 Training step: the modern recipe in the size of GPT-2 124M
  train_gpt2_modern --gradient_accumulation_steps=1 --batch_size=1 --bench_steps=3 --warmup_steps=1
train_shakespeare_10s 25 Full run: config/train_shakespeare_10s.py
train_shakespeare_cpu 50 Full run: config/train_shakespeare_cpu.py
checkpoint 35 The cost of a checkpoint: GPT-2 124M
  --checkpoint=True --rounds=1 --bench_steps=3 --warmup_steps=1 --compile=False --block_size=256
memory 25 Memory without activation checkpointing: GPT-2 124M
  --check=memory --batch_size=2
memory-checkpointing 25 Memory with activation checkpointing: GPT-2 124M
  --check=memory --batch_size=2 --activation_checkpointing=True
ladder 45 The ladder: the gain of each improvement
  train_shakespeare_cpu --ladder=True --bench_steps=30 --compile=False SHAKESPEARE"""
GPU_PARTS = f"""{CHECKS}
step 90 Training step: GPT-2 124M, block_size 1024, compiled
  --compile=True --bench_steps=20 --warmup_steps=5 BATCH AGAINST
decode 45 Sampling: GPT-2 124M
  --generate=True --rounds=2 --num_samples=8 --max_new_tokens=256 AGAINST
  --generate=True --rounds=2 --num_samples=64 --max_new_tokens=256 {MORE_CHECKS}
tests 30 The tests marked cuda
step-modern 60 Training step: the modern recipe in the size of GPT-2 124M, compiled
  train_gpt2_modern --gradient_accumulation_steps=1 --compile=True --bench_steps=20 --warmup_steps=5 BATCH
synchronize 30 The cost of the device synchronisation of a step
  --check=synchronize --batch_size=8 --compile=True --bench_steps=20 --warmup_steps=5
train_shakespeare_char 100 Full run: config/train_shakespeare_char.py
train_shakespeare_char_modern 100 Full run: config/train_shakespeare_char_modern.py
checkpoint 35 The cost of a checkpoint: GPT-2 124M
  --checkpoint=True --rounds=1 --bench_steps=3 --warmup_steps=1 --compile=False --batch_size=8
memory 25 Memory without activation checkpointing: GPT-2 xl
  --check=memory --n_layer=48 --n_head=25 --n_embd=1600 --batch_size=4
memory-checkpointing 25 Memory with activation checkpointing: GPT-2 xl
  --check=memory --n_layer=48 --n_head=25 --n_embd=1600 --batch_size=4 --activation_checkpointing=True
ladder 90 The ladder: the gain of each improvement
  --ladder=True --batch_size=8 --bench_steps=10"""
Result = dict[str, Any]


@dataclass
class Part:
    """Commands, as arguments of python, in which RESULT becomes the path of the result file. With
    until_it_fits, the part ends with the first command that does not run out of memory."""

    name: str
    title: str
    commands: list[list[str]]
    estimate: float  # seconds; the time limit is twice this
    until_it_fits: bool = False
    results: list[Result] = field(default_factory=list)
    status: str = "not run: no time left"
    seconds: float = 0.0


def bench_report(config: BenchConfig, runtime: Runtime, parts: list[Part] | None = None) -> Result:
    """Run the parts, by default those for this device, and write the report. The previous report is renamed,
    and the one before it is deleted. Raises UserError if another process is writing a report here."""
    advice = "wait until it ends, or run bench.py in another folder"
    with locked(Path(f"{FOLDER}.lock"), f"another bench.py is writing to {FOLDER}/; {advice}"):
        return write_report(config, runtime, parts)


def write_report(config: BenchConfig, runtime: Runtime, parts: list[Part] | None) -> Result:
    """Write the report, with its folder locked by bench_report."""
    begin = time.monotonic()
    with suppress(ValueError):  # SIGTERM also ends the running part, as Ctrl-C does; main thread only
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if FOLDER.exists():
        previous = Path(f"{FOLDER}.previous-1")
        if previous.exists():
            shutil.rmtree(previous)
        FOLDER.rename(previous)
    FOLDER.mkdir()
    parts = all_parts(config, runtime) if parts is None else parts
    for number, part in enumerate(parts, 1):
        left = 60 * config.report_minutes - (time.monotonic() - begin)
        if part.commands and left < part.estimate:
            part.status = f"not run: {left:.0f} s left of {config.report_minutes:g} minutes"
        elif part.commands:
            print(f"part     {number:2}/{len(parts)} {part.title}", end="", flush=True)
            run_part(part, min(left, 2 * part.estimate))
            n_failed = sum(not row["passes"] for row in rows_of([part]))
            failed = f", {n_failed} FAILED" if n_failed else ""
            print(f": {part.status}{failed}, {part.seconds:.0f} s", flush=True)
            for path in FOLDER.glob("*/*.pt"):
                path.unlink()
            if part.name in TARGETS:
                with suppress(UserError, ValueError):  # without a loss, or matplotlib
                    logs = {path.parent.name: read_log(path) for path in sorted(FOLDER.glob("*/log.csv"))}
                    write_figure(draw(logs, "seconds"), FOLDER / "loss.png")
        minutes = (time.monotonic() - begin) / 60
        keys = ("name", "status", "seconds", "results")
        rows = [{key: getattr(each, key) for key in keys} for each in parts]
        result = {"minutes": minutes, "commit": commit(), "parts": rows}
        markdown = as_markdown(parts, runtime, minutes)
        (FOLDER / "report.md").write_text(markdown + "\n", encoding="utf-8")
        (FOLDER / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"report   {FOLDER / 'report.md'}, {minutes:.1f} minutes")
    return result


def run_part(part: Part, limit: float) -> None:
    """Run a part's commands one after another; sets its results, status and seconds."""
    begin, part.status = time.monotonic(), "ok"
    for number, words in enumerate(part.commands):
        result, log = (FOLDER / f"{part.name}-{number}.{suffix}" for suffix in ("json", "log"))
        status = run_command(words, result, log, limit - (time.monotonic() - begin))
        output = log.read_text("utf-8", "replace")
        if status == 0 or (part.name == "tests" and status == 1):  # some failed
            part.results.append(read_result(part.name, result) | {"output": output[-3000:]})
            result.unlink(missing_ok=True)
            if part.until_it_fits:
                break
        elif status is None:
            part.status = f"stopped at its time limit of {limit:.0f} s"
            break
        elif not (part.until_it_fits and "out of memory" in output):
            lines = output.strip().splitlines() or ["no output"]
            errors = [line for line in lines if "error" in line.lower()]
            part.status = f"failed: {(errors or lines)[-1][:300]}"
            break
    if part.until_it_fits and part.status == "ok" and not part.results:
        part.status = "failed: out of memory at every size"
    part.seconds = time.monotonic() - begin


def run_command(words: list[str], result: Path, log: Path, limit: float) -> int | None:
    """The exit status of a command; None if it and its child processes were killed at the time limit."""
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
    """Kill a process and its descendants, including those in other sessions, such as torchrun's ranks."""
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
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in a driver cannot be killed
        process.wait(10)


def all_parts(config: BenchConfig, runtime: Runtime) -> list[Part]:
    """The parts for this kind of device, most important first."""
    device = [f"--device={runtime.device}", f"--dtype={dtype_name(runtime.dtype)}"]
    parts: list[Part] = []
    for line in (GPU_PARTS if runtime.device.type == "cuda" else CPU_PARTS).strip().splitlines():
        if line.startswith(" "):
            parts[-1].until_it_fits = "BATCH" in line
            parts[-1].commands += bench_commands(line, device, config.against)
        else:
            name, seconds, title = line.split(maxsplit=2)
            parts.append(Part(name, title, [], float(seconds)))
    for part in parts:
        if part.name in TARGETS and not SHAKESPEARE.is_file():
            part.status = f"not run: no dataset; first run {command('data/shakespeare_char/prepare.py')}"
        elif part.name in TARGETS:
            words = [part.name, f"--out_dir={part.name}", "--loss_plot=False", device[0]]
            part.commands = [[str(ROOT / "train.py"), *words]]
        elif part.name == "tests":
            words = "-m pytest -n 0 -m cuda --continue-on-collection-errors --junitxml=RESULT".split()
            part.commands = [[*words, str(ROOT / "tests")]]
        elif not part.commands:
            part.commands = bench_commands(f"--check={part.name}", device, None)
    return [part for part in parts if part.name != "tests" or find_spec("pytest")]


def bench_commands(line: str, device: list[str], against: str | None) -> list[list[str]]:
    """The commands of a line of CPU_PARTS or GPU_PARTS."""
    words = line.split()
    real_data = "SHAKESPEARE" in words and SHAKESPEARE.is_file()
    command = [str(ROOT / "bench.py"), *(word for word in words if not word.isupper()), *device]
    command += [f"--real_data={real_data}", "--json=RESULT"]
    if against and "AGAINST" in words:  # an absolute path, as the commands run in another folder
        path = against if against == "transformers" else Path(against).resolve()
        command.append(f"--against={path}")
    sizes = (32, 16, 8) if "BATCH" in words else ()
    return [[*command, f"--batch_size={B}"] for B in sizes] or [command]


def read_result(name: str, path: Path) -> Result:
    """The result of a part: pytest's results, a run's log, or the JSON of bench.py."""
    if name == "tests":
        return read_tests(path)
    return read_curve(name) if name in TARGETS else json.loads(path.read_text(encoding="utf-8"))


def read_tests(path: Path) -> Result:
    """Rows of pytest's results: the number of tests by outcome, and a row per failed test."""
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        names[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    counts = {f"tests, {outcome}": str(len(cases)) for outcome, cases in names.items()}
    rows = [{"what": what, "value": n, "limit": None, "passes": True} for what, n in counts.items()]
    rows += [{"what": name, "value": 1.0, "limit": 0.0, "passes": False} for name in names["failed"]]
    return {"rows": rows}


def read_curve(name: str) -> Result:
    """Step, seconds and val loss of each evaluation of the run of config/NAME.py."""
    log = read_log(FOLDER / name / "log.csv")
    (steps, losses), (seconds, _) = points(log, "val_loss"), points(log, "val_loss", by="seconds")
    return {"config": name, "curve": np.stack((steps, seconds, losses), axis=1).tolist()}


def rows_of(parts: list[Part]) -> list[Result]:
    """The rows of all checks that ran."""
    return [row for part in parts for result in part.results for row in result.get("rows", [])]


def headline(result: Result) -> str:
    """The most important figures of a result; "" if it has none."""
    if "steps" in result:
        (_, ours), *others = result["steps"].items()
        text = f"{ours['median'] * 1000:,.1f} ms, {ours['tokens_per_second']:,.0f} tokens/s"
        ratios = [f", {result['ratio']['median']:.2f} times {name}'s speed" for name, _ in others]
        return f"{text}, MFU {ours['mfu']:.0%}{''.join(ratios)}"
    if "runs" in result:
        runs = result["runs"][:2]  # the others have 8-bit weights
        return ", ".join(f"batch {run['batch']}: {run['decode']['median']:,.0f} tokens/s" for run in runs)
    if "curve" in result:
        step, seconds, best = min(result["curve"], key=lambda row: row[2])
        target, source = TARGETS[result["config"]]
        times = [f"reached after {row[1]:.1f} s" for row in result["curve"] if row[2] <= target]
        text = f"best val loss {best:.4f} at step {step:.0f}, after {seconds:.0f} s"
        return f"{text}; target {target} ({source}) {times[0] if times else 'not reached'}"
    return ""


def as_markdown(parts: list[Part], runtime: Runtime, minutes: float) -> str:
    """The report: failures and headlines first, then a section for each part."""
    done = [part for part in parts if part.status == "ok"]
    checked = [row for row in rows_of(parts) if row["limit"] is not None]
    failed = [row for row in checked if not row["passes"]]
    headlines = [(part.title, headline(result)) for part in done for result in part.results]
    lines = [
        f"# {runtime.describe()}\n",
        f"`python bench.py --report=True`, torch {torch.__version__}, commit {commit()}, "
        f"{time.strftime('%Y-%m-%d')}; {len(done)} of {len(parts)} parts in {minutes:.1f} minutes.\n",
        f"**{len(checked) - len(failed)} of {len(checked)} checks passed.**\n",
        *(f"- FAILED: {row['what']}: {row['value']}, at most {row['limit']}" for row in failed),
        *(f"- {part.title}: {part.status}" for part in parts if part.status != "ok"),
        *(f"- {title}: {text}" for title, text in headlines if text),
    ]
    for part in parts:
        if not part.results and part.status.startswith("not run"):
            continue
        lines.append(f"\n## {part.title}\n")
        lines += [f"```\n{result['output'].strip()}\n```\n" for result in part.results]
        lines.append(f"{part.seconds:.0f} s" + ("" if part.status == "ok" else f"; {part.status}"))
    pictures = sorted(path.name for path in FOLDER.glob("*.png"))
    return "\n".join([*lines, "", *(f"![{name}]({name})" for name in pictures)])


def commit() -> str:
    """The repository's commit, with -dirty if files differ from it."""
    with suppress(OSError):  # no git
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"
    return "unknown"
