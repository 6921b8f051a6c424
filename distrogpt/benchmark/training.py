"""Time train.py's training step, alone or in turns with another implementation's: nanoGPT from a checkout, or
transformers' GPT-2."""

import importlib.util
import math
import os
import sys
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Module

from distrogpt.benchmark import timing
from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError, writable
from distrogpt.hardware import measured_flops, peak_flops
from distrogpt.kernels.compile import maybe_compile
from distrogpt.kernels.cpu import to_device
from distrogpt.runtime import Runtime
from distrogpt.settings import RECIPE, BenchConfig
from distrogpt.training.batches import BatchLoader, MicroBatch
from distrogpt.training.distributed import steps_to_expect
from distrogpt.training.minutes import has_a_size
from distrogpt.training.optim import make_optimizers
from distrogpt.training.startup import initial_model, resolve_max_iters, samples_per_step
from model import GPT, GPTConfig

HF = "transformers"
TRACE = "bench_trace.json"
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
# layers, heads, width (Radford et al., 2019)
GPT2_SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024)}
GPT2_SHAPES |= {"gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
TrainingStep = Callable[..., Any]  # train.py's, passed by bench.py, as the package imports no command


def with_gpt2_shape(config: BenchConfig) -> BenchConfig:
    """The settings with GPT-2's shape if init_from names one. Raises UserError if the shape is in a file."""
    source = config.init_from.removeprefix("auto:")
    if source in GPT2_SHAPES and config.minutes is not None:
        raise has_a_size(config)
    if source in GPT2_SHAPES:
        layers, heads, width = GPT2_SHAPES[source]
        gpt2 = {name: getattr(BenchConfig, name) for name in RECIPE}
        gpt2 |= {"bias": True, "optimizer": config.optimizer}
        return replace(config, init_from="scratch", n_layer=layers, n_head=heads, n_embd=width, **gpt2)
    if source not in ("scratch", "resume", "auto"):
        advice = "set --n_layer, --n_head, --n_embd and --init_from=scratch"
        raise UserError(f"bench.py cannot read the shape of init_from={config.init_from}; {advice}")
    return config


def recipe_of(config: BenchConfig) -> dict[str, Any]:
    """The settings of the network and the optimizer that differ from GPT-2 with AdamW."""
    values = {name: getattr(config, name) for name in RECIPE}
    return {name: value for name, value in values.items() if value != getattr(BenchConfig, name)}


def describe_network(config: BenchConfig) -> str:
    parts = [f"{name}={value}" for name, value in recipe_of(config).items() if name != "optimizer"]
    return f"GPT-2 with {', '.join(parts)}" if parts else "GPT-2"


def recipe_line(config: BenchConfig) -> str:
    """The line of network and optimizer."""
    line = f"recipe   {describe_network(config)}; {OPTIMIZERS[config.optimizer]}"
    return textwrap.fill(line, 110, subsequent_indent=9 * " ")


def describe(config: BenchConfig, runtime: Runtime, compiled: bool) -> str:
    """The timed training step: network, optimizer, compute dtype, and whether it is compiled."""
    how = "compiled" if compiled else "not compiled"
    words = (describe_network(config), OPTIMIZERS[config.optimizer], timing.dtype_name(runtime.dtype), how)
    return "; ".join(words)


@dataclass
class Trainer:
    """A model and its optimizers; each call is a training step on the next batch of `data`."""

    training_step: TrainingStep
    config: BenchConfig
    data: Dataset | None
    runtime: Runtime
    model: Module | None = None  # None: a new one, as train.py makes it
    optimizers: list[torch.optim.Optimizer] | None = None  # None: those of train.py

    def __post_init__(self) -> None:
        if self.model is None:
            self.model = new_model(self.config, self.data, self.runtime)
        if self.optimizers is None:
            plain = getattr(self.model, "module", self.model)  # without DDP
            self.optimizers = make_optimizers(plain, self.config, self.runtime)
        self.scaler = self.runtime.grad_scaler()
        if self.data is not None:
            self.batches = BatchLoader(self.data, self.config, self.runtime, 0)

    def describe(self) -> str:
        """The model's size, and the timed training step."""
        what = describe(self.config, self.runtime, self.model.is_compiled)
        return f"{self.model.get_num_params(False):,} parameters: {what}"

    def train(self, batches: BatchLoader | list[MicroBatch]) -> Any:
        """One step on these micro-batches."""
        settings = (self.config.grad_clip, self.runtime)
        return self.training_step(self.model, self.optimizers, self.scaler, batches, *settings)

    def __call__(self) -> Any:
        return self.train(self.batches)


def new_weights(config: BenchConfig, data: Dataset) -> GPT:
    """A model of the settings' shape with random weights, on the CPU."""
    return initial_model(replace(config, init_from="scratch"), data.meta)[0]


def new_model(config: BenchConfig, data: Dataset, runtime: Runtime, padded: bool = True) -> GPT:
    """A model with random weights on its device, compiled if train.py would."""
    model = new_weights(config, data)
    if not padded:  # GPT-2's vocabulary
        model = GPT(replace(model.config, vocab_size=data.meta["vocab_size"]))
    model.activation_checkpointing = config.activation_checkpointing
    steps = steps_to_expect(resolve_max_iters(config, data))
    model.is_compiled = maybe_compile(model, config.compile, runtime.device, steps)
    return to_device(model, runtime.device).train()


class HuggingFaceGPT2(Module):
    """transformers' GPT-2 with nanoGPT's interface. Raises UserError."""

    def __init__(self, config: BenchConfig, vocab_size: int) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            raise UserError("transformers is not installed; run: pip install transformers") from None

        shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        shape |= {"bos_token_id": None, "eos_token_id": None, "n_positions": config.block_size}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gpt2(idx, use_cache=False).logits  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay: float, lr: float, betas: tuple, device_type: str) -> Any:
        return torch.optim.AdamW(self.parameters(), lr, betas, weight_decay=weight_decay)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **sampling: float) -> torch.Tensor:
        lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "eos_token_id": None}
        return self.gpt2.generate(idx, do_sample=True, pad_token_id=0, **lengths, **sampling)


