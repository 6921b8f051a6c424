"""Inspect a model: its next-token probabilities and attention weights."""

import math
from collections.abc import Sequence

import torch

from distrogpt.runtime import Runtime
from model import GPT, Attention


@torch.no_grad()
def next_tokens(
    model: GPT, ids: Sequence[int], vocab_size: int, runtime: Runtime, count: int = 10
) -> list[tuple[int, float]]:
    """The `count` most likely next ids and their probabilities. Ids from vocab_size on are padding: left
    out."""
    with runtime.autocast():
        logits, _ = model(torch.tensor([ids], device=runtime.device))  # (1, 1, V)
    probs, next_ids = logits[0, 0, :vocab_size].float().softmax(dim=-1).topk(min(count, vocab_size))
    return list(zip(next_ids.tolist(), probs.tolist(), strict=True))


@torch.no_grad()
def attention_weights(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """The attention weights of each layer and head, (n_layer, n_head, T, T), on the CPU; rows sum to 1."""
    weights = []

    def record(layer: Attention, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        q, k = inputs[0].float(), inputs[1].float()  # (1, H, T, D), (1, K, T, D)
        scores = layer.scale * q @ k.repeat_interleave(q.size(1) // k.size(1), dim=1).mT  # (1, H, T, T)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights.append(scores.masked_fill(future, -math.inf).softmax(dim=-1).cpu())

    hooks = [block.attn.attention.register_forward_hook(record) for block in model.transformer.h]
    try:
        model.hidden_states(torch.tensor([ids], device=model.transformer.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(weights)
