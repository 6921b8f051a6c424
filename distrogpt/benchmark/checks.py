"""Checks of this machine for bench.py --report=True, each also by itself: python bench.py --check=network

Every check compares what a user relies on with a reference: another device, another code path, an unbroken
run. A check returns rows; a row with a limit passes if its value is not above it.
"""

import copy
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from distrogpt.benchmark.plan import Split, count, find_place, memory
from distrogpt.benchmark.timing import alternate, open_data, peak_memory, spread
from distrogpt.checkpoint import NEWEST, load_checkpoint
from distrogpt.errors import UserError
from distrogpt.hardware import measured_bandwidth, measured_flops, peak_flops
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.kernels.compile import compile_error
from distrogpt.kernels.cpu import to_device
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.batches import MicroBatch
from distrogpt.training.distributed import full_tensor, wrap_distributed
from distrogpt.training.optim import clip_gradients, make_optimizers
from distrogpt.training.startup import new_model_config
from model import GPT, GPTConfig
from train import training_step

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"block_size": 256, "vocab_size": 1024, "n_layer": 4, "n_head": 4, "n_embd": 256}
RECIPE = {  # as in config/train_gpt2_modern.py, but for zero_init, which would hide most of a gradient
    "norm": "rmsnorm",
    "rotary": True,
    "qk_norm": True,
    "activation": "relu2",
    "n_kv_head": 2,
    "tied": False,
    "logit_softcap": 15.0,
    "embedding_skip": True,
}
NETWORKS = {"GPT-2": {}, "modern": RECIPE}


class Row(NamedTuple):
    """What was compared, the result, and the largest value that passes; None: the value informs."""

    what: str
    value: float | str
    limit: float | None = None

    @property
    def passes(self) -> bool:
        return self.limit is None or bool(self.value <= self.limit)


def bench_check(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Run one check, print its rows, and return them."""
    rows = CHECKS[config.check](config, runtime)
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.2e}"
        limit = "" if row.limit is None else f", at most {row.limit:g}: {'ok' if row.passes else 'FAILED'}"
        print(f"{row.what:62} {value}{limit}")
    return {"rows": [row._asdict() | {"passes": row.passes} for row in rows]}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm of what is expected."""
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


@contextmanager
def exact_float32() -> Iterator[None]:
    """fp32 products without TF32 or bf16 in them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small_model(network: dict[str, Any], seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SMALL, **network))


def batch_of(seed: int, device: torch.device, length: int = SMALL["block_size"]) -> MicroBatch:
    """A micro-batch of 8 sequences that count upwards, which a network learns in a few steps."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1024, (8, 1)) + np.arange(length + 1) * rng.integers(1, 4, (8, 1))
    tokens = torch.from_numpy(tokens % SMALL["vocab_size"]).to(device)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:].contiguous(), seed)


def train_steps(
    model: torch.nn.Module, config: BenchConfig, runtime: Runtime, length: int = SMALL["block_size"]
) -> list[float]:
    """The losses of 20 steps of train.py on sequences of that length."""
    plain = model.module if hasattr(model, "module") else model
    optimizers = make_optimizers(plain, config, runtime.device.type, runtime.dtype)
    scaler = runtime.loss_scaler()
    batches = ([batch_of(step, runtime.device, length)] for step in range(20))
    return [training_step(model, optimizers, scaler, batch, 1.0, runtime).loss for batch in batches]


