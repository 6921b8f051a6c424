"""What positions read from each other: attention, its KV cache, rotary positions; and dropout and RMSNorm.

On GPUs these are torch's own operations; on CPUs the same arithmetic in fewer or faster ones.

Shapes: B sequences, T positions, H heads of queries, K heads of keys and values, D numbers in a head.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

EPS = 1e-6  # of RMSNorm: what keeps a row of zeros from being divided by zero


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """F.dropout (arXiv 1207.0580); on CPUs from random bytes, ten times as fast, p to the nearest 1/256."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(max(round(256 * p), 1), 255)  # bytes below this drop
    noise = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    noise = noise.view(torch.uint8)[: x.numel()].view(x.shape)
    keep = torch.ge(noise, dropped, out=torch.empty(x.shape, dtype=x.dtype))
    return x * keep.mul_(256 / (256 - dropped))


class RMSNormOnCPU(torch.autograd.Function):
    """F.rms_norm as three passes forwards and three backwards, in fp32: torch's own takes twice the time."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)  # the share that only changes the length is lost
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x over the root of the mean of its squares, over the last dimension (arXiv 1910.07467)."""
    return RMSNormOnCPU.apply(x) if x.device.type == "cpu" else F.rms_norm(x, (x.size(-1),), eps=EPS)


