"""What a run reads: a dataset, or a mixture of several; which windows of it, and which of their targets."""

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
    """One dataset of a mixture, or the only one: the streams of its splits, and its weight of all samples."""

    name: str
    weight: float
    folder: Path
    meta: dict[str, Any]
    streams: dict[str, TokenStream]
    line_starts: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # with sampling=lines, where each line starts

    def tokens_per_byte(self, split: str = "val") -> float | None:
        """Of a split; None where meta.json does not say how many bytes its text has."""
        size = self.meta.get("bytes", {}).get(split)
        return len(self.streams[split]) / size if size else None


class Dataset(NamedTuple):
    """The parts of a run's data, which have one vocabulary."""

    parts: list[Part]
    newline: int | None = None  # ids, where lines matter
    separator: int | None = None  # with loss_after

    @property
    def meta(self) -> dict[str, Any]:
        """What holds for all parts: tokenizer, vocab_size, dtype; of a single one, all that is known."""
        first = self.parts[0].meta
        common = {name: first[name] for name in ("tokenizer", "vocab_size", "dtype")}
        return first if len(self.parts) == 1 else common

    def windows(self, split: str, which: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids of each sample, of part which[i] from starts[i] on: (N, length), int64. UserError."""
        if len(self.parts) == 1:
            return self.parts[0].streams[split].windows(starts, length)
        windows = np.empty((len(starts), length), np.int64)
        for number, part in enumerate(self.parts):
            here = which == number
            if here.any():
                windows[here] = part.streams[split].windows(starts[here], length)
        return windows

    def loss_mask(self, windows: np.ndarray) -> np.ndarray | None:
        """Which targets of windows (N, T + 1) count, (N, T); None where all do."""
        return None if self.separator is None else mask_after_separator(self.separator, self.newline, windows)


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """The names in dataset=NAME, or =NAME:WEIGHT,NAME:WEIGHT, and their weights, 1 in all. Raises UserError.

    Without weights, all have the same. What is no number after a colon belongs to the name.
    """
    pieces = [text] if "," not in text or dataset_folder(text) else text.split(",")
    names, weights = [], []
    for piece in pieces:
        name, weight = split_weight(piece.strip())
        names.append(name)
        weights.append(weight)
    if len(pieces) > 1 and (not all(names) or len(set(names)) < len(names)):
        raise UserError(f"dataset={text[:200]} has a name that is empty or there twice; name each once")
    given = [weight for weight in weights if weight is not None]
    if given and (len(given) < len(weights) or not all(0 < weight < math.inf for weight in given)):
        raise UserError(
            f"dataset={text[:200]}: not each name has a positive weight; write NAME:0.9,OTHER:0.1"
        )
    total = sum(given)
    weights = [weight / total for weight in given] or [1 / len(names)] * len(names)
    return list(zip(names, weights, strict=True))


def split_weight(piece: str) -> tuple[str, float | None]:
    """NAME:WEIGHT in two; what is a folder's name as it is has no weight."""
    name, _, weight = piece.rpartition(":")
    try:
        return (piece, None) if not name or dataset_folder(piece) else (name, float(weight))
    except ValueError:
        return piece, None


def find_parts(text: str) -> list[tuple[str, float, Path, dict[str, Any]]]:
    """Of each part of a mixture, or of the only one: name, weight, folder and meta. Raises UserError where
    they have not all the same vocabulary."""
    parts = [(name, weight, find_dataset(name)) for name, weight in parse_mixture(text)]
    found = [(*part, read_meta(part[2])) for part in parts]
    for key in ("tokenizer", "vocab_size", "dtype"):
        for name, _, _, meta in found[1:]:
            if meta[key] != found[0][3][key]:
                raise UserError(
                    f"{found[0][0]} and {name} have not the same {key}; prepare them with the same tokenizer"
                )
    return found


def read_dataset_meta(text: str) -> dict[str, Any]:
    """What is known of the dataset or mixture: tokenizer, vocab_size, dtype. Raises UserError."""
    return find_parts(text)[0][3]


def measured_splits(config: TrainConfig) -> tuple[str, ...]:
    """The splits that an evaluation measures; by the last one's loss, the best is chosen."""
    return ("train", "val") if config.eval_splits == "both" else (config.eval_splits,)


def open_dataset(config: TrainConfig, splits: tuple[str, ...] | None = None) -> Dataset:
    """The dataset or mixture that the settings name, checked; None: the splits that a run of them reads.
    Raises UserError."""
    if splits is None:
        read = measured_splits(config) if config.eval_only else ("train", *measured_splits(config))
        splits = tuple(dict.fromkeys(read))
    parts = [
        Part(
            name,
            weight,
            folder,
            meta,
            {split: TokenStream(folder, split, meta, config.block_size) for split in splits},
        )
        for name, weight, folder, meta in find_parts(config.dataset)
    ]
    newline = separator = None
    if config.sampling == "lines" or config.loss_after is not None:
        newline = single_token_id("\n", parts[0].meta, "the newline, which ends lines,")
    if config.loss_after is not None:
        separator = single_token_id(config.loss_after, parts[0].meta, f"the separator {config.loss_after!r}")
        if separator == newline:
            raise UserError("the separator is the newline, which ends a line; choose a token within lines")
    if config.sampling == "lines":
        for part in parts:
            part.line_starts = {
                split: find_line_starts(stream, newline) for split, stream in part.streams.items()
            }
    return Dataset(parts, newline, separator)


def single_token_id(text: str, meta: dict[str, Any], what: str) -> int:
    """The id of a text that is one token. Raises UserError where it is not."""
    if not meta["tokenizer"]:
        raise UserError(f"{what} is to be found, but the vocabulary names no characters; write a meta.json")
    try:
        ids = from_description(meta["tokenizer"]).encode(text)
    except UserError as error:
        raise UserError(f"{what} is to be one token of the dataset, but {error}") from None
    if len(ids) != 1:
        raise UserError(
            f"{what} is to be one token of the dataset, but {text!r} is {len(ids)}; choose another"
        )
    return int(ids[0])


def find_line_starts(stream: TokenStream, newline: int) -> np.ndarray:
    """Where the lines of a split start, (lines,): at its begin, and after each newline but the last id."""
    after_newlines = stream.positions_of(newline) + 1
    return np.concatenate([[0], after_newlines[after_newlines < len(stream)]])


def mask_after_separator(separator: int, newline: int, windows: np.ndarray) -> np.ndarray:
    """Which targets of windows (N, T + 1) stand after the first separator on their line, the newline that
    ends it included: (N, T)."""

    def newest(token: int) -> np.ndarray:  # where it last stood, up to each place; -1 where it did not
        return np.maximum.accumulate(np.where(windows == token, np.arange(windows.shape[1]), -1), axis=1)

    return (newest(separator) > newest(newline))[:, :-1]


def to_xy(
    windows: np.ndarray, counted: np.ndarray | None, runtime: Runtime
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) as inputs x (B, T) and their next tokens y (B, T), on the device; -1 in y where a
    target is not counted."""
    tokens = runtime.to_device(windows)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return x, y if counted is None else y.masked_fill(runtime.to_device(~counted), -1)


def step_windows(data: Dataset, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Of which part each sample of a step is, and where it starts: (N,) twice, N = micro-steps · batch_size.

    Functions of seed and step alone: ranks and micro-steps share them out.
    """
    count = config.gradient_accumulation_steps * config.batch_size
    if len(data.parts) == 1:
        return np.zeros(count, np.int64), part_starts(data.parts[0], 0, config, step, step * count, count)
    which, within = interleave(step * count, count, [part.weight for part in data.parts])
    starts = np.empty(count, np.int64)
    for number, part in enumerate(data.parts):
        here = np.flatnonzero(which == number)
        if len(here):
            starts[here] = part_starts(part, number, config, step, int(within[here[0]]), len(here))
    return which, starts


def part_starts(
    part: Part, number: int, config: TrainConfig, step: int, first: int, count: int
) -> np.ndarray:
    """Where `count` samples of part `number` start, of its own from `first` on, all of one step: (count,)."""
    length, T = len(part.streams["train"]), config.block_size
    if config.sampling == "lines":
        lines = part.line_starts["train"]
        return lines[epoch_order(config.seed, first, count, len(lines), number)[0]]
    if config.sampling == "epochs":
        return epoch_starts(config.seed, first, count, length, T, number)
    return random_starts(config.seed, step, count, length - T, purpose=3 * number)


def samples_per_epoch(data: Dataset, config: TrainConfig) -> int:
    """How many samples a pass over the training data has, over that of all parts of a mixture."""
    if config.sampling == "lines":
        return sum(len(part.line_starts["train"]) for part in data.parts)
    return sum(windows_per_epoch(len(part.streams["train"]), config.block_size) for part in data.parts)


def strided_windows(length: int, T: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of T tokens and a target over `length` ids, each `stride` behind the one before, the last one
    less: where they start, and how many first targets of each do not count, as they did before: (N,), (N,).
    So each id but the first is a target once, and is told from T - stride ids or more before it."""
    last = length - 1 - T
    starts = np.minimum(np.arange(1 + math.ceil(last / stride)) * stride, last)
    return starts, np.append(0, starts[:-1] + T - starts[1:])


def evaluation_windows(
    part: Part, number: int, split: str, config: TrainConfig, ranks: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of an evaluation of part `number` start, and how many first targets of each do not
    count: (N,), (N,).

    eval_iters batches at random places, the same at every evaluation. With eval_iters=0, all of val, each
    token once, and a quarter as many of train; all of train where that alone is measured. With
    sampling=lines, windows start with a line: eval_iters=0 is one for each line of val. Each of the ranks
    gets as many.
    """
    B, T, purpose = config.batch_size, config.block_size, 3 * number + ("train", "val").index(split) + 1
    whole = "train" if config.eval_splits == "train" else "val"  # what eval_iters=0 reads all of
    at_lines = config.sampling == "lines"
    count = len(part.line_starts[whole]) if at_lines else math.ceil((len(part.streams[whole]) - 1) / T)
    if config.eval_iters or split != whole:
        count = config.eval_iters * B or math.ceil(count / 4)
        end = len(part.line_starts[split]) if at_lines else len(part.streams[split]) - T
        starts = random_starts(config.seed, 0, count, end, purpose)
        starts, skip = part.line_starts[split][starts] if at_lines else starts, np.zeros_like(starts)
    elif at_lines:
        starts, skip = part.line_starts[split], np.zeros_like(part.line_starts[split])
    else:
        starts, skip = strided_windows(len(part.streams[split]), T, T)
    return pad_windows(starts, skip, T, ranks * B)


def pad_windows(starts: np.ndarray, skip: np.ndarray, T: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows and so many more, whose targets do not count, that batches are equal."""
    padding = -len(starts) % multiple  # torch.compile likes equal batches; what is added does not count
    return np.pad(starts, (0, padding)), np.pad(skip, (0, padding), constant_values=T)
