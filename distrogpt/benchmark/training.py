"""Time train.py's training step: speed, MFU and memory, alone or next to another implementation's."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distrogpt.benchmark import timing
from distrogpt.benchmark.baselines import baseline_model, baseline_name, baseline_step
from distrogpt.data.dataset import Dataset
from distrogpt.errors import writable
from distrogpt.hardware import measured_flops, peak_flops
from distrogpt.kernels.compile import maybe_compile
from distrogpt.kernels.cpu import to_device
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import BatchLoader, MicroBatch
from distrogpt.training.optim import make_optimizers
from distrogpt.training.startup import initial_model, resolve_max_iters, samples_per_step
from model import GPT

TRACE = "bench_trace.json"
TrainingStep = Callable[..., Any]  # train.py's, which bench.py hands in: the package imports no command


@dataclass
class Trainer:
    """A model and its optimizers; each call is a training step on the next batch of `data`."""

    training_step: TrainingStep
    config: BenchConfig
    data: Dataset | None
    runtime: Runtime
    model: torch.nn.Module | None = None  # None: a new one as train.py makes it
    optimizers: list[torch.optim.Optimizer] | None = None  # None: those of train.py

    def __post_init__(self) -> None:
        config, runtime = self.config, self.runtime
        if self.model is None:
            self.model = new_model(config, self.data, runtime)
        if self.optimizers is None:
            plain = getattr(self.model, "module", self.model)  # without DDP
            self.optimizers = make_optimizers(plain, config, runtime)
        self.scaler = runtime.grad_scaler()
        if self.data is not None:
            self.batches = BatchLoader(self.data, config, runtime, 0)

    def train(self, batches: BatchLoader | list[MicroBatch]) -> Any:
        """One step on these micro-batches."""
        settings = (self.config.grad_clip, self.runtime)
        return self.training_step(self.model, self.optimizers, self.scaler, batches, *settings)

    def __call__(self) -> Any:
        return self.train(self.batches)


def baseline_trainer(config: BenchConfig, data: Dataset, vocab_size: int, runtime: Runtime) -> Trainer:
    """The model of config.against: fp32 on CPUs, autocast and compiled on GPUs."""
    model, device = baseline_model(config, vocab_size).to(runtime.device).train(), runtime.device
    settings = (config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(*settings)
    if device.type == "cuda":
        maybe_compile(model, config.compile, device, config.max_iters)
    else:
        runtime = replace(runtime, dtype=torch.float32)
    return Trainer(baseline_step, config, data, runtime, model, [optimizer])


def new_weights(config: BenchConfig, data: Dataset) -> GPT:
    """A model of the settings' shape with random weights, on the CPU."""
    return initial_model(replace(config, init_from="scratch"), data.meta)[0]


def new_model(config: BenchConfig, data: Dataset, runtime: Runtime, padded: bool = True) -> GPT:
    """A model with random weights on its device, compiled if train.py would."""
    model = new_weights(config, data)
    if not padded:  # GPT-2's vocabulary
        model = GPT(replace(model.config, vocab_size=data.meta["vocab_size"]))
    model.activation_checkpointing = config.activation_checkpointing
    maybe_compile(model, config.compile, runtime.device, resolve_max_iters(config, data).max_iters)
    return to_device(model, runtime.device).train()


def profile(step: timing.Step, runtime: Runtime) -> None:
    """Print the most expensive operations of three steps, and write all of them as a trace for a browser."""
    from torch.profiler import ProfilerActivity

    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if runtime.device.type == "cuda":
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        timing.synchronize(runtime)
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    with writable(TRACE) as file:
        profiler.export_chrome_trace(file)
    print(f"trace    {Path(TRACE).resolve()}: open it at chrome://tracing or https://ui.perfetto.dev")


def bench_step(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Time, speed, MFU and memory of the training step; in turns with the baseline's if there is one."""
    data = timing.open_data(config)
    trainer = Trainer(training_step, config, data, runtime)
    model, steps, memory = trainer.model, {"ours": trainer}, None
    if config.against:
        for _ in range(2):  # the peak of our model alone, before the baseline is built
            trainer()
        memory = timing.peak_memory(runtime)
        name = baseline_name(config.against)
        steps[name] = baseline_trainer(config, data, model.config.vocab_size, runtime)
    times = timing.alternate(steps, config.warmup_steps, config.bench_steps, runtime)
    memory = memory or timing.peak_memory(runtime)  # before peak_flops, which takes memory of its own
    peak = peak_flops(runtime.device, runtime.dtype)
    sequences = samples_per_step(config)
    tokens, shape = sequences * config.block_size, model.config
    size = f"{shape.n_layer}/{shape.n_head}/{shape.n_embd}"
    print(f"model    {size}, {model.get_num_params(False):,} parameters")
    print(f"step     {sequences} sequences of {config.block_size} = {tokens:,} tokens")
    results = {name: step_results(model, sequences, seconds, peak) for name, seconds in times.items()}
    for name, step in results.items():
        if len(results) > 1:
            print(f"{name}:")
        low, high = step["low"] * 1000, step["high"] * 1000
        print(f"time     {step['median'] * 1000:.2f} ms median ({low:.2f} to {high:.2f} is the middle half)")
        print(f"speed    {step['tokens_per_second']:,.0f} tokens/s, {step['flops'] / 1e9:,.0f} GFLOP/s")
        print(f"mfu      {step['mfu']:.1%} of {peak / 1e9:,.0f} GFLOP/s")
    result = {"tokens": tokens, "memory_bytes": memory, "peak_flops": peak, "steps": results}
    if runtime.device.type == "cuda":
        result["measured_flops"] = product = measured_flops(runtime.device, runtime.dtype)
        mfu = results["ours"]["flops"] / product
        print(f"         {mfu:.1%} of the {product / 1e9:,.0f} GFLOP/s that a matrix product reaches here")
    if config.against:
        result["ratio"] = gain = timing.ratio(times[name], times["ours"])
        print(f"ratio    {gain['median']:.2f} times {name}'s {timing.quartiles(gain)}")
    if memory:
        where = "on the GPU" if runtime.device.type == "cuda" else "resident"
        print(f"memory   {memory / 2**30:.2f} GiB {where}")
    if config.profile:
        profile(trainer, runtime)
    return result


def step_results(model: GPT, sequences: int, seconds: list[float], peak: float) -> dict[str, float]:
    """What the seconds of a step mean."""
    result = timing.spread(seconds)
    tokens_per_second = sequences * model.config.block_size / result["median"]
    flops = model.flops_per_token() * tokens_per_second
    return {**result, "tokens_per_second": tokens_per_second, "flops": flops, "mfu": flops / peak}
