"""decode.cpp, the decoding step in C++, called through ctypes.

Compared with torch, it saves the time between hundreds of small operations, and reads the weights at nearly
the full speed of the memory.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from distrogpt.kernels.build import has_bf16, library
from distrogpt.kernels.quantized import Int8Linear
from model import GPT, GPTConfig, KVCache, rotary_cos_sin

ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu")  # by the numbers that decode.cpp gives them
HEAD_DIMS = (32, 64, 128)


def struct(name: str, **fields: str) -> type[ctypes.Structure]:
    """The struct of that name in decode.cpp; `fields` are the names of its members by their types."""
    members = [(member, TYPES[kind]) for kind, names in fields.items() for member in names.split()]
    TYPES[name] = type(name, (ctypes.Structure,), {"_fields_": members})
    return TYPES[name]


TYPES: dict[str, type] = {"pointer": c_void_p, "integer": c_int64, "number": c_float}
Linear = struct("Linear", pointer="weight scale bias", integer="rows columns")
NORMS = "ln_1_weight ln_1_bias ln_2_weight ln_2_bias"
Layer = struct("Layer", pointer=f"{NORMS} q_weight k_weight skip", Linear="c_attn attn_proj c_fc mlp_proj")
SHAPE = "n_layer C H K D width rmsnorm qk_norm key_offset activation"
POINTERS = "layers ln_f_weight ln_f_bias rotary"
Model = struct("Model", pointer=POINTERS, Linear="lm_head", integer=SHAPE, number="scale softcap")
Cache = struct("Cache", pointer="kv", integer="rows size")


def supports(config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether decode.cpp computes this network, in this dtype, on this CPU."""
    return has_bf16() and dtype == torch.bfloat16 and config.n_embd % 32 == 0 and config.head_dim in HEAD_DIMS


class NativeDecoder:
    """The decoding step of a model whose weights are bf16, or 8-bit integers in Int8Linear layers.

    It shares the matrices, except those whose number of columns is no multiple of 32, and copies the vectors:
    make it again if they change. Attention reads a KV cache in bf16."""

    cache_dtype = torch.bfloat16

    def __init__(self, model: GPT) -> None:
        """Raises OSError or subprocess.SubprocessError if decode.cpp cannot be compiled: see build_error."""
        self.function = library("decode").decode
        self.tensors: list[Tensor] = []  # to which the structs point
        # not the model, whose attribute this is: a cycle of references would keep its memory
        self.config, self.wte, self.wpe = model.config, model.transformer.wte, None
        if not model.config.rotary:
            self.wpe = model.transformer.wpe
        config, blocks = model.config, model.transformer.h
        self.layers = (Layer * config.n_layer)(*map(self.layer, blocks))
        rotary = None
        if config.rotary:
            cos_sin = rotary_cos_sin(torch.arange(config.block_size)[None], config.head_dim)[:, 0, 0]
            rotary = self.floats(cos_sin.permute(1, 2, 0))  # (block_size, D/2, 2)
        self.struct = Model(
            ctypes.cast(self.layers, c_void_p),
            *self.norm(model.transformer.ln_f),
            rotary,
            self.linear(model.lm_head),
            *(config.n_layer, config.n_embd, config.n_head, config.kv_heads, config.head_dim),
            *(config.mlp_width, config.norm == "rmsnorm", config.qk_norm, config.key_offset),
            ACTIVATIONS.index(config.activation),
            blocks[0].attn.attention.scale,
            config.logit_softcap,
        )

    def layer(self, block: nn.Module) -> ctypes.Structure:
        attn, mlp = block.attn, block.mlp
        matrices = map(self.linear, (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
        vectors = map(self.floats, (attn.q_weight, attn.k_weight, block.skip))
        return Layer(*self.norm(block.ln_1), *self.norm(block.ln_2), *vectors, *matrices)

    def pointer(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def norm(self, layer: nn.Module) -> tuple[int | None, int | None]:
        return self.floats(getattr(layer, "weight", None)), self.floats(getattr(layer, "bias", None))

    def linear(self, layer: nn.Linear | Int8Linear) -> Linear:
        weight = layer.weight.detach().contiguous()
        if padding := -weight.size(1) % 32:
            weight = F.pad(weight, (0, padding))
        scale = self.floats(getattr(layer, "scale", None))
        return Linear(self.pointer(weight), scale, self.floats(layer.bias), *weight.shape)

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """The next logits (B, V), fp32, after ids (B, 1) at positions (1 or B, 1). Raises IndexError if they
        are not within block_size and the cache, ValueError if the cache is not in bf16."""
        B, positions = len(ids), positions.expand(len(ids), 1).contiguous()
        _, _, rows, _, size, _ = cache.kv.shape
        end, numbers = min(size - cache.key_offset, self.config.block_size), positions[:, 0].tolist()
        if B > rows or max(numbers) >= end or min(numbers) < 0:
            raise IndexError(f"{B} sequences up to position {max(numbers)} are not in the cache")
        if cache.kv.dtype != self.cache_dtype or not cache.kv.is_contiguous():
            raise ValueError(f"the cache has to be contiguous, in {self.cache_dtype}")
        x = self.wte(ids)[:, 0].float()  # (B, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)[:, 0].float()
        V = self.struct.lm_head.rows
        logits = torch.empty(B * V + 16)
        self.function(
            ctypes.byref(self.struct),
            ctypes.byref(Cache(cache.kv.data_ptr(), rows, size)),
            c_void_p(x.data_ptr()),
            c_void_p(positions.data_ptr()),
            c_int64(B),
            c_int64(torch.get_num_threads()),
            c_void_p(logits.data_ptr()),
        )
        return logits[: B * V].view(B, V)
