"""How well a network predicts each split of the data: losses, and what is told of them."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from distrogpt.data.dataset import Dataset, Part, evaluation_windows, measured_splits, to_xy
from distrogpt.data.token_stream import TokenStream
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig

Found = TypeVar("Found")
Losses = dict[
    str, float
]  # train, val, bits_per_byte where it is known, and of a mixture val/NAME of each part


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    data: Dataset,
    config: TrainConfig,
    runtime: Runtime,
    stop_asked: Callable[[], bool] = lambda: False,
    trouble: list[UserError] | None = None,
) -> Losses | None:
    """Mean loss per token of train and val, or of what eval_splits says, in nats, of a mixture weighted by
    its shares; None where it did not come to its end, on any rank: stop_asked, or the data is not what it
    was, which is added to `trouble`, or raised where there is no such list. Raises UserError where no target
    counts.
    """
    losses: dict[str, list[float]] = {split: [] for split in measured_splits(config)}
    for number, part in enumerate(data.parts):
        for split, found in losses.items():
            loss = mean_loss(model, data, part, number, split, config, runtime, stop_asked, trouble)
            if loss is None:
                return None
            found.append(loss)
    return mean_losses(data, losses)


def mean_losses(data: Dataset, losses: dict[str, list[float]], split: str = "val") -> Losses:
    """Of the losses of each part in each split, the means by the parts' shares. Where they are known, also
    bits_per_byte and, of a mixture, SPLIT/NAME of each part: of one split."""
    shares = [part.weight for part in data.parts]
    means = {name: weighted(found, shares) for name, found in losses.items()}
    if split not in losses:
        return means
    ratios = [part.tokens_per_byte(split) for part in data.parts]
    if all(ratios) and data.separator is None:  # of some targets only, there are no bytes to count
        bits = [loss * ratio / math.log(2) for loss, ratio in zip(losses[split], ratios, strict=True)]
        means["bits_per_byte"] = weighted(bits, shares)
    if len(data.parts) > 1:
        parts = zip(data.parts, losses[split], strict=True)
        means |= {f"{split}/{part.name}": loss for part, loss in parts}
    return means


def mean_loss(
    model: torch.nn.Module,
    data: Dataset,
    part: Part,
    number: int,
    split: str,
    config: TrainConfig,
    runtime: Runtime,
    stop_asked: Callable[[], bool],
    trouble: list[UserError] | None,
) -> float | None:
    """Mean loss per token of a split of part `number`, in nats; the ranks share the batches. None and errors
    as `evaluate` has them."""
    windows = evaluation_windows(part, number, split, config, runtime.world_size)
    sizes = (config.batch_size, config.block_size)
    found = summed_loss(model, data, part.streams[split], *windows, *sizes, runtime, stop_asked, trouble)
    if found and not found[1]:
        raise UserError(
            f"{part.name}: no target of {split} stands after loss_after={config.loss_after}; choose another"
        )
    return found and found[0] / found[1]


@torch.no_grad()
def summed_loss(
    model: torch.nn.Module,
    data: Dataset,
    stream: TokenStream,
    starts: np.ndarray,
    skip: np.ndarray,
    B: int,
    T: int,
    runtime: Runtime,
    stop_asked: Callable[[], bool] = lambda: False,
    trouble: list[UserError] | None = None,
) -> tuple[float, float] | None:
    """The sum of the losses over windows of T tokens, B at a time, without the first `skip` of each, and how
    many they are. The ranks share the batches; None and errors as `evaluate` has them."""
    total, sums = torch.zeros(2, dtype=torch.float64), []  # in fp32, the sum of very many would stand still
    model.eval()
    for i in range(runtime.rank * B, len(starts), runtime.world_size * B):
        windows = attempt(lambda i=i: stream.windows(starts[i : i + B], T + 1), trouble)
        if runtime.all_reduce_sum(windows is None or stop_asked())[0]:
            model.train()
            return None
        counted = np.arange(T) >= skip[i : i + B, None]  # (B, T)
        answers = data.loss_mask(windows)
        x, y = to_xy(windows, counted if answers is None else counted & answers, runtime)
        with runtime.autocast():
            _, loss = model(x, y, return_logits=False)
        counted = (y >= 0).sum()
        of_batch = torch.where(counted > 0, loss.float() * counted, 0.0)  # the mean of no losses is nan
        sums.append(torch.stack((of_batch, counted.float())))
        if len(sums) == 1000:
            total += torch.stack(sums).cpu().double().sum(dim=0)
            sums = []
    model.train()
    if sums:
        total += torch.stack(sums).cpu().double().sum(dim=0)
    all_loss, all_count = runtime.all_reduce_sum(*total.tolist())
    return all_loss, all_count


def attempt(read: Callable[[], Found], trouble: list[UserError] | None) -> Found | None:
    """What `read` returns, or None and its UserError in `trouble`, for all ranks have to stop together."""
    try:
        return read()
    except UserError as error:
        if trouble is None:
            raise
        trouble.append(error)
        return None


def weighted(values: Sequence[float], shares: Sequence[float]) -> float:
    """The mean of the values by their shares, which are 1 in all."""
    return sum(value * share for value, share in zip(values, shares, strict=True))


def evaluation_line(step: int, found: Losses) -> str:
    """An evaluation, in words."""
    both = [f"{split} loss {found[split]:.4f}" for split in ("train", "val") if split in found]
    line = f"step {step}: {', '.join(both)}"
    if "bits_per_byte" in found:
        line += f", {found['bits_per_byte']:.4f} bits per byte"
    for name in ("hellaswag", "accuracy"):
        line += f", {name} {100 * found[name]:.2f} %" if name in found else ""
    parts = [f"{name[4:]} {loss:.4f}" for name, loss in found.items() if name.startswith("val/")]
    return f"{line} ({', '.join(parts)})" if parts else line
