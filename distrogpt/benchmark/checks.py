"""The checks of bench.py --report=True. To run one of them: python bench.py --check=network

Every check compares with a reference: another device, another code path, an uninterrupted run. It returns
rows; a row with a limit passes if its value is at most the limit.
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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from distrogpt.benchmark import plan, timing
from distrogpt.benchmark.training import Trainer, TrainingStep
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
from distrogpt.training.distributed import weights_are_finite, wrap_distributed
from distrogpt.training.optim import clip_gradients
from model import GPT, GPTConfig

SMALL = {"block_size": 256, "vocab_size": 1024, "n_layer": 4, "n_head": 4, "n_embd": 256}
MODERN = {"norm": "rmsnorm", "rotary": True, "qk_norm": True, "activation": "relu2", "n_kv_head": 2}
MODERN |= {"tied": False, "logit_softcap": 15.0, "embedding_skip": True, "key_offset": True}
# without zero_init: gradients would be 0
NETWORKS = {"GPT-2": {}, "modern": MODERN}
TRAIN = [sys.executable, str(timing.ROOT / "train.py")]


class Row(NamedTuple):
    """What was compared, its value, and the largest value that passes; None: for information only."""

    what: str
    value: float | str
    limit: float | None = None

    @property
    def passes(self) -> bool:
        return self.limit is None or bool(self.value <= self.limit)


def bench_check(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Run one check, print its rows, and return them."""
    rows = CHECKS[config.check](config, runtime, training_step)
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.2e}"
        limit = "" if row.limit is None else f", at most {row.limit:g}: {'ok' if row.passes else 'FAILED'}"
        print(f"{row.what:62} {value}{limit}")
    return {"rows": [row._asdict() | {"passes": row.passes} for row in rows]}


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error: the norm of the difference, divided by the norm of `expected`."""
    result, expected = result.detach().cpu().float(), expected.detach().cpu().float()
    return float((result - expected).norm() / expected.norm().clamp(min=1e-12))


def not_finite(what: str, model: torch.nn.Module, runtime: Runtime) -> Row:
    value = 0.0 if weights_are_finite(model, runtime) else 1.0
    return Row(f"{what}: weights that are not finite", value, 0.0)


def small_model(network: dict[str, Any], device: torch.device | None = None) -> GPT:
    """A small model with the kernels of a device; for None, with the layers of model.py."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **network))
    return model if device is None else to_device(model, device)


def make_batch(seed: int, device: torch.device, length: int = SMALL["block_size"]) -> MicroBatch:
    """8 sequences of increasing ids, which a network learns in a few steps."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1024, (8, 1)) + np.arange(length + 1) * rng.integers(1, 4, (8, 1))
    tokens = torch.from_numpy(tokens % SMALL["vocab_size"]).to(device)  # (8, T + 1)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:].contiguous(), seed)


def losses_of(trainer: Trainer, length: int = SMALL["block_size"]) -> torch.Tensor:
    """The losses of 20 training steps on sequences of that length: (20,)."""
    device = trainer.runtime.device
    return torch.tensor([trainer.train([make_batch(seed, device, length)]).loss for seed in range(20)])


def check_machine(config: BenchConfig, runtime: Runtime, _: TrainingStep) -> list[Row]:
    """The machine: its name, versions, matmul speed and memory bandwidth."""
    system = f"{platform.system()} {platform.release()}, {os.cpu_count()} cores"
    versions = f"{platform.python_version()}, {torch.__version__}"
    rows = [Row("processor", processor_name()), Row("system", system), Row("Python, torch", versions)]
    for dtype in sorted({runtime.dtype, torch.float32}, key=str):
        product = measured_flops(runtime.device, dtype, seconds=1.0)
        rows.append(Row(f"matmul, {timing.dtype_name(dtype)}", f"{product / 1e12:,.2f} TFLOP/s"))
    if runtime.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(runtime.device)
        words = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        peak = f"{peak_flops(runtime.device, runtime.dtype) / 1e12:,.0f} TFLOP/s"
        rows += [Row("GPU", words), Row("peak, the reference of MFU", peak)]
    return [*rows, Row("memory bandwidth, reading", f"{measured_bandwidth(runtime.device) / 1e9:,.0f} GB/s")]


def processor_name() -> str:
    """The processor's name; on Linux also its family, as virtual machines may hide the generation in the
    name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    family = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({family})"


