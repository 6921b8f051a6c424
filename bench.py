"""Measure how fast training and sampling are here: python bench.py config/train_shakespeare_cpu.py

The training step is train.py's own, on its own batches: bench.py measures train.py, so it imports it. What is
compared takes turns of a few steps, so that a busy machine slows all of it alike; medians are told.
"""

from configurator import configure
from distrogpt.settings import BenchConfig

if __name__ == "__main__":
    CONFIG = configure(BenchConfig)  # before torch is loaded, so that --help and mistakes answer at once

import copy
import functools
import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from distrogpt.benchmark.baselines import Step, others_generate, others_step
from distrogpt.benchmark.batch_size import (
    FRAGMENTATION,
    Trial,
    available_memory,
    found_in,
    give_back_memory,
    search,
    table,
)
from distrogpt.benchmark.checks import bench_check
from distrogpt.benchmark.multiple_choice import bench_questions
from distrogpt.benchmark.plan import USABLE, Split, count, find_place, memory, plan, planned_shape
from distrogpt.benchmark.report import bench_report
from distrogpt.benchmark.serving import bench_serve
from distrogpt.benchmark.timing import alternate, open_data, peak_memory, ratio, spread, synchronize
from distrogpt.checkpoint import BEST, NEWEST, atomic_write, training_state
from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError, cli_errors, is_out_of_memory, writable
from distrogpt.hardware import measured_bandwidth, measured_flops, peak_flops
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.kernels import replace_layers
from distrogpt.kernels.compile import compile_error, maybe_compile
from distrogpt.kernels.cpu import CPUAttention, CPUDropout, to_device
from distrogpt.runtime import (
    Runtime,
    enable_onednn_float32,
    find_pyplot,
    start_runtime,
)
from distrogpt.training.batches import step_batches
from distrogpt.training.logger import TrainLogger
from distrogpt.training.optim import get_lr, make_optimizers
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.startup import initial_model, new_model_config, resolve_max_iters
from model import GPT, Attention
from plot import SHARE
from train import training_step

TRACE, PLOT = "bench_trace.json", "bench_ladder.png"
PROMPT = 16  # tokens before those that are timed
ALL_LOGS = {"log_interval": 1, "tensorboard_log": True, "loss_plot": True}


def our_step(
    config: BenchConfig, data: Dataset, runtime: Runtime, fused: bool = True, padded: bool = True
) -> tuple[GPT, list[torch.optim.Optimizer], Step]:
    """A model and its optimizers as train.py makes them, and train.py's step; a rung may want less."""
    model, _ = initial_model(replace(config, init_from="scratch"), data.meta)
    if not padded:
        model = GPT(replace(model.config, vocab_size=data.meta["vocab_size"]))
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(
        to_device(model, runtime.device).train(), config, runtime.device.type, runtime.dtype
    )
    if not fused:
        groups = [
            {key: group[key] for key in ("params", "weight_decay")} for group in optimizers[0].param_groups
        ]
        betas = (config.beta1, config.beta2)
        optimizers = [torch.optim.AdamW(groups, config.learning_rate, betas, fused=False)]
    maybe_compile(model, config.compile, runtime.device, resolve_max_iters(config, data).max_iters)
    return model, optimizers, step_of(model, optimizers, config, data, runtime)


def step_of(
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    config: BenchConfig,
    data: Dataset,
    runtime: Runtime,
) -> Step:
    """train.py's step of that model, on batches of its own."""
    scaler = runtime.loss_scaler()
    batches = step_batches(data, config, runtime, 0)

    def step(number: int) -> None:
        nonlocal batches

        def read_on() -> list:
            return step_batches(data, config, runtime, number + 1)

        made = training_step(model, optimizers, scaler, batches, config.grad_clip, runtime, read_on)
        batches = made.following

    return step


def profile(step: Step, runtime: Runtime) -> None:
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
    with writable(TRACE) as file:
        profiler.export_chrome_trace(file)
    print(f"trace    {Path(TRACE).resolve()}: open it at chrome://tracing or https://ui.perfetto.dev")


