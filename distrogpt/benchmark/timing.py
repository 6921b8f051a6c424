"""What bench.py times with: data for steps, turns of what is compared, medians, memory."""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from distrogpt.benchmark.baselines import Step
from distrogpt.data.dataset import Dataset, Part, open_dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig


class RandomStream:
    """Stands in for a TokenStream where there is no dataset: `length` uniform ids."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size = vocab_size
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(length)]  # (N, length)


def open_data(config: BenchConfig) -> Dataset:
    """The train split of the dataset; random ids where real_data=False, or where the default
    dataset is not there. Raises UserError."""
    if config.real_data:
        try:
            return open_dataset(config, ("train",))
        except UserError as error:
            if config.dataset != BenchConfig.dataset:
                raise UserError(
                    f"{error}; or --real_data=False, for random ids of GPT-2's vocabulary"
                ) from None
    print("data     random ids of GPT-2's vocabulary")
    stream = RandomStream(GPT2_META["vocab_size"], 1_000_000 + config.block_size)
    lines = {"train": np.arange(0, 1_000_000, config.block_size)}
    return Dataset([Part("random ids", 1.0, Path(), GPT2_META, {"train": stream}, lines)])


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has done all that it was given."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    elif runtime.device.type == "mps":
        torch.mps.synchronize()


def alternate(steps: dict[str, Step], warmup: int, count: int, runtime: Runtime) -> dict[str, list[float]]:
    """Seconds of `count` steps of each, the device's work included. They take turns of a tenth of them."""
    for step in steps.values():
        for number in range(warmup):
            step(number)
    times: dict[str, list[float]] = {name: [] for name in steps}
    turn = math.ceil(count / 10)  # a step that follows another one's finds the caches cold
    for first in range(0, count, turn):
        for name, step in steps.items():
            for number in range(first, min(first + turn, count)):
                synchronize(runtime)
                begin = time.perf_counter()
                step(number)
                synchronize(runtime)
                times[name].append(time.perf_counter() - begin)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratio(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: the spread of the ratios of neighbouring measurements."""
    return spread([slow / fast for slow, fast in zip(theirs, ours, strict=True)])


def peak_memory(runtime: Runtime) -> int | None:
    """Bytes of the largest memory so far: the GPU's allocations, or the process's resident set."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