def check_network(config: BenchConfig, runtime: Runtime, _: TrainingStep) -> list[Row]:
    """Compare logits, loss and gradients with model.py's plain layers in fp32 on the CPU."""

    def run(model: GPT, dtype: torch.dtype) -> tuple[torch.Tensor, float, torch.Tensor]:
        on = replace(runtime, device=next(model.parameters()).device, dtype=dtype)
        x, y, *_ = make_batch(0, on.device)
        with timing.float32_precision("highest"):
            with on.autocast():
                logits, loss = model(x, y)
            loss.backward()
        return logits, loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    rows = []
    for name, network in NETWORKS.items():
        logits, loss, gradients = run(small_model(network), torch.float32)
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            result = run(small_model(network, runtime.device), dtype)
            kind = f"{name}, {timing.dtype_name(dtype)}"
            rows.append(Row(f"{kind}: logits", distance(result[0], logits), limit))
            rows.append(Row(f"{kind}: loss", abs(result[1] / loss - 1), limit / 10))
            rows.append(Row(f"{kind}: gradients", distance(result[2], gradients), limit))
    return rows


@torch.no_grad()
def check_greedy(config: BenchConfig, runtime: Runtime, _: TrainingStep) -> list[Row]:
    """Greedy decoding, 64 tokens after each of 8 prompts. Compares the KV cache with full forward passes, a
    batch with each prompt alone, and CUDA graphs with eager decoding. The value is the fraction of tokens
    that differ. In bf16, rounding decides near ties: the cache is not compared, and on GPUs batches have no
    limit."""
    rows, on_gpu = [], runtime.device.type == "cuda"
    for name, network in NETWORKS.items():
        model = small_model(network, runtime.device)
        for p in model.transformer.h.parameters():
            p.mul_(3.0)  # with random weights of usual size, one token repeats forever
        prompts = [make_batch(seed, runtime.device).x[0, : 8 + 5 * seed] for seed in range(8)]
        for dtype in (torch.float32, torch.bfloat16):
            kind, exact = f"{name}, {timing.dtype_name(dtype)}", dtype == torch.float32
            ready = optimize_for_inference(copy.deepcopy(model), dtype)
            with timing.float32_precision("highest"):
                alone = torch.cat([greedy(ready, [prompt]) for prompt in prompts])
                together = greedy(ready, prompts)
                if exact:
                    expected = torch.stack([greedy_without_cache(ready, prompt) for prompt in prompts])
                    rows.append(Row(f"{kind}: KV cache", different(alone, expected), 0.0))
                limit = 0.0 if exact or not on_gpu else None
                rows.append(Row(f"{kind}: batch of 8", different(together, alone), limit))
                if on_gpu:
                    eager = greedy(ready, prompts, graph=False)
                    rows.append(Row(f"{kind}: CUDA graph", different(eager, together), 0.0))
        rows.append(Row(f"{name}: distinct tokens in the text", f"{len(alone.unique())} of {alone.numel()}"))
    return rows


def greedy(model: GPT, prompts: list[torch.Tensor], graph: bool = True) -> torch.Tensor:
    """64 greedy ids after each prompt (T,), by the decoder of sample.py: (N, 64)."""
    uniforms = torch.zeros(len(prompts), 64)
    tokens = stream(model, prompts, SamplingParams(temperature=0.0), uniforms, graph=graph)
    return torch.cat([token.ids for token in tokens], dim=1)


def greedy_without_cache(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """64 greedy ids after a prompt (T,), each from a full forward pass: (64,)."""
    for _ in range(64):
        logits, _ = model(ids[None])
        ids = torch.cat((ids, logits[0, -1:].argmax(dim=-1)))
    return ids[-64:]


def different(ids: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ids != expected).float().mean())


