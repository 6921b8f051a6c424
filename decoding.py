"""From logits to tokens, and a model made ready for that: its weights in the form that is read fastest.

Decoding reads every weight for every token, so its speed is the weights' bytes over the memory's bandwidth.
`model` is a GPT, which model.py makes.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import KVCache
from runtime import cuda_graph


def sample_token(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """Draw one id for each row of logits (B, V): (B, 1). Temperature 0 takes the likeliest."""
    if temperature < 1e-5:  # 0, or too small to divide by
        return logits.argmax(dim=-1, keepdim=True)
    if not top_k or top_k >= logits.size(-1):
        return torch.multinomial((logits.float() / temperature).softmax(dim=-1), num_samples=1)
    values, ids = logits.topk(top_k)  # (B, top_k)
    chosen = torch.multinomial((values.float() / temperature).softmax(dim=-1), num_samples=1)  # (B, 1)
    return ids.gather(1, chosen)


def stream(
    model: nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the next token of each of the B sequences, (B, 1), max_new_tokens times.

    Each token is read once: keys and values are kept. Where block_size is full, the last three quarters
    of it are read anew, as positions from 0 on, which makes room for the next quarter. Ids from
    `vocab_size` on are never drawn: a padded vocabulary has them, no tokenizer can read them. The caller
    sets eval mode.
    """
    config, weight = model.config, model.transformer.wte.weight
    block_size = config.block_size
    window = idx[:, -block_size:]  # the newest tokens, at most block_size
    size = min(block_size, window.size(1) + max_new_tokens)
    cache = KVCache(config.n_layer, config.kv_heads, config.n_embd // config.n_head, len(idx), size, weight)
    decode = partial(model.decode, cache=cache)
    recorded, next_id = not weight.is_cuda, window[:, -1:]
    for number in range(max_new_tokens):
        with torch.no_grad():
            if number == 0:
                same = bool((window == window[:1]).all())  # one prompt for all samples is read once
                logits = model.prefill(window[:1] if same else window, cache).expand(len(idx), -1)
            elif cache.length == block_size:
                window = window[:, -max(1, block_size * 3 // 4) :]
                logits = model.prefill(window, cache)
            else:
                position = torch.full((1,), cache.length, device=idx.device)
                if not recorded:
                    decode, recorded = cuda_graph(decode, next_id, position), True
                logits = decode(next_id, position)
                cache.length += 1
            next_id = sample_token(logits[:, :vocab_size], temperature, top_k)  # (B, 1)
            window = torch.cat([window, next_id], dim=1)
        yield next_id


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
def prepare(model: nn.Module, dtype: torch.dtype, int8: bool = False, compile: bool = False) -> nn.Module:
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
