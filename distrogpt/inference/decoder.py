"""From logits to tokens, and a model made ready for that: its weights in the form that is read fastest.

Decoding reads every weight for every token, so its speed is the weights' bytes over the memory's bandwidth.
`model` is a GPT, which model.py makes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from distrogpt.kernels.compile import cuda_graph
from distrogpt.kernels.cpu import KVCache


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen; as it stands, by the network's own chances. The limits hold in this order."""

    temperature: float = 1.0
    top_k: int | None = None  # among so many likeliest
    top_p: float = 1.0  # among the likeliest that have this chance together (arXiv 1904.09751)
    min_p: float = 0.0  # among those with this share of the likeliest one's chance (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # of what stands there already, against its logit (arXiv 1909.05858)

    @classmethod
    def of(cls, asked: Any) -> "SamplingParams":
        """What a SampleConfig says of it."""
        return cls(**{field.name: getattr(asked, field.name) for field in fields(cls)})


class Drawn(NamedTuple):
    """A token of each sequence, and what it was chosen from."""

    ids: torch.Tensor  # (B, 1)
    logits: torch.Tensor  # (B, V), which the next token overwrites


def sample_token(
    logits: torch.Tensor, choice: SamplingParams, draws: torch.Tensor, seen: torch.Tensor | None = None
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
    if limited:
        logits, ids = logits.topk(choice.top_k)  # the likeliest first
    chances = (logits.float() / choice.temperature).softmax(dim=-1)
    if choice.top_p < 1:
        if not limited:
            chances, ids = likeliest_first(chances, choice.top_p)
        chances = chances.masked_fill(chances.cumsum(dim=-1) - chances >= choice.top_p, 0.0)
    if choice.min_p:
        chances = chances.masked_fill(chances < choice.min_p * chances.amax(dim=-1, keepdim=True), 0.0)
    sums = chances.cumsum(dim=-1)
    place = (sums <= draws * (1 - 2**-22) * sums[:, -1:]).sum(dim=-1, keepdim=True)  # never behind the last
    return place if ids is None else ids.gather(1, place)


def likeliest_first(chances: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of chances (B, V) with their places, those that have top_p together in a row, or more of
    them: most often the first 1,024 do, which are found in a tenth of the time that sorting takes."""
    n = min(1024, chances.size(-1))
    first, places = chances.topk(n)
    enough = first.sum(dim=-1) > top_p
    if bool(enough.all()):
        return first, places
    ordered, ids = chances.sort(dim=-1, descending=True)
    ordered[enough], ids[enough, :n] = 0.0, places[enough]  # these as they are when the others do not sort
    ordered[enough, :n] = first[enough]
    return ordered, ids


def uniform_noise(seed: int, copies: int, count: int) -> torch.Tensor:
    """Numbers for `count` tokens of each of so many samples, uniform in [0, 1): (copies, count). Those of a
    sample are a function of seed and its number alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, n])) for n in range(copies)]
    return torch.from_numpy(np.stack([row.random(count, np.float32) for row in rows]))


