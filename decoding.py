"""A model made ready to decode: its weights in the form that one token at a time reads fastest.

Decoding reads every weight for every token, so its speed is the weights' bytes over the memory's bandwidth.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT


class PackedLinear(nn.Module):
    """nn.Linear in bf16 with the weights in oneDNN's blocks: for few rows, three times as fast on CPUs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), 1)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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
        if x.device.type == "cpu" and len(rows) <= 16 and rows.size(1) % 16 == 0:  # else the kernel crashes
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale).to(x.dtype)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def prepare(model: GPT, dtype: torch.dtype, int8: bool = False, compile: bool = False) -> GPT:
    """The model for decoding only, changed in place: weights in `dtype`, or in 8 bits, and in fast layout.

    With `compile`, one token's decoding is compiled, without the layout, which torch.compile does not know:
    on CPUs that is faster with 8-bit weights or in fp32, slower in bf16.
    """
    model.eval().to(dtype)
    if compile:
        model.decode = torch.compile(model.decode)
    on_cpu = model.transformer.wte.weight.device.type == "cpu"
    pack = not compile and on_cpu and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    pack = pack and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    kind = Int8Linear if int8 else PackedLinear if pack else None
    if kind:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child))
    return model
