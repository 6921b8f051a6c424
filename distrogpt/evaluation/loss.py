"""The losses of all splits and parts in one dictionary, and the log line that reports them."""

import math

from distrogpt.data.dataset import Dataset

# train and val, bits_per_byte if it is known, and val/NAME for each part of a mixture
Losses = dict[str, float]


def mean_losses(data: Dataset, losses: dict[str, list[float]], split: str = "val") -> Losses:
    """The weighted mean over the parts of each split. For `split`, also bits_per_byte if the number of bytes
    is known and, if the dataset is a mixture, SPLIT/NAME for each part."""
    means = {name: weighted_mean(data, values) for name, values in losses.items()}
    if split not in losses:
        return means
    ratios = [part.tokens_per_byte(split) for part in data.parts]
    if all(ratios) and data.separator is None:  # the bytes of answers alone are not known
        bits = [loss * ratio / math.log(2) for loss, ratio in zip(losses[split], ratios, strict=True)]
        means["bits_per_byte"] = weighted_mean(data, bits)
    if len(data.parts) > 1:
        parts = zip(data.parts, losses[split], strict=True)
        means |= {f"{split}/{part.name}": loss for part, loss in parts}
    return means


def weighted_mean(data: Dataset, values: list[float]) -> float:
    """The mean of one value per part, weighted as the parts are."""
    return sum(value * part.weight for value, part in zip(values, data.parts, strict=True))


def evaluation_line(step: int, losses: Losses) -> str:
    """The log line of an evaluation."""
    line = [f"{split} loss {losses[split]:.4f}" for split in ("train", "val") if split in losses]
    if "bits_per_byte" in losses:
        line.append(f"{losses['bits_per_byte']:.4f} bits per byte")
    line += [f"{name} {100 * losses[name]:.2f} %" for name in ("hellaswag", "accuracy") if name in losses]
    parts = [f"{name[4:]} {loss:.4f}" for name, loss in losses.items() if name.startswith("val/")]
    return f"step {step}: {', '.join(line)}" + (f" ({', '.join(parts)})" if parts else "")
