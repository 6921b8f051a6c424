"""What a run would take, before anything is spent: python bench.py config/train_gpt2.py --plan=True --gpu=h100

Bytes are counted on the model itself; times are arithmetic on data sheets and on these assumptions:

- Matrix products reach a share of the peak (MFU) that is given, measured here, or MFU below; recomputing
  activations adds a third. It is the same at any batch size, which is kind to one or two sequences a GPU.
- The optimizer reads and writes 40 bytes a parameter (28 for AdamW, 12 for clipping) at the memory's bandwidth.
- Gradients are exchanged in fp32 in rings over the slowest link, the GPU's to its node or all network cards of
  the node together, at LINK_SHARE of the nominal rate; a bucket waits LATENCY for each doubling of the ranks.
- DDP exchanges once a step, behind the backward pass of the last micro-step but for the last bucket. FSDP2
  gathers weights twice and scatters gradients once in each micro-step, behind all of its arithmetic.

What is published gives the MFU, and not the other way round: nanoGPT's 600,000 steps of 0.49 M tokens in about
4 days on 8 A100 40GB make 0.29, llm.c's 10 B tokens 0.40 in 45 minutes on 8 H100, and 0.64 in 90 minutes on 8
A100 80GB.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import attention as attention_file
import model as model_file
from data.tokens import GPT2_META, find_dataset, read_meta
from errors import UserError
from model import GPT, GPTConfig
from runtime import PEAK_FLOPS, Runtime, measured_flops, peak_flops
from settings import BenchConfig

MFU = 0.4  # where none is known: llm.c's on H100, see above
LINK_SHARE, LATENCY = 0.8, 10e-6  # of the nominal bandwidth; seconds for each doubling of the ranks
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at once
USABLE = 0.9  # of a GPU's memory: the rest is CUDA's, NCCL's, and gaps between blocks
RESIDENT = 1.15  # a CPU's resident set over what is live: the allocator keeps what a step frees; measured
DISK = 1e9  # bytes/s that a node's SSD reads or writes
PAGE = 4096  # bytes that a system reads at once
GPT2_SHAPES = {  # layers, heads, width (Radford et al., 2019)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class Place(NamedTuple):
    """A GPU among others, or this machine. Bandwidths are bytes/s, in one direction."""

    name: str
    peak: float  # FLOP/s, dense, bf16
    memory: float  # bytes
    memory_bandwidth: float
    link: float  # to the other GPUs of the node
    network: float  # of the network card that it has to itself
    per_node: int = 8
    is_cpu: bool = False


# The name in PEAK_FLOPS; memory in GiB, as nvidia-smi tells it; GB/s of it; GB/s of NVLink, or PCIe x16, in one
# direction: the vendor's data sheets. Gbit/s to other nodes: of the vendor's own systems (DGX B200, H200, H100,
# A100, DGX-1), and what such machines are rented with for the rest.
GPUS = {
    "b200": ("B200", 179, 8000, 900, 400),
    "h200": ("H200", 140, 4800, 450, 400),
    "h100": ("H100", 79, 3350, 450, 400),
    "h100-pcie": ("H100 PCIe", 79, 2000, 64, 200),
    "a100-80gb": ("A100", 79, 2039, 300, 200),
    "a100-40gb": ("A100", 39, 1555, 300, 200),
    "l40s": ("L40S", 45, 864, 32, 100),
    "a40": ("A40", 45, 696, 32, 50),
    "a10": ("A10", 22, 600, 32, 25),
    "v100": ("V100", 32, 900, 150, 50),
    "t4": ("T4", 15, 300, 16, 12.5),
    "rtx4090": ("RTX 4090", 24, 1008, 32, 12.5),
    "rtx3090": ("RTX 3090", 24, 936, 32, 12.5),
}
OTHER = ("", 0, math.inf, 32, 12.5)  # one of which nothing is known


class Counts(NamedTuple):
    """What is counted on a model; bytes unless told otherwise. `each` is for each sequence of a micro-step."""

    shape: GPTConfig
    parameters: int  # their number
    block_parameters: int  # of one block
    averages: int  # the optimizer's
    matrices: int  # the number of those that Muon updates
    flops_per_token: int
    block_fixed: int  # kept for the gradient whatever the batch: copies of the weights in 16 bits
    block_each: int
    head_fixed: int
    head_each: int

    @property
    def tables(self) -> int:
        """Number of the parameters outside of the blocks."""
        return self.parameters - self.shape.n_layer * self.block_parameters


def find_place(config: BenchConfig, runtime: Runtime, peak: float | None = None) -> Place:
    """The GPU of config.gpu, or this machine, whose `peak` may have been measured before."""
    here = config.gpu == "here"
    if here and runtime.device.type != "cuda":
        name, size = f"this {runtime.device.type}", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        peak, (_, _, bandwidth, link, network) = peak or measured_flops(runtime), OTHER
    elif here:
        name, size = (getattr(torch.cuda.get_device_properties(runtime.device), k) for k in ("name", "total_memory"))
        known = (row for row in GPUS.values() if f" {row[0]} " in f" {name.replace('-', ' ')} ")
        peak, (_, _, bandwidth, link, network) = peak or peak_flops(runtime), next(known, OTHER)
    else:
        name, gigabytes, bandwidth, link, network = GPUS[config.gpu]
        peak, size = PEAK_FLOPS[name], gigabytes * 2**30
        if config.dtype == "float32":  # TF32 is half as fast as bf16; older chips have none
            peak /= 8 if config.gpu in ("v100", "t4") else 2
    network = config.interconnect or network
    own = max(1, torch.cuda.device_count()) if here else 8
    link, network, bandwidth = link * 1e9, network * 1e9 / 8, bandwidth * 1e9
    per_node = config.gpus_per_node or own
    return Place(name, peak, size, bandwidth, link, network, per_node, here and runtime.device.type == "cpu")


def planned_shape(config: BenchConfig) -> tuple[BenchConfig, GPTConfig, bool]:
    """The settings with GPT-2's shape where init_from names one, the network, and whether the dataset is here.

    Without a dataset, the vocabulary is GPT-2's. Raises UserError where the shape is in a file.
    """
    if config.init_from in GPT2_SHAPES:
        layers, heads, width = GPT2_SHAPES[config.init_from]
        config = replace(config, init_from="scratch", n_layer=layers, n_head=heads, n_embd=width, bias=True)
    elif config.init_from not in ("scratch", "resume", "auto"):
        raise UserError(f"init_from={config.init_from} has a shape of its own; plan with that in the settings")
    meta, found = GPT2_META, False
    if config.real_data:
        try:
            meta, found = read_meta(find_dataset(config.dataset)), True
        except UserError:
            pass
    # padded as train.py does it
    vocab_size = GPTConfig.vocab_size if meta["vocab_size"] == 50257 else meta["vocab_size"]
    shape = {name: value for name, value in asdict(config).items() if name in asdict(GPTConfig())}
    return config, GPTConfig(vocab_size=vocab_size, **shape), found


@contextmanager
def as_on_gpu(wanted: bool) -> Iterator[None]:
    """model.py's operations as GPUs do them: attention that keeps no scores, dropout that keeps one byte."""
    ours = {"causal_attention": model_file.causal_attention, "dropout": model_file.dropout}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, p: float) -> torch.Tensor:
        gqa = q.size(1) != k.size(1)  # without dropout: on GPUs its noise is made anew for the gradient
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)

    def drop(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    try:
        vars(model_file).update({"causal_attention": attend, "dropout": drop} if wanted else {})
        yield
    finally:
        vars(model_file).update(ours)


def saved_bytes(model: GPT, B: int, half: bool) -> int:
    """Bytes that a training forward pass of B sequences keeps for the gradient, but for the parameters.

    Each memory block counts once, however many operations keep it.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no later one takes its number
        return tensor

    idx = torch.zeros(B, model.config.block_size, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(idx, idx, only_loss=True)
    return sum(storage.nbytes() for storage in kept.values())


def count(shape: GPTConfig, config: BenchConfig, half: bool, on_gpu: bool) -> Counts:
    """Count a model. One and two layers, and one and two sequences, tell what each of them adds.

    They are torch's fake tensors, which have all but numbers: the same code runs, without memory and time.
    """
    caches = (attention_file.rotation, attention_file.causal_bias)
    for cache in caches:
        cache.cache_clear()  # of true tensors, which do not mix with fake ones
    saved = {}
    with FakeTensorMode(), as_on_gpu(on_gpu):
        for layers in (1, 2):
            model = GPT(replace(shape, n_layer=layers)).train()
            for B in (1, 2):
                saved[layers, B] = saved_bytes(model, B, half)
    for cache in caches:
        cache.cache_clear()
    block = {B: saved[2, B] - saved[1, B] for B in (1, 2)}
    head = {B: saved[1, B] - block[B] for B in (1, 2)}
    with torch.device("meta"):
        model = GPT(shape)
    of_block = sum(p.numel() for p in model.transformer.h[0].parameters())
    N = sum(p.numel() for p in model.parameters())
    muon = config.optimizer == "muon"
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) if muon else 0
    averages = 4 * N * (config.momentum > 0) if config.optimizer == "sgd" else 8 * N - 4 * matrices
    kept = (2 * block[1] - block[2], block[2] - block[1], 2 * head[1] - head[2], head[2] - head[1])
    return Counts(shape, N, of_block, averages, matrices, model.flops_per_token(), *kept)


def memory(
    counts: Counts, place: Place, n: int, B: int, micro: int, shard: bool, again: bool
) -> dict[str, float]:
    """Bytes of a rank among n, with `micro` micro-steps of B sequences, without torch.compile, which needs less.

    `again`: activations are computed again. "more" is what is exchanged: DDP's buckets, or with `shard` two
    blocks gathered in 16 bits and the tables in fp32. "peak" is less than the sum where not all is there at once.
    """
    shape, N = counts.shape, counts.parameters
    shard = shard and n > 1
    share = 1 / n if shard else 1
    weights = gradients = 4 * N * share
    averages = counts.averages * share
    more = 4 * (counts.block_parameters + counts.tables) if shard else 4 * N * (n > 1)
    stream = 4 * B * shape.block_size * shape.n_embd  # what a block reads
    fixed = 0 if shard else counts.block_fixed  # gathered weights are in 16 bits already
    block = fixed + B * counts.block_each
    blocks = shape.n_layer * stream + block if again else shape.n_layer * block
    head = counts.head_fixed + B * counts.head_each
    logits = B * shape.block_size * shape.vocab_size
    state = weights + averages + more
    before = gradients if micro > 1 else 0  # in the first micro-step, they come as activations go
    # autocast keeps all its copies of the weights to the end of the forward pass, which makes logits twice
    forward = before + shape.n_layer * (fixed + (stream if again else B * counts.block_each)) + head + 6 * logits
    activations = blocks + head + 8 * logits  # the gradients of the log-probabilities and of the logits
    end = gradients + 4 * counts.tables * (2 if micro > 1 or shard else 1)  # reading and writing add to a table
    step = gradients + 10 * counts.matrices * share  # Muon's products, in fp32 and 16 bits
    peak = (state + max(forward, before + activations, end, step)) * (RESIDENT if place.is_cpu else 1)
    parts = {"weights": weights, "gradients": gradients, "averages": averages, "activations": activations}
    return {**parts, "more": more, "peak": peak, "fits": peak <= USABLE * place.memory}


def ring_bandwidth(place: Place, n: int) -> float:
    """Bytes/s that a ring through n GPUs carries."""
    in_node = min(n, place.per_node)
    return LINK_SHARE * (place.link if n <= place.per_node else min(place.link, in_node * place.network))


def exchange_seconds(counts: Counts, place: Place, n: int, shard: bool) -> tuple[float, float]:
    """Seconds of an exchange among n ranks, and of its last part, which nothing hides.

    DDP's all-reduce of fp32 gradients, once a step; with `shard` the gathers and the scatter of a micro-step.
    """
    if n == 1:
        return 0.0, 0.0
    gradients, wait = 4 * counts.parameters, LATENCY * math.log2(n)
    if shard:
        weights = 2 * 2 * counts.shape.n_layer * counts.block_parameters + 4 * counts.tables
        sent, parts = (n - 1) / n * (weights + gradients), 3 * (counts.shape.n_layer + 1)
    else:
        sent, parts = 2 * (n - 1) / n * gradients, math.ceil(gradients / BUCKET)
    seconds = sent / ring_bandwidth(place, n) + parts * wait
    return seconds, seconds / parts


def step_time(
    counts: Counts, place: Place, n: int, B: int, micro: int, mfu: float, shard: bool, again: bool
) -> dict[str, float]:
    """Seconds of a step with `micro` micro-steps of B sequences on each of n GPUs: arithmetic and its parts."""
    shard = shard and n > 1
    tokens = B * counts.shape.block_size
    micro_step = counts.flops_per_token * tokens / (place.peak * mfu) * (4 / 3 if again else 1)
    update = 40 * counts.parameters / (n if shard else 1) / place.memory_bandwidth
    exchange, last = exchange_seconds(counts, place, n, shard)
    if shard:
        waits, exchange = micro * max(last, exchange - micro_step), micro * exchange
    else:  # two thirds of the arithmetic are the backward pass's, with recomputing three quarters
        waits = max(last, exchange - micro_step * (3 / 4 if again else 2 / 3))
    seconds = micro * micro_step + update + waits
    parts = {"compute": micro * micro_step, "update": update, "exchange": exchange, "waits": waits}
    return {**parts, "seconds": seconds, "tokens_per_second": n * micro * tokens / seconds}


def share_out(sequences: int, n: int, largest: int) -> tuple[int, int]:
    """batch_size, at most `largest`, and gradient_accumulation_steps, a multiple of n, next to `sequences`."""
    found = []
    for B in range(largest, 0, -1):
        for rounds in {max(1, sequences // (n * B)), math.ceil(sequences / (n * B))}:
            found.append((abs(n * B * rounds - sequences), -B, n * rounds))
    _, B, micro_steps = min(found)
    return -B, micro_steps


def settle(
    sequences: int, n: int, largest: int, fits: Callable[[int, int], bool]
) -> tuple[int, int] | None:
    """share_out with the largest batch_size that fits(batch_size, micro-steps of a rank); None: not even 1."""
    for limit in range(largest, 0, -1):
        B, micro_steps = share_out(sequences, n, limit)
        if fits(B, micro_steps // n):
            return B, micro_steps
    return None


def settings_for(
    config: BenchConfig, counts: Counts, place: Place, n: int, shard: bool, again: bool
) -> tuple[int, int] | None:
    """batch_size and gradient_accumulation_steps for n GPUs, nearest to the settings; None: does not fit."""
    sequences = config.gradient_accumulation_steps * config.batch_size

    def fits(B: int, micro: int) -> bool:
        return bool(memory(counts, place, n, B, micro, shard, again)["fits"])

    return settle(sequences, n, config.batch_size, fits)


def data_rates(counts: Counts, tokens_per_second: float, nodes: int) -> dict[str, float]:
    """Bytes/s of token ids, in all, of a node, and of a node's disk, which reads windows in whole pages."""
    ids = 4 if counts.shape.vocab_size > 1 << 16 else 2
    window = (counts.shape.block_size + 1) * ids
    pages = 1 + (window - ids) / PAGE  # the mean over where a window begins
    total = tokens_per_second * ids
    return {"total": total, "node": total / nodes, "disk": total / nodes * pages * PAGE / window}


def scaling(
    config: BenchConfig, counts: Counts, place: Place, mfu: float, shard: bool, again: bool
) -> list[dict[str, Any]]:
    """The same run on 1, 2, 4, ... GPUs, at least 4096, and on n_gpus; where it does not fit, only n."""
    tokens = tokens_of(config)
    top = max(4096, config.n_gpus)
    rows = []
    for n in sorted({2**i for i in range(top.bit_length()) if 2**i <= top} | {config.n_gpus}):
        found = settings_for(config, counts, place, n, shard, again)
        row: dict[str, Any] = {"n": n}
        if found:
            B, steps = found
            row |= {"batch_size": B, "micro_steps": steps // n, "sequences": B * steps}
            row |= step_time(counts, place, n, B, steps // n, mfu, shard, again)
            row |= {"days": tokens / row["tokens_per_second"] / 86400}
            row |= {"efficiency": row["compute"] / row["seconds"], "share": row["waits"] / row["seconds"]}
            row |= {"data": data_rates(counts, row["tokens_per_second"], math.ceil(n / place.per_node))}
        rows.append(row)
    return rows


def tokens_of(config: BenchConfig) -> int:
    """Tokens of the whole run."""
    step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    return config.max_iters * step
