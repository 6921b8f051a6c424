"""Predict memory, time and communication of a run: python bench.py train_gpt2 --plan=True --gpu=h100

Memory is counted on the model itself; times are computed from data sheets. Compute runs at a given, measured
or assumed MFU, whatever the batch size; recomputing activations adds a third. The optimizer moves 40 bytes
per parameter (AdamW 28, clipping 12); Muon adds its matmuls. The slowest link of a ring (NVLink, or all
network cards of a node) reaches LINK_SHARE of its bandwidth, and each message costs LATENCY per doubling of
the ranks. DDP reduces fp32 gradients once per step, overlapped with the last backward pass except for the
last bucket. FSDP2 gathers weights twice and scatters gradients in each micro-step, overlapped with all of it.

MFUs of published runs: nanoGPT's 600,000 steps of 0.49 M tokens in 4 days on 8 A100 40GB, 0.29; llm.c's 10 B
tokens in 45 minutes on 8 H100, 0.40, and in 90 minutes on 8 A100 80GB, 0.63.
"""

import math
import os
from bisect import bisect_left
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distrogpt.benchmark.plan_minutes import (
    choose,
    fit_to_time,
    sizes_for,
    text_of,
    training_seconds,
)
from distrogpt.benchmark.training import TrainingStep, bench_step, recipe_line, with_gpt2_shape
from distrogpt.data.dataset import find_parts, open_dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.errors import UserError
from distrogpt.gpus import GPU, GPUS, find_gpu
from distrogpt.hardware import measured_flops, peak_flops
from distrogpt.kernels import replace_layers
from distrogpt.kernels.block import CPUBlock, unfuse
from distrogpt.kernels.cpu import causal_mask, use_cpu_kernels
from distrogpt.runtime import Runtime
from distrogpt.scaling import Size, Text
from distrogpt.settings import BenchConfig
from distrogpt.training.minutes import FIRST, choice_lines, size_of
from distrogpt.training.optim import num_submatrices
from distrogpt.training.startup import new_model_config, resolve_max_iters, samples_per_step
from model import GPT, Attention, GPTConfig

MFU = 0.4  # the default: llm.c's on H100
LINK_SHARE, LATENCY = 0.8, 10e-6  # of the nominal bandwidth; seconds
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
USABLE = 0.9  # of the memory; the rest is for CUDA, NCCL, the system, and fragmentation
LIBRARIES = 40e6  # bytes that the first step on a CPU loads; measured
COMPILER = 80e6  # bytes of torch's compiler, which DDP, FSDP2 and activation_checkpointing load; measured
DISK, PAGE = 1e9, 4096  # bytes/s of a node's SSD; bytes of a memory page, which is read as a whole
# columns of the memory table, and their headings
MEMORY_COLUMNS = {"weights": "weights", "gradients": "gradients", "averages": "optimizer"}
MEMORY_COLUMNS |= {"activations": "activations", "more": "gathered", "peak": " peak"}
UNKNOWN = GPU("", 0, 0, None, 32, 12.5)  # PCIe, and 100 Gbit/s for eight GPUs


class Hardware(NamedTuple):
    """A GPU of a cluster, or this machine. Bandwidths are bytes/s, in one direction."""

    name: str
    peak: float  # FLOP/s, dense, bf16
    memory: float  # bytes
    memory_bandwidth: float | None  # None: included in the measured MFU
    link: float  # to the other GPUs of the node
    network: float  # of the GPU's own network card
    per_node: int = 8
    is_cpu: bool = False


class Counts(NamedTuple):
    """Numbers of parameters, and bytes that a block and the rest of the model (`head`) save for the backward
    pass: `fixed` bytes (16-bit copies of weights), and bytes for `each` sequence."""

    shape: GPTConfig
    parameters: int
    tables: int  # parameters outside the blocks
    matrices: int  # parameters that Muon updates
    averages: int  # bytes of the optimizer's state
    flops_per_token: int
    update_flops: float  # of Muon's matmuls, which each rank computes for all matrices
    item: int  # bytes per weight of a block in the compute dtype
    block_fixed: int
    block_each: int
    head_fixed: int
    head_each: int