@lru_cache(maxsize=16)
def rotation(T: int, D: int, device: torch.device | None = None) -> torch.Tensor:
    """Cosine and sine of the angles of rotary positions (arXiv 2104.09864): (2, T, D/2).

    Position t turns the i-th pair of a head's numbers by t / 10000^(2i/D).
    """
    speed = 1 / 10_000.0 ** (torch.arange(0, D, 2, device=device) / D)  # (D/2,): transformers' very numbers
    angle = torch.arange(T, device=device)[:, None] * speed  # (T, D/2)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours in the last dimension: x (..., T, D) by `turn` (2, T, D/2), in fp32."""
    x = x.float().unflatten(-1, (-1, 2))  # (..., T, D/2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # as complex numbers, in a third of the time; compilers know none
        return torch.view_as_real(torch.view_as_complex(x) * torch.complex(*turn)).flatten(-2)
    (a, b), (cos, sin) = x.unbind(-1), turn
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@lru_cache(maxsize=64)
def causal_bias(begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of positions begin..end-1: -inf where a later one is read. (rows, end)"""
    return torch.full((end - begin, end), -math.inf, dtype=dtype).triu(1 + begin)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, p: float = 0.0
) -> torch.Tensor:
    """softmax(scale q kᵀ) v where no position reads a later one.

    q (B, H, T, D), k and v (B, K, T, D) to q's shape: H/K neighbouring heads read the same keys and values.
    p is the dropout of the weights. On GPUs torch's own kernel; on CPUs plain products, in bf16 and with
    dropout several times as fast.
    """
    B, H, T, D = q.shape
    shared = k.size(1) != H
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(
            q, k, v, None, p, is_causal=True, scale=scale, enable_gqa=shared
        )
    if shared:
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    rows = max(128, T // 64 * 16)  # of queries at a time: most of what no position may read is not computed
    parts = []
    for begin in range(0, T, rows):
        end = min(begin + rows, T)
        bias = causal_bias(begin, end, q.dtype)
        scores = torch.baddbmm(bias, q[:, begin:end], k[:, :end].transpose(1, 2), alpha=scale)
        weights = dropout(scores.softmax(dim=-1), p, training=True)  # (B·H, rows, end)
        parts.append(torch.bmm(weights, v[:, :end]))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y.view(B, H, T, D)


class KVCache:
    """Keys and values of the tokens read so far, for B sequences of up to `size`, allocated once.

    `heads` (K) and `width` (D) are those of a layer's keys and values. Before a reading, `rows` says which
    sequences are read from position 0 on, or else `used` how many there are, the first ones, and `length` how
    many places the longest one takes then.
    """

    def __init__(self, n_layer: int, heads: int, width: int, B: int, size: int, like: torch.Tensor) -> None:
        self.static = like.is_cuda  # the same shapes at every token, for CUDA graphs
        size += -size % 16  # GPUs copy a mask of another length at every reading; CPUs: see below
        self.dtype = like.dtype if like.is_cuda else torch.float32  # one query's attention is slow in bf16
        shape = (n_layer, 2, B, heads, size, width)
        self.layers = torch.zeros(shape, device=like.device, dtype=self.dtype).unbind(0)
        self.length = 0
        self.used = B
        self.rows = self.all = torch.arange(B, device=like.device)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        position: torch.Tensor | None,
    ) -> torch.Tensor:
        """Put in new keys and values, (N, K, T, D), and read them and the older ones for q (N, H, T, D).

        T tokens from 0 on, which go into one or more `rows` each; or one at `position`, (1, 1), of all B
        sequences, or at a place of its own of each, (B, 1).
        """
        past, new = self.layers[layer], torch.stack((k, v)).to(self.dtype)  # (2, B, K, size, D)
        if position is None:
            past[:, self.rows, :, : k.size(2)] = new.repeat_interleave(len(self.rows) // len(k), dim=1)
            return causal_attention(q, k, v, scale)
        if self.used < len(self.all):
            past = past[:, : self.used]
        if len(position) == 1:
            past.index_copy_(3, position[0], new)
        else:
            past[:, self.all[: self.used], :, position[:, 0]] = new.squeeze(3).transpose(0, 1)  # (B, 2, K, D)
        past = past if self.static else past[:, :, :, : self.length + -self.length % 16]
        if layer == 0:  # what is added to the scores in all layers: -inf after `position`
            later = torch.arange(past.size(3), device=past.device) > position
            bias = torch.zeros_like(later, dtype=self.dtype).masked_fill_(later, -math.inf)[:, None]
            of_each = q.device.type == "cpu" and len(position) > 1
            self.bias = bias.repeat_interleave(past.size(2), dim=0) if of_each else bias
        q = q.to(self.dtype)
        if q.device.type == "cpu":
            return one_query_on_cpu(q, *past, self.bias, scale)
        shared = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(
            q, *past, attn_mask=self.bias[:, None], scale=scale, enable_gqa=shared
        )


def one_query_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale q kᵀ + bias) v for one query of each sequence: q (B, H, 1, D), k and v (B, K, T, D), bias
    (1 or B·K, 1, T).

    As fast as torch's own; and where T is a multiple of 16, a sequence gets the same numbers to the last bit
    alone and beside others, which torch's own does not grant.
    """
    B, H, _, D = q.shape
    K = k.size(1)
    q = q.reshape(B * K, H // K, D)  # heads that read the same keys are rows of one product
    scores = torch.baddbmm(bias, q, k.flatten(0, 1).transpose(1, 2), alpha=scale)  # (B·K, H/K, T)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(B, H, 1, D)


class Branches:
    """In place of a KVCache: sequences of which not each position reads all before it, in one pass.

    So the endings of one text stand behind it one after another, and each reads the text and itself.
    """

    def __init__(self, reads: torch.Tensor) -> None:
        """reads (B, T, T): whether each position, by rows, reads each other one; it has to read one."""
        bias = torch.zeros(reads.shape, device=reads.device)
        self.bias = bias.masked_fill_(~reads, -math.inf)[:, None]  # (B, 1, T, T)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, position: object
    ) -> torch.Tensor:
        """q (B, H, T, D), k and v (B, K, T, D) to q's shape."""
        self.bias = self.bias.to(q.dtype)
        shared = q.size(1) != k.size(1)
        if q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, k, v, self.bias, scale=scale, enable_gqa=shared)
        if shared:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = torch.add(self.bias, torch.matmul(q, k.transpose(2, 3)), alpha=scale)  # (B, H, T, T)
        return torch.matmul(scores.softmax(dim=-1), v)
