"""The data of a run: a dataset or a weighted mixture of datasets, and the windows that the run reads."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from distrogpt.data.meta import GPT2_META, dataset_folder, find_dataset, read_meta
from distrogpt.data.sampling import epoch_order, epoch_starts, interleave, random_starts, windows_per_epoch
from distrogpt.data.token_stream import TokenStream
from distrogpt.data.tokenizer import from_description
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime, activity
from distrogpt.settings import TrainConfig

Windows = tuple[np.ndarray, np.ndarray]  # starts, and numbers of first targets not to count: (N,), (N,)


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
        """The ratio of a split; None if meta.json does not have the size of its text."""
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
        return first if len(self.parts) == 1 else {name: first[name] for name in GPT2_META}

    def windows(self, split: str, which: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Ids from starts[i] of part which[i] on: (N, length), int64. Raises UserError."""
        windows = np.empty((len(starts), length), np.int64)
        for number, part in enumerate(self.parts):
            of_part = which == number
            if of_part.any():
                windows[of_part] = part.streams[split].windows(starts[of_part], length)
        return windows

    def loss_mask(self, windows: np.ndarray) -> np.ndarray | None:
        """Which targets of windows (N, T + 1) the loss counts, (N, T): those after the first separator on
        their line, its newline included. None if it counts all."""
        if self.separator is None:
            return None
        positions = np.arange(windows.shape[1])
        last_separator, last_newline = (  # up to each position, -1 before the first: (N, T + 1)
            np.maximum.accumulate(np.where(windows == token, positions, -1), axis=1)
            for token in (self.separator, self.newline)
        )
        return (last_separator > last_newline)[:, :-1]


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Names and weights, 1 in all, from NAME or NAME:WEIGHT,NAME:WEIGHT; without weights, all are the same.
    Text after a colon that is not a number belongs to the name. Raises UserError."""
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
        raise UserError(f"dataset={text[:200]} has an empty or repeated name; give each name once")
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [(name, 1 / len(names)) for name in names]
    if len(given) < len(weights) or not all(0 < weight < math.inf for weight in given):
        raise UserError(f"dataset={text[:200]}: each name needs a positive weight; write NAME:0.9,OTHER:0.1")
    return [(name, weight / sum(given)) for name, weight in zip(names, given, strict=True)]


def find_parts(text: str) -> list[tuple[str, float, Path, dict[str, Any]]]:
    """Name, weight, folder and meta of each part of a mixture. Raises UserError if vocabularies differ."""
    parts = []
    for name, weight in parse_mixture(text):
        folder = find_dataset(name)
        parts.append((name, weight, folder, read_meta(folder)))
    first_name, *_, first = parts[0]
    for name, *_, meta in parts[1:]:
        if different := [key for key in GPT2_META if meta[key] != first[key]]:
            advice = "prepare them with the same tokenizer"
            raise UserError(f"{first_name} and {name} differ in {different[0]}; {advice}")
    return parts


def measured_splits(config: TrainConfig) -> tuple[str, ...]:
    """The splits that an evaluation measures; the loss of the last one chooses the best checkpoint."""
    return ("train", "val") if config.eval_splits == "both" else (config.eval_splits,)


@activity("opening the data")
def open_dataset(config: TrainConfig, splits: tuple[str, ...] | None = None) -> Dataset:
    """Open the settings' dataset or mixture, by default the splits that a run reads. Raises UserError."""
    if splits is None:
        trained_on = () if config.eval_only else ("train",)
        splits = tuple(dict.fromkeys(trained_on + measured_splits(config)))
    parts = []
    for name, weight, folder, meta in find_parts(config.dataset):
        streams = {split: TokenStream(folder, split, meta, config.block_size) for split in splits}
        parts.append(Part(name, weight, folder, meta, streams))
    newline = separator = None
    if config.sampling == "lines" or config.loss_after is not None:
        newline = single_token_id("\n", parts[0].meta, "the newline")
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
        raise UserError(f"{what} cannot be encoded: the dataset has no tokenizer; add one to its meta.json")
    try:
        ids = from_description(meta["tokenizer"]).encode(text)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if len(ids) != 1:
        raise UserError(f"{what} must be a single token, but {text!r} is {len(ids)} tokens; choose another")
    return int(ids[0])