class Split(NamedTuple):
    """How a step is distributed over n ranks: each runs micro_steps of B sequences."""

    n: int
    B: int
    micro_steps: int
    shard: bool = False
    recompute: bool = False  # activation checkpointing

    @property
    def sequences(self) -> int:
        return self.n * self.B * self.micro_steps


def total_memory() -> float:
    """Bytes of this machine's memory; inf if the system does not report it, as on Windows."""
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_hardware(config: BenchConfig, runtime: Runtime, peak: float | None = None) -> Hardware:
    """The GPU of config.gpu, or this machine; `peak` is its FLOP/s, if measured before."""
    device, here = runtime.device, config.gpu == "here"
    if not here:
        gpu = GPUS[config.gpu]
        name, size, peak, per_node = gpu.words, gpu.memory * 2**30, gpu.peak_flops, 8
        if config.dtype == "float32":  # TF32 is half as fast as bf16; older chips have none
            peak /= 8 if config.gpu in ("v100", "t4") else 2
    elif device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, size, per_node = properties.name, properties.total_memory, torch.cuda.device_count()
        gpu, peak = find_gpu(name) or UNKNOWN, peak or peak_flops(device, runtime.dtype)
    else:
        name, size, per_node, gpu = f"this {device.type}", total_memory(), 1, UNKNOWN
        peak = peak or measured_flops(device, runtime.dtype)
    bandwidth = gpu.memory_bandwidth * 1e9 if gpu.memory_bandwidth else None
    network, per_node = config.interconnect or gpu.network, config.gpus_per_node or per_node
    is_cpu = here and device.type == "cpu"
    return Hardware(name, peak, size, bandwidth, gpu.link * 1e9, network * 1e9 / 8, per_node, is_cpu)


def find_data(config: BenchConfig) -> tuple[dict[str, Any], bool]:
    """The meta.json of the dataset, and whether that was found; otherwise, the vocabulary is GPT-2's."""
    if config.real_data:
        with suppress(UserError):
            parts = find_parts(config.dataset)
            if all(any(folder.glob("train*.bin")) for _, _, folder, _ in parts):
                return parts[0][-1], True
    return GPT2_META, False


def planned_shape(config: BenchConfig) -> tuple[BenchConfig, GPTConfig, bool]:
    """The settings, with GPT-2's shape if init_from names one; the network; whether the dataset was found.
    Raises UserError if the shape is in a file, or if max_epochs needs a dataset that was not found."""
    config = with_gpt2_shape(config)
    meta, has_data = find_data(config)
    if config.max_epochs is not None:
        if not has_data:
            raise UserError("max_epochs needs the dataset, which was not found; set --max_iters instead")
        config = resolve_max_iters(config, open_dataset(config, ("train",)))
    return config, new_model_config(config, meta), has_data


class MaskedDropout(nn.Dropout):
    """Dropout as on GPUs: a mask of one byte per element is saved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


def as_trained(model: GPT, on_gpu: bool) -> GPT:
    """The model with the layers of its device. On GPUs, attention recomputes its dropout in the backward
    pass."""
    if not on_gpu:  # fused blocks, which are no operations of torch, need less memory than their layers
        return replace_layers(use_cpu_kernels(model), {CPUBlock: unfuse})
    layers = {nn.Dropout: lambda layer: MaskedDropout(layer.p)}
    return replace_layers(model, {**layers, Attention: lambda layer: Attention(layer.scale, 0.0)})


def saved_bytes(model: GPT, B: int, half: bool) -> int:
    """Bytes that the forward pass of B sequences saves for the backward pass, without the parameters. Memory
    that several operations save counts once. `half`: with autocast to 16 bits."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no later storage has the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    idx = torch.zeros(B, model.config.block_size, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(idx, idx, return_logits=False)
    return sum(storage.nbytes() for storage in saved.values())


