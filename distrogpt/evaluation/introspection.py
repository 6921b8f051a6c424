"""What goes on in a network: which tokens it expects, and what each position reads."""

import math
from collections.abc import Sequence

import torch

from distrogpt.runtime import Runtime
from model import GPT, Attention


@torch.no_grad()
def next_tokens(
    model: GPT, ids: Sequence[int], vocab_size: int, runtime: Runtime, count: int = 10
) -> list[tuple[int, float]]:
    """The `count` likeliest ids to follow, and their chances. Ids from vocab_size on are none."""
    with runtime.autocast():
        logits, _ = model(torch.tensor([ids], device=runtime.device))
    chances, found = logits[0, 0, :vocab_size].float().softmax(dim=-1).topk(min(count, vocab_size))
    return list(zip(found.tolist(), chances.tolist(), strict=True))


class RecordedAttention(Attention):
    """Appends its weights, (B, H, T, T), to a list."""

    def __init__(self, layer: Attention, weights: list[torch.Tensor]) -> None:
        super().__init__(layer.scale, 0.0)
        self.weights = weights

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = self.scale * q.float() @ k.float().mT  # (B, H, T, T)
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        self.weights.append(scores.masked_fill(later, -math.inf).softmax(dim=-1))
        return (self.weights[-1] @ v.float()).to(v.dtype)


@torch.no_grad()
def attention_weights(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """The attention weights of each layer and head: (n_layer, n_head, T, T), on the CPU; rows read columns."""
    weights, layers = [], [block.attn.attention for block in model.transformer.h]
    idx = torch.tensor([ids], device=model.transformer.wte.weight.device)
    try:
        for block, layer in zip(model.transformer.h, layers, strict=True):
            block.attn.attention = RecordedAttention(layer, weights)
        model.hidden_states(idx)
    finally:
        for block, layer in zip(model.transformer.h, layers, strict=True):
            block.attn.attention = layer
    return torch.cat(weights).cpu()