def check_compile(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> list[Row]:
    """Compare 20 compiled training steps with the same steps in eager mode."""
    if error := compile_error(runtime.device):
        return [Row("torch.compile", error)]
    rows = []
    for name, network in NETWORKS.items():
        model = small_model(network, runtime.device)
        eager = losses_of(Trainer(training_step, config, None, runtime, copy.deepcopy(model)))
        model.compile()
        other = losses_of(Trainer(training_step, config, None, runtime, model))
        rows.append(Row(f"{name}: largest difference in loss", float((eager - other).abs().max()), 0.05))
        rows.append(Row(f"{name}: losses", f"{eager[0]:.4f} to {eager[-1]:.4f}, {other[-1]:.4f} compiled"))
    return rows


def check_fp16(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> list[Row]:
    """Compare the decrease of the loss in 20 steps in fp16, with its loss scaler, with that in fp32."""
    learned, rows = [], []
    length = SMALL["block_size"] if runtime.device.type == "cuda" else 16  # CPUs are slow in fp16
    for dtype in (torch.float32, torch.float16):
        model = small_model({}, runtime.device)
        losses = losses_of(Trainer(training_step, config, None, replace(runtime, dtype=dtype), model), length)
        learned.append(float(losses[0] - losses[-1]))
        rows.append(Row(f"{timing.dtype_name(dtype)}: losses", f"{losses[0]:.4f} to {losses[-1]:.4f}"))
    row = Row("fp16: fraction of fp32's loss decrease that is missing", 1 - learned[1] / learned[0], 0.25)
    return [row, not_finite("fp16", model, runtime), *rows]


def check_resume(config: BenchConfig, runtime: Runtime, _: TrainingStep) -> list[Row]:
    """Compare a run of 20 steps with one that is killed after its checkpoint of step 10 and then resumed."""
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(Path(folder), runtime)
        uninterrupted = run_train(["--out_dir=whole", *flags], folder)
        command = [*TRAIN, *flags, "--out_dir=broken", "--save_interval=10"]
        newest, log = Path(folder) / "broken" / NEWEST, Path(folder) / "killed.log"
        with open(log, "w") as file:
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        while not newest.is_file() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        killed = process.wait() != 0
        if not newest.is_file():
            raise UserError(f"train.py failed: {log.read_text()[-300:]}")
        step = load_checkpoint(newest)["iter_num"]
        resumed = run_train(["--out_dir=broken", *flags, "--init_from=resume"], folder)
        files = [load_checkpoint(Path(folder) / name / NEWEST) for name in ("whole", "broken")]
    expected, weights = (torch.cat([w.flatten() for w in file["model"].values()]) for file in files)
    limit = 0.0 if runtime.device.type == "cpu" else 1e-2  # on GPUs, the order of sums varies
    failed = 0.0 if killed and step < 20 else 1.0
    return [
        Row(f"killed during training, resumed at step {step}", failed, 0.0),
        Row("weights, compared with the uninterrupted run", distance(weights, expected), limit),
        Row("val loss", f"{uninterrupted} uninterrupted, {resumed} resumed"),
    ]


def training_flags(folder: Path, runtime: Runtime) -> list[str]:
    """train.py's flags for 20 steps on a dataset made in the folder."""
    rng, sizes = np.random.default_rng(0), {"train": 100_000, "val": 10_000}
    for split, size in sizes.items():
        (rng.integers(1, 4, size).cumsum() % 256).astype("<u2").tofile(folder / f"{split}.bin")
    meta = {"version": 1, "tokenizer": {"kind": "byte"}, "vocab_size": 257, "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta | {"tokens": sizes}))
    flags = "--max_iters=20 --eval_interval=20 --eval_iters=2 --warmup_iters=5 --batch_size=4 --block_size=64"
    flags += " --gradient_accumulation_steps=8 --dropout=0.1 --compile=False --loss_plot=False"
    flags += "".join(f" --{name}={SMALL[name]}" for name in ("n_layer", "n_head", "n_embd"))
    flags += f" --device={runtime.device} --dtype={timing.dtype_name(runtime.dtype)}"
    return [f"--dataset={folder}", *flags.split()]


def run_train(flags: list[str], folder: str, command: list[str] = TRAIN) -> str:
    """Run train.py in the folder; the best val loss that it reports. Raises UserError if it fails."""
    run = subprocess.run([*command, *flags], cwd=folder, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py failed: {' '.join((run.stderr or run.stdout).split())[-300:]}")
    return run.stdout.split("val loss ")[-1].split()[0]


def check_ranks(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> list[Row]:
    """Compare DDP and FSDP2 with one rank (NCCL on a GPU, otherwise gloo), and torchrun, with plain runs."""
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    if runtime.dtype == torch.float16:
        runtime = replace(runtime, dtype=torch.float32)  # FSDP2 has no loss scaling here
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    rows, model = [], small_model({}, runtime.device)
    expected = losses_of(Trainer(training_step, config, None, runtime, copy.deepcopy(model)))
    for name, shard in (("DDP", False), ("FSDP2, --shard=True", True)):
        replica = wrap_distributed(copy.deepcopy(model), shard, runtime)
        difference = expected - losses_of(Trainer(training_step, config, None, runtime, replica))
        what = f"{name}, {backend}: largest difference in loss"
        rows += [Row(what, float(difference.abs().max()), 0.01), not_finite(name, replica, runtime)]
        del replica
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        flags = training_flags(Path(folder), runtime)
        alone = run_train(["--out_dir=plain", *flags], folder)
        torchrun = [TRAIN[0], *"-m torch.distributed.run --standalone --nproc_per_node=1".split(), TRAIN[1]]
        loss = run_train(["--out_dir=ranks", *flags], folder, torchrun)
    return [*rows, Row("torchrun: difference in val loss", abs(float(loss) - float(alone)), 0.02)]


def check_synchronize(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> list[Row]:
    """The cost of the device synchronisation of a step, which reads loss and gradient norm before the
    update."""
    config = replace(config, compile=config.compile is True)
    trainer = Trainer(training_step, config, timing.open_data(config), runtime)
    batches = trainer.batches.current[:1]
    x, y, *_ = batches[0]

    def reading() -> None:
        for _ in range(5):
            trainer.train(batches)

    def without_reading() -> None:
        for _ in range(5):
            with runtime.autocast():
                _, loss = trainer.model(x, y, return_logits=False)
            loss.backward()
            clip_gradients(trainer.optimizers, config.grad_clip)
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    steps = {"reading": reading, "without": without_reading}
    times = timing.alternate(steps, 1, max(3, config.bench_steps // 5), runtime)
    slow, fast = (timing.spread(seconds)["median"] / 5 * 1000 for seconds in times.values())
    return [
        Row("step that reads loss and gradient norm before the update", f"{slow:.2f} ms"),
        Row("step without reading them", f"{fast:.2f} ms"),
        Row("cost of the synchronisation", f"{slow - fast:.2f} ms, {slow / fast - 1:.1%}"),
    ]


def check_memory(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> list[Row]:
    """The peak memory of three training steps, and the estimate of --plan."""
    config = replace(config, gradient_accumulation_steps=1, compile=False)
    trainer = Trainer(training_step, config, timing.open_data(config), runtime)
    for _ in range(3):
        trainer()
    measured = timing.peak_memory(runtime)  # before the estimate, which needs memory too
    half, on_gpu = runtime.dtype != torch.float32, runtime.device.type != "cpu"
    counts = plan.count(trainer.model.config, config, half, on_gpu)
    split = plan.Split(1, config.batch_size, 1, recompute=config.activation_checkpointing)
    hardware = plan.find_hardware(replace(config, gpu="here"), runtime, peak=1.0)
    planned = plan.memory(counts, hardware, split)["peak"]
    value = "not measured on this system"
    if measured:
        error = f"{planned / measured - 1:+.0%}"
        value = f"{measured / 2**30:.2f} GiB; estimated {planned / 2**30:.2f} GiB ({error})"
    how = "with" if config.activation_checkpointing else "without"
    what = f"{counts.parameters / 1e6:,.0f} M parameters, batch {config.batch_size}"
    return [Row(f"{what}, {how} activation checkpointing", value)]


ALL = (check_machine, check_network, check_greedy, check_compile, check_fp16, check_resume, check_ranks)
ALL += (check_synchronize, check_memory)
CHECKS = {check.__name__.removeprefix("check_"): check for check in ALL}
