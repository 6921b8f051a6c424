"""Smaller benchmarks: the ladder of improvements, the cost of checkpoints and logs, batched multiple
choice."""

import contextlib
import importlib.util
import io
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from distrogpt.benchmark import timing
from distrogpt.benchmark.training import (
    Trainer,
    TrainingStep,
    describe,
    describe_network,
    new_model,
    recipe_of,
)
from distrogpt.checkpoint import NEWEST, atomic_write, training_state
from distrogpt.data.dataset import Dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.evaluation.multiple_choice import Question, answer_multiple_choice
from distrogpt.kernels import replace_layers
from distrogpt.kernels.block import CPUBlock, unfuse
from distrogpt.kernels.cpu import CPUAttention, CPUDropout, to_device
from distrogpt.plotting import COLORS, INK, new_figure, style_axes, write_figure
from distrogpt.runtime import Runtime, start_runtime
from distrogpt.settings import RECIPE, BenchConfig
from distrogpt.training.logger import DRAWING_INTERVAL, TrainLogger
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.startup import new_model_config
from distrogpt.training.state import TrainState
from model import GPT, Attention

PLOT = "bench_ladder.png"
COUNT = 48  # questions per round
BATCHES = (1, 4, 16, COUNT)


def ladder_rungs(config: BenchConfig, data: Dataset, runtime: Runtime) -> dict[str, dict[str, Any]]:
    """The rungs, and what each adds to the previous ones: from GPT-2 with AdamW in plain fp32 to the
    settings."""
    on_gpu = runtime.device.type == "cuda"
    first = {"dropout": True} if on_gpu else {"padded": True}  # not rungs on this device
    rungs = {"fp32, plain": first, "TF32" if on_gpu else "oneDNN matmul": {"products": True}}
    if runtime.dtype != torch.float32:
        rungs[timing.dtype_name(runtime.dtype)] = {"dtype": runtime.dtype}
    rungs["faster attention"] = {"attention": True}
    if config.dropout and not on_gpu:
        rungs["byte-mask dropout"] = {"dropout": True}
    if on_gpu and data.meta["vocab_size"] == 50257:
        rungs["padded vocabulary"] = {"padded": True}
    rungs["fused AdamW"] = {"fused": True}
    rungs |= {f"{name}={value}": {name: value} for name, value in recipe_of(config).items()}
    model = new_model(config, data, runtime)
    if isinstance(model.transformer.h[0], CPUBlock) and runtime.dtype == torch.bfloat16:
        rungs["fused blocks"] = {"blocks": True}
    if model.is_compiled:
        rungs["compile"] = {"compile": True}
    return rungs


class PlainAttention(Attention):
    """Attention by the formula: all scores are computed, then masked."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        later = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.transpose(-2, -1) * self.scale).masked_fill(later, -math.inf).softmax(dim=-1)
        return F.dropout(weights, self.dropout, self.training) @ v  # (B, H, T, D)


def rung_step(
    training_step: TrainingStep, config: BenchConfig, data: Dataset, runtime: Runtime, on: dict[str, Any]
) -> timing.Step:
    """The training step of GPT-2 with AdamW, in the settings' size, with only the improvements `on`."""
    recipe = {name: on.get(name, getattr(BenchConfig, name)) for name in RECIPE}
    config = replace(config, compile=on.get("compile", False), **recipe)
    runtime = replace(runtime, dtype=on.get("dtype", torch.float32))
    model, plain = new_model(config, data, runtime, padded=on.get("padded", False)), {}
    if not on.get("dropout"):
        plain[CPUDropout] = lambda layer: nn.Dropout(layer.p)
    if not on.get("attention"):
        plain[Attention] = plain[CPUAttention] = lambda layer: PlainAttention(layer.scale, layer.dropout)
    if not on.get("blocks"):
        plain[CPUBlock] = unfuse
    trainer = Trainer(training_step, config, data, runtime, replace_layers(model, plain))
    if not on.get("fused"):  # one kernel for each parameter and operation
        keys, betas = ("params", "weight_decay"), (config.beta1, config.beta2)
        groups = [{key: group[key] for key in keys} for group in trainer.optimizers[0].param_groups]
        trainer.optimizers = [torch.optim.AdamW(groups, config.learning_rate, betas, fused=False)]
    precision = torch.get_float32_matmul_precision() if on.get("products") else "highest"
    return timing.float32_precision(precision)(trainer)


