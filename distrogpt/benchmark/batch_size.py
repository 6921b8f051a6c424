"""The largest batch that fits, and the fastest: bench.py --find_batch=True

On a GPU, each batch size is tried. On a CPU, the system would kill a process that needs too much memory, so
the memory of a step is estimated first, and a batch that does not fit is not tried.
"""

import ctypes
import gc
import math
import re
import statistics
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distrogpt.benchmark import plan
from distrogpt.benchmark.timing import open_data, seconds_of
from distrogpt.benchmark.training import Trainer, TrainingStep, recipe_line
from distrogpt.errors import UserError, is_out_of_memory
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import BatchLoader
from distrogpt.training.startup import new_model_config, samples_per_step

LARGEST = 1 << 15  # sequences; GPU kernels cannot index more
SLOW = 5.0  # seconds of a step; larger batches, at least twice as slow, are not timed
GAIN = 1.02  # of tokens/s; smaller gains are noise
FRAGMENTATION = 0.7  # usable part of a CPU's free memory: up to 1.4 times the need is allocated


class Trial(NamedTuple):
    """A step of one micro-batch."""

    batch: int
    memory: float  # peak bytes: measured on a GPU, otherwise estimated
    fits: bool
    seconds: float | None = None  # None: not timed


Try = Callable[[int], Trial]


def search(attempt: Try, computed: Try, careful: bool, time_all: bool = False) -> dict[int, Trial]:
    """Trials of 1, 2, 4... sequences up to the first that does not fit; then a bisection until the largest
    that fits is known to an eighth. Sorted by batch. If `careful`, a batch that does not fit by its estimate,
    `computed`, is not attempted. Unless time_all, only batches that are worth_timing are attempted."""
    trials: dict[int, Trial] = {}

    def fits(batch: int) -> bool:
        trial = computed(batch)
        if (trial.fits or not careful) and (time_all or worth_timing(trials.values(), careful)):
            trial = attempt(batch)
        trials[batch] = trial
        return trial.fits

    low, high = 0, 1  # the largest that fits, and the smallest that may not fit
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    while high in trials and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return dict(sorted(trials.items()))


def worth_timing(trials: Iterable[Trial], careful: bool) -> bool:
    """Whether to time a larger batch: no step was slow and, if `careful`, the last three batches raised
    tokens/s."""
    timed = sorted((trial.batch, trial.seconds) for trial in trials if trial.seconds)
    rates = [batch / seconds for batch, seconds in timed]
    flat = careful and len(rates) > 3 and max(rates[-3:]) < GAIN * max(rates[:-3])
    return not flat and all(seconds < SLOW for _, seconds in timed)


class BatchTrials:
    """Trials of batch sizes on one model. `room`: bytes that a step may use; None is the free memory."""

    def __init__(self, config: BenchConfig, runtime: Runtime, step: TrainingStep, room: float | None) -> None:
        self.config, self.runtime, self.training_step = config, runtime, step
        self.on_gpu = runtime.device.type == "cuda"
        if room is None and self.on_gpu:
            room = plan.USABLE * torch.cuda.mem_get_info()[0]
        self.room = FRAGMENTATION * available_memory() if room is None else room
        self.data = open_data(config)._replace(separator=None)  # or a small batch may have no targets
        self.hardware = plan.find_hardware(replace(config, gpu="here"), runtime, peak=1.0)
        shape, half = new_model_config(config, self.data.meta), runtime.dtype != torch.float32
        self.counts = plan.count(shape, config, half, not self.hardware.is_cpu)
        self.trainer: Trainer | None = None

    def accumulates(self, batch: int) -> bool:
        """Whether the run would accumulate the gradients of several micro-batches of this size."""
        return self.config.n_gpus > 1 or batch < samples_per_step(self.config)

    def computed(self, batch: int) -> Trial:
        micro_steps = 2 if self.accumulates(batch) else 1
        split = plan.Split(1, batch, micro_steps, recompute=self.config.activation_checkpointing)
        peak = plan.memory(self.counts, self.hardware, split)["peak"]
        return Trial(batch, peak, peak <= self.room)

    def attempt(self, batch: int) -> Trial:
        """Time up to three steps after a warm-up, if the batch fits; the trial has their median."""
        trial, seconds = self.computed(batch)._replace(fits=True), []
        config = replace(self.config, batch_size=batch, gradient_accumulation_steps=1)
        try:
            if self.trainer is None:
                self.trainer = Trainer(self.training_step, config, self.data, self.runtime)
            self.trainer.batches = BatchLoader(self.data, config, self.runtime, 0)
            while len(seconds) < 4 and sum(seconds[1:]) <= 1:
                if self.accumulates(batch):
                    for p in self.trainer.model.parameters():
                        p.grad = torch.zeros_like(p)
                seconds.append(seconds_of(self.trainer, runtime=self.runtime))
            trial = trial._replace(seconds=statistics.median(seconds[1:]))
            if self.on_gpu:
                trial = trial._replace(memory=torch.cuda.max_memory_allocated())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            trial = trial._replace(fits=False)
            gc.collect()  # the tensors of the unfinished step
        if self.trainer:
            self.trainer.model.zero_grad(set_to_none=True)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        with suppress(AttributeError, OSError, TypeError):  # to the system; glibc only
            ctypes.CDLL(None).malloc_trim(0)
        return trial


