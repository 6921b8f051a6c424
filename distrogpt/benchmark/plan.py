"""What a run would take, before anything is spent: python bench.py train_gpt2 --plan=True --gpu=h100

Bytes are counted on the model itself. Times are arithmetic, on data sheets and on these assumptions:

- Products reach a share of the peak, given, measured here, or MFU below, at any batch size, which
  is kind to one or two sequences a GPU. Computing activations again adds a third.
- The optimizer reads and writes 40 bytes a parameter (AdamW 28, clipping 12) at the memory's bandwidth.
- A ring's slowest link carries LINK_SHARE of its nominal rate: a GPU's to its node, or all network cards of a
  node together. Each message waits LATENCY for each doubling of the ranks, the network's and the launch's.
- DDP adds up fp32 gradients once a step, behind the last micro-step's backward pass but for the last bucket.
  FSDP2 gathers weights twice and scatters gradients in each micro-step, behind all of its arithmetic.

What is published gives the MFU, not the other way round: nanoGPT's 600,000 steps of 0.49 M tokens in about
4 days on 8 A100 40GB make 0.29; llm.c's 10 B tokens make 0.40 in 45 minutes on 8 H100, and 0.63 in 90 minutes
on 8 A100 80GB.
"""

import math
import os
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distrogpt.data.dataset import find_parts, open_dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.errors import UserError
from distrogpt.gpus import GPU, GPUS, find_gpu
from distrogpt.hardware import measured_flops, peak_flops
from distrogpt.kernels import replace_layers
from distrogpt.kernels.cpu import causal_mask, use_cpu_kernels
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.startup import new_model_config, resolve_max_iters
from model import GPT, Attention, GPTConfig