def bench_ladder(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Time each rung in turns with the previous one, and plot them. The ms of a rung are those of the first
    rung divided by all gains, so that the load of the machine, which varies, does not distort them."""
    data, on = timing.open_data(config), {}
    rungs, below, total = [], None, 1.0
    todo = ladder_rungs(config, data, runtime)
    size = f"{config.n_layer}/{config.n_head}/{config.n_embd}"
    print(f"ladder   from GPT-2 {size}; AdamW; plain float32")
    print(f"         to {describe(config, runtime, 'compile' in todo)}")
    print(f"{'rung':22} {'ms/step':>10}      gain   total gain")
    for name, improvement in todo.items():
        on |= improvement
        step = rung_step(training_step, config, data, runtime, on)
        pair: dict[str, timing.Step] = {name: step} if below is None else {"below": below, name: step}
        times = timing.alternate(pair, config.warmup_steps, config.bench_steps, runtime)
        gain = timing.ratio(times["below"], times[name])["median"] if below else 1.0
        total *= gain
        ms = rungs[0]["ms"] / total if below else statistics.median(times[name]) * 1000
        rungs.append({"rung": name, "ms": ms, "gain": gain, "total": total})
        print(f"{name:22} {ms:10.2f}   x {gain:5.2f}      x {total:5.2f}", flush=True)
        below = step
    if runtime.device.type == "cuda":
        cpu = start_runtime("cpu")
        trainer = Trainer(training_step, replace(config, batch_size=1, compile=False), data, cpu)
        ms = statistics.median(timing.alternate({"": trainer}, 1, 2, cpu)[""]) * 1000 * config.batch_size
        print(f"{'CPU, not compiled':22} {ms:10.2f}   for the same number of sequences")
        rungs.append({"rung": "CPU", "ms": ms, "gain": rungs[-1]["ms"] / ms, "total": rungs[0]["ms"] / ms})
    plot_ladder(rungs, f"GPT-2 {size}, {runtime.describe()}")
    return {"rungs": rungs}


def plot_ladder(rungs: list[dict[str, Any]], title: str) -> None:
    """Write the picture of a ladder into the current folder."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"note     {PLOT} is not drawn without matplotlib; run: pip install matplotlib")
        return
    write_figure(draw_ladder(rungs, title), Path(PLOT), dpi=150)
    print(f"plot     {Path(PLOT).resolve()}")


def draw_ladder(rungs: list[dict[str, Any]], subtitle: str) -> Any:
    """A figure with bars of ms per step, each with its gain over the one above it."""
    figure = new_figure(8, 0.45 * len(rungs) + 1.6, "What each improvement gains")
    axes = figure.subplots()
    labels = [f"{rung['ms']:.1f} ms  (\u00d7 {rung['gain']:.2f})" for rung in rungs]
    bars = axes.barh([rung["rung"] for rung in rungs], [rung["ms"] for rung in rungs], color=COLORS[0])
    axes.bar_label(bars, labels, padding=5, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    xlabel = "milliseconds per training step (\u00d7: speedup over the bar above)"
    style_axes(axes, xlabel, subtitle=subtitle, grid="x")
    return figure


@contextlib.contextmanager
def temporary_run(config: BenchConfig, runtime: Runtime) -> Iterator[RunDirectory]:
    """A run in a temporary folder of the working directory. Its output is hidden."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory(dir=".", prefix="out-bench-") as out_dir,
        RunDirectory(replace(config, out_dir=out_dir), runtime) as run,
    ):
        yield run


def bench_checkpoint(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """The cost of a checkpoint: a step waits for the copy, and steps are slower while it is written."""
    trainer = Trainer(training_step, config, timing.open_data(config), runtime)
    times = timing.alternate({"ours": trainer}, config.warmup_steps, config.bench_steps, runtime)["ours"]
    step = statistics.median(times)
    costs: dict[str, list[float]] = {"wait": [], "lost": [], "write": []}
    print(f"step     {step * 1000:,.1f} ms median, {trainer.describe()}")

    state = TrainState()
    state.val_loss = 3.0  # as after an evaluation
    with temporary_run(config, runtime) as run:
        out_dir = Path(run.config.out_dir)
        for _ in range(config.rounds):
            begin, n_steps = time.perf_counter(), 0
            run.save(trainer.model, trainer.optimizers, trainer.scaler, state)
            costs["wait"].append(time.perf_counter() - begin)
            while run.save_thread.is_alive():
                trainer()
                timing.synchronize(runtime)
                n_steps += 1
            costs["lost"].append(time.perf_counter() - begin - n_steps * step)
            begin = time.perf_counter()
            contents = training_state(trainer.model, trainer.optimizers, iter_num=0, best_val_loss=math.inf)
            atomic_write(partial(torch.save, contents), out_dir / "alone.pt")
            costs["write"].append(time.perf_counter() - begin)
        size = (out_dir / NEWEST).stat().st_size
    result: dict[str, Any] = {name: timing.spread(values) for name, values in costs.items()}
    wait, lost, write = (result[name]["median"] for name in costs)
    print(f"writes   {size / 1e6:,.0f} MB; a step waits {wait:.2f} s for the copy")
    print(
        f"cost     {lost:.2f} s per checkpoint, with slower steps: {lost / (250 * step):.2%} of 250 steps\n"
        f"         {write:.2f} s, or {write / (250 * step):.2%}, if training waited for the disk"
    )
    return {**result, "bytes": size, "step": step}


def bench_logs(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """The cost of all logs: a line per step, and loss.png after evaluations."""
    trainer = Trainer(training_step, config, timing.open_data(config), runtime)
    config = replace(config, log_interval=1, tensorboard_log=True, loss_plot=True)
    state = TrainState()
    steps, lines = [], []

    def log(losses: dict[str, float] | None) -> None:
        state.step += 1
        logger.log_step(loss=3.0, grad_norm=1.0, lr=1e-3, applied=True)
        logger.write(losses)

    with (
        temporary_run(config, runtime) as run,
        TrainLogger(run, state, trainer.model) as logger,
    ):
        for _ in range(config.warmup_steps):
            trainer()
        for _ in range(config.bench_steps):
            steps.append(timing.seconds_of(trainer, runtime=runtime))
            lines.append(timing.seconds_of(log, None, runtime=runtime))
        begin = sum(os.times()[2:4])  # CPU time of the plotting process; the steps' times vary by more
        log({"train": 3.0, "val": 3.0})
        if logger.plot:
            logger.plot.finish(60)
        picture = (sum(os.times()[2:4]) - begin) / (os.cpu_count() or 1)
    step, line = statistics.median(steps), statistics.mean(lines)
    interval = max(config.eval_interval * step, DRAWING_INTERVAL)  # seconds between two plots
    cost = line + picture * step / interval
    print(f"step     {step * 1000:,.2f} ms median, {trainer.describe()}")
    print(f"lines    {line * 1000:.3f} ms per step, {line / step:.2%}: screen, log.csv, TensorBoard")
    print(f"plot     {picture * 1000:,.0f} ms of all CPU cores, every {interval:,.0f} s")
    print(f"cost     {cost * 1000:.3f} ms per step, {cost / step:.2%}")
    return {"step": step, "lines": line, "picture": picture, "cost": cost, "share": cost / step}


def random_questions(count: int, block_size: int) -> list[Question]:
    """Questions of random token ids, as long as HellaSwag's or as block_size allows, grouped by length."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        n = min(rng.randint(low, high), max(1, block_size // 2))
        return [rng.randrange(GPT2_META["vocab_size"]) for _ in range(n)]

    many = [Question(ids(20, 90), [ids(8, 40) for _ in range(4)], 0) for _ in range(100 * count)]
    many.sort(key=lambda question: len(question.context) + sum(map(len, question.endings)))
    return [question for percent in (20, 50, 80) for question in many[percent * count :][: count // 3]]


@torch.no_grad()
def one_by_one(model: GPT, questions: list[Question], runtime: Runtime) -> list[list[int]]:
    """The choices by the plain method: one question at a time, its four endings as padded rows."""
    chosen = []
    for context, endings, _ in questions:
        ids = [torch.tensor(context + ending) for ending in endings]
        rows = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(runtime.device)  # (4, T)
        mask = [torch.arange(1, rows.size(1)).lt(len(row)) for row in ids]
        mask = torch.stack(mask).to(runtime.device)  # (4, T - 1)
        mask[:, : len(context) - 1] = False
        with runtime.autocast():
            logits, _ = model(rows[:, :-1], rows[:, 1:].contiguous())
            losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        sums = (losses.view(mask.shape) * mask).sum(dim=1)
        chosen.append([int(sums.argmin()), int((sums / mask.sum(dim=1)).argmin())])
    return chosen


def bench_questions(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Time multiple choice in batches and one question at a time, in turns, with random weights."""
    torch.manual_seed(config.seed)
    shape = replace(new_model_config(config, GPT2_META), zero_init=False)  # or all endings would be equal
    model = to_device(GPT(shape), runtime.device).eval()
    what = f"{describe_network(config)}; {timing.dtype_name(runtime.dtype)}"
    print(f"model    {model.get_num_params(False):,} parameters, random weights: {what}")
    questions, chosen = random_questions(COUNT, config.block_size), {}
    ways = {"one by one": one_by_one}
    ways |= {f"batches of {size}": partial(answer_multiple_choice, batch_size=size) for size in BATCHES}

    def answer(name: str) -> None:
        chosen[name] = ways[name](model, questions, runtime)

    times = timing.alternate({name: partial(answer, name) for name in ways}, 1, config.rounds, runtime)
    result: dict[str, Any] = {}
    for name, seconds in times.items():
        rate, gain = timing.spread([COUNT / s for s in seconds]), timing.ratio(times["one by one"], seconds)
        same = sum(list(a) == list(b) for a, b in zip(chosen[name], chosen["one by one"], strict=True))
        result[name] = {"questions_per_second": rate, "gain": gain, "same": same / COUNT}
        print(
            f"{name:14} {rate['median']:8.2f} questions/s, {gain['median']:.2f} times the speed "
            f"{timing.quartiles(gain)}, same answers: {same} of {COUNT}"
        )
    return result