def to_xy(windows: np.ndarray, loss_mask: np.ndarray | None, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Inputs x (B, T) and next tokens y (B, T) of windows (B, T + 1), on the device; y is -1 for targets that
    the loss does not count."""
    tokens = runtime.to_device(windows)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return x, y if loss_mask is None else y.masked_fill(runtime.to_device(~loss_mask), -1)


def step_windows(data: Dataset, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Part and start of each sample of a step, over all ranks and micro-steps, which divide them among
    themselves: (N,), (N,). They are functions of seed and step alone."""
    count = config.gradient_accumulation_steps * config.batch_size
    which, within = interleave(step * count, count, [part.weight for part in data.parts])
    starts = np.empty(count, np.int64)
    for number in np.unique(which).tolist():
        mine = which == number
        part, first, size = data.parts[number], int(within[mine][0]), int(mine.sum())
        length, T = len(part.streams["train"]), config.block_size
        if config.sampling == "lines":
            line_starts = part.line_starts["train"]
            order, _ = epoch_order(config.seed, first, size, len(line_starts), number)
            starts[mine] = line_starts[order]
        elif config.sampling == "epochs":
            starts[mine] = epoch_starts(config.seed, first, size, length, T, number)
        else:
            starts[mine] = random_starts(config.seed, step, size, length - T, purpose=3 * number)
    return which, starts


def samples_per_epoch(data: Dataset, config: TrainConfig) -> int:
    """The number of samples in one pass over the training data of all parts."""
    if config.sampling == "lines":
        return sum(len(part.line_starts["train"]) for part in data.parts)
    return sum(windows_per_epoch(len(part.streams["train"]), config.block_size) for part in data.parts)


def strided_windows(length: int, T: int, stride: int) -> Windows:
    """Windows of T tokens and a target over `length` ids, `stride` apart. Targets of earlier windows are not
    counted again: each id but the first is a target once, after at least T - stride ids of context."""
    last = length - 1 - T
    starts = np.minimum(np.arange(1 + math.ceil(last / stride)) * stride, last)
    return starts, np.append(0, starts[:-1] + T - starts[1:])


def evaluation_windows(
    part: Part, number: int, split: str, config: TrainConfig, ranks: int = 1, stride: int | None = None
) -> Windows:
    """The windows that evaluate part `number`, padded to equal batches on all ranks.

    eval_iters batches at random positions, the same at every evaluation. With eval_iters=0, all of val, and a
    quarter as many random windows of train; all of train if eval_splits=train. With sampling=lines, windows
    start with a line, and eval_iters=0 takes each line of val.
    """
    B, T, by_lines = config.batch_size, config.block_size, config.sampling == "lines"
    full_split = "train" if config.eval_splits == "train" else "val"  # evaluated as a whole with eval_iters=0
    stream, starts, skip = part.streams[split], part.line_starts.get(split), None
    if config.eval_iters or split != full_split:
        windows = part.line_starts[full_split] if by_lines else range(0, len(part.streams[full_split]) - 1, T)
        count = config.eval_iters * B or math.ceil(len(windows) / 4)
        purpose = 3 * number + ("train", "val").index(split) + 1
        end = len(starts) if by_lines else len(stream) - T
        drawn = random_starts(config.seed, 0, count, end, purpose)
        starts = starts[drawn] if by_lines else drawn
    elif not by_lines:
        starts, skip = strided_windows(len(stream), T, stride or T)
    if skip is None:
        skip = np.zeros_like(starts)
    # windows that are not counted make batches equal, for torch.compile
    padding = (0, -len(starts) % (ranks * B))
    return np.pad(starts, padding), np.pad(skip, padding, constant_values=T)
