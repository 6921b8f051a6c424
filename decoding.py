"""From logits to tokens, and a model made ready for that: its weights in the form that is read fastest.

Decoding reads every weight for every token, so its speed is the weights' bytes over the memory's bandwidth.
`model` is a GPT, which model.py makes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from attention import KVCache
from runtime import cuda_graph


@dataclass(frozen=True)
class Choice:
    """How a token is chosen; as it stands, by the network's own chances. The limits hold in this order."""

    temperature: float = 1.0
    top_k: int | None = None  # among so many likeliest
    top_p: float = 1.0  # among the likeliest that have this chance together (arXiv 1904.09751)
    min_p: float = 0.0  # among those with this share of the likeliest one's chance (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # of what stands there already, against its logit (arXiv 1909.05858)


class Drawn(NamedTuple):
    """A token of each sequence, and what it was chosen from."""

    ids: torch.Tensor  # (B, 1)
    logits: torch.Tensor  # (B, V), which the next token overwrites


def sample_token(
    logits: torch.Tensor, choice: Choice, draws: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Choose one id for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest.

    `draws` (B, 1), uniform in [0, 1), decide: a row depends on its own alone. `seen` (B, V) is for the
    penalty of repetition.
    """
    if seen is not None:
        penalty = choice.repetition_penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, lowered, logits)
    if choice.temperature < 1e-5:  # 0, or too small to divide by
        return logits.argmax(dim=-1, keepdim=True)
    limited, ids = choice.top_k and choice.top_k < logits.size(-1), None
    if limited or choice.top_p < 1:
        logits, ids = logits.topk(choice.top_k if limited else logits.size(-1))  # the likeliest first
    chances = (logits.float() / choice.temperature).softmax(dim=-1)
    if choice.top_p < 1:
        chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= choice.top_p, 0.0)
    if choice.min_p:
        chances = chances.masked_fill(chances < choice.min_p * chances.amax(dim=-1, keepdim=True), 0.0)
    sums = chances.cumsum(dim=-1)
    place = (sums <= draws * (1 - 2**-22) * sums[:, -1:]).sum(dim=-1, keepdim=True)  # never behind the last
    return place if ids is None else ids.gather(1, place)


def uniform_draws(seed: int, copies: int, count: int) -> torch.Tensor:
    """Numbers for `count` tokens of each of so many samples, uniform in [0, 1): (copies, count). Those of a
    sample are a function of seed and its number alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, n])) for n in range(copies)]
    return torch.from_numpy(np.stack([row.random(count, np.float32) for row in rows]))