def count(shape: GPTConfig, config: BenchConfig, half: bool, on_gpu: bool) -> Counts:
    """Count a model with fake tensors, which run the same code without memory and compute. The bytes of a
    block are the difference between two layers and one, those of a sequence between three sequences and two
    (with one, some copies are left out)."""
    saved = {}
    causal_mask.cache_clear()  # real and fake tensors do not mix
    with FakeTensorMode():
        for layers in (1, 2):
            model = as_trained(GPT(replace(shape, n_layer=layers)).train(), on_gpu)
            for B in (2, 3):
                saved[layers, B] = saved_bytes(model, B, half)
    causal_mask.cache_clear()
    block = [saved[2, B] - saved[1, B] for B in (2, 3)]
    with torch.device("meta"):
        model = GPT(shape)
    in_blocks = list(model.transformer.h.parameters())
    N = model.get_num_params(non_embedding=False)
    matrices, averages, update_flops = 0, 8 * N, 0.0
    if config.optimizer == "muon":
        matrices = sum(p.numel() for p in in_blocks if p.dim() == 2)
        averages, update_flops = 8 * N - 4 * matrices, muon_flops(model)
    elif config.optimizer == "sgd":
        averages = 4 * N if config.momentum else 0
    head = [saved[1, 2] - block[0], saved[1, 3] - block[1]]
    fixed_and_each = [size for two, three in (block, head) for size in (3 * two - 2 * three, three - two)]
    tables, item = N - sum(p.numel() for p in in_blocks), 2 if half else 4
    return Counts(
        shape, N, tables, matrices, averages, model.flops_per_token(), update_flops, item, *fixed_and_each
    )


