"""Layers of model.py in fewer or faster operations for CPUs: the same arithmetic, the same weights.

Shapes: B sequences, T queries, S keys, H query heads, K key/value heads of D channels.
"""

import math
from functools import lru_cache

import torch
import torch.nn as nn
from torch import Tensor

from distrogpt.kernels import replace_layers
from distrogpt.kernels.block import fuse
from model import EPS, GPT, Attention, Block, RMSNorm, Rotary


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout (arXiv 1207.0580) from random bytes, ten times as fast; p is rounded to 1/256."""
    dropped = min(max(round(256 * p), 1), 255)  # bytes below this drop
    noise = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    noise = noise.view(torch.uint8)[: x.numel()].view(x.shape)
    keep = torch.ge(noise, dropped, out=torch.empty(x.shape, dtype=x.dtype))
    return x * keep.mul_(256 / (256 - dropped))


class CPUDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training and self.p else x


class RMSNormFunction(torch.autograd.Function):
    """Three passes forward and three backward, in fp32: torch's own takes twice the time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)  # the part that would only change the length
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


class CPURMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x).to(x.dtype)


class CPURotary(Rotary):
    """By complex products, in a third of the time; torch.compile does not support complex numbers."""

    def forward(self, x: Tensor, cos_sin: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, cos_sin)
        x = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(x * torch.complex(*cos_sin)).flatten(-2)


@lru_cache(maxsize=64)
def causal_mask(begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Added to the scores of queries begin..end-1: -inf for later keys. (end - begin, end)"""
    return torch.full((end - begin, end), -math.inf, dtype=dtype).triu(1 + begin)


class CPUAttention(Attention):
    """Plain matrix products: in bf16 and with dropout several times as fast as torch's own kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.causal(q, k, v)
        if q.size(2) == 1:
            return self.one_query(q.to(k.dtype), k, v, mask).to(q.dtype)
        k, v = self.repeat_heads(q, k, v)
        scores = torch.add(mask, torch.matmul(q, k.transpose(2, 3)), alpha=self.scale)  # (B, H, T, S)
        weights = scores.softmax(dim=-1)
        if self.training and self.dropout:
            weights = dropout(weights, self.dropout)
        return torch.matmul(weights, v)

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In blocks of queries, so that most of the masked scores are not computed."""
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, *self.repeat_heads(q, k, v)))
        rows, blocks = max(128, T // 64 * 16), []
        for begin in range(0, T, rows):
            end = min(begin + rows, T)
            bias = causal_mask(begin, end, q.dtype)
            scores = torch.baddbmm(bias, q[:, begin:end], k[:, :end].transpose(1, 2), alpha=self.scale)
            weights = scores.softmax(dim=-1)  # (B·H, rows, end)
            if self.training and self.dropout:
                weights = dropout(weights, self.dropout)
            blocks.append(torch.bmm(weights, v[:, :end]))
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return y.view(B, H, T, D)

    def one_query(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """If S is a multiple of 16, the result of a sequence is bit-identical alone and in a batch, which
        torch's own kernel does not guarantee. q (B, H, 1, D), mask (1 or B, 1, 1, S)."""
        B, H, _, D = q.shape
        K = k.size(1)
        mask = mask[:, 0] if len(mask) == 1 else mask[:, 0].repeat_interleave(K, dim=0)  # (1 or B·K, 1, S)
        q = q.reshape(B * K, H // K, D)  # query heads of one key head are rows of one product
        scores = torch.baddbmm(mask, q, k.flatten(0, 1).transpose(1, 2), alpha=self.scale)
        return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(B, H, 1, D)

    @staticmethod
    def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, K, S, D) once for each query head: (B, H, S, D)."""
        groups = q.size(1) // k.size(1)
        if groups == 1:
            return k, v
        return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def use_cpu_kernels(model: GPT) -> GPT:
    """The same network with the layers of this file, and blocks that train by those of block.py."""
    replacements = {
        Block: fuse,
        nn.Dropout: lambda layer: CPUDropout(layer.p),
        RMSNorm: lambda layer: CPURMSNorm(),
        Rotary: lambda layer: CPURotary(),
        Attention: lambda layer: CPUAttention(layer.scale, layer.dropout),
    }
    return replace_layers(model, replacements)


def to_device(model: GPT, device: torch.device) -> GPT:
    """The model on its device, with the layers of this file if that is the CPU."""
    model.to(device)
    return use_cpu_kernels(model) if device.type == "cpu" else model