def stream(
    model: nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    choice: Choice = Choice(),
    vocab_size: int | None = None,
    draws: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    copies: int = 1,
    graph: bool = True,
) -> Iterator[Drawn]:
    """Yield the next token of each of B sequences max_new_tokens times.

    idx (N, T) are prompts, of which each goes on in so many `copies`, one after another: B = N·copies. They
    may have `lengths` of their own; what stands behind is not read. `draws` (B, max_new_tokens) are uniform
    in [0, 1), by default from torch's generator.

    Each token is read once: keys and values are kept. Where a sequence fills block_size, the last three
    quarters of it are read anew, as positions from 0 on, which makes room for the next quarter. Ids from
    `vocab_size` on are never chosen: a padded vocabulary has them, no tokenizer can read them. The caller
    sets eval mode. On a GPU, reading a token becomes a CUDA graph, unless `graph` is False.
    """
    config, weight, device = model.config, model.transformer.wte.weight, idx.device
    block_size, B = config.block_size, len(idx) * copies
    ends = np.repeat(idx.size(1) if lengths is None else np.array(lengths), B if lengths is None else copies)
    begins = np.maximum(ends - block_size, 0)  # of what each sequence has in the cache
    alike = bool((ends == ends[0]).all())  # then they stay so
    text = torch.cat([idx.repeat_interleave(copies, 0), idx.new_zeros(B, max_new_tokens)], dim=1)
    behind = torch.from_numpy(ends)[:, None].to(device)  # (B, 1)
    size = min(block_size, int(ends.max()) + max_new_tokens)
    cache = KVCache(config.n_layer, config.kv_heads, config.n_embd // config.n_head, B, size, weight)
    decode, recorded = partial(model.decode, cache=cache), not (graph and weight.is_cuda)
    draws = (torch.rand(B, max_new_tokens) if draws is None else draws).to(device)
    seen, next_id, position = None, text[:, :1], behind

    def read(rows: np.ndarray, into: np.ndarray) -> torch.Tensor:
        """Read what some sequences have from `begins` on into the cache of these or more; (rows, V)."""
        widths = ends[rows] - begins[rows]
        width = int(widths.max())
        width = min(width + -width % 16, block_size)  # the same numbers as in another batch: attention.py
        window = idx.new_zeros(len(rows), width)
        for number, row in enumerate(rows.tolist()):
            window[number, : widths[number]] = text[row, begins[row] : ends[row]]
        cache.rows = torch.from_numpy(into).to(device)
        return model.prefill(window, torch.from_numpy(widths - 1).to(device), cache)

    everyone = np.arange(B)
    for number in range(max_new_tokens):
        with torch.no_grad():
            full = np.flatnonzero(ends - begins > block_size)  # the newest token has no place
            if number == 0:
                logits = read(everyone[::copies], everyone).repeat_interleave(copies, 0)  # prompts once
            elif len(full) < B:  # those that are full go on with what is read below
                cache.length = min(int((ends - begins).max()), block_size)
                if not recorded:
                    decode, recorded = cuda_graph(decode, next_id, position), True
                logits = decode(next_id, position)
            if number and len(full):
                begins[full] = ends[full] - max(1, block_size * 3 // 4)
                again = read(full, full)
                logits = again if alike else logits.index_copy(0, cache.rows, again)
            if number == 0 or len(full):
                places = np.minimum(ends - begins, block_size - 1)  # of what comes next
                position = torch.from_numpy(places[:1] if alike else places)[:, None].to(device)
            else:
                position = (position + 1).clamp(max=block_size - 1)
            logits = logits[:, :vocab_size]
            if choice.repetition_penalty != 1 and seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, end in enumerate(ends.tolist()):
                    seen[row, text[row, :end]] = True
            next_id = sample_token(logits, choice, draws[:, number : number + 1], seen)  # (B, 1)
            text.scatter_(1, behind, next_id)
            if seen is not None:
                seen.scatter_(1, next_id, True)
            behind, ends = behind + 1, ends + 1
        yield Drawn(next_id, logits)


class PackedLinear(nn.Module):
    """nn.Linear with its weights in oneDNN's blocks, for CPUs: with few rows several times as fast, and a row
    gets the same numbers to the last bit alone and among others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == x.size(-1) and (x.size(-1) > 1024 or x.dtype == torch.float32):
            x = x.expand(2, *x.shape[1:])  # one row alone would be summed in another order
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[:1]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """nn.Linear with 8-bit weights and a scale for each output: half of bf16's bytes (arXiv 2208.07339)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = (weight.float().abs().amax(dim=1).clamp(min=1e-8) / 127).to(torch.bfloat16)  # (out,)
        steps = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", steps.to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # (N, in)
        one_each = x.dim() == 2 or x.size(1) == 1  # a row of each sequence: by the same kernel for any number
        if x.device.type == "cpu" and one_each and rows.size(1) % 16 == 0:  # else the kernel crashes,
            some = rows.bfloat16().split(16)  # and for more rows
            ys = [torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale) for rows in some]
            y = (ys[0] if len(ys) == 1 else torch.cat(ys)).to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def prepare(model: nn.Module, dtype: torch.dtype, int8: bool = False, compile: bool = False) -> nn.Module:
    """The model for decoding only, changed in place: weights in `dtype`, or in 8 bits, and in fast layout.

    With `compile`, one token's decoding is compiled, without the layout, which torch.compile does not know:
    on CPUs that is faster with 8-bit weights or in fp32, slower in bf16.
    """
    model.eval().to(dtype)
    if compile:
        model.decode = torch.compile(model.decode)
    on_cpu = model.transformer.wte.weight.device.type == "cpu"
    pack = not compile and on_cpu and torch.backends.mkldnn.is_available()
    if pack and dtype != torch.float32:
        pack = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    kind = Int8Linear if int8 else PackedLinear if pack else None
    if kind:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child))
    return model
