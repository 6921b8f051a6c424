"""GPT-2's block of model.py as one node of autograd, for training on CPUs in bf16: the same arithmetic and
weights as with autocast, in fewer operations.

Between the matrix products, the casts, sums and norms of autocast each read and write whole activations,
which do not fit into the caches. block.cpp does what lies between two products at once, and attention without
storing its weights. Blocks with other settings, and machines without a compiler, use the layers of cpu.py.

Shapes: B sequences of T positions, N = B·T, C channels, H query and K key/value heads of D channels.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distrogpt.kernels.build import build_error, has_bf16, library
from model import Block, KVCache

log = logging.getLogger("distrogpt")

LONGEST = 1024  # positions; for more, torch's products in bf16 are faster than those of block.cpp in fp32
ARGUMENTS = {  # of the functions of block.cpp: P pointer, L long, I int, F float, S uint64_t
    "add_norm": "LLPPPPPPPSF",
    "cast": "LLPPSF",
    "norm_backward": "LLPPPPPPPPSF",
    "gelu_tanh": "LPP",
    "gelu_backward": "LPPI",
    "attention": "LLLLLPPPFSF",
    "attention_backward": "LLLLLPPPPFPSF",
}
C_TYPES = {"P": ctypes.c_void_p, "L": ctypes.c_long, "I": ctypes.c_int, "F": ctypes.c_float}
C_TYPES["S"] = ctypes.c_uint64


@cache
def kernels() -> dict[str, Callable[..., None]] | None:
    """The functions of block.cpp by name, which take tensors as pointers; None if it cannot be compiled."""
    if not has_bf16():
        return None
    if error := build_error("block"):
        log.info(f"note     training is slower than it could be: {error}")
        return None
    functions = {}
    for name, letters in ARGUMENTS.items():
        function = getattr(library("block"), name)
        function.argtypes, function.restype = [C_TYPES[letter] for letter in letters], None
        functions[name] = function
    return functions


def call(name: str, *arguments: Any) -> None:
    pointers = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    kernels()[name](*pointers)


class Shape(NamedTuple):
    """What a node knows of its block and its input."""

    B: int
    T: int
    C: int
    H: int
    K: int
    D: int
    scale: float  # of the scores
    tanh: bool  # GPT-2's GELU
    dropout: float
    seeds: list[int]  # of the dropout of attention's weights, attention and MLP

    @property
    def heads(self) -> tuple[int, ...]:
        return self.B, self.T, self.H, self.K, self.D


class Weights(NamedTuple):
    """The parameters of a block; biases may be None."""

    ln_1: Tensor
    ln_1_bias: Tensor | None
    c_attn: Tensor
    c_attn_bias: Tensor | None
    attn_proj: Tensor
    attn_proj_bias: Tensor | None
    ln_2: Tensor
    ln_2_bias: Tensor | None
    c_fc: Tensor
    c_fc_bias: Tensor | None
    mlp_proj: Tensor
    mlp_proj_bias: Tensor | None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, in) times the transpose of weight (out, in): (N, out)."""
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, in bf16, and of weight and bias, in fp32."""
    dbias = None if bias is None else dy.sum(0, dtype=torch.float32)
    return torch.mm(dy, weight), torch.mm(dy.t(), x).float(), dbias


class BlockFunction(torch.autograd.Function):
    """x (B, T, C) and the parameters of a block to (B, T, C)."""

    @staticmethod
    def forward(ctx, shape: Shape, x: Tensor, *parameters: Tensor | None) -> Tensor:
        w, (B, T, C), p, seeds = Weights(*parameters), x.shape, shape.dropout, shape.seeds
        N = B * T
        x = x.contiguous()
        with torch.autocast("cpu", enabled=False):
            products = [weight.bfloat16() for weight in (w.c_attn, w.attn_proj, w.c_fc, w.mlp_proj)]
            c_attn, attn_proj, c_fc, mlp_proj = products
            stats_1, stats_2 = x.new_empty(2, N), x.new_empty(2, N)
            h_1 = torch.empty(N, C, dtype=torch.bfloat16)
            call("add_norm", N, C, x, None, None, w.ln_1, w.ln_1_bias, h_1, stats_1, 0, 0.0)
            qkv = linear(h_1, c_attn, w.c_attn_bias)  # (N, (H + 2K)·D)
            y, lse = torch.empty_like(h_1), x.new_empty(B * shape.H, T)
            call("attention", *shape.heads, qkv, y, lse, shape.scale, seeds[0], p)
            branch = linear(y, attn_proj, w.attn_proj_bias)
            x_2, h_2 = torch.empty_like(x), torch.empty_like(h_1)
            call("add_norm", N, C, x, branch, x_2, w.ln_2, w.ln_2_bias, h_2, stats_2, seeds[1], p)
            a = linear(h_2, c_fc, w.c_fc_bias)  # (N, 4C)
            activated = torch.empty_like(a) if shape.tanh else F.gelu(a)
            if shape.tanh:  # torch's takes three times as long
                call("gelu_tanh", a.numel(), a, activated)
            branch, out = linear(activated, mlp_proj, w.mlp_proj_bias), torch.empty_like(x)
            call("add_norm", N, C, x_2, branch, out, None, None, None, None, seeds[2], p)
        ctx.shape = shape
        activations = (x, stats_1, h_1, qkv, y, lse, x_2, stats_2, h_2, a, activated)
        ctx.save_for_backward(*parameters, *products, *activations)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        shape, saved = ctx.shape, ctx.saved_tensors
        w, (c_attn, attn_proj, c_fc, mlp_proj) = Weights(*saved[:12]), saved[12:16]
        x, stats_1, h_1, qkv, y, lse, x_2, stats_2, h_2, a, activated = saved[16:]
        N, C, p, seeds, dout = shape.B * shape.T, shape.C, shape.dropout, shape.seeds, dout.contiguous()
        d_branch, d_ln_1, d_ln_2 = torch.empty_like(h_1), x.new_empty(2, C), x.new_empty(2, C)
        call("cast", N, C, dout, d_branch, seeds[2], p)
        da, *d_mlp_proj = linear_backward(d_branch, activated, mlp_proj, w.mlp_proj_bias)
        call("gelu_backward", a.numel(), a, da, shape.tanh)
        dh, *d_c_fc = linear_backward(da, h_2, c_fc, w.c_fc_bias)
        dx = torch.empty_like(x)
        call("norm_backward", N, C, dh, x_2, stats_2, w.ln_2, dout, dx, d_branch, d_ln_2, seeds[1], p)
        dy, *d_attn_proj = linear_backward(d_branch, y, attn_proj, w.attn_proj_bias)
        dqkv = torch.empty_like(qkv)
        call("attention_backward", *shape.heads, qkv, y, dy, lse, shape.scale, dqkv, seeds[0], p)
        dh, *d_c_attn = linear_backward(dqkv, h_1, c_attn, w.c_attn_bias)
        call("norm_backward", N, C, dh, x, stats_1, w.ln_1, dx, dx, None, d_ln_1, 0, 0.0)
        gradients = (*d_ln_1, *d_c_attn, *d_attn_proj, *d_ln_2, *d_c_fc, *d_mlp_proj)
        return None, dx, *(None if p is None else g for p, g in zip(w, gradients, strict=True))


class CPUBlock(Block):
    """A Block that trains by BlockFunction if it can: then without calling its layers, nor their hooks."""

    def forward(self, x: Tensor, x0: Tensor, at: Tensor, cos_sin: Tensor | None, *cached: Any) -> Tensor:
        attn, mlp = self.attn, self.mlp
        layers = (self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj)
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        if not self.is_covered(x, parameters, *cached):
            return super().forward(x, x0, at, cos_sin, *cached)
        heads, p = (attn.n_head, attn.kv_heads, attn.D), attn.attention.dropout
        seeds = torch.empty(3, dtype=torch.int64).random_().tolist() if p else [0, 0, 0]
        shape = Shape(*x.shape, *heads, attn.attention.scale, is_tanh(mlp.activation), p, seeds)
        return BlockFunction.apply(shape, x, *parameters)

    def is_covered(
        self, x: Tensor, parameters: list[Tensor | None], mask: Tensor | None, cache: KVCache | None
    ) -> bool:
        """Whether this call is a step of training in bf16 with fp32 weights that are not sharded."""
        if not (self.training and torch.is_grad_enabled() and mask is None and cache is None):
            return False
        if torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
            return False
        if x.dtype != torch.float32 or x.size(1) > LONGEST:
            return False
        in_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        given = [p for p in parameters if p is not None]
        plain = all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in given)
        return in_bf16 and plain and kernels() is not None


def is_tanh(activation: Callable) -> bool | None:
    """Whether an activation is GPT-2's GELU (True) or the exact one (False); None: it is another."""
    if activation is F.gelu:
        return False
    return True if getattr(activation, "keywords", None) == {"approximate": "tanh"} else None


def fuse(block: Block) -> Block:
    """The same block, which trains by BlockFunction if its settings are GPT-2's."""
    attn, mlp = block.attn, block.mlp
    plain_attention = attn.qk_norm is None and attn.rotary is None and not attn.key_offset
    layer_norm = isinstance(block.ln_1, nn.LayerNorm) and block.ln_1.eps == 1e-5
    if plain_attention and layer_norm and block.skip is None and is_tanh(mlp.activation) is not None:
        if attn.D % 16 == 0:
            block.__class__ = CPUBlock
    return block


def unfuse(block: CPUBlock) -> Block:
    """The same block, which trains by its layers."""
    block.__class__ = Block
    return block