def bench_step(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """The training step: time, speed, share of the machine's peak, memory; beside another's where asked."""
    data = open_data(config)
    model, _, step = our_step(config, data, runtime)
    steps, memory = {"ours": step}, None
    if config.against:
        for number in range(2):  # the memory of ours alone, before the other model is there
            step(number)
        memory = peak_memory(runtime)
        name = "transformers" if config.against == "transformers" else Path(config.against).resolve().name
        name = "theirs" if name in ("", "ours") else name
        steps[name] = others_step(config.against, config, data, model.config.vocab_size, runtime)[1]
    times = alternate(steps, config.warmup_steps, config.bench_steps, runtime)
    memory = memory or peak_memory(runtime)  # before the peak is measured, which takes memory of its own

    sequences = config.batch_size * config.gradient_accumulation_steps
    tokens = sequences * config.block_size
    peak = peak_flops(runtime.device, runtime.dtype)
    shape = model.config
    print(
        f"model    {shape.n_layer}/{shape.n_head}/{shape.n_embd}, {model.get_num_params(False):,} parameters"
    )
    print(f"step     {sequences} sequences of {config.block_size} = {tokens:,} tokens")
    result: dict[str, Any] = {
        "tokens": tokens,
        "memory_bytes": memory,
        "peak_flops": peak,
        "steps": {},
    }
    for name, seconds in times.items():
        found = spread(seconds)
        median = found["median"]
        flops = model.flops_per_token() * tokens / median
        mfu = model.estimate_mfu(sequences, median, peak)
        if len(times) > 1:
            print(f"{name}:")
        print(
            f"time     {median * 1000:.2f} ms median "
            f"({found['low'] * 1000:.2f} to {found['high'] * 1000:.2f} is the middle half)"
        )
        print(f"speed    {tokens / median:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s")
        print(f"mfu      {mfu:.1%} of {peak / 1e9:,.0f} GFLOP/s")
        found |= {"tokens_per_second": tokens / median, "flops": flops, "mfu": mfu}
        result["steps"][name] = found
    if runtime.device.type == "cuda":
        product = measured_flops(runtime.device, runtime.dtype)
        share = model.estimate_mfu(sequences, result["steps"]["ours"]["median"], product)
        result["measured_flops"] = product
        print(f"         {share:.1%} of the {product / 1e9:,.0f} GFLOP/s that a matrix product reaches here")
    if config.against:
        result["ratio"] = faster = ratio(times[name], times["ours"])
        print(f"ratio    {faster['median']:.2f} times {name}'s ({faster['low']:.2f} to {faster['high']:.2f})")
    if memory:
        where = "on the GPU" if runtime.device.type == "cuda" else "resident"
        print(f"memory   {memory / 2**30:.2f} GiB {where}")
    if config.profile:
        profile(step, runtime)
    return result


def bench_checkpoint(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """What training loses to a checkpoint: the step waits for the copy, and writing slows those after it."""
    data = open_data(config)
    model, optimizers, step = our_step(config, data, runtime)
    usual = alternate({"ours": step}, config.warmup_steps, config.bench_steps, runtime)["ours"]
    median, count = statistics.median(usual), itertools.count(config.bench_steps)
    times: dict[str, list[float]] = {"wait": [], "lost": [], "write": []}
    print(f"step     {median * 1000:,.1f} ms median, {model.get_num_params(False):,} parameters")
    with (
        tempfile.TemporaryDirectory(dir=".", prefix="out-bench-") as out_dir,
        RunDirectory(Path(out_dir), lambda line: None) as folder,
    ):
        for _ in range(config.rounds):
            began = time.perf_counter()
            contents = training_state(model, optimizers, iter_num=0, best_val_loss=math.inf)
            folder.save(contents, BEST, NEWEST)
            times["wait"].append(time.perf_counter() - began)
            del contents
            taken = 0
            while folder.writing():
                step(next(count))
                synchronize(runtime)
                taken += 1
            times["lost"].append(time.perf_counter() - began - taken * median)
            size = (Path(out_dir) / NEWEST).stat().st_size
            began = time.perf_counter()
            contents = training_state(model, optimizers, iter_num=0, best_val_loss=math.inf)
            atomic_write(functools.partial(torch.save, contents), Path(out_dir) / "alone.pt")
            times["write"].append(time.perf_counter() - began)
    found: dict[str, Any] = {name: spread(values) for name, values in times.items()}
    wait, lost, write = (found[name]["median"] for name in ("wait", "lost", "write"))
    print(f"writes   {size / 1e6:,.0f} MB; the step waits {wait:.2f} s for the copy")
    print(
        f"lost     {lost:.2f} s a checkpoint, slower steps included: {lost / (250 * median):.2%} of 250 steps"
    )
    print(f"         {write:.2f} s, or {write / (250 * median):.2%}, if steps waited for the disk")
    return found | {"bytes": size, "step": median}


def bench_logs(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """What training loses to all its logs: a line at each step, and loss.png as often as it is redrawn."""
    data = open_data(config)
    model, _, step = our_step(config, data, runtime)
    sequences = config.gradient_accumulation_steps * config.batch_size
    at_peak = model.estimate_mfu(
        sequences, 1.0, peak_flops(runtime.device, runtime.dtype)
    )  # a step's seconds
    times: dict[str, list[float]] = {"step": [], "lines": []}
    with (
        tempfile.TemporaryDirectory(dir=".", prefix="out-bench-") as out_dir,
        open(os.devnull, "w") as screen,
        RunDirectory(Path(out_dir), print) as folder,
        TrainLogger(replace(config, out_dir=out_dir, **ALL_LOGS), runtime, folder, "0", 0, 0.0) as logs,
    ):
        logs.say = functools.partial(print, file=screen, flush=True)

        def timed(what: str, do: Callable[..., object], *given: Any) -> float:
            began = time.perf_counter()
            do(*given)
            synchronize(runtime)
            times[what].append(time.perf_counter() - began)
            return times[what][-1]

        def log(number: int, seconds: float, found: dict[str, float] | None) -> None:
            logs.step(number, 3.0, 1.0, get_lr(number, config), seconds, at_peak / seconds)
            logs.write(number, found)

        for number in range(config.warmup_steps):
            step(number)
        for number in range(config.bench_steps):
            timed("lines", log, number, timed("step", step, number), None)
        timed("lines", logs.flush)
        log(number, 1.0, {"train": 3.0, "val": 3.0})
        while logs.picture and logs.picture.drawing():
            time.sleep(0.1)
        picture = logs.picture.cost if logs.picture else 0.0  # by the child's own clock: steps vary by more
    median, lines = statistics.median(times["step"]), sum(times["lines"]) / config.bench_steps
    often = max(config.eval_interval * median, picture / SHARE)
    cost = lines + picture * median / often
    print(f"step     {median * 1000:,.2f} ms median, {model.get_num_params(False):,} parameters")
    print(f"lines    {lines * 1000:.3f} ms a step, {lines / median:.2%}: screen, log.csv, TensorBoard")
    print(f"picture  {picture * 1000:,.0f} ms of the whole machine, at most every {often:,.0f} s")
    print(f"cost     {cost * 1000:.3f} ms a step, {cost / median:.2%}")
    return {"step": median, "lines": lines, "picture": picture, "cost": cost, "share": cost / median}


def ladder_rungs(config: BenchConfig, meta: dict, runtime: Runtime) -> list[tuple[str, dict[str, Any]]]:
    """What each rung adds to the one below it; the first is plain fp32."""
    on_gpu = runtime.device.type == "cuda"
    rungs = [("fp32, plain", {}), ("TF32" if on_gpu else "oneDNN products", {"products": True})]
    if runtime.dtype != torch.float32:
        rungs.append((str(runtime.dtype).removeprefix("torch."), {"dtype": runtime.dtype}))
    rungs.append(("attention kernel", {"attention": True}))
    if config.dropout and not on_gpu:
        rungs.append(("dropout by bytes", {"dropout": True}))
    if not on_gpu:
        rungs.append(("exact GELU", {"activation": "gelu"}))
    if on_gpu and meta["vocab_size"] == 50257:
        rungs.append(("padded vocabulary", {"padded": True}))
    rungs.append(("fused AdamW", {"fused": True}))
    rungs.append(("compile", {"compile": True}))
    return rungs


class PlainAttention(Attention):
    """Attention as the formula has it: all scores, masked afterwards."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        later = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-2, -1)) * self.scale  # (B, H, T, T)
        return (
            F.dropout(scores.masked_fill(later, -math.inf).softmax(dim=-1), self.dropout, self.training) @ v
        )


def rung_step(config: BenchConfig, data: Dataset, runtime: Runtime, on: dict[str, Any]) -> Step:
    """train.py's step with only the improvements in `on`; the others are replaced in the model."""
    gpt2 = {"activation": on.get("activation", "gelu_tanh"), "optimizer": "adamw", "n_kv_head": None}
    config = replace(config, compile=on.get("compile", False), **gpt2)
    place = replace(runtime, dtype=on.get("dtype", torch.float32))
    padded = on.get("padded", False) or runtime.device.type != "cuda"
    precision = torch.get_float32_matmul_precision() if on.get("products") else "highest"
    plain = {}
    if not on.get("dropout"):
        plain[CPUDropout] = lambda layer: nn.Dropout(layer.p)
    if not on.get("attention"):
        plain |= dict.fromkeys(
            (Attention, CPUAttention), lambda layer: PlainAttention(layer.scale, layer.dropout)
        )
    model, _, step = our_step(config, data, place, on.get("fused", False), padded)
    replace_layers(model, plain)

    def with_precision(number: int) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        step(number)
        torch.set_float32_matmul_precision(before)

    return with_precision


def bench_ladder(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """The speed study of GPT-2's step: each rung beside the one below it, taking turns. Writes a plot.

    A rung's ms are the first's over all gains so far: its own would show how busy the machine was just then.
    """
    data = open_data(config)
    on: dict[str, Any] = {}
    rungs, below, total = [], None, 1.0
    for name, more in ladder_rungs(config, data.meta, runtime):
        on |= more
        step = rung_step(config, data, runtime, dict(on))
        pair = {name: step} if below is None else {"below": below, name: step}
        times = alternate(pair, config.warmup_steps, config.bench_steps, runtime)
        gain = ratio(times["below"], times[name])["median"] if below else 1.0
        total *= gain
        ms = rungs[0]["ms"] / total if below else spread(times[name])["median"] * 1000
        rungs.append({"rung": name, "ms": ms, "gain": gain, "total": total})
        print(f"{name:18} {ms:10.2f} ms   x {gain:.2f}   {total:6.2f} times the first", flush=True)
        below = step
    if runtime.device.type == "cuda":
        cpu = start_runtime("cpu")
        small = replace(config, batch_size=1, compile=False)
        seconds = alternate({"cpu": our_step(small, data, cpu)[2]}, 1, 2, cpu)["cpu"]
        ms = statistics.median(seconds) * 1000 * config.batch_size
        print(f"{'CPU, all but compile':18} {ms:10.2f} ms for as many sequences")
        gain, total = rungs[-1]["ms"] / ms, rungs[0]["ms"] / ms
        rungs.append({"rung": "CPU", "ms": ms, "gain": gain, "total": total})
    plot_ladder(rungs, f"{config.n_layer}/{config.n_head}/{config.n_embd}, {runtime.describe()}")
    return {"rungs": rungs}


def plot_ladder(rungs: list[dict[str, Any]], title: str) -> None:
    """Bars of ms per step, each with its gain over the one above it."""
    pyplot = find_pyplot(PLOT)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rungs) + 1.4), layout="constrained")
    bars = axes.barh([rung["rung"] for rung in rungs], [rung["ms"] for rung in rungs], color="#4477aa")
    axes.bar_label(bars, [f"{rung['ms']:.1f} ms (x {rung['gain']:.2f})" for rung in rungs], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.32)
    axes.set(xlabel="ms per training step; in brackets the gain over the rung above", title=title)
    with writable(PLOT) as file:
        figure.savefig(file, dpi=150)
    print(f"plot     {Path(PLOT).resolve()}")


@torch.no_grad()
def bench_generate(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Prefill and decoding with random weights, one sequence and num_samples, also with 8-bit weights."""
    fit, half = config.block_size - PROMPT, config.block_size // 2
    new = min(256, fit) if config.max_new_tokens is None else config.max_new_tokens
    if not 3 <= new <= fit:
        raise UserError(
            f"block_size={config.block_size} leaves {fit} tokens after a prompt of {PROMPT}, too few for "
            f"max_new_tokens={config.max_new_tokens or 3}; raise --block_size or lower --max_new_tokens"
        )
    data = open_data(config)
    model, _ = initial_model(replace(config, init_from="scratch"), data.meta)
    vocab_size = model.config.vocab_size
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    kinds = {"ours": (False, runtime.dtype.itemsize), "ours, int8": (True, 1)}  # bytes of a weight
    error = compile_error(runtime.device) if config.compile is True else ""
    if error:
        print(f"note     {error}")
    compiled = config.compile is True and not error
    ready = {
        name: optimize_for_inference(copy.deepcopy(model).to(runtime.device), runtime.dtype, int8, compiled)
        for name, (int8, _) in kinds.items()
    }
    runs = [(name, B) for name in kinds for B in sorted({1, config.num_samples})]
    other = others_generate(config.against, config, new, vocab_size, runtime) if config.against else None
    prompt = torch.randint(vocab_size, (1, half), device=runtime.device)

    def seconds(idx: torch.Tensor, m: GPT, count: int, copies: int = 1) -> tuple[float, float, float]:
        """To the first token; from the second to the last; in all. At the second, a GPU records its graph."""
        synchronize(runtime)
        begin = time.perf_counter()
        tokens = stream(m, idx, SamplingParams(0.8, 200), torch.rand(copies, count))
        next(tokens)
        synchronize(runtime)
        first = time.perf_counter()
        next(tokens, None)
        synchronize(runtime)
        second = time.perf_counter()
        for _ in tokens:
            pass
        synchronize(runtime)
        end = time.perf_counter()
        return first - begin, end - second, end - begin

    decode: dict[Any, list[float]] = {run: [] for run in runs}  # tokens/s
    prefill: dict[Any, list[float]] = {run: [] for run in runs}
    whole: dict[str, list[float]] = {"ours": [], "other": []}  # seconds of one sequence
    bandwidths = []
    for number in range(config.rounds + 1):
        for name, B in runs:
            to_first, _, _ = seconds(prompt, ready[name], 1)
            _, rest, all_of_it = seconds(prompt[:, :PROMPT], ready[name], new, B)
            if number == 0:  # a warm-up, for all
                continue
            prefill[name, B].append(half / to_first)
            decode[name, B].append(B * (new - 2) / rest)
            if (name, B) == ("ours", 1):
                whole["ours"].append(all_of_it)
        if other and number:
            begin = time.perf_counter()
            other(prompt[:, :PROMPT])
            synchronize(runtime)
            whole["other"].append(time.perf_counter() - begin)
        bandwidths.append(measured_bandwidth(runtime.device))
    bandwidth = statistics.median(bandwidths)
    print(f"model    {model.get_num_params(False):,} parameters, random; prompt {PROMPT}, then {new} tokens")
    print(f"memory   read at {bandwidth / 1e9:,.0f} GB/s")
    result: dict[str, Any] = {"bandwidth": bandwidth, "runs": []}
    for name, B in runs:
        found = spread(decode[name, B])
        share = found["median"] / B / (bandwidth / (weights * kinds[name][1]))
        prefill_rate = statistics.median(prefill[name, B])
        result["runs"].append(
            {"name": name, "batch": B, "decode": found, "share": share, "prefill": prefill_rate}
        )
        print(
            f"{name + ',':11} batch {B:2}: decode {found['median']:7.1f} tokens/s ({found['low']:.1f} to "
            f"{found['high']:.1f}), {share:.0%} of the bandwidth's limit; prefill {prefill_rate:,.0f} tokens/s"
        )
    if other:
        rates = {name: spread([new / s for s in times]) for name, times in whole.items()}
        result["whole"] = rates
        result["ratio"] = faster = ratio(whole["other"], whole["ours"])
        mine, others = (rates[key]["median"] for key in ("ours", "other"))
        print(f"whole    ours {mine:.1f} tokens/s, {config.against} {others:.1f}, prompt included")
        print(f"ratio    {faster['median']:.1f} times theirs ({faster['low']:.1f} to {faster['high']:.1f})")
    return result


def bench_batch(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """The largest batch that fits, and the fastest that was timed: a table, and flags for both."""
    config = planned_shape(replace(config, max_epochs=None))[0]  # it makes a few steps
    on_gpu = runtime.device.type == "cuda"
    data = open_data(config)._replace(separator=None)  # a small batch may have no target that counts
    room = USABLE * torch.cuda.mem_get_info()[0] if on_gpu else FRAGMENTATION * available_memory()
    place = find_place(replace(config, gpu="here"), runtime, peak=1.0)
    half, shape = runtime.dtype != torch.float32, new_model_config(config, data.meta)
    counts = count(shape, config, half, not place.is_cpu)
    sequences = config.gradient_accumulation_steps * config.batch_size

    def adds_up(batch: int) -> bool:
        return config.n_gpus > 1 or batch < sequences  # to gradients that are there before

    def computed(batch: int) -> Trial:
        split = Split(1, batch, 1 + adds_up(batch), again=config.activation_checkpointing)
        peak = memory(counts, place, split)["peak"]
        return Trial(batch, peak, peak <= room)

    def timed(batch: int) -> float:
        sized = replace(config, batch_size=batch, gradient_accumulation_steps=1)
        step, seconds = step_of(model, optimizers, sized, data, runtime), []
        for number in range(4):
            for p in model.parameters() if adds_up(batch) else ():
                p.grad = torch.zeros_like(p)
            synchronize(runtime)
            begin = time.perf_counter()
            step(number)
            synchronize(runtime)
            seconds.append(time.perf_counter() - begin)
            if sum(seconds[1:]) > 1:
                break
        return statistics.median(seconds[1:])  # the first one is a warm-up

    def attempt(batch: int) -> Trial:
        found = computed(batch)
        try:
            found = found._replace(seconds=timed(batch), fits=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = found._replace(fits=False)
        if on_gpu:
            found = found._replace(memory=torch.cuda.max_memory_allocated()) if found.fits else found
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=True)
        if not found.fits:
            gc.collect()  # what a step that broke off has left
        torch.cuda.empty_cache()  # does nothing where there is none
        give_back_memory()
        return found

    trials = {1: computed(1)}
    if on_gpu or trials[1].fits:
        one = replace(config, batch_size=1, gradient_accumulation_steps=1)
        model, optimizers, _ = our_step(one, data, runtime)
        trials = search(attempt, computed, careful=not on_gpu)
    if not trials[1].fits:
        raise UserError(
            f"one sequence needs {trials[1].memory / 2**30:,.2f} GiB, {room / 2**30:,.2f} can be used; "
            "lower --block_size or --n_embd, or set --activation_checkpointing=True"
        )
    found = found_in(trials, config)
    print("\n".join(table(found, config)))
    return found


def bench_plan(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """What the run would take: on this machine from a few steps measured now, else from data sheets alone."""
    if config.gpu != "here" or config.mfu:
        return plan(config, runtime)
    shown, _, found = planned_shape(config)
    # on a CPU a step of a thousand tokens is enough, and a whole one may be an hour's
    few = shown.batch_size if runtime.device.type == "cuda" else max(1, 1024 // shown.block_size)
    how = {"gradient_accumulation_steps": 1, "batch_size": min(few, shown.batch_size), "real_data": found}
    print("measure  a few steps here:")
    took = bench_step(replace(shown, bench_steps=min(5, shown.bench_steps), warmup_steps=1, **how), runtime)
    return plan(config, runtime, took["steps"]["ours"]["mfu"], took["peak_flops"])


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure what the settings ask for, print it, and return it; written to config.json too."""
    elsewhere = config.plan and config.gpu != "here"
    runtime = start_runtime("cpu" if elsewhere else config.device, config.dtype)
    ways = {"plan": bench_plan, "ladder": bench_ladder, "generate": bench_generate}
    ways |= {"checkpoint": bench_checkpoint, "logs": bench_logs, "find_batch": bench_batch}
    ways |= {"questions": bench_questions, "serve": bench_serve, "check": bench_check, "profile": bench_step}
    ways["report"] = bench_report
    modes = [name for name in ways if getattr(config, name)]
    measure = ways[modes[0]] if modes else bench_step
    modes += (
        ["against"] if config.against and measure not in (bench_step, bench_generate, bench_report) else []
    )
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} do not go together; give one at a time")
    if config.json:
        with writable(config.json):  # before an hour of measuring
            pass
    if config.batch_size is None:
        config.batch_size = 1 if runtime.device.type == "cpu" and not elsewhere else 12
    if not elsewhere:
        print(f"machine  {runtime.describe()}, torch {torch.__version__}")
    if not (config.generate or config.serve):
        enable_onednn_float32(runtime)
    result = measure(config, runtime)
    result |= {"device": runtime.describe(), "torch": torch.__version__, "settings": asdict(config)}
    if config.json:
        with writable(config.json) as file:
            Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    with cli_errors():
        bench(CONFIG)
