"""Time a training step: python bench.py config/train_shakespeare_cpu.py

It is train.py's own step, on its own batches: bench.py measures train.py, so it imports it.
"""

import sys

from configurator import configure
from settings import BenchConfig

if __name__ == "__main__":
    CONFIG = configure(BenchConfig)  # before torch is loaded, so that --help and mistakes answer at once

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.tokens import GPT2_META, TokenStream, find_dataset, read_meta
from errors import UserError, one_line_errors
from runtime import Runtime, maybe_compile, peak_flops, start_runtime
from train import initial_model, make_optimizer, step_batches, training_step

TRACE = "bench_trace.json"


class RandomStream:
    """Stands in for a TokenStream where there is no dataset: uniform ids, a million of them."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, 1_000_000)

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.tokens[starts[:, None] + np.arange(length)]  # (N, length)


def open_stream(config: BenchConfig) -> tuple[TokenStream | RandomStream, dict]:
    """The train split of the dataset, or random ids where it is not there or not wanted; and its meta."""
    if config.real_data:
        try:
            folder = find_dataset(config.dataset)
            meta = read_meta(folder)
            return TokenStream(folder, "train", meta, config.block_size), meta
        except UserError as error:
            print(f"note     random ids of GPT-2's vocabulary instead of data: {error}")
    return RandomStream(GPT2_META["vocab_size"]), GPT2_META


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has done all that it was given."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    elif runtime.device.type == "mps":
        torch.mps.synchronize()


def time_steps(step: Callable[[int], object], count: int, runtime: Runtime) -> list[float]:
    """Seconds of each of `count` steps, the device's work included."""
    times = []
    for number in range(count):
        synchronize(runtime)
        begin = time.perf_counter()
        step(number)
        synchronize(runtime)
        times.append(time.perf_counter() - begin)
    return times


def peak_memory(runtime: Runtime) -> str:
    """The largest memory so far: the GPU's allocations, or the process's resident set."""
    if runtime.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return "not known"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB resident"


def profile(step: Callable[[int], object], runtime: Runtime) -> None:
    """Print the costliest operations of three steps, and write all as a trace for a browser."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if runtime.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(3):
            step(number)
        synchronize(runtime)
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    profiler.export_chrome_trace(TRACE)
    print(f"trace    {Path(TRACE).resolve()}: open it at chrome://tracing or https://ui.perfetto.dev")


def bench(config: BenchConfig) -> dict[str, float]:
    """Time the step and print what it reaches; seconds (median), tokens_per_second, flops and mfu."""
    runtime = start_runtime(config.device, config.dtype)
    if config.batch_size is None:
        config.batch_size = 1 if runtime.device.type == "cpu" else 12
    stream, meta = open_stream(config)
    config.init_from = "scratch"
    model, _ = initial_model(config, meta)
    optimizer, scaler = make_optimizer(model.to(runtime.device).train(), config, runtime)
    maybe_compile(model, config.compile, runtime.device, math.inf, print)

    def step(number: int) -> None:
        batches = step_batches(stream, config, runtime, number)
        training_step(model, optimizer, scaler, batches, config.grad_clip, runtime)

    time_steps(step, config.warmup_steps, runtime)
    times = time_steps(step, config.bench_steps, runtime)

    sequences = config.batch_size * config.gradient_accumulation_steps
    tokens = sequences * config.block_size
    memory = peak_memory(runtime)  # before the peak is measured, which takes memory of its own
    median, peak = statistics.median(times), peak_flops(runtime)
    flops = model.flops_per_token() * tokens / median
    mfu = model.estimate_mfu(sequences, median, peak)
    shape = model.config
    print(
        f"model    {shape.n_layer}/{shape.n_head}/{shape.n_embd}, {model.get_num_params(False):,} parameters"
    )
    print(f"machine  {runtime.describe()}, torch {torch.__version__}")
    print(f"step     {sequences} sequences of {config.block_size} = {tokens:,} tokens")
    print(f"time     {median * 1000:.2f} ms median ({min(times) * 1000:.2f} to {max(times) * 1000:.2f})")
    print(f"speed    {tokens / median:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s")
    print(f"mfu      {mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s")
    print(f"memory   {memory}")
    if config.profile:
        profile(step, runtime)
    return {"seconds": median, "tokens_per_second": tokens / median, "flops": flops, "mfu": mfu}


if __name__ == "__main__":
    with one_line_errors():
        bench(CONFIG)
