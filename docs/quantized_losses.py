"""Losses of a trained model with fewer bits: python docs/quantized_losses.py out-stdlib-char data/stdlib_char

Reads windows of the val split token by token, as sample.py does: in fp32 by torch; in bf16 and with 8-bit
weights as sample.py would; and in bf16 with weights rounded to 4 bits in groups of 32.
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distrogpt.data.meta import read_meta
from distrogpt.data.token_stream import TokenStream
from distrogpt.inference.decoder import decode, optimize_for_inference
from distrogpt.loading import load_trained
from model import GPT, KVCache

WINDOWS, GROUP = 64, 32


def round_to_4_bits(model: GPT) -> GPT:
    """Each group of 32 weights of a row: a scale, and integers from -8 to 7."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            groups = layer.weight.detach().unflatten(1, (-1, math.gcd(GROUP, layer.in_features)))
            scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
            rounded = (groups / scale).round().clamp(-8, 7) * scale
            layer.weight = nn.Parameter(rounded.nan_to_num().flatten(1))
    return model


@torch.no_grad()
def token_losses(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each token but the first: (B, T - 1)."""
    step = getattr(model, "decode", partial(decode, model))
    dtype = getattr(step, "cache_dtype", torch.float32)
    cache, losses = KVCache(model.config, len(idx), model.config.block_size, dtype=dtype), []
    for t in range(idx.size(1) - 1):
        logits = step(idx[:, t : t + 1], torch.tensor([[t]]), cache=cache)
        losses.append(F.cross_entropy(logits.float(), idx[:, t + 1], reduction="none"))
    return torch.stack(losses, dim=1)


def main(out_dir: str, folder: str) -> None:
    model, _, source = load_trained(out_dir, "resume")
    stream = TokenStream(Path(folder), "val", read_meta(Path(folder)), model.config.block_size)
    starts = np.linspace(0, len(stream) - model.config.block_size - 1, WINDOWS).astype(int)
    idx = torch.from_numpy(stream.windows(starts, model.config.block_size).astype(np.int64))
    ready = {
        "fp32": optimize_for_inference(copy.deepcopy(model), torch.float32),
        "bf16": optimize_for_inference(copy.deepcopy(model), torch.bfloat16),
        "8 bits": optimize_for_inference(copy.deepcopy(model), torch.bfloat16, int8=True),
        "4 bits": optimize_for_inference(round_to_4_bits(copy.deepcopy(model)), torch.bfloat16),
    }
    losses = {name: token_losses(network, idx) for name, network in ready.items()}
    print(f"{source}: {idx.numel():,} tokens")
    for name, each in losses.items():
        rise = each.mean() / losses["bf16"].mean() - 1
        error = (each - losses["bf16"]).mean(1).std() / WINDOWS**0.5 / losses["bf16"].mean()
        print(f"{name:6} loss {each.mean():.4f}, {rise:+.3%} of bf16 (standard error {error:.3%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