def muon_flops(model: GPT) -> float:
    """FLOPs of a Muon update: optim.py's orthogonalize, for all matrices of the blocks."""
    flops = 0.0
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            parts = num_submatrices(name, model.config)
            short, long = sorted((p.size(0) // parts, p.size(1)))
            flops += parts * (4 * short**2 * long + 18 * short**3)
    return flops


def memory(counts: Counts, hardware: Hardware, split: Split) -> dict[str, float]:
    """Bytes per rank in eager mode; torch.compile needs less for activations and loss. "more" are the weights
    that `shard` gathers from other ranks: two blocks in the compute dtype, tables in fp32. "peak" is smaller
    than the sum if not all of it is allocated at the same time."""
    shape, N, B, shard = counts.shape, counts.parameters, split.B, split.shard and split.n > 1
    layers, fraction = shape.n_layer, 1 / split.n if shard else 1
    weights, gradients, averages = 4 * N * fraction, 4 * N * fraction, counts.averages * fraction
    more = 2 * counts.item * ((N - counts.tables) // layers) + 4 * counts.tables if shard else 0
    fixed = 0 if shard else counts.block_fixed  # gathered weights are already in 16 bits
    head = counts.head_fixed + B * counts.head_each
    logits = B * shape.block_size * shape.vocab_size
    if split.recompute:  # only a block's input is saved, and one block at a time is recomputed
        saved = layers * 4 * B * shape.block_size * shape.n_embd
        block = fixed + B * counts.block_each
    else:
        saved, block = layers * B * counts.block_each, layers * fixed
    # in the first micro-step, gradients replace activations, except with DDP, which has buckets for them
    before = gradients if split.micro_steps > 1 or (split.n > 1 and not shard) else 0
    # autocast keeps its copies of all weights until the forward pass ends; the loss needs the logits twice
    forward = before + layers * fixed + saved + head + 6 * logits
    activations = saved + block + head + 8 * logits  # gradients of the logits and of log_softmax
    # a tied table has two gradients and their sum before they are added to its own
    table, adds = 4 * shape.vocab_size * shape.n_embd, int(split.micro_steps > 1 or shard)
    tables = 2 + adds if shape.tied else adds * (2 if shard else 1)
    end = gradients + table * tables
    update = gradients + 8 * counts.matrices * fraction  # Muon's matmuls
    peak = weights + averages + more + max(forward, before + activations, end, update)
    if hardware.is_cpu:  # its allocator keeps freed memory, fragmented by about the logits' size; measured
        peak += 8 * logits + LIBRARIES + (COMPILER if split.recompute or split.n > 1 else 0)
    parts = {"weights": weights, "gradients": gradients, "averages": averages, "activations": activations}
    return {**parts, "more": more, "peak": peak, "fits": peak <= USABLE * hardware.memory}


def exchange(counts: Counts, hardware: Hardware, n: int, shard: bool) -> tuple[float, float]:
    """Seconds of the communication among n ranks, and of its last message, which cannot overlap with compute:
    the all-reduce of fp32 gradients of a step; with `shard`, the gathers and the scatter of a micro-step."""
    if n == 1:
        return 0.0, 0.0
    gradients = 4 * counts.parameters
    weights = 2 * counts.item * (counts.parameters - counts.tables) + 4 * counts.tables  # blocks twice
    sent = (n - 1) / n * (weights + gradients if shard else 2 * gradients)
    groups = 2 * counts.shape.n_layer + 1  # attention and MLP of each block, and the rest: distributed.py
    messages = 3 * groups if shard else math.ceil(gradients / BUCKET)
    link = hardware.link  # the slowest of a ring through n GPUs
    if n > hardware.per_node:
        link = min(link, hardware.per_node * hardware.network)
    seconds = sent / (LINK_SHARE * link) + messages * LATENCY * math.log2(n)
    return seconds, seconds / messages


def step_time(counts: Counts, hardware: Hardware, split: Split, mfu: float) -> dict[str, float]:
    """Seconds of a step and its parts; "waits" is the communication, "exchange", that does not overlap."""
    shard = split.shard and split.n > 1
    tokens = split.B * counts.shape.block_size
    micro_step = counts.flops_per_token * tokens / (hardware.peak * mfu) * (4 / 3 if split.recompute else 1)
    update = 40 * counts.parameters / (split.n if shard else 1) / (hardware.memory_bandwidth or math.inf)
    if hardware.memory_bandwidth:  # a CPU's MFU was measured including the update
        update += counts.update_flops / (hardware.peak * mfu)
    once, last = exchange(counts, hardware, split.n, shard)
    # it overlaps with a whole micro-step, or with the backward pass: 2/3 of it, 3/4 when recomputing
    overlap = 1.0 if shard else 3 / 4 if split.recompute else 2 / 3
    times = split.micro_steps if shard else 1
    waits = times * max(last, once - micro_step * overlap)
    compute = split.micro_steps * micro_step
    seconds = compute + update + waits
    parts = {"compute": compute, "update": update, "exchange": times * once, "waits": waits}
    return {"seconds": seconds, **parts, "tokens_per_second": tokens * split.n * split.micro_steps / seconds}


def share_out(sequences: int, n: int, largest: int, smallest: int = 1) -> tuple[int, int]:
    """B, from smallest to largest, and the micro-steps of each of n ranks, for a step of as nearly
    `sequences` as possible; the largest such B."""
    splits = [
        (B, micro_steps)
        for B in range(largest, max(smallest, largest - 4095) - 1, -1)  # one of these is near enough
        for micro_steps in (max(1, sequences // (n * B)), math.ceil(sequences / (n * B)))
    ]
    return min(splits, key=lambda split: abs(n * split[0] * split[1] - sequences))


def settle(config: BenchConfig, counts: Counts, hardware: Hardware, split: Split) -> Split:
    """`split`, with the B and micro-steps nearest to the settings that fit into memory; B is 1 if none
    fit."""

    def of_at_most(largest: int) -> Split:
        B, micro_steps = share_out(samples_per_step(config), split.n, largest)
        return split._replace(B=B, micro_steps=micro_steps)

    def too_large(largest: int) -> bool:
        return not memory(counts, hardware, of_at_most(largest))["fits"]

    largest = config.batch_size
    if too_large(largest):
        largest = max(1, bisect_left(range(1, largest), True, key=too_large))
    return of_at_most(largest)


def data_rates(counts: Counts, tokens_per_second: float, nodes: int) -> dict[str, float]:
    """Bytes/s of token ids: in total, per node, and from a node's disk, which reads whole pages."""
    itemsize = 4 if counts.shape.vocab_size > 1 << 16 else 2
    window = (counts.shape.block_size + 1) * itemsize
    pages = 1 + (window - itemsize) / PAGE  # mean over the positions of windows
    total = tokens_per_second * itemsize
    return {"total": total, "node": total / nodes, "disk": total / nodes * pages * PAGE / window}


def run_on(config: BenchConfig, counts: Counts, hardware: Hardware, split: Split, mfu: float) -> dict:
    """The whole run with this split, for the number of tokens of its settings."""
    step = step_time(counts, hardware, split, mfu)
    sequences, rate = samples_per_step(config), step["tokens_per_second"]
    days = config.max_iters * sequences * config.block_size / rate / 86400
    run = {"n": split.n, "B": split.B, "rounds": split.micro_steps, "shard": split.shard}
    run |= {"again": split.recompute, "sequences": split.sequences}
    run |= {"max_iters": round(config.max_iters * sequences / split.sequences), **step}
    run |= {"share": step["waits"] / step["seconds"], "efficiency": step["compute"] / step["seconds"]}
    run |= {"days": days, "gpu_hours": days * 24 * split.n, "memory": memory(counts, hardware, split)}
    return {**run, "data": data_rates(counts, rate, math.ceil(split.n / hardware.per_node))}


def flags_of(config: BenchConfig, split: Split) -> str:
    """The flags that change the settings to those of `split`, for the same number of tokens; "" if none."""
    longer = samples_per_step(config) / split.sequences
    wanted = {"batch_size": split.B, "gradient_accumulation_steps": split.n * split.micro_steps}
    for name in ("max_iters", "lr_decay_iters"):
        steps = getattr(config, name)
        if steps is not None and not config.max_minutes and not (name == "max_iters" and config.max_epochs):
            wanted[name] = round(steps * longer)
    wanted |= {"shard": split.shard, "activation_checkpointing": split.recompute}
    return " ".join(f"--{name}={value}" for name, value in wanted.items() if value != getattr(config, name))


def bench_plan(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """Plan the run: for this machine from a few measured steps, otherwise from data sheets."""
    if config.gpu != "here" or config.mfu:
        return plan(config, runtime)
    print("measure  a few training steps on this machine:")
    if config.minutes is None:
        return plan(config, runtime, *measure(config, runtime, training_step))
    hardware, text = find_hardware(config, runtime), text_of(config, find_data(config)[1])
    mfus: dict[Size, float] = {}
    sizes, on_gpu = sizes_for(config), not hardware.is_cpu
    chosen = choose(config, sizes, text, hardware.peak, {FIRST: MFU}, on_gpu)
    while size_of(chosen) not in mfus:  # until the size that seems best has been measured
        mfus[size_of(chosen)], _ = measure(chosen, runtime, training_step)
        chosen = choose(config, sizes, text, hardware.peak, mfus, on_gpu)
    return plan(chosen, runtime, mfus[size_of(chosen)], hardware.peak, text)


def measure(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> tuple[float, float]:
    """The MFU of a few training steps on this machine, and its peak FLOP/s."""
    shape, _, has_data = planned_shape(config)
    batch_size = shape.batch_size
    if runtime.device.type != "cuda":  # a thousand tokens are enough; a full step may take an hour
        batch_size = min(batch_size, max(1, 1024 // shape.block_size))
    few = {"bench_steps": min(5, shape.bench_steps), "warmup_steps": 1, "gradient_accumulation_steps": 1}
    few |= {"batch_size": batch_size, "real_data": has_data}
    step = bench_step(replace(shape, **few), runtime, training_step)
    return step["steps"]["ours"]["mfu"], step["peak_flops"]


def plan(
    config: BenchConfig,
    runtime: Runtime,
    mfu: float | None = None,
    peak: float | None = None,
    text: Text | None = None,
) -> dict[str, Any]:
    """Print the plan of the run, and return it. `mfu` and `peak`: measured on this machine. `text`: if the
    settings were chosen for it."""
    hardware, has_data = find_hardware(config, runtime, peak), find_data(config)[1]
    mfu, source = find_mfu(config, mfu)
    if config.minutes is not None:
        text = text_of(config, has_data)
        config = choose_by_step_time(config, text, runtime, hardware, mfu)
    config, counts = planned_counts(config, runtime, hardware)
    split, variants = best_split(config, counts, hardware)
    if config.max_minutes is not None:
        seconds = training_seconds(config, config.max_minutes, not hardware.is_cpu)
        speed = step_time(counts, hardware, split, mfu)["tokens_per_second"]
        config = fit_to_time(config, seconds, speed)
    numbers = sorted({2**i for i in range(max(4096, config.n_gpus).bit_length())} | {config.n_gpus})
    splits = [settle(config, counts, hardware, split._replace(n=n)) for n in numbers]
    counted = counts._asdict() | {"shape": asdict(counts.shape)}
    result = {"place": hardware._asdict(), "counts": counted, "mfu": mfu}
    result |= {"run": run_on(config, counts, hardware, split, mfu), "flags": flags_of(config, split)}
    result |= {"variants": variants, "checkpoint_bytes": 4 * counts.parameters + counts.averages}
    result["scaling"] = [run_on(config, counts, hardware, one, mfu) for one in splits]
    if config.real_data and not has_data:
        print(f"data     dataset {config.dataset} not found; GPT-2's vocabulary size is used")
    if text:
        result["tokens"] = tokens = config.max_iters * samples_per_step(config) * config.block_size
        print_choice(config, text, tokens)
    print_memory(config, hardware, counts, result)
    if result["run"]["memory"]["fits"]:
        print(f"mfu      {mfu:.0%} of the peak FLOP/s, {source}")
        print_run(config, result)
    print_scaling(config, result["scaling"])
    return result


def planned_counts(config: BenchConfig, runtime: Runtime, hardware: Hardware) -> tuple[BenchConfig, Counts]:
    """The settings of planned_shape, and the counts of its network."""
    config, shape, _ = planned_shape(config)
    half = (runtime.dtype != torch.float32) if config.gpu == "here" else config.dtype != "float32"
    return config, count(shape, config, half, not hardware.is_cpu)


def choose_by_step_time(
    config: BenchConfig, text: Text, runtime: Runtime, hardware: Hardware, mfu: float
) -> BenchConfig:
    """The settings that `minutes` chooses if a step takes as long as planned, its update and communication
    included."""
    sizes, on_gpu, mfus = sizes_for(config), not hardware.is_cpu, {}
    best = choose(config, sizes, text, hardware.peak, {FIRST: mfu}, on_gpu)
    while True:  # until the best size is better than the next smaller and larger ones
        number = sizes.index(size_of(best))
        near = [size for size in sizes[max(0, number - 1) : number + 2] if size not in mfus]
        if not near:
            return best
        for size in near:
            chosen = choose(config, [size], text, hardware.peak, {size: mfu}, on_gpu)
            chosen, counts = planned_counts(chosen, runtime, hardware)
            step = step_time(counts, hardware, best_split(chosen, counts, hardware)[0], mfu)
            flops = counts.flops_per_token * step["tokens_per_second"]
            mfus[size] = flops / (config.n_gpus * hardware.peak)
        best = choose(config, list(mfus), text, hardware.peak, mfus, on_gpu)


def find_mfu(config: BenchConfig, measured: float | None) -> tuple[float, str]:
    """The MFU to expect, and its source."""
    if config.mfu:
        return config.mfu, "given"
    if not measured:
        return MFU, "assumed; set --mfu, or measure it with --gpu=here"
    # the hardware's, as the forward pass is computed twice
    return measured * (4 / 3 if config.activation_checkpointing else 1), "measured here"


def best_split(config: BenchConfig, counts: Counts, hardware: Hardware) -> tuple[Split, dict[str, Any]]:
    """The cheapest split that fits into memory, and the memory of a rank with and without sharding."""
    shard, recompute = config.shard, config.activation_checkpointing
    for how in ((shard, recompute), (True, recompute), (shard, True), (True, True)):  # cheapest first
        split = settle(config, counts, hardware, Split(config.n_gpus, 1, 1, *how))
        if memory(counts, hardware, split)["fits"]:
            break
    variants = {}
    for name in ("plain", "checkpointing", "shard", "shard, checkpointing"):
        variant = split._replace(shard="shard" in name, recompute="checkpointing" in name)
        variants[name] = memory(counts, hardware, variant)
    return split, variants


def print_choice(config: BenchConfig, text: Text, tokens: int) -> None:
    """Print what train.py --minutes prints, after the text that is assumed without a dataset."""
    if math.isinf(text.tokens):
        print(
            f"text     assumed: unlimited English web text, {text.bytes_per_token:g} bytes per token, "
            f"difficulty {text.difficulty:g} (docs/minutes.md)"
        )
    print("\n".join(choice_lines(config, text, tokens, config.max_minutes)))


def print_memory(config: BenchConfig, hardware: Hardware, counts: Counts, result: dict[str, Any]) -> None:
    """Print the hardware, the model, and which settings fit into memory."""
    run, n, shape, flags = result["run"], config.n_gpus, counts.shape, result["flags"]
    steps, usable = config.gradient_accumulation_steps, f"{USABLE * hardware.memory / 2**30:,.1f} GiB"
    print(
        f"hardware {n:,} x {hardware.name}, {hardware.per_node} per node: "
        f"{hardware.memory / 2**30:,.0f} GiB, {hardware.peak / 1e12:,.3g} TFLOP/s, "
        f"{hardware.link / 1e9:,.0f} GB/s within a node, "
        f"{hardware.network * 8 / 1e9:,.4g} Gbit/s between nodes\n"
        f"model    {shape.n_layer}/{shape.n_head}/{shape.n_embd}, {counts.parameters:,} parameters, "
        f"{counts.flops_per_token / 1e9:,.3g} GFLOP per token\n{recipe_line(config)}"
    )
    if (n * run["rounds"], run["B"]) != (steps, config.batch_size):
        why = f"cannot be split among {n:,} GPUs" if steps % n else "do not fit"
        wanted = steps * config.batch_size
        instead = "" if run["sequences"] == wanted else f", not {wanted:,}"
        print(
            f"batch    {steps} micro-steps of {config.batch_size} {why}; nearest: {n * run['rounds']:,} of "
            f"{run['B']} = {run['sequences']:,} sequences per step{instead}"
        )
    heads = "  ".join(MEMORY_COLUMNS.values())
    print(f"memory   GiB per rank, eager   {heads}  batch_size {run['B']}")
    for name, parts in result["variants"].items():
        figures = "  ".join(f"{parts[key] / 2**30:{len(head)}.2f}" for key, head in MEMORY_COLUMNS.items())
        print(f"         {name:20}  {figures}  {'fits' if parts['fits'] else 'does not fit'}")
    if run["memory"]["fits"]:
        how = f"fits     {'with these flags' if flags else 'yes'}"
        print(f"{how}: {run['memory']['peak'] / 2**30:,.1f} of {usable} usable")
        if flags:
            print(f"flags    {flags}")
    else:
        least = min(parts["peak"] for parts in result["variants"].values()) / 2**30
        print(f"fits     no: at least {least:,.1f} GiB needed, {usable} usable; use more or larger GPUs")
        print("         the table below is with --shard=True --activation_checkpointing=True:")


def duration(seconds: float) -> str:
    """The seconds in a readable unit."""
    for name, unit in {"days": 86400, "hours": 3600, "minutes": 60}.items():
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} s"


def print_run(config: BenchConfig, result: dict[str, Any]) -> None:
    """Print how long a step and the run take, and how much is read and written."""
    run, size = result["run"], result["checkpoint_bytes"]
    ms = {name: f"{run[name] * 1000:,.1f}" for name in ("seconds", "compute", "update", "exchange", "waits")}
    rates = {name: f"{rate / 1e6:,.1f}" for name, rate in run["data"].items()}
    tokens = run["sequences"] * config.block_size
    total = f"{run['max_iters'] * tokens / 1e9:,.1f} billion"
    if run["max_iters"] * tokens < 1e9:
        total = f"{run['max_iters'] * tokens / 1e6:,.1f} million"
    rest = f"         the start and evaluations take the rest of the {config.max_minutes or 0:g} minutes\n"
    print(
        f"step     {ms['seconds']} ms for {tokens:,} tokens\n"
        f"         compute {ms['compute']} ms, optimizer {ms['update']} ms, "
        f"communication {ms['exchange']} ms ({ms['waits']} ms exposed)\n"
        f"speed    {run['tokens_per_second']:,.0f} tokens/s\n"
        f"run      {run['max_iters']:,} steps, {total} tokens: "
        f"{duration(run['days'] * 86400)}, {run['gpu_hours']:,.1f} GPU-hours\n"
        f"{rest if config.max_minutes else ''}"
        f"reads    {rates['total']} MB/s of token ids in total, {rates['node']} MB/s per node, "
        f"{rates['disk']} MB/s from its disk in {PAGE // 1024} KiB pages\n"
        f"writes   {size / 1e9:,.2f} GB per checkpoint, {size / DISK:,.1f} s at {DISK / 1e9:.0f} GB/s"
    )


def print_scaling(config: BenchConfig, rows: list[dict[str, Any]]) -> None:
    """Print the run on increasing numbers of GPUs, and the limits of scaling."""
    heads = "sequences    GiB     ms/step  exposed  efficiency          time"
    print(f"scale      GPUs  batch_size x micro-steps  {heads}")
    for row in rows:
        times = "does not fit"
        if row["memory"]["fits"]:
            times = f"{row['seconds'] * 1000:10,.1f}  {row['share']:7.1%}  {row['efficiency']:10.0%}  "
            times += f"{duration(row['days'] * 86400):>12}"
        print(
            f"         {row['n']:6,}  {row['B']:10} x {row['rounds']:<11}  {row['sequences']:9,}  "
            f"{row['memory']['peak'] / 2**30:5.1f}  {times}"
        )
    fitting = [row for row in rows if row["memory"]["fits"]]
    if not fitting:
        return
    most, sequences = rows[-1]["n"], samples_per_step(config)

    print("         exposed: part of a step that waits for communication; efficiency: part that computes")
    words = f"less than 10% of a step is exposed up to {most:,} GPUs"
    if slow := [row["n"] for row in fitting if row["share"] >= 0.1]:
        words = f"10% of a step or more is exposed from {slow[0]:,} GPUs on"
    print(f"limits   communication: {words}")
    if sequences < most:
        few = next(row["n"] for row in rows if row["n"] > sequences)
        why = "a larger batch learns less per token"
        print(f"         batch: {sequences:,} sequences are too few for {few:,} GPUs; {why}")
    words = f"is enough up to {most:,} GPUs"
    if slow := [row["n"] for row in fitting if row["data"]["disk"] >= DISK]:
        words = f"is too slow from {slow[0]:,} GPUs on"
    rate = max(row["data"]["disk"] for row in fitting) / 1e6
    ssd = f"an SSD of {DISK / 1e6:,.0f} MB/s per node"
    print(f"         data: {ssd} {words} ({rate:,.1f} MB/s at most)")
