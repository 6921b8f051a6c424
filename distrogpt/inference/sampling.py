"""From logits to tokens: temperature, top-k, top-p, min-p and the repetition penalty.

Shapes: B sequences, V = vocab_size.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingParams:
    """How a token is sampled; by default from the model's distribution. The filters apply in this order."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # only the k most likely tokens
    top_p: float = 1.0  # nucleus: the smallest set with this total probability (arXiv 1904.09751)
    min_p: float = 0.0  # only tokens with this fraction of the largest probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # lowers the logits of tokens that occurred (arXiv 1909.05858)

    @classmethod
    def from_settings(cls, settings: Any) -> "SamplingParams":
        """The sampling parameters of a SampleConfig."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


def sample_token(
    logits: torch.Tensor, params: SamplingParams, uniforms: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Sample one id for each row of logits (B, V): (B, 1).

    `uniforms` (B, 1), in [0, 1), are the random numbers: a row does not depend on the others. `seen` (B, V)
    marks the tokens to which the repetition penalty applies.
    """
    if seen is not None:
        penalty = params.repetition_penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, lowered, logits)
    if params.temperature < 1e-5:  # 0, or too small to divide by
        return logits.argmax(dim=-1, keepdim=True)
    ids, has_top_k = None, bool(params.top_k) and params.top_k < logits.size(-1)
    if has_top_k:
        logits, ids = logits.topk(params.top_k)  # (B, k), the most likely first
    probs = (logits.float() / params.temperature).softmax(dim=-1)
    if params.top_p < 1:
        if not has_top_k:
            probs, ids = top_p_candidates(probs, params.top_p)
        top_p = max(params.top_p, 1e-30)  # smaller values are 0 in fp32 and would leave no token
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0.0)
    if params.min_p:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    sums = probs.cumsum(dim=-1)
    index = (sums <= uniforms * (1 - 2**-22) * sums[:, -1:]).sum(dim=-1, keepdim=True)  # never past the end
    return index if ids is None else ids.gather(1, index)


def top_p_candidates(probs: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of probs (B, V) in descending order, and their ids: at least those that top_p keeps.

    Most often 1,024 are enough, which topk finds in a tenth of the time that sorting takes.
    """
    n = min(1024, probs.size(-1))
    top, top_ids = probs.topk(n)
    enough = top.sum(dim=-1) > top_p
    if bool(enough.all()):
        return top, top_ids
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered[enough], ids[enough, :n] = 0.0, top_ids[enough]  # a row's result must not depend on other rows
    ordered[enough, :n] = top[enough]
    return ordered, ids


def uniform_noise(seed: int, n: int, count: int) -> torch.Tensor:
    """Random numbers in [0, 1) for `count` tokens of each of n samples: (n, count). A sample's numbers depend
    on the seed and its index alone."""
    rows = [np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, i])) for i in range(n)]
    return torch.from_numpy(np.stack([row.random(count, np.float32) for row in rows]))
