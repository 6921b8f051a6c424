"""Batched decoding with a KV cache.

Shapes: B sequences, T positions, V = vocab_size. `model` is a GPT.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from distrogpt.errors import warn
from distrogpt.inference.sampling import SamplingParams, sample_token
from distrogpt.kernels.build import build_error
from distrogpt.kernels.compile import cuda_graph
from distrogpt.kernels.cpu import to_device
from distrogpt.kernels.native import NativeDecoder, supports
from distrogpt.kernels.quantized import pack_linear
from model import GPT, KVCache


def prefill(model: GPT, idx: torch.Tensor, last: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Fill the cache with prompts idx (N, T) from position 0 on; the logits (N, V) at the positions `last`
    (N,). Later tokens have no effect."""
    x = model.hidden_states(idx, cache=cache)
    x = x[torch.arange(len(x), device=x.device), last]  # (N, C)
    rows = x.expand(2, -1) if len(x) == 1 else x  # torch sums one row alone in another order
    return model.logits(rows)[: len(x)].float()


def decode(model: GPT, ids: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """One decoding step: the next logits (B, V) after ids (B, 1) at positions (1 or B, 1)."""
    return model.logits(model.hidden_states(ids, positions, cache=cache)[:, -1]).float()


class DecodingBatch:
    """Sequences that are decoded together, one token at a time. Sequences can be added and removed between
    tokens.

    Each token is processed once. When a sequence fills block_size, its last three quarters are prefilled
    again from position 0 on, which makes room for the next quarter. On a GPU, decoding runs as a CUDA graph
    unless `graph` is False.
    """

    def __init__(
        self,
        model: GPT,
        rows: int,
        size: int | None = None,
        graph: bool = True,
        record_graph: Callable[..., Callable[..., torch.Tensor]] | None = None,
    ) -> None:
        """`rows` is the largest number of sequences, and `size` the largest length, by default block_size.
        `record_graph` replaces cuda_graph, on any device."""
        weight = model.transformer.wte.weight
        self.model, self.device, self.block_size = model, weight.device, model.config.block_size
        self.decode = getattr(model, "decode", partial(decode, model))  # see optimize_for_inference
        size = min(size or self.block_size, self.block_size)
        size += -size % 16  # attention sums of other lengths round differently
        dtype = weight.dtype if weight.is_cuda else torch.float32  # torch's attention is slow in bf16 on CPUs
        self.cache_dtype = getattr(self.decode, "cache_dtype", dtype)
        self.cache = self.new_cache(rows, size)
        self.text = torch.zeros(rows, size + 1, dtype=torch.long, device=self.device)
        self.last_tokens = self.text[:0, :1]  # (B, 1), not read yet
        self.lengths = np.zeros(0, np.int64)  # (B,) of the texts
        self.positions: torch.Tensor | None = None  # of last_tokens, (1 or B, 1); None: from the lengths
        self.prompts: list[tuple[np.ndarray, int]] = []  # rows to prefill, in groups of n equal ones
        if record_graph is None and graph and weight.is_cuda:
            record_graph = cuda_graph
        self.record_graph, self.graphs = record_graph, {}

    def new_cache(self, rows: int, size: int) -> KVCache:
        return KVCache(self.model.config, rows, size, self.device, self.cache_dtype)

    def add_sequences(self, prompts: Sequence[torch.Tensor], n: int = 1) -> None:
        """Append n sequences for each of the prompts (T,), which must not be empty."""
        begin = len(self.lengths)
        prompts = [prompt[-self.block_size :] for prompt in prompts]
        self.lengths = np.append(self.lengths, np.repeat([len(prompt) for prompt in prompts], n))
        for number, prompt in enumerate(prompts):
            row = begin + number * n
            self.text[row : row + n] = 0  # padding is read too, without effect
            self.text[row : row + n, : len(prompt)] = prompt
        self.prompts.append((np.arange(begin, len(self.lengths)), n))
        self.last_tokens = torch.cat([self.last_tokens, self.last_tokens.new_zeros(len(prompts) * n, 1)])
        self.positions = None

    def remove_sequence(self, row: int) -> None:
        """Remove a sequence; the last sequence takes its row. Between add_sequences and this, call
        next_logits."""
        last = len(self.lengths) - 1
        length = min(int(self.lengths[last]), self.block_size)
        if row < last:
            self.cache.kv[:, :, row, :, : length + 1] = self.cache.kv[:, :, last, :, : length + 1]
        for rows in (self.text, self.last_tokens, self.lengths):
            rows[row] = rows[last]
        self.last_tokens, self.lengths, self.positions = self.last_tokens[:last], self.lengths[:last], None

    def next_logits(self) -> torch.Tensor:
        """Process the new tokens; the logits (B, V) of the next tokens, which the next call overwrites."""
        B, prompts = len(self.lengths), self.prompts
        full = np.flatnonzero(self.lengths > self.block_size)  # no position is left for the last token
        self.prompts = []
        if len(full):
            prompts = [*prompts, (full, 1)]
        logits = None
        if sum(len(rows) for rows, _ in prompts) < B:  # rows to prefill are decoded too, and overwritten
            logits = self.decode_last_tokens()
        if len(full):
            n_kept, end = max(1, self.block_size * 3 // 4), self.block_size + 1
            self.text[full, :n_kept] = self.text[full, end - n_kept : end]
            self.lengths[full], self.positions = n_kept, None
        for rows, n in prompts:
            index = torch.from_numpy(rows).to(self.device)
            prompt_logits = self.prefill(rows, index, n)
            if logits is None:
                logits = prompt_logits.new_zeros(B, prompt_logits.size(1))
            logits = logits.index_copy(0, index, prompt_logits)
        return logits

    def decode_last_tokens(self) -> torch.Tensor:
        """Logits (B, V) after the last token of each sequence."""
        B = len(self.lengths)
        ids, positions = self.last_tokens, self.last_positions().clamp(max=self.block_size - 1)
        if self.record_graph is None:
            if self.device.type != "cuda":  # on GPUs, masks of changing lengths cost more
                length = min(int(self.lengths.max()), self.block_size)
                self.cache.length = length + -length % 16
            return self.decode(ids, positions, cache=self.cache)
        # graphs are recorded for a few numbers of rows only; rows beyond B are overwritten when they are used
        unused = ids.new_zeros(min(len(self.text), 1 << (B - 1).bit_length()) - B, 1)
        if len(positions) == B:
            positions = torch.cat([positions, unused])
        inputs = (torch.cat([ids, unused]), positions)
        shapes = tuple(len(tensor) for tensor in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record_graph(partial(self.decode, cache=self.cache), *inputs)
        return self.graphs[shapes](*inputs)[:B]

    def prefill(self, rows: np.ndarray, index: torch.Tensor, n: int) -> torch.Tensor:
        """Logits (len(rows), V) after these rows, in groups of n equal ones; `index`: rows, on the device."""
        lengths = self.lengths[rows[::n]]
        width = int(lengths.max())
        width = min(width + -width % 16, self.block_size)  # the same numbers as in another batch
        cache = self.new_cache(len(lengths), width)
        last = torch.from_numpy(lengths - 1).to(self.device)
        logits = prefill(self.model, self.text[index[::n], :width], last, cache)
        self.cache.kv[:, :, index, :, : cache.kv.size(4)] = cache.kv.repeat_interleave(n, dim=2)
        return logits.repeat_interleave(n, 0)

    def last_positions(self) -> torch.Tensor:
        """The position of each sequence's last token: (B, 1), or (1, 1) if they are equal."""
        if self.positions is None:
            equal = len(set(self.lengths.tolist())) == 1
            lengths = torch.from_numpy(self.lengths[:1] if equal else self.lengths)
            self.positions = (lengths[:, None] - 1).to(self.device)
        return self.positions

    def append(self, ids: torch.Tensor) -> None:
        """Append the next token of each sequence, ids (B, 1)."""
        self.positions = self.last_positions() + 1
        self.text[: len(ids)].scatter_(1, self.positions.expand_as(ids), ids)
        self.last_tokens = ids
        self.lengths += 1


class StreamedToken(NamedTuple):
    """A token of each sequence, and the logits from which it was sampled."""

    ids: torch.Tensor  # (B, 1)
    logits: torch.Tensor  # (B, V), overwritten with the next token


def stream(
    model: GPT,
    prompts: Sequence[torch.Tensor],
    params: SamplingParams,
    uniforms: torch.Tensor,
    vocab_size: int | None = None,
    graph: bool = True,
) -> Iterator[StreamedToken]:
    """Yield the next token of B sequences for each column of `uniforms` (B, max_new_tokens), in [0, 1).

    Each of the prompts (T,) has B / len(prompts) sequences, which are adjacent. Ids from `vocab_size` on, the
    padding of the vocabulary, are never sampled. Call eval() first.
    """
    B, max_new_tokens = uniforms.shape
    n = B // len(prompts)
    batch = DecodingBatch(model, B, max(map(len, prompts)) + max_new_tokens, graph)
    batch.add_sequences(prompts, n)
    uniforms, seen = uniforms.to(batch.device), None
    for number in range(max_new_tokens):
        with torch.no_grad():
            logits = batch.next_logits()[:, :vocab_size]
            if params.repetition_penalty != 1 and seen is None:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row in range(B):
                    seen[row, prompts[row // n]] = True
            ids = sample_token(logits, params, uniforms[:, number : number + 1], seen)  # (B, 1)
            if seen is not None:
                seen.scatter_(1, ids, True)
            batch.append(ids)
        yield StreamedToken(ids, logits)


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module, dtype: torch.dtype, int8: bool = False, compile: bool = False
) -> nn.Module:
    """Change the model in place for fast decoding: its weights are converted to `dtype`, or to 8 bits. Call
    it again if they change.

    On CPUs that multiply bf16, the decoding step is that of kernels/decode.cpp; on others, weights are packed
    into a fast layout. With `compile`, torch.compile compiles the decoding step instead, without the layout,
    which it does not support.
    """
    device = model.transformer.wte.weight.device
    to_device(model.eval().to(dtype), device)
    native = device.type == "cpu" and not compile and supports(model.config, dtype)
    if native and (error := build_error("decode")):
        warn(f"note     decoding is slower than it could be: {error}")
        native = False
    if int8 or (device.type == "cpu" and not compile and not native):
        pack_linear(model, dtype, int8)
    if native:
        model.decode = NativeDecoder(model)
    if compile:
        model.decode = torch.compile(partial(decode, model))
    return model