class DecodingBatch:
    """Sequences that go on together, by a token of each at a time; they may join and leave in between.

    Each token is read once: keys and values are kept. Where a sequence fills block_size, the last three
    quarters of it are read anew, as positions from 0 on, which makes room for the next quarter. On a GPU,
    reading a token of each becomes a CUDA graph, unless `graph` is False.
    """

    def __init__(self, model: nn.Module, rows: int, size: int | None = None, graph: bool = True) -> None:
        """Room for so many sequences; `size` is their longest, where that is below block_size."""
        config, weight = model.config, model.transformer.wte.weight
        self.model, self.device, self.block_size = model, weight.device, config.block_size
        size = min(size or self.block_size, self.block_size)
        size += -size % 16
        heads = (config.kv_heads, config.n_embd // config.n_head)
        self.cache = KVCache(config.n_layer, *heads, rows, size, weight)
        self.text = torch.zeros(rows, size + 1, dtype=torch.long, device=self.device)
        self.newest = self.text[:0, :1]  # (B, 1), the only ones that have not been read
        self.lengths = np.zeros(0, np.int64)  # (B,) of the texts
        self.place: torch.Tensor | None = None  # of the newest, (1 or B, 1); None: the lengths say it
        self.joined: list[tuple[np.ndarray, int]] = []  # rows to read from the first token on, and copies
        self.graph, self.graphs = graph and weight.is_cuda, {}

    def join(self, prompts: Sequence[torch.Tensor], copies: int = 1) -> None:
        """One sequence more, behind the others, for each copy of each of N prompts (T,) of one id or more."""
        begin = len(self.lengths)
        prompts = [prompt[-self.block_size :] for prompt in prompts]
        self.lengths = np.append(self.lengths, np.repeat([len(prompt) for prompt in prompts], copies))
        for number, prompt in enumerate(prompts):
            at = begin + number * copies
            self.text[at : at + copies] = 0  # what stands behind is read, too, though nothing comes of it
            self.text[at : at + copies, : len(prompt)] = prompt
        self.joined.append((np.arange(begin, len(self.lengths)), copies))
        self.newest = torch.cat([self.newest, self.newest.new_zeros(len(prompts) * copies, 1)])
        self.place = None

    def leave(self, row: int) -> None:
        """Forget a sequence; the last one takes its row. Those that joined have to be read before."""
        last = len(self.lengths) - 1
        length = min(int(self.lengths[last]), self.block_size)
        for past in self.cache.layers if row < last else ():
            past[:, row, :, :length] = past[:, last, :, :length]
        for rows in (self.text, self.newest, self.lengths):
            rows[row] = rows[last]
        self.newest, self.lengths, self.place = self.newest[:last], self.lengths[:last], None

    def read(self) -> torch.Tensor:
        """Read what is new of all sequences: (B, V), scores of what follows, which the next call changes."""
        B, anew = len(self.lengths), self.joined
        full = np.flatnonzero(self.lengths > self.block_size)  # whose newest token has no place
        self.joined = []
        if len(full):
            anew = [*anew, (full, 1)]
        if sum(len(rows) for rows, _ in anew) < B:  # of the others, what is computed here is overwritten
            logits = self.read_newest()
        else:
            logits = None
        if len(full):
            kept = max(1, self.block_size * 3 // 4)
            end = self.block_size + 1
            self.text[full, :kept] = self.text[full, end - kept : end]
            self.lengths[full], self.place = kept, None
        for rows, copies in anew:
            part = self.read_from_the_first(rows, copies)
            if len(rows) == B:
                logits = part
            else:
                logits = part.new_zeros(B, part.size(1)) if logits is None else logits
                logits = logits.index_copy(0, self.cache.rows, part)
        return logits

    def read_newest(self) -> torch.Tensor:
        """Logits (B, V) after the newest token of each."""
        B, rows = len(self.lengths), len(self.text)
        self.cache.length = min(int(self.lengths.max()), self.block_size)
        newest, place = self.newest, self.places().clamp(max=self.block_size - 1)
        if not self.graph:
            self.cache.used = B
            return self.model.decode(newest, place, self.cache)
        # a graph is recorded for few numbers of rows; what stands in those beyond B is overwritten when used
        self.cache.used = min(rows, 1 << (B - 1).bit_length())
        beyond = newest.new_zeros(self.cache.used - B, 1)
        inputs = (torch.cat([newest, beyond]), torch.cat([place, beyond]) if len(place) == B else place)
        shapes = tuple(len(tensor) for tensor in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = cuda_graph(partial(self.model.decode, cache=self.cache), *inputs)
        return self.graphs[shapes](*inputs)[:B]

    def read_from_the_first(self, rows: np.ndarray, copies: int) -> torch.Tensor:
        """Logits (len(rows), V) after all of some texts, of which `copies` neighbours are the same."""
        lengths = self.lengths[rows[::copies]]
        width = int(lengths.max())
        width = min(width + -width % 16, self.block_size)  # the same numbers as in others: attention.py
        self.cache.rows = torch.from_numpy(rows).to(self.device)
        last = torch.from_numpy(lengths - 1).to(self.device)
        logits = self.model.prefill(self.text[self.cache.rows[::copies], :width], last, self.cache)
        return logits.repeat_interleave(copies, 0)

    def places(self) -> torch.Tensor:
        """Where the newest token of each stands: (B, 1), or (1, 1) where that is the same place."""
        if self.place is None:
            alike = len(set(self.lengths.tolist())) == 1
            lengths = torch.from_numpy(self.lengths[:1] if alike else self.lengths)
            self.place = (lengths[:, None] - 1).to(self.device)
        return self.place

    def add(self, ids: torch.Tensor) -> None:
        """The next token of each sequence, ids (B, 1)."""
        self.place = self.places() + 1
        self.text[: len(ids)].scatter_(1, self.place.expand_as(ids), ids)
        self.newest = ids
        self.lengths += 1


def stream(
    model: nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    choice: SamplingParams = SamplingParams(),
    vocab_size: int | None = None,
    draws: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    copies: int = 1,
    graph: bool = True,
) -> Iterator[Drawn]:
    """Yield the next token of each of B sequences max_new_tokens times.

    idx (N, T) are prompts, of which each goes on in so many `copies`, one after another: B = N·copies. They
    may have `lengths` of their own; what stands behind is not read. `draws` (B, max_new_tokens) are uniform
    in [0, 1), by default from torch's generator. Ids from `vocab_size` on are never chosen: a padded
    vocabulary has them, no tokenizer can read them. The caller sets eval mode. `graph`: see Batch.
    """
    B = len(idx) * copies
    prompts = [row[:length] for row, length in zip(idx, lengths or [idx.size(1)] * len(idx), strict=True)]
    batch = DecodingBatch(model, B, max(map(len, prompts)) + max_new_tokens, graph)
    batch.join(prompts, copies)
    draws = (torch.rand(B, max_new_tokens) if draws is None else draws).to(idx.device)
    seen = None
    for number in range(max_new_tokens):
        with torch.no_grad():
            logits = batch.read()[:, :vocab_size]
            if choice.repetition_penalty != 1 and seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row in range(B):
                    seen[row, prompts[row // copies]] = True
            ids = sample_token(logits, choice, draws[:, number : number + 1], seen)  # (B, 1)
            if seen is not None:
                seen.scatter_(1, ids, True)
            batch.add(ids)
        yield Drawn(ids, logits)


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
def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype, int8: bool = False, compile: bool = False
) -> nn.Module:
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
