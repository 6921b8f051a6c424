"""The loss of a model on windows of tokens, and the line that reports it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, to_xy
from distrogpt.data.token_stream import TokenStream
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime

# train and val, bits_per_byte if it is known, and val/NAME for each part of a mixture
Losses = dict[str, float]


class EvalWindows(NamedTuple):
    """Windows of T inputs and their targets, read in batches of B; of window i, the first skip[i] targets do
    not count. N is a multiple of B times the number of ranks."""

    stream: TokenStream
    starts: np.ndarray  # (N,)
    skip: np.ndarray  # (N,)
    B: int
    T: int


def never() -> bool:
    """The stop_requested of an evaluation that is not interrupted."""
    return False


@torch.no_grad()
def summed_loss(
    model: torch.nn.Module,
    data: Dataset,
    windows: EvalWindows,
    runtime: Runtime,
    stop_requested: Callable[[], bool] = never,
) -> tuple[float, float] | None:
    """The sum of the losses of all targets that count, in nats, and their number; ranks share the batches.

    Returns None if a rank requests a stop. If a rank cannot read its data, it raises UserError and the others
    return None. Call eval() first.
    """
    stream, starts, skip, B, T = windows
    firsts = range(runtime.rank * B, len(starts), runtime.world_size * B)
    sums = torch.zeros(len(firsts), 2, device=runtime.device)  # loss and number of targets of each batch
    for i, first in enumerate(firsts):
        error = None
        try:
            tokens = stream.windows(starts[first : first + B], T + 1)  # (B, T + 1)
        except UserError as reason:
            error = reason
        if runtime.all_reduce_sum(error is not None or stop_requested())[0]:
            if error is not None:
                raise error
            return None
        mask = np.arange(T) >= skip[first : first + B, None]  # (B, T)
        loss_mask = data.loss_mask(tokens)
        x, y = to_xy(tokens, mask if loss_mask is None else mask & loss_mask, runtime)
        with runtime.autocast():
            _, loss = model(x, y, return_logits=False)
        count = (y >= 0).sum()
        sums[i, 0] = torch.where(count > 0, loss.float() * count, 0.0)  # the mean of no losses is nan
        sums[i, 1] = count
    loss_sum, count = runtime.all_reduce_sum(*sums.cpu().double().sum(dim=0).tolist())
    return loss_sum, count


def mean_losses(data: Dataset, losses: dict[str, list[float]], split: str = "val") -> Losses:
    """The weighted means of the losses of all parts in each split; and of one split, if they are known,
    bits_per_byte and, for a mixture, SPLIT/NAME of each part."""
    weights = [part.weight for part in data.parts]
    means = {name: weighted_mean(values, weights) for name, values in losses.items()}
    if split not in losses:
        return means
    ratios = [part.tokens_per_byte(split) for part in data.parts]
    if all(ratios) and data.separator is None:  # the bytes of answers alone are not known
        bits = [loss * ratio / math.log(2) for loss, ratio in zip(losses[split], ratios, strict=True)]
        means["bits_per_byte"] = weighted_mean(bits, weights)
    if len(data.parts) > 1:
        parts = zip(data.parts, losses[split], strict=True)
        means |= {f"{split}/{part.name}": loss for part, loss in parts}
    return means


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean by weights that sum to 1."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def evaluation_line(step: int, losses: Losses) -> str:
    """An evaluation in words."""
    splits = [f"{split} loss {losses[split]:.4f}" for split in ("train", "val") if split in losses]
    line = f"step {step}: {', '.join(splits)}"
    if "bits_per_byte" in losses:
        line += f", {losses['bits_per_byte']:.4f} bits per byte"
    for name in ("hellaswag", "accuracy"):
        if name in losses:
            line += f", {name} {100 * losses[name]:.2f} %"
    parts = [f"{name[4:]} {loss:.4f}" for name, loss in losses.items() if name.startswith("val/")]
    return f"{line} ({', '.join(parts)})" if parts else line
