"""Layers for decoding only: nn.Linear with weights that are read fastest.

Decoding reads every weight for every token, so its speed is the weights' bytes over the memory's bandwidth.
"""

import torch
import torch.nn as nn

from distrogpt.kernels import replace_layers


class PackedLinear(nn.Module):
    """nn.Linear with its weights in oneDNN's blocked layout, for CPUs: for few rows several times as fast.
    The result of a row is bit-identical alone and in a batch."""

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
        decoding = x.dim() == 2 or x.size(1) == 1  # one row per sequence, by one kernel for any batch size
        if x.device.type == "cpu" and decoding and rows.size(1) % 16 == 0:  # the kernel crashes otherwise,
            chunks = rows.bfloat16().split(16)  # and with more rows
            ys = [torch.ops.aten._weight_int8pack_mm(chunk, self.weight, self.scale) for chunk in chunks]
            y = (ys[0] if len(ys) == 1 else torch.cat(ys)).to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def pack_linear(model: nn.Module, dtype: torch.dtype, int8: bool) -> nn.Module:
    """Replace nn.Linear by Int8Linear, or by PackedLinear if this CPU multiplies `dtype`."""
    if int8:
        return replace_layers(model, {nn.Linear: Int8Linear})
    pack = torch.backends.mkldnn.is_available()
    if dtype != torch.float32:
        pack = pack and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return replace_layers(model, {nn.Linear: PackedLinear}) if pack else model