def baseline_model(config: BenchConfig, vocab_size: int) -> Module:
    """nanoGPT's GPT from the checkout config.against, or transformers' GPT-2. Raises UserError."""
    if config.against == HF:
        return HuggingFaceGPT2(config, vocab_size)
    path = Path(config.against) / "model.py"
    spec = importlib.util.spec_from_file_location("baseline", path)
    module = sys.modules["baseline"] = importlib.util.module_from_spec(spec)
    names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    try:
        with redirect_stdout(None):
            spec.loader.exec_module(module)
            shape = {name: getattr(config, name) for name in names}
            return module.GPT(module.GPTConfig(vocab_size=vocab_size, **shape))
    except Exception as error:  # of any kind, as the file can be any
        raise UserError(f"{path} is not nanoGPT's ({error}); give the folder of a nanoGPT checkout") from None


def default_precision(runtime: Runtime) -> AbstractContextManager:
    """torch's default fp32 matmul on a CPU, as enable_onednn_float32 is part of our implementation."""
    on_cpu = runtime.device.type == "cpu"
    return timing.float32_precision("highest" if on_cpu else torch.get_float32_matmul_precision())


def baseline_step(
    model: Module, optimizers: list, scaler: object, batches: BatchLoader, grad_clip: float, runtime: Runtime
) -> None:
    """A training step as nanoGPT does it, without loss scaling."""
    with default_precision(runtime):
        for x, y, *_ in batches:
            with runtime.autocast():
                _, loss = model(x, y.contiguous())
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)


def baseline_trainer(config: BenchConfig, data: Dataset, vocab_size: int, runtime: Runtime) -> Trainer:
    """The model of config.against: fp32 on CPUs, autocast and compiled on GPUs."""
    model, device = baseline_model(config, vocab_size).to(runtime.device).train(), runtime.device
    settings = (config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type)
    with redirect_stdout(None):
        optimizer = model.configure_optimizers(*settings)
    if device.type == "cuda":
        model.is_compiled = maybe_compile(model, config.compile, device, config.max_iters)
    else:
        model.is_compiled, runtime = False, replace(runtime, dtype=torch.float32)
    return Trainer(baseline_step, config, data, runtime, model, [optimizer])


def gpt2_flops_per_token(shape: GPTConfig) -> int:
    """FLOPs per token of a training step of GPT-2 in this size."""
    gpt2 = {name: getattr(GPTConfig, name) for name in RECIPE if name != "optimizer"}
    with torch.device("meta"):
        return GPT(replace(shape, **gpt2)).flops_per_token()


def baseline_name(config: BenchConfig) -> str:
    """The baseline's name in tables."""
    name = HF if config.against == HF else Path(config.against).resolve().name
    return "theirs" if name in ("", "ours") else name


def print_other_side(config: BenchConfig, runtime: Runtime, compiled: bool | None) -> None:
    """Print the baseline's network and dtype, and a note of settings that it does not support. `compiled` is
    None if it does not train."""
    name, recipe = baseline_name(config), recipe_of(config)
    has = {"bias": True} if config.against == HF else {"bias": config.bias, "activation": "gelu"}
    gpt2 = replace(config, **{name: has.get(name, getattr(BenchConfig, name)) for name in RECIPE})
    if compiled is None:
        recipe.pop("optimizer", None)
        print(f"{name:8} {describe_network(gpt2)}; {timing.dtype_name(runtime.dtype)}")
    else:
        print(f"{name:8} {describe(gpt2, runtime, compiled)}")
    lacks = [f"{key}={value}" for key, value in recipe.items() if getattr(gpt2, key) != value]
    if lacks:
        unsupported = ", ".join(lacks)
        print(f"note     {name} does not support {unsupported}: timed as GPT-2 of the same size")


