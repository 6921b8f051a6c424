"""What goes on in a network: which tokens it expects, and what each position reads."""

import math
from collections.abc import Sequence

import torch

from distrogpt.runtime import Runtime
from model import GPT


@torch.no_grad()
def next_tokens(
    model: GPT, ids: Sequence[int], vocab_size: int, runtime: Runtime, count: int = 10
) -> list[tuple[int, float]]:
    """The `count` likeliest ids to follow, and their chances. Ids from vocab_size on are none."""
    with runtime.autocast():
        logits, _ = model(torch.tensor([ids], device=runtime.device))
    chances, found = logits[0, 0, :vocab_size].float().softmax(dim=-1).topk(min(count, vocab_size))
    return list(zip(found.tolist(), chances.tolist(), strict=True))


class Watch:
    """In place of a KVCache: keeps the weights of attention, one (B, H, T, T) for each layer."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, position: object
    ) -> torch.Tensor:
        """q (B, H, T, D), k and v (B, K, T, D) to q's shape."""
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        scores = scale * q.float() @ k.float().mT
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        self.weights.append(scores.masked_fill(later, -math.inf).softmax(dim=-1))
        return (self.weights[-1] @ v.float()).to(v.dtype)


@torch.no_grad()
def attention_weights(model: GPT, ids: Sequence[int]) -> torch.Tensor:
    """How much each position reads from each other one, in each layer and head: (n_layer, n_head, T, T), on
    the CPU; a row reads columns, 1 in all."""
    watch, device = Watch(), model.transformer.wte.weight.device
    idx = torch.tensor([ids], device=device)
    model.hidden(idx, watch, torch.arange(len(ids), device=device)[None])
    return torch.cat(watch.weights).cpu()