def check_machine(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """The machine, and what it can do at most."""
    rows = [
        Row("processor", processor_name()),
        Row("system", f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"),
        Row("Python, torch", f"{platform.python_version()}, {torch.__version__}"),
    ]
    if runtime.device.type == "cuda":
        about = torch.cuda.get_device_properties(runtime.device)
        rows.append(
            Row("GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        )
    dtypes = {runtime.dtype, torch.float32}
    for dtype in sorted(dtypes, key=str):
        product = measured_flops(runtime.device, dtype, seconds=1.0)
        rows.append(
            Row(f"matrix product, {str(dtype).removeprefix('torch.')}", f"{product / 1e12:,.2f} TFLOP/s")
        )
    if runtime.device.type == "cuda":
        rows.append(
            Row(
                "peak from which MFU is computed",
                f"{peak_flops(runtime.device, runtime.dtype) / 1e12:,.0f} TFLOP/s",
            )
        )
    rows.append(Row("memory, read", f"{measured_bandwidth(runtime.device) / 1e9:,.0f} GB/s"))
    return rows


def processor_name() -> str:
    """The processor's name, with its family on Linux: names of virtual machines do not say the generation."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f"family {about.get('cpu family', '?')}, model {about.get('model', '?')}"
    return f"{about.get('model name', platform.machine())} ({family})"


def check_network(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """Logits, loss and gradients against fp32 on the CPU."""
    rows = []
    cpu = torch.device("cpu")
    for name, network in NETWORKS.items():
        reference = small_model(network)
        x, y, *_ = batch_of(0, cpu)
        with exact_float32():
            logits, loss = reference(x, y)
            loss.backward()
        expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            model = to_device(copy.deepcopy(reference), runtime.device)
            model.zero_grad()
            with exact_float32(), replace(runtime, dtype=dtype).autocast():
                found, found_loss = model(x.to(runtime.device), y.to(runtime.device))
            with exact_float32():
                found_loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            rows += [
                Row(f"{kind}: logits", distance(found, logits), limit),
                Row(f"{kind}: loss", abs(found_loss.item() / loss.item() - 1), limit / 10),
                Row(
                    f"{kind}: gradients",
                    distance(gradient, expected),
                    limit,
                ),
            ]
    return rows


@torch.no_grad()
def check_greedy(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """Greedy text, 64 tokens of 8 prompts: the KV cache against whole forward passes, prompts in a batch
    against each alone, CUDA graphs against none. The value is the share of tokens that differ.

    In bf16, rounding turns near ties: there the cache is not compared, nor, on GPUs, are batches judged.
    """
    rows = []
    on_gpu = runtime.device.type == "cuda"
    for name, network in NETWORKS.items():
        model = small_model(network)
        for p in model.transformer.h.parameters():
            p.mul_(3.0)  # random weights of usual size choose one token again and again
        prompts = [batch_of(seed, runtime.device).x[0, : 8 + 5 * seed] for seed in range(8)]
        for dtype in (torch.float32, torch.bfloat16):
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            ready = optimize_for_inference(copy.deepcopy(model).to(runtime.device), dtype)
            with exact_float32():
                alone = torch.cat([greedy(ready, [prompt]) for prompt in prompts])
                together = greedy(ready, prompts)
                if dtype == torch.float32:
                    expected = torch.stack([greedy_without_cache(ready, prompt) for prompt in prompts])
                    rows.append(Row(f"{kind}: KV cache", share_different(alone, expected), 0.0))
                judged = 0.0 if dtype == torch.float32 or not on_gpu else None
                rows.append(Row(f"{kind}: batch of 8", share_different(together, alone), judged))
                if on_gpu:
                    eager = share_different(greedy(ready, prompts, graph=False), together)
                    rows.append(Row(f"{kind}: CUDA graph", eager, 0.0))
        rows.append(Row(f"{name}: different tokens in the text", f"{len(alone.unique())} of {alone.numel()}"))
    return rows


def greedy(model: GPT, prompts: list[torch.Tensor], graph: bool = True) -> torch.Tensor:
    """The 64 likeliest ids after each prompt (T,), by the decoder of sample.py: (N, 64)."""
    tokens = stream(
        model, prompts, SamplingParams(temperature=0.0), torch.zeros(len(prompts), 64), graph=graph
    )
    return torch.cat([token.ids for token in tokens], dim=1)


def share_different(ids: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ids != expected).float().mean())


def greedy_without_cache(model: GPT, prompt: torch.Tensor) -> torch.Tensor:
    """The 64 likeliest ids after a prompt (T,), each from a forward pass over all before it: (64,)."""
    idx = prompt[None]
    for _ in range(64):
        logits, _ = model(idx)
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    return idx[0, len(prompt) :]


def check_compile(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """20 training steps compiled, against the same steps uncompiled."""
    if error := compile_error(runtime.device):
        return [Row("torch.compile", error)]
    rows = []
    for name, network in NETWORKS.items():
        model = to_device(small_model(network), runtime.device)
        compiled = copy.deepcopy(model)
        compiled.compile()
        plain, other = (train_steps(m, config, runtime) for m in (model, compiled))
        rows.append(Row(f"{name}: largest difference of losses", largest_difference(plain, other), 0.05))
        rows.append(Row(f"{name}: losses", f"{plain[0]:.4f} to {plain[-1]:.4f}, {other[-1]:.4f} compiled"))
    return rows


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def check_fp16(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """What 20 training steps learn in fp16 with its loss scaler, against fp32. The first steps may be skipped
    while it looks for the scale."""
    learned, rows = {}, []
    length = SMALL["block_size"] if runtime.device.type == "cuda" else 16  # CPUs are slow in fp16
    for dtype in (torch.float32, torch.float16):
        model = to_device(small_model({}), runtime.device)
        losses = train_steps(model, config, replace(runtime, dtype=dtype), length)
        learned[dtype] = losses[0] - losses[-1]
        rows.append(
            Row(f"{str(dtype).removeprefix('torch.')}: losses", f"{losses[0]:.4f} to {losses[-1]:.4f}")
        )
    missing = 1 - learned[torch.float16] / learned[torch.float32]
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return [
        Row("fp16: share of what fp32 learns that is missing", missing, 0.25),
        Row("fp16: weights that are not finite", float(not finite), 0.0),
        *rows,
    ]


def check_resume(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """train.py for 20 steps, and again with a SIGKILL after its checkpoint of step 10 and a resume."""
    with tempfile.TemporaryDirectory() as folder:
        flags = run_flags(Path(folder), runtime)
        whole_run = run_train("--out_dir=whole", flags, folder)
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--out_dir=broken", "--save_interval=10"]
        with open(Path(folder) / "killed.log", "w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        newest = Path(folder) / "broken" / NEWEST
        while not newest.is_file() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        killed = process.wait() != 0
        if not newest.is_file():
            raise UserError(f"train.py failed: {(Path(folder) / 'killed.log').read_text()[-300:]}")
        step = load_checkpoint(newest)["iter_num"]
        resumed = run_train("--out_dir=broken", [*flags, "--init_from=resume"], folder)
        one, other = (flat_weights(Path(folder) / name / NEWEST) for name in ("whole", "broken"))
        exact = runtime.device.type == "cpu"  # GPUs add gradients in an order of their own
        return [
            Row(f"killed while it trained, resumed at step {step}", float(not (killed and step < 20)), 0.0),
            Row("weights against the unbroken run's", distance(other, one), 0.0 if exact else 1e-2),
            Row("val loss", f"{whole_run} unbroken, {resumed} resumed"),
        ]


def run_flags(folder: Path, runtime: Runtime) -> list[str]:
    """train.py's flags for 20 steps on a dataset made in the folder."""
    rng = np.random.default_rng(0)
    sizes = {"train": 100_000, "val": 10_000}
    for split, size in sizes.items():
        (rng.integers(1, 4, size).cumsum() % 256).astype("<u2").tofile(folder / f"{split}.bin")
    meta = {
        "version": 1,
        "tokenizer": {"kind": "byte"},
        "vocab_size": 257,
        "dtype": "uint16",
        "tokens": sizes,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    shape = [f"--{name}={value}" for name, value in SMALL.items() if name.startswith("n_")]
    run = ["--max_iters=20", "--eval_interval=20", "--eval_iters=2", "--warmup_iters=5", "--batch_size=4"]
    run += [
        "--block_size=64",
        "--gradient_accumulation_steps=8",
        "--dropout=0.1",
        "--compile=False",
        "--loss_plot=False",
    ]
    place = [f"--device={runtime.device}", f"--dtype={str(runtime.dtype).removeprefix('torch.')}"]
    return [f"--dataset={folder}", *shape, *run, *place]


def run_train(out_dir: str, flags: list[str], folder: str, launcher: tuple[str, ...] = ()) -> str:
    """Run train.py in the folder; the best val loss that it reports. Raises UserError if it fails."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags, out_dir]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train.py failed: {' '.join((done.stderr or done.stdout).split())[-300:]}")
    return done.stdout.split("val loss ")[-1].split()[0]


def flat_weights(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in load_checkpoint(path)["model"].values()])


def check_ranks(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """DDP and FSDP2 in a group of one rank (NCCL on a GPU, else gloo), and torchrun, against plain runs."""
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    if runtime.dtype == torch.float16:
        runtime = replace(runtime, dtype=torch.float32)  # FSDP2 has no loss scaling here
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    rows = []
    model = to_device(small_model({}), runtime.device)
    expected = train_steps(copy.deepcopy(model), config, runtime)
    for name, shard in (("DDP", False), ("FSDP2, --shard=True", True)):
        shared = copy.deepcopy(model)
        losses = train_steps(wrap_distributed(shared, shard, runtime), config, runtime)
        difference = largest_difference(expected, losses)
        rows.append(Row(f"{name}, {backend}: largest difference of losses", difference, 0.01))
        finite = all(bool(full_tensor(p.detach()).isfinite().all()) for p in shared.parameters())
        rows.append(Row(f"{name}: weights that are not finite", float(not finite), 0.0))
        del shared
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        flags = run_flags(Path(folder), runtime)
        plain = run_train("--out_dir=plain", flags, folder)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
        loss = run_train("--out_dir=ranks", flags, folder, torchrun)
        rows.append(Row("torchrun: difference of val loss", abs(float(loss) - float(plain)), 0.02))
    return rows


def check_synchronize(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """What a step loses because it reads loss and gradient norm from the device before it updates weights."""
    config.batch_size = config.batch_size or 8
    data = open_data(config)
    torch.manual_seed(0)
    model = to_device(GPT(new_model_config(config, data.meta)), runtime.device)
    if config.compile is True:
        model.compile()
    optimizers = make_optimizers(model, config, runtime.device.type, runtime.dtype)
    scaler = runtime.loss_scaler()
    vocab_size, shape = model.config.vocab_size, (config.batch_size, config.block_size)
    x, y = (torch.randint(vocab_size, shape, device=runtime.device) for _ in range(2))

    def reading(number: int) -> None:
        for _ in range(5):
            training_step(model, optimizers, scaler, [MicroBatch(x, y, 0)], config.grad_clip, runtime)

    def without_reading(number: int) -> None:
        for _ in range(5):
            with runtime.autocast():
                _, loss = model(x, y, return_logits=False)
            loss.backward()
            clip_gradients(model, config.grad_clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    ways = {"reading": reading, "without": without_reading}
    times = alternate(ways, 1, max(3, config.bench_steps // 5), runtime)
    ms = {name: spread(seconds)["median"] / 5 * 1000 for name, seconds in times.items()}
    share = ms["reading"] / ms["without"] - 1
    return [
        Row("step, loss and norm read before the update", f"{ms['reading']:.2f} ms"),
        Row("step that reads nothing", f"{ms['without']:.2f} ms"),
        Row("cost of the synchronisation", f"{ms['reading'] - ms['without']:.2f} ms, {share:.1%}"),
    ]


def check_memory(config: BenchConfig, runtime: Runtime) -> list[Row]:
    """The largest memory of three training steps, beside the planner's number."""
    config.batch_size = config.batch_size or 1
    data = open_data(config)
    shape = new_model_config(config, data.meta)
    torch.manual_seed(0)
    model = to_device(GPT(shape), runtime.device)
    model.activation_checkpointing = config.activation_checkpointing
    optimizers = make_optimizers(model, config, runtime.device.type, runtime.dtype)
    scaler = runtime.loss_scaler()
    size = (config.batch_size, config.block_size)
    x, y = (torch.randint(shape.vocab_size, size, device=runtime.device) for _ in range(2))
    for _ in range(3):
        training_step(model, optimizers, scaler, [MicroBatch(x, y, 0)], config.grad_clip, runtime)
    measured = peak_memory(runtime)  # before the planner counts, which needs memory of its own
    on_gpu = runtime.device.type != "cpu"
    counts = count(shape, config, runtime.dtype != torch.float32, on_gpu)
    split = Split(1, config.batch_size, 1, again=config.activation_checkpointing)
    predicted = memory(counts, find_place(replace(config, gpu="here"), runtime, peak=1.0), split)["peak"]
    again = "with" if config.activation_checkpointing else "without"
    parameters = f"{model.get_num_params(False) / 1e6:,.0f} M parameters, batch {config.batch_size}"
    if measured is None:
        return [Row(f"{parameters}, {again} activation checkpointing", "not measured on this system")]
    return [
        Row(
            f"{parameters}, {again} activation checkpointing",
            f"{measured / 2**30:.2f} GiB; planner {predicted / 2**30:.2f} GiB, {predicted / measured - 1:+.0%}",
        )
    ]


CHECKS: dict[str, Callable[[BenchConfig, Runtime], list[Row]]] = {
    "machine": check_machine,
    "network": check_network,
    "greedy": check_greedy,
    "compile": check_compile,
    "fp16": check_fp16,
    "resume": check_resume,
    "ranks": check_ranks,
    "synchronize": check_synchronize,
    "memory": check_memory,
}