def baseline_generate(
    config: BenchConfig, max_new_tokens: int, vocab_size: int, runtime: Runtime
) -> tuple[Callable[[torch.Tensor], None], Runtime]:
    """A function that samples tokens after a prompt (1, T) as nanoGPT's sample.py does, and the runtime with
    its compute dtype: ours with transformers, fp32 with nanoGPT on CPUs."""
    model = baseline_model(config, vocab_size).to(runtime.device).eval()
    float32 = replace(runtime, dtype=torch.float32)  # without autocast
    theirs = runtime if config.against == HF or runtime.device.type != "cpu" else float32
    if config.against == HF:
        model.to(runtime.dtype)
        runtime = float32
    else:
        runtime = theirs

    def generate(idx: torch.Tensor) -> None:
        with default_precision(runtime), runtime.autocast():
            model.generate(idx, max_new_tokens, temperature=0.8, top_k=200)

    return generate, theirs


def profile(step: timing.Step, runtime: Runtime) -> None:
    """Print the most expensive operations of three steps, and write a trace of all of them."""
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
        for _ in range(3):
            step()
        timing.synchronize(runtime)
    order = "self_cuda_time_total" if runtime.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
    with writable(TRACE):
        temporary = f"{TRACE}.{os.getpid()}.part"
        profiler.export_chrome_trace(temporary)
        os.replace(temporary, TRACE)
    print(f"trace    {Path(TRACE).resolve()}: open it at chrome://tracing or https://ui.perfetto.dev")


def bench_step(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Measure time, speed, MFU and memory of the training step, in turns with the baseline's if given."""
    data = timing.open_data(config)
    trainer = Trainer(training_step, config, data, runtime)
    model, steps, memory = trainer.model, {"ours": trainer}, None
    if config.against:
        for _ in range(2):  # the peak of our model alone, before the baseline is built
            trainer()
        memory = timing.peak_memory(runtime)
        name = baseline_name(config)
        steps[name] = theirs = baseline_trainer(config, data, model.config.vocab_size, runtime)
    times = timing.alternate(steps, config.warmup_steps, config.bench_steps, runtime)
    memory = memory or timing.peak_memory(runtime)  # before peak_flops, which needs memory too
    peak, shape, sequences = peak_flops(runtime.device, runtime.dtype), model.config, samples_per_step(config)
    tokens, size = sequences * config.block_size, f"{shape.n_layer}/{shape.n_head}/{shape.n_embd}"
    print(f"model    {size}, {trainer.describe()}")
    if config.against:
        print_other_side(config, theirs.runtime, theirs.model.is_compiled)
    print(f"step     {sequences} sequences of {config.block_size} = {tokens:,} tokens")
    results = {}
    for label, seconds in times.items():
        results[label] = step = timing.spread(seconds)
        step["tokens_per_second"] = tokens / step["median"]
        flops = model.flops_per_token() if label == "ours" else gpt2_flops_per_token(shape)
        step["flops"] = flops * step["tokens_per_second"]
        step["mfu"] = step["flops"] / peak
        if len(times) > 1:
            print(f"{label}:")
        low, high = step["low"] * 1000, step["high"] * 1000
        print(f"time     {step['median'] * 1000:.2f} ms median (quartiles {low:.2f} to {high:.2f})")
        print(f"speed    {step['tokens_per_second']:,.0f} tokens/s, {step['flops'] / 1e9:,.0f} GFLOP/s")
        print(f"mfu      {step['mfu']:.1%} of {peak / 1e9:,.0f} GFLOP/s")
    result = {"tokens": tokens, "memory_bytes": memory, "peak_flops": peak, "steps": results}
    if runtime.device.type == "cuda":
        result["measured_flops"] = product = measured_flops(runtime.device, runtime.dtype)
        mfu = results["ours"]["flops"] / product
        print(f"         {mfu:.1%} of the {product / 1e9:,.0f} GFLOP/s of a matmul, measured")
    if config.against:
        result["ratio"] = gain = timing.ratio(times[name], times["ours"])
        print(f"ratio    {gain['median']:.2f} times {name}'s speed {timing.quartiles(gain)}")
    if memory:
        where = "peak on the GPU" if runtime.device.type == "cuda" else "peak, resident"
        print(f"memory   {memory / 2**30:.2f} GiB {where}")
    if config.profile:
        profile(trainer, runtime)
    return result
