"""The speed study of GPT-2's training step: one improvement after another, each next to the one before it."""

import importlib.util
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from distrogpt.benchmark import timing
from distrogpt.benchmark.training import Trainer, TrainingStep, new_model
from distrogpt.data.dataset import Dataset
from distrogpt.kernels import replace_layers
from distrogpt.kernels.cpu import CPUAttention, CPUDropout
from distrogpt.plotting import new_figure, write_figure
from distrogpt.runtime import Runtime, start_runtime
from distrogpt.settings import BenchConfig
from model import Attention

PLOT = "bench_ladder.png"


def ladder_rungs(config: BenchConfig, meta: dict, runtime: Runtime) -> dict[str, dict[str, Any]]:
    """What each rung adds to those below it; the first is plain fp32."""
    on_gpu = runtime.device.type == "cuda"
    first = {"dropout": True} if on_gpu else {"padded": True}  # no rungs there
    rungs = {"fp32, plain": first, "TF32" if on_gpu else "oneDNN products": {"products": True}}
    if runtime.dtype != torch.float32:
        rungs[timing.dtype_name(runtime.dtype)] = {"dtype": runtime.dtype}
    rungs["attention kernel"] = {"attention": True}
    if config.dropout and not on_gpu:
        rungs["dropout by bytes"] = {"dropout": True}
    if not on_gpu:
        rungs["exact GELU"] = {"activation": "gelu"}
    if on_gpu and meta["vocab_size"] == 50257:
        rungs["padded vocabulary"] = {"padded": True}
    return {**rungs, "fused AdamW": {"fused": True}, "compile": {"compile": True}}


class PlainAttention(Attention):
    """Attention as in the formula: all scores, masked afterwards."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        later = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
        weights = (q @ k.transpose(-2, -1) * self.scale).masked_fill(later, -math.inf).softmax(dim=-1)
        return F.dropout(weights, self.dropout, self.training) @ v  # (B, H, T, D)


def rung_step(
    training_step: TrainingStep, config: BenchConfig, data: Dataset, runtime: Runtime, on: dict[str, Any]
) -> timing.Step:
    """GPT-2's training step with the improvements `on` alone."""
    gpt2 = {"activation": on.get("activation", "gelu_tanh"), "optimizer": "adamw", "n_kv_head": None}
    config = replace(config, compile=on.get("compile", False), **gpt2)
    runtime = replace(runtime, dtype=on.get("dtype", torch.float32))
    model, plain = new_model(config, data, runtime, padded=on.get("padded", False)), {}
    if not on.get("dropout"):
        plain[CPUDropout] = lambda layer: nn.Dropout(layer.p)
    if not on.get("attention"):
        plain[Attention] = plain[CPUAttention] = lambda layer: PlainAttention(layer.scale, layer.dropout)
    trainer = Trainer(training_step, config, data, runtime, replace_layers(model, plain))
    if not on.get("fused"):  # one kernel for each parameter and operation
        keys, betas = ("params", "weight_decay"), (config.beta1, config.beta2)
        groups = [{key: group[key] for key in keys} for group in trainer.optimizers[0].param_groups]
        trainer.optimizers = [torch.optim.AdamW(groups, config.learning_rate, betas, fused=False)]
    precision = torch.get_float32_matmul_precision() if on.get("products") else "highest"
    return timing.float32_precision(precision)(trainer)


def bench_ladder(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Time each rung in turns with the one below it, and plot them.

    A rung's ms are the first one's divided by all gains so far: measured later, on a busier machine, it would
    seem slower.
    """
    data, on = timing.open_data(config), {}
    rungs, below, total = [], None, 1.0
    for name, improvement in ladder_rungs(config, data.meta, runtime).items():
        on |= improvement
        step = rung_step(training_step, config, data, runtime, on)
        pair: dict[str, timing.Step] = {name: step} if below is None else {"below": below, name: step}
        times = timing.alternate(pair, config.warmup_steps, config.bench_steps, runtime)
        gain = timing.ratio(times["below"], times[name])["median"] if below else 1.0
        total *= gain
        ms = rungs[0]["ms"] / total if below else timing.spread(times[name])["median"] * 1000
        rungs.append({"rung": name, "ms": ms, "gain": gain, "total": total})
        print(f"{name:18} {ms:10.2f} ms   x {gain:.2f}   {total:6.2f} times the first", flush=True)
        below = step
    if runtime.device.type == "cuda":
        cpu = start_runtime("cpu")
        small = replace(config, batch_size=1, compile=False)
        trainer = Trainer(training_step, small, data, cpu)
        ms = statistics.median(timing.alternate({"": trainer}, 1, 2, cpu)[""]) * 1000 * config.batch_size
        print(f"{'CPU, all but compile':18} {ms:10.2f} ms for as many sequences")
        rungs.append({"rung": "CPU", "ms": ms, "gain": rungs[-1]["ms"] / ms, "total": rungs[0]["ms"] / ms})
    plot_ladder(rungs, f"{config.n_layer}/{config.n_head}/{config.n_embd}, {runtime.describe()}")
    return {"rungs": rungs}


def plot_ladder(rungs: list[dict[str, Any]], title: str) -> None:
    """Bars of ms per step, each with its gain over the one above it."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"note     no {PLOT}: pip install matplotlib")
        return
    figure = new_figure(8, 0.45 * len(rungs) + 1.4)
    axes = figure.subplots()
    bars = axes.barh([rung["rung"] for rung in rungs], [rung["ms"] for rung in rungs], color="#4477aa")
    axes.bar_label(bars, [f"{rung['ms']:.1f} ms (x {rung['gain']:.2f})" for rung in rungs], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.32)
    axes.set(xlabel="ms per training step; in brackets the gain over the rung above", title=title)
    write_figure(figure, Path(PLOT), dpi=150)
    print(f"plot     {Path(PLOT).resolve()}")
