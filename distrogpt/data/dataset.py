"""The data of a run: a dataset, or a weighted mixture of datasets, and the windows that it reads of them."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distrogpt.data.meta import dataset_folder, find_dataset, read_meta
from distrogpt.data.sampling import epoch_order, epoch_starts, interleave, random_starts, windows_per_epoch
from distrogpt.data.token_stream import TokenStream
from distrogpt.data.tokenizer import from_description
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig


@dataclass
class Part:
    """One dataset of a mixture, or the only one; the weights of all parts add up to 1."""

    name: str
    weight: float
    folder: Path
    meta: dict[str, Any]
    streams: dict[str, TokenStream]  # by split
    line_starts: dict[str, np.ndarray] = field(default_factory=dict)  # by split, with sampling=lines

    def tokens_per_byte(self, split: str = "val") -> float | None:
        """Of a split; None if meta.json does not have the size of its text."""
        size = self.meta.get("bytes", {}).get(split)
        return len(self.streams[split]) / size if size else None


class Dataset(NamedTuple):
    """The parts of a run's data, which have the same vocabulary."""

    parts: list[Part]
    newline: int | None = None  # ids, if lines matter
    separator: int | None = None  # with loss_after

    @property
    def meta(self) -> dict[str, Any]:
        """The meta of a single part, or what all parts have in common: tokenizer, vocab_size, dtype."""
        first = self.parts[0].meta
        if len(self.parts) == 1:
            return first
        return {name: first[name] for name in ("tokenizer", "vocab_size", "dtype")}

    def windows(self, split: str, which: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Ids from starts[i] of part which[i] on: (N, length), int64. Raises UserError."""
        windows = np.empty((len(starts), length), np.int64)
        for number, part in enumerate(self.parts):
            of_part = which == number
            if of_part.any():
                windows[of_part] = part.streams[split].windows(starts[of_part], length)
        return windows

    def loss_mask(self, windows: np.ndarray) -> np.ndarray | None:
        """Which targets of windows (N, T + 1) the loss counts, (N, T); None if it counts all."""
        if self.separator is None:
            return None
        return mask_after_separator(self.separator, self.newline, windows)


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Names and weights, 1 in all, from NAME or NAME:WEIGHT,NAME:WEIGHT. Raises UserError.

    Without weights, all are the same. Text after a colon that is not a number belongs to the name.
    """
    pieces = [text] if "," not in text or dataset_folder(text) else text.split(",")
    names, weights = [], []
    for piece in map(str.strip, pieces):
        name, _, weight = piece.rpartition(":")
        try:
            weights.append(float(weight) if name and not dataset_folder(piece) else None)
        except ValueError:
            weights.append(None)
        names.append(piece if weights[-1] is None else name)
    if len(pieces) > 1 and (not all(names) or len(set(names)) < len(names)):
        raise UserError(f"dataset={text[:200]} has a name that is empty or there twice; name each once")
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [(name, 1 / len(names)) for name in names]
    if len(given) < len(weights) or not all(0 < weight < math.inf for weight in given):
        raise UserError(f"dataset={text[:200]}: weights are not all positive; write NAME:0.9,OTHER:0.1")
    return [(name, weight / sum(given)) for name, weight in zip(names, given, strict=True)]


def find_parts(text: str) -> list[tuple[str, float, Path, dict[str, Any]]]:
    """Name, weight, folder and meta of each part of a mixture. Raises UserError if vocabularies differ."""
    parts = []
    for name, weight in parse_mixture(text):
        folder = find_dataset(name)
        parts.append((name, weight, folder, read_meta(folder)))
    first_name, *_, first = parts[0]
    for key in ("tokenizer", "vocab_size", "dtype"):
        for name, *_, meta in parts[1:]:
            if meta[key] != first[key]:
                raise UserError(
                    f"{first_name} and {name} have not the same {key}; prepare them with the same tokenizer"
                )
    return parts


def read_dataset_meta(text: str) -> dict[str, Any]:
    """tokenizer, vocab_size and dtype of a dataset or mixture. Raises UserError."""
    return find_parts(text)[0][3]


def measured_splits(config: TrainConfig) -> tuple[str, ...]:
    """The splits that an evaluation measures; the loss of the last one chooses the best checkpoint."""
    return ("train", "val") if config.eval_splits == "both" else (config.eval_splits,)


def open_dataset(config: TrainConfig, splits: tuple[str, ...] | None = None) -> Dataset:
    """Open and check the dataset or mixture of the settings; by default the splits that a run reads.

    Raises UserError.
    """
    if splits is None:
        splits = measured_splits(config)
        if not config.eval_only:
            splits = tuple(dict.fromkeys(("train", *splits)))
    parts = []
    for name, weight, folder, meta in find_parts(config.dataset):
        streams = {split: TokenStream(folder, split, meta, config.block_size) for split in splits}
        parts.append(Part(name, weight, folder, meta, streams))
    newline = separator = None
    if config.sampling == "lines" or config.loss_after is not None:
        newline = single_token_id("\n", parts[0].meta, "the newline, which ends lines,")
    if config.loss_after is not None:
        separator = single_token_id(config.loss_after, parts[0].meta, f"the separator {config.loss_after!r}")
        if separator == newline:
            raise UserError("the separator is the newline, which ends a line; choose a token within lines")
    if config.sampling == "lines":
        for part in parts:
            for split, stream in part.streams.items():
                starts = np.append(0, stream.positions_of(newline) + 1)
                part.line_starts[split] = starts[starts < len(stream)]
    return Dataset(parts, newline, separator)


def single_token_id(text: str, meta: dict[str, Any], what: str) -> int:
    """The id of a text that is one token. Raises UserError if it is not."""
    if not meta["tokenizer"]:
        raise UserError(f"{what} is to be found, but the vocabulary names no characters; write a meta.json")
    try:
        ids = from_description(meta["tokenizer"]).encode(text)
    except UserError as error:
        raise UserError(f"{what} has to be one token, but {error}") from None
    if len(ids) != 1:
        raise UserError(f"{what} has to be one token, but {text!r} is {len(ids)}; choose another")
    return int(ids[0])


def mask_after_separator(separator: int, newline: int, windows: np.ndarray) -> np.ndarray:
    """Which targets of windows (N, T + 1) come after the first separator on their line, its newline included:
    (N, T)."""
    positions = np.arange(windows.shape[1])
    last_separator, last_newline = (  # up to each position, -1 before the first: (N, T + 1)
        np.maximum.accumulate(np.where(windows == token, positions, -1), axis=1)
        for token in (separator, newline)
    )
    return (last_separator > last_newline)[:, :-1]


def to_xy(
    windows: np.ndarray, loss_mask: np.ndarray | None, runtime: Runtime
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x (B, T) and next tokens y (B, T) of windows (B, T + 1), on the device; y is -1 where the loss
    does not count a target."""
    tokens = runtime.to_device(windows)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return x, y if loss_mask is None else y.masked_fill(runtime.to_device(~loss_mask), -1)


def step_windows(data: Dataset, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Part and start of each sample of a step, over all ranks and micro-steps: (N,), (N,).

    They are functions of seed and step alone; ranks and micro-steps divide them among themselves.
    """
    count = config.gradient_accumulation_steps * config.batch_size
    which, within = interleave(step * count, count, [part.weight for part in data.parts])
    starts = np.empty(count, np.int64)
    for number, part in enumerate(data.parts):
        samples = np.flatnonzero(which == number)
        if len(samples):
            first = int(within[samples[0]])
            starts[samples] = part_starts(part, number, config, step, range(first, first + len(samples)))
    return which, starts


def part_starts(part: Part, number: int, config: TrainConfig, step: int, samples: range) -> np.ndarray:
    """Starts of a step's samples of part `number`, by their numbers within the part: (samples,)."""
    length, T, first, count = len(part.streams["train"]), config.block_size, samples.start, len(samples)
    if config.sampling == "lines":
        line_starts = part.line_starts["train"]
        return line_starts[epoch_order(config.seed, first, count, len(line_starts), number)[0]]
    if config.sampling == "epochs":
        return epoch_starts(config.seed, first, count, length, T, number)
    return random_starts(config.seed, step, count, length - T, purpose=3 * number)


def samples_per_epoch(data: Dataset, config: TrainConfig) -> int:
    """The number of samples in one pass over the training data of all parts."""
    if config.sampling == "lines":
        return sum(len(part.line_starts["train"]) for part in data.parts)
    return sum(windows_per_epoch(len(part.streams["train"]), config.block_size) for part in data.parts)


def strided_windows(length: int, T: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts of windows of T tokens and a target over `length` ids, `stride` apart, and the number of first
    targets of each that an earlier window has: (N,), (N,). So each id but the first is a target once, with
    T - stride ids or more before it."""
    last = length - 1 - T
    starts = np.minimum(np.arange(1 + math.ceil(last / stride)) * stride, last)
    return starts, np.append(0, starts[:-1] + T - starts[1:])


def evaluation_windows(
    part: Part, number: int, split: str, config: TrainConfig, ranks: int = 1, stride: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the windows that evaluate part `number`, and the number of first targets of each that do not
    count: (N,), (N,), padded to equal batches on all ranks.

    eval_iters batches at random positions, the same at every evaluation. With eval_iters=0, all of val, and a
    quarter as many random windows of train; all of train if eval_splits=train. With sampling=lines, windows
    start with a line, and eval_iters=0 takes each line of val.
    """
    B, T, by_lines = config.batch_size, config.block_size, config.sampling == "lines"
    full_split = "train" if config.eval_splits == "train" else "val"  # all of it with eval_iters=0
    stream, line_starts = part.streams[split], part.line_starts.get(split)
    if not config.eval_iters and split == full_split:
        if not by_lines:
            return pad_windows(*strided_windows(len(stream), T, stride or T), T, ranks * B)
        starts = line_starts
    else:
        windows = part.line_starts[full_split] if by_lines else range(0, len(part.streams[full_split]) - 1, T)
        count = config.eval_iters * B or math.ceil(len(windows) / 4)
        purpose = 3 * number + ("train", "val").index(split) + 1
        end = len(line_starts) if by_lines else len(stream) - T
        starts = random_starts(config.seed, 0, count, end, purpose)
        if by_lines:
            starts = line_starts[starts]
    return pad_windows(starts, np.zeros_like(starts), T, ranks * B)


def pad_windows(starts: np.ndarray, skip: np.ndarray, T: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows, with uncounted ones added up to a multiple: equal batches suit torch.compile."""
    padding = -len(starts) % multiple
    return np.pad(starts, (0, padding)), np.pad(skip, (0, padding), constant_values=T)