MFU = 0.4  # where none is known: llm.c's on H100, see above
LINK_SHARE, LATENCY = 0.8, 10e-6  # of the nominal bandwidth; seconds
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
USABLE = 0.9  # of a memory: the rest is CUDA's, NCCL's, the system's, and gaps between what is allocated
LIBRARIES = 40e6  # bytes that the first step on a CPU loads; measured
COMPILER = 80e6  # bytes of torch's compiler, which DDP, FSDP2 and activation_checkpointing load; measured
DISK, PAGE = 1e9, 4096  # bytes/s of a node's SSD; bytes that a system reads at once
GPT2_SHAPES = {  # layers, heads, width (Radford et al., 2019)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
UNKNOWN = GPU("", 0, 0, None, 32, 12.5)  # PCIe, and eight that share 100 Gbit/s


class Hardware(NamedTuple):
    """A GPU among others, or this machine. Bandwidths are bytes/s, in one direction."""

    name: str
    peak: float  # FLOP/s, dense, bf16
    memory: float  # bytes
    memory_bandwidth: float | None  # None: the measured MFU has it in it
    link: float  # to the other GPUs of the node
    network: float  # of the network card that it has to itself
    per_node: int = 8
    is_cpu: bool = False


class Counts(NamedTuple):
    """What is counted on a model: bytes kept for the gradient, by a block and by all else, whatever the batch
    (`fixed`, copies of weights in 16 bits) and for `each` sequence of it; and numbers of parameters."""

    shape: GPTConfig
    parameters: int
    tables: int  # of them outside of the blocks
    matrices: int  # of them that Muon updates
    averages: int  # bytes of the optimizer's
    flops_per_token: int
    item: int  # bytes of a weight of the blocks in the run's arithmetic
    block_fixed: int
    block_each: int
    head_fixed: int
    head_each: int


class Split(NamedTuple):
    """How n ranks share a step: each makes `rounds` micro-steps of B sequences."""

    n: int
    B: int
    rounds: int
    shard: bool = False
    again: bool = False  # activations are computed again for the gradient

    @property
    def sequences(self) -> int:
        return self.n * self.B * self.rounds


def find_place(config: BenchConfig, runtime: Runtime, peak: float | None = None) -> Hardware:
    """The GPU of config.gpu, or this machine, whose `peak` may have been measured before."""
    kind = runtime.device.type
    if config.gpu != "here":
        gpu = GPUS[config.gpu]
        name, size, peak, own = gpu.words, gpu.memory * 2**30, gpu.peak_flops, 8
        if config.dtype == "float32":  # TF32 is half as fast as bf16; older chips have none
            peak /= 8 if config.gpu in ("v100", "t4") else 2
    elif kind == "cuda":
        about = torch.cuda.get_device_properties(runtime.device)
        name, size, own = about.name, about.total_memory, torch.cuda.device_count()
        gpu = find_gpu(name) or UNKNOWN
    else:
        name, gpu, own = f"this {kind}", UNKNOWN, 1
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf  # Windows does not tell
        size = PAGE * pages if pages == math.inf else os.sysconf("SC_PAGE_SIZE") * pages
    peak = peak or (
        peak_flops(runtime.device, runtime.dtype)
        if kind == "cuda"
        else measured_flops(runtime.device, runtime.dtype)
    )
    return Hardware(
        name,
        peak,
        size,
        gpu.memory_bandwidth and gpu.memory_bandwidth * 1e9,
        gpu.link * 1e9,
        (config.interconnect or gpu.network) * 1e9 / 8,
        config.gpus_per_node or own,
        config.gpu == "here" and kind == "cpu",
    )


def planned_shape(config: BenchConfig) -> tuple[BenchConfig, GPTConfig, bool]:
    """The settings, with GPT-2's shape where init_from names one; the network; whether the dataset is here.

    Without a dataset, the vocabulary is GPT-2's. Raises UserError where the shape is in a file, or max_epochs
    are to be counted on a dataset that is not here.
    """
    if config.init_from in GPT2_SHAPES:
        layers, heads, width = GPT2_SHAPES[config.init_from]
        config = replace(config, init_from="scratch", n_layer=layers, n_head=heads, n_embd=width, bias=True)
    elif config.init_from not in ("scratch", "resume", "auto"):
        raise UserError(f"plan cannot see into init_from={config.init_from}; give its shape in the settings")
    meta, found = GPT2_META, False
    if config.real_data:
        try:
            parts = find_parts(config.dataset)
            found = all(any(folder.glob("train*.bin")) for _, _, folder, _ in parts)
            meta = parts[0][-1] if found else meta
        except UserError:
            pass
    if config.max_epochs is not None:
        if not found:
            raise UserError("max_epochs is counted on the dataset, which is not here; give --max_iters alone")
        config = resolve_max_iters(config, open_dataset(config, ("train",)))
    return config, new_model_config(config, meta), found


class MaskedDropout(nn.Dropout):
    """Dropout as GPUs do it: a byte is kept for each number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


def as_trained(model: GPT, on_gpu: bool) -> GPT:
    """The model with the layers of its device. On GPUs, attention keeps no scores, and makes the noise of its
    dropout again in the backward pass."""
    if not on_gpu:
        return use_cpu_kernels(model)
    return replace_layers(
        model,
        {
            nn.Dropout: lambda layer: MaskedDropout(layer.p),
            Attention: lambda layer: Attention(layer.scale, 0.0),
        },
    )


def saved_bytes(model: GPT, B: int, half: bool) -> int:
    """Bytes that a training forward pass of B sequences keeps for the gradient, but for the parameters.

    A piece of memory counts once, however many operations keep it. `half`: with autocast to 16 bits.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no later one takes an address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    idx = torch.zeros(B, model.config.block_size, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(idx, idx, return_logits=False)
    return sum(storage.nbytes() for storage in kept.values())


def count(shape: GPTConfig, config: BenchConfig, half: bool, on_gpu: bool) -> Counts:
    """Count a model. One and two layers, and two and three sequences, tell what each of them adds: of one
    alone, fewer copies are made.

    On torch's fake tensors, which have all but numbers: the same code runs, without memory and time.
    """
    saved = {}
    causal_mask.cache_clear()  # true tensors and fake ones do not mix
    with FakeTensorMode():
        for layers in (1, 2):
            model = as_trained(GPT(replace(shape, n_layer=layers)).train(), on_gpu)
            for B in (2, 3):
                saved[layers, B] = saved_bytes(model, B, half)
    causal_mask.cache_clear()
    block = [saved[2, B] - saved[1, B] for B in (2, 3)]
    head = [saved[1, 2] - block[0], saved[1, 3] - block[1]]
    with torch.device("meta"):
        model = GPT(shape)
    in_blocks = list(model.transformer.h.parameters())
    N = model.get_num_params(non_embedding=False)
    matrices = sum(p.numel() for p in in_blocks if p.dim() == 2) if config.optimizer == "muon" else 0
    averages = 4 * N * (config.momentum > 0) if config.optimizer == "sgd" else 8 * N - 4 * matrices
    tables = N - sum(p.numel() for p in in_blocks)
    kept = (3 * block[0] - 2 * block[1], block[1] - block[0], 3 * head[0] - 2 * head[1], head[1] - head[0])
    return Counts(shape, N, tables, matrices, averages, model.flops_per_token(), 2 if half else 4, *kept)


def memory(counts: Counts, place: Hardware, split: Split) -> dict[str, float]:
    """Bytes of a rank, without torch.compile, which needs less for activations and loss.

    "more", with `shard`, is what is gathered from others: two blocks in the run's arithmetic, tables in fp32.
    "peak" is below the sum where not all of it is there at once.
    """
    shape, N, B, shard = counts.shape, counts.parameters, split.B, split.shard and split.n > 1
    layers, share = shape.n_layer, 1 / split.n if shard else 1
    weights, gradients, averages = 4 * N * share, 4 * N * share, counts.averages * share
    of_block = (N - counts.tables) // layers
    more = 2 * counts.item * of_block + 4 * counts.tables if shard else 0
    fixed = 0 if shard else counts.block_fixed  # gathered weights are in 16 bits already
    stream = 4 * B * shape.block_size * shape.n_embd  # what a block reads: enough to compute it again
    kept = layers * stream if split.again else layers * B * counts.block_each
    head = counts.head_fixed + B * counts.head_each
    logits = B * shape.block_size * shape.vocab_size
    # in a first micro-step they come as activations go, but for DDP, whose buckets they lie in
    before = gradients if split.rounds > 1 or (split.n > 1 and not shard) else 0
    # autocast keeps its copies of all weights to the end of the forward pass, which has the logits twice
    forward = before + layers * fixed + kept + head + 6 * logits
    one = fixed + B * counts.block_each if split.again else layers * fixed
    activations = kept + one + head + 8 * logits  # gradients of the logits and of their logarithms
    # a table that reads and writes has two gradients and their sum before they are its own
    table, adds = 4 * shape.vocab_size * shape.n_embd, split.rounds > 1 or shard
    end = gradients + table * (2 + adds if shape.tied else adds * (1 + shard))
    update = gradients + 8 * counts.matrices * share  # Muon's products
    peak = weights + averages + more + max(forward, before + activations, end, update)
    if place.is_cpu:  # its allocator keeps what a step frees, with holes of about the logits' size; measured
        peak += 8 * logits + LIBRARIES + COMPILER * (split.again or split.n > 1)
    parts = {"weights": weights, "gradients": gradients, "averages": averages, "activations": activations}
    return {**parts, "more": more, "peak": peak, "fits": peak <= USABLE * place.memory}


def ring_bandwidth(place: Hardware, n: int) -> float:
    """Bytes/s that a ring through n GPUs carries."""
    cards = min(n, place.per_node) * place.network if n > place.per_node else math.inf
    return LINK_SHARE * min(place.link, cards)


def exchange(counts: Counts, place: Hardware, n: int, shard: bool) -> tuple[float, float]:
    """Seconds of an exchange among n ranks, and of its last message, which nothing hides.

    The all-reduce of fp32 gradients, once a step; with `shard` the gathers and the scatter of a micro-step.
    """
    if n == 1:
        return 0.0, 0.0
    gradients = 4 * counts.parameters
    weights = 2 * counts.item * (counts.parameters - counts.tables) + 4 * counts.tables  # blocks twice
    sent = (n - 1) / n * (weights + gradients if shard else 2 * gradients)
    groups = 2 * counts.shape.n_layer + 1  # attention and MLP of each block, and the rest: parallel.py
    messages = 3 * groups if shard else math.ceil(gradients / BUCKET)
    seconds = sent / ring_bandwidth(place, n) + messages * LATENCY * math.log2(n)
    return seconds, seconds / messages


def step_time(counts: Counts, place: Hardware, split: Split, mfu: float) -> dict[str, float]:
    """Seconds of a step and of its parts; "waits" is the part of "exchange" that arithmetic does not hide."""
    shard = split.shard and split.n > 1
    tokens = split.B * counts.shape.block_size
    round_ = counts.flops_per_token * tokens / (place.peak * mfu) * (4 / 3 if split.again else 1)
    update = 40 * counts.parameters / (split.n if shard else 1) / (place.memory_bandwidth or math.inf)
    once, last = exchange(counts, place, split.n, shard)
    # all of a micro-step hides it, or the backward pass, which is 2/3 of one, recomputing 3/4
    hidden = round_ if shard else round_ * (3 / 4 if split.again else 2 / 3)
    times = split.rounds if shard else 1
    waits = times * max(last, once - hidden)
    seconds = split.rounds * round_ + update + waits
    parts = {"compute": split.rounds * round_, "update": update, "exchange": times * once, "waits": waits}
    return {"seconds": seconds, **parts, "tokens_per_second": tokens * split.n * split.rounds / seconds}


def share_out(sequences: int, n: int, largest: int) -> tuple[int, int]:
    """B, at most `largest`, and the micro-steps of each of n ranks, so that a step is next to `sequences`."""
    found = []
    for B in range(max(1, largest - 4095), largest + 1):  # some of these go, or nearly so
        for rounds in (max(1, sequences // (n * B)), math.ceil(sequences / (n * B))):
            found.append((abs(n * B * rounds - sequences), -B, rounds))
    _, B, rounds = min(found)
    return -B, rounds


def settle(config: BenchConfig, counts: Counts, place: Hardware, n: int, shard: bool, again: bool) -> Split:
    """The settings nearest to the given ones that n ranks can share, and that fit; B is 1 where none does."""
    sequences = config.gradient_accumulation_steps * config.batch_size

    def split(largest: int) -> Split:
        return Split(n, *share_out(sequences, n, largest), shard, again)

    fits, fails = 1, config.batch_size + 1  # and all below, and all above
    while fails - fits > 1:
        middle = (fits + fails) // 2 if fails <= config.batch_size else config.batch_size
        if memory(counts, place, split(middle))["fits"]:
            fits = middle
        else:
            fails = middle
    return split(fits)


def data_rates(counts: Counts, tokens_per_second: float, nodes: int) -> dict[str, float]:
    """Bytes/s of token ids: in all, of a node, and of a node's disk, which reads windows in whole pages."""
    ids = 4 if counts.shape.vocab_size > 1 << 16 else 2
    window = (counts.shape.block_size + 1) * ids
    pages = 1 + (window - ids) / PAGE  # the mean over where a window begins
    total = tokens_per_second * ids
    return {"total": total, "node": total / nodes, "disk": total / nodes * pages * PAGE / window}


def run_on(config: BenchConfig, counts: Counts, place: Hardware, split: Split, mfu: float) -> dict[str, Any]:
    """The whole run, for the tokens that its settings say, shared in this way."""
    took = step_time(counts, place, split, mfu)
    step = config.gradient_accumulation_steps * config.batch_size
    days = config.max_iters * step * config.block_size / took["tokens_per_second"] / 86400
    return {
        **split._asdict(),
        "sequences": split.sequences,
        "max_iters": round(config.max_iters * step / split.sequences),
        **took,
        "share": took["waits"] / took["seconds"],
        "efficiency": took["compute"] / took["seconds"],
        "days": days,
        "gpu_hours": days * 24 * split.n,
        "memory": memory(counts, place, split),
        "data": data_rates(counts, took["tokens_per_second"], math.ceil(split.n / place.per_node)),
    }


def flags_of(config: BenchConfig, split: Split) -> str:
    """The flags that make the settings those of `split`, for the same number of tokens; "" for none."""
    longer = config.gradient_accumulation_steps * config.batch_size / split.sequences
    wanted = {"batch_size": split.B, "gradient_accumulation_steps": split.n * split.rounds}
    lengths = ("max_iters", "lr_decay_iters") if config.max_epochs is None else ("lr_decay_iters",)
    steps = {name: getattr(config, name) for name in lengths}
    wanted |= {name: round(value * longer) for name, value in steps.items() if value is not None}
    wanted |= {"shard": split.shard, "activation_checkpointing": split.again}
    return " ".join(f"--{name}={value}" for name, value in wanted.items() if value != getattr(config, name))


def plan(config: BenchConfig, runtime: Runtime, mfu: float | None = None, peak: float | None = None) -> dict:
    """Print what the run would take, and return it. `mfu` and `peak`: measured on this machine."""
    place = find_place(config, runtime, peak)
    config, shape, found = planned_shape(config)
    half = (runtime.dtype != torch.float32) if config.gpu == "here" else config.dtype != "float32"
    counts = count(shape, config, half, not place.is_cpu)
    whence = (
        "given" if config.mfu else "measured here" if mfu else "assumed; --mfu= gives it, --gpu=here measures"
    )
    if mfu and config.activation_checkpointing:
        mfu *= 4 / 3  # of arithmetic that was done twice
    mfu = config.mfu or mfu or MFU
    asked = (config.shard, config.activation_checkpointing)
    for how in (asked, (True, asked[1]), (asked[0], True), (True, True)):  # the cheaper ones first
        split = settle(config, counts, place, config.n_gpus, *how)
        if memory(counts, place, split)["fits"]:
            break
    run = run_on(config, counts, place, split, mfu)
    names = {(0, 0): "plain", (0, 1): "checkpointing", (1, 0): "shard", (1, 1): "shard, checkpointing"}
    variants = {
        name: memory(counts, place, split._replace(shard=bool(shard), again=bool(again)))
        for (shard, again), name in names.items()
    }
    numbers = sorted({2**i for i in range(max(4096, config.n_gpus).bit_length())} | {config.n_gpus})
    splits = [settle(config, counts, place, n, split.shard, split.again) for n in numbers]
    result = {
        "place": place._asdict(),
        "counts": {**counts._asdict(), "shape": asdict(shape)},
        "mfu": mfu,
        "run": run,
        "flags": flags_of(config, split),
        "variants": variants,
        "checkpoint_bytes": 4 * counts.parameters + counts.averages,
        "scaling": [run_on(config, counts, place, one, mfu) for one in splits],
    }
    if config.real_data and not found:
        print(f"data     no dataset {config.dataset} here: planned with GPT-2's vocabulary")
    print_memory(config, place, counts, result)
    if run["memory"]["fits"]:
        print(f"mfu      {mfu:.0%} of the peak, {whence}")
        print_run(config, result)
    print_scaling(config, result["scaling"])
    return result


def print_memory(config: BenchConfig, place: Hardware, counts: Counts, result: dict[str, Any]) -> None:
    """The place, the model, and what of it fits with which settings."""
    run, n, shape = result["run"], config.n_gpus, counts.shape
    steps, usable = config.gradient_accumulation_steps, f"{USABLE * place.memory / 2**30:,.1f} GiB"
    print(
        f"place    {n:,} x {place.name}, {place.per_node} a node: {place.memory / 2**30:,.0f} GiB, "
        f"{place.peak / 1e12:,.3g} TFLOP/s, {place.link / 1e9:,.0f} GB/s in a node, "
        f"{place.network * 8 / 1e9:,.4g} Gbit/s between\n"
        f"model    {shape.n_layer}/{shape.n_head}/{shape.n_embd}, {counts.parameters:,} parameters, "
        f"{counts.flops_per_token / 1e9:,.3g} GFLOP a token"
    )
    if (run["n"] * run["rounds"], run["B"]) != (steps, config.batch_size):
        why = f"cannot be shared among {n:,}" if steps % n else "do not fit"
        print(
            f"batch    {steps} micro-steps of {config.batch_size} {why}; nearest: {n * run['rounds']:,} of "
            f"{run['B']}, {run['sequences']:,} sequences a step for {steps * config.batch_size:,}"
        )
    widths = {"weights": 7, "gradients": 9, "averages": 8, "activations": 11, "more": 5, "peak": 5}
    heads = "  ".join(f"{key:>{width}}" for key, width in widths.items())
    print(f"memory   GiB of a rank         {heads}  batch_size {run['B']}, eager")
    for name, parts in result["variants"].items():
        figures = "  ".join(f"{parts[key] / 2**30:{width}.2f}" for key, width in widths.items())
        print(f"         {name:20}  {figures}  {'fits' if parts['fits'] else 'too much'}")
    if not run["memory"]["fits"]:
        least = min(parts["peak"] for parts in result["variants"].values()) / 2**30
        print(f"fits     no: {least:,.1f} GiB at least, of {usable}; take more GPUs, or larger ones")
        print("         below, with shard and activation_checkpointing:")
        return
    how = "with these flags" if result["flags"] else "yes"
    print(f"fits     {how}: {run['memory']['peak'] / 2**30:,.1f} of {usable}")
    if result["flags"]:
        print(f"flags    {result['flags']}")


def duration(seconds: float) -> str:
    """In the unit that suits."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    name, unit = next((pair for pair in units.items() if seconds >= 2 * pair[1]), ("s", 1))
    return f"{seconds / unit:,.1f} {name}"


def print_run(config: BenchConfig, result: dict[str, Any]) -> None:
    """How long a step and the run take, what is read and written."""
    run, size = result["run"], result["checkpoint_bytes"]
    ms = {name: f"{run[name] * 1000:,.1f}" for name in ("seconds", "compute", "update", "exchange", "waits")}
    rates = {name: f"{rate / 1e6:,.1f}" for name, rate in run["data"].items()}
    tokens = run["sequences"] * config.block_size
    print(
        f"step     {ms['seconds']} ms for {tokens:,} tokens: arithmetic {ms['compute']}, "
        f"update {ms['update']}, exchange {ms['exchange']}, of which {ms['waits']} wait\n"
        f"speed    {run['tokens_per_second']:,.0f} tokens/s\n"
        f"run      {run['max_iters']:,} steps, {run['max_iters'] * tokens / 1e9:,.1f} billion tokens: "
        f"{run['days']:,.2f} days ({duration(run['days'] * 86400)}), {run['gpu_hours']:,.1f} GPU-hours\n"
        f"reads    {rates['total']} MB/s in all, {rates['node']} a node, {rates['disk']} from its disk "
        f"in whole pages of {PAGE // 1024} KiB\n"
        f"writes   {size / 1e9:,.2f} GB a checkpoint, {size / DISK:,.1f} s at {DISK / 1e9:.0f} GB/s"
    )


def print_scaling(config: BenchConfig, rows: list[dict[str, Any]]) -> None:
    """The run on more and more GPUs, and what stops it."""
    print(
        "scale      GPUs  batch_size x steps  sequences    GiB     ms/step   waits  efficiency          time"
    )
    for row in rows:
        start = f"         {row['n']:6,}  {row['B']:10} x {row['rounds']:5}  {row['sequences']:9,}"
        start += f"  {row['memory']['peak'] / 2**30:5.1f}"
        figures = (
            f"  {row['seconds'] * 1000:10,.1f}  {row['share']:6.1%}  {row['efficiency']:10.0%}  "
            f"{duration(row['days'] * 86400):>12}"
        )
        print(start + (figures if row["memory"]["fits"] else "  too much"))
    fitting = [row for row in rows if row["memory"]["fits"]]
    if not fitting:
        return
    most, sequences = rows[-1]["n"], config.gradient_accumulation_steps * config.batch_size
    waiting = [row["n"] for row in fitting if row["share"] >= 0.1]
    told = f"from {waiting[0]:,} GPUs on" if waiting else f"not up to {most:,} GPUs"
    print(f"limits   exchange: {told}, a tenth of a step or more waits for it")
    if sequences < most:
        few = next(row["n"] for row in rows if row["n"] > sequences)
        print(
            f"         batch: {sequences:,} sequences are too few for {few:,} GPUs; "
            "a larger step learns less from a token"
        )
    reading = [row["n"] for row in fitting if row["data"]["disk"] >= DISK]
    told = f"from {reading[0]:,} GPUs on" if reading else f"not up to {most:,} GPUs"
    rate = max(row["data"]["disk"] for row in fitting) / 1e6
    print(
        f"         data: {told}, a node reads more than an SSD's {DISK / 1e6:,.0f} MB/s ({rate:,.1f} at most)"
    )
