"""The largest batch that fits, and the fastest: what bench.py --find_batch=True tries, and how it tells it.

On a GPU, only a trial knows what fits. A CPU shares its memory with the whole system, which ends a process
that takes too much: there, what a step needs is computed first, and what is more than is left is not tried.
"""

import ctypes
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from distrogpt.settings import BenchConfig

LARGEST = 1 << 15  # sequences; beyond, GPU kernels run out of numbers
SLOW = 5.0  # seconds of a step after which larger batches, twice as slow or more, are not timed
GAIN = 1.02  # of tokens/s; less is noise
FRAGMENTATION = (
    0.7  # of what is left on a CPU; the rest is for holes between what is allocated: up to 1.4 measured
)


class Trial(NamedTuple):
    """A batch of so many sequences, in a step of one micro-step."""

    batch: int
    memory: float  # bytes of the step's peak: measured on a GPU, else computed
    fits: bool
    seconds: float | None = None  # of a step; None: not timed


def search(
    attempt: Callable[[int], Trial], computed: Callable[[int], Trial], careful: bool
) -> dict[int, Trial]:
    """Trials of 1, 2, 4... sequences up to the first that does not fit; then between the last two, until the
    largest that fits is known to an eighth. Sorted by the batch.

    `careful`: what does not fit as `computed` is not attempted; nor are larger batches than are worth it.
    """
    trials: dict[int, Trial] = {}

    def trial(batch: int) -> bool:
        found = computed(batch)
        if (found.fits or not careful) and worth_timing(trials.values(), careful):
            found = attempt(batch)
        trials[batch] = found
        return found.fits

    fits, fails = 0, 1
    while fails <= LARGEST and trial(fails):
        fits, fails = fails, 2 * fails
    while fails in trials and fails - fits > max(1, fits // 8):
        middle = (fits + fails) // 2
        if trial(middle):
            fits = middle
        else:
            fails = middle
    return dict(sorted(trials.items()))


def worth_timing(trials: Iterable[Trial], careful: bool) -> bool:
    """Whether a larger batch is to be timed: no step was slow and, if `careful`, the last three batches made
    tokens faster."""
    timed = sorted((trial.batch, trial.seconds) for trial in trials if trial.seconds)
    rates = [batch / seconds for batch, seconds in timed]
    flat = careful and len(rates) > 3 and max(rates[-3:]) < GAIN * max(rates[:-3])
    return not flat and all(seconds < SLOW for _, seconds in timed)


def shared(config: BenchConfig, largest: int) -> dict[str, Any]:
    """Micro-steps of at most `largest` sequences, and of half as many at least, that make a step next to that
    of the settings."""
    sequences, n = config.gradient_accumulation_steps * config.batch_size, config.n_gpus
    most = max(1, min(largest, sequences // n))
    splits = [(B, max(1, round(sequences / (n * B)))) for B in range(most // 2 + 1, most + 1)]
    B, rounds = min(splits, key=lambda split: (abs(n * split[0] * split[1] - sequences), -split[0]))
    steps = n * rounds
    flags = f"--batch_size={B} --gradient_accumulation_steps={steps}"
    return {"batch_size": B, "gradient_accumulation_steps": steps, "flags": flags, "sequences": B * steps}


def found_in(trials: dict[int, Trial], config: BenchConfig) -> dict[str, Any]:
    """The results for --json: all trials; the largest that fits, and the fastest that was timed."""
    rows = [
        {**trial._asdict(), "tokens_per_second": trial.seconds and batch * config.block_size / trial.seconds}
        for batch, trial in trials.items()
    ]
    fitting = [row for row in rows if row["fits"]]
    choices = {
        "largest": max(fitting, key=lambda row: row["batch"]),
        "fastest": max(fitting, key=lambda row: row["tokens_per_second"] or 0),
    }
    return {
        "trials": rows,
        **{name: {**row, **shared(config, row["batch"])} for name, row in choices.items()},
    }


def table(found: dict[str, Any], config: BenchConfig) -> list[str]:
    """The results as lines."""
    lines = ["   batch          ms      tokens/s       memory"]
    for row in found["trials"]:
        speed, told = 26 * " ", "computed" if row["fits"] else "too much"
        if row["seconds"]:
            speed, told = f"{row['seconds'] * 1000:12,.2f}  {row['tokens_per_second']:12,.0f}", ""
        lines.append(f"{row['batch']:8,}{speed}  {row['memory'] / 2**30:7,.2f} GiB  {told}".rstrip())
    sequences = config.gradient_accumulation_steps * config.batch_size
    for name in ("largest", "fastest"):
        row = found[name]
        more = " or more" if name == "largest" and row["batch"] == LARGEST else ""
        nearest = "" if row["sequences"] == sequences else f", {row['sequences']:,} being nearest"
        lines.append(f"{name}  {row['batch']:,}{more}; a step of {sequences:,}{nearest}: {row['flags']}")
    return lines


def give_back_memory() -> None:
    """Let glibc return to the system what is free in its heap: between other sizes, it is of little use."""
    with suppress(AttributeError, OSError, TypeError):  # another libc, another system
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may still take without harm to others; inf where the system does not tell.

    On Linux what the kernel says, or what is left of a cgroup's limit (a container, a cluster's job); on
    macOS half of all memory.
    """
    try:
        kilobytes = re.search(r"^MemAvailable: +(\d+) kB", (proc / "meminfo").read_text(), re.M)[1]
        return min(1024 * int(kilobytes), cgroup_room(proc, cgroups))
    except (OSError, TypeError):
        names = getattr(os, "sysconf_names", {})
        pages = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), None)
        share = 1.0 if pages == "SC_AVPHYS_PAGES" else 0.5
        return share * os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else math.inf


def cgroup_room(proc: Path, cgroups: Path) -> float:
    """What is left of the least limit of this process's cgroups of either version, and of those above them.

    Files that the system has read and would drop are not counted as taken.
    """
    room = math.inf
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = cgroups / "memory" if kinds else cgroups
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            try:
                left = int((place / f"memory.{limit}").read_text())  # "max": there is none
                left -= int((place / f"memory.{usage}").read_text())
                stat = (place / "memory.stat").read_text()
            except (OSError, ValueError):
                continue
            dropped = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
            room = min(room, left + max(map(int, dropped), default=0))
    return max(room, 0)