def bench_batch(
    config: BenchConfig,
    runtime: Runtime,
    step: TrainingStep,
    room: float | None = None,
    time_all: bool = False,
) -> dict[str, Any]:
    """Find the largest batch that fits and the fastest one; print a table, and the flags for both."""
    config = plan.planned_shape(replace(config, max_epochs=None))[0]  # a few steps need no number of steps
    trials = BatchTrials(config, runtime, step, room)
    first, results = trials.computed(1), {}
    if first.fits or trials.on_gpu:
        results = search(trials.attempt, trials.computed, not trials.on_gpu, time_all)
        first = results[1]
    if not first.fits:
        raise UserError(
            f"one sequence needs {first.memory / 2**30:,.2f} GiB, but {trials.room / 2**30:,.2f} are free; "
            "lower --block_size or --n_embd, or set --activation_checkpointing=True"
        )
    print(f"model    {trials.counts.parameters:,} parameters\n{recipe_line(config)}")
    print("   batch     ms/step      tokens/s       memory")
    rows = []
    for trial in results.values():
        rate, speed, note = None, 26 * " ", "estimated, not timed" if trial.fits else "does not fit"
        if trial.seconds:
            rate = trial.batch * config.block_size / trial.seconds
            speed, note = f"{trial.seconds * 1000:12,.2f}  {rate:12,.0f}", ""
        print(f"{trial.batch:8,}{speed}  {trial.memory / 2**30:7,.2f} GiB  {note}".rstrip())
        rows.append({**trial._asdict(), "tokens_per_second": rate})
    fitting, sequences = [row for row in rows if row["fits"]], samples_per_step(config)
    best = {"largest": fitting[-1], "fastest": max(fitting, key=lambda row: row["tokens_per_second"] or 0)}
    for name, row in best.items():
        best[name] = row | step_with(config, row["batch"])
        or_more = " or more" if name == "largest" and row["batch"] == LARGEST else ""
        nearest = best[name]["sequences"]
        note = "" if nearest == sequences else f" (nearest possible: {nearest:,})"
        step = f"for {sequences:,} sequences per step{note}"
        print(f"{name}  batch {row['batch']:,}{or_more}; {step}: {best[name]['flags']}")
    return {"trials": rows, **best}


def step_with(config: BenchConfig, largest: int) -> dict[str, Any]:
    """The micro-batch of largest // 2 to `largest` sequences whose step is nearest to that of the
    settings."""
    sequences = samples_per_step(config)
    largest = max(1, min(largest, sequences // config.n_gpus))
    B, micro_steps = plan.share_out(sequences, config.n_gpus, largest, largest // 2 + 1)
    steps = config.n_gpus * micro_steps
    flags = f"--batch_size={B} --gradient_accumulation_steps={steps}"
    return {"batch_size": B, "gradient_accumulation_steps": steps, "flags": flags, "sequences": B * steps}


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process can still use; inf if the system does not report it. On Linux, the kernel's
    MemAvailable or the rest of a cgroup's limit, whichever is smaller; on macOS, half of all memory."""
    try:
        kilobytes = re.search(r"^MemAvailable: +(\d+) kB", (proc / "meminfo").read_text(), re.M)[1]
        return min(1024 * int(kilobytes), cgroup_room(proc, cgroups))
    except (OSError, TypeError):
        return plan.total_memory() / 2


def cgroup_room(proc: Path, cgroups: Path) -> float:
    """The smallest rest of the memory limits of this process's cgroups (version 1 or 2) and their parents.
    File caches, which the system can drop, do not count as used."""
    room = math.inf
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        folder = cgroups / ("memory" if kinds else "") / path.lstrip("/")
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError):  # no such file; "max": no limit
                left = int((group / f"memory.{limit}").read_text())
                left -= int((group / f"memory.{usage}").read_text())
                stat = (group / "memory.stat").read_text()
                caches = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
                room = min(room, left + max(map(int, caches), default=0))
    return max(room, 0)
