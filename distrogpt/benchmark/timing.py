"""Shared by all benchmarks: data, timing in turns, medians, memory."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, Part, open_dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

ROOT = Path(__file__).resolve().parents[2]  # of the repository
Step = Callable[[], Any]  # one training step


class RandomStream:
    """A TokenStream of `length` uniform ids, for benchmarks without a dataset."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(length)]  # (N, length)


def open_data(config: BenchConfig) -> Dataset:
    """The train split; random token ids if real_data=False or the default dataset is missing. Raises
    UserError."""
    if config.real_data:
        try:
            return open_dataset(config, ("train",))
        except UserError as error:
            if config.dataset != BenchConfig.dataset:
                hint = "or use random token ids: --real_data=False"
                raise UserError(f"{error}; {hint}") from None
    print("data     random token ids, with GPT-2's vocabulary size")
    stream = RandomStream(GPT2_META["vocab_size"], 1_000_000 + config.block_size)
    lines = {"train": np.arange(0, 1_000_000, config.block_size)}
    return Dataset([Part("random ids", 1.0, Path(), GPT2_META, {"train": stream}, lines)])


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision within a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has finished all work."""
    if runtime.device.type in ("cuda", "mps"):
        getattr(torch, runtime.device.type).synchronize()


def seconds_of(function: Callable[..., Any], *args: Any, runtime: Runtime) -> float:
    """Seconds of one call, including asynchronous work on the device."""
    synchronize(runtime)
    begin = time.perf_counter()
    function(*args)
    synchronize(runtime)
    return time.perf_counter() - begin


def alternate(steps: dict[str, Step], warmup: int, count: int, runtime: Runtime) -> dict[str, list[float]]:
    """Seconds of `count` steps of each, run in turns of a tenth of them, so that other load affects all
    equally."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    turn = math.ceil(count / 10)  # several steps, as the first one after another model finds cold caches
    for first in range(0, count, turn):
        for name, step in steps.items():
            for _ in range(first, min(first + turn, count)):
                times[name].append(seconds_of(step, runtime=runtime))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: median and quartiles of the ratios of neighbouring measurements."""
    return spread([slow / fast for slow, fast in zip(baseline, ours, strict=True)])


def quartiles(values: dict[str, float], digits: int = 2) -> str:
    """The quartiles as text: (low to high)."""
    return f"({values['low']:.{digits}f} to {values['high']:.{digits}f})"


def peak_memory(runtime: Runtime) -> int | None:
    """Peak bytes so far: allocated on the GPU, otherwise the resident memory of this process."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
