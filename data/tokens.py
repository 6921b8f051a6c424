"""Token ids from disk: `TokenStream` reads windows of one split, train.bin or train_000000.bin and so on."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.meta import how_to_prepare
from errors import UserError

CHECKED_AT_START = 1 << 28  # ids of a split; those beyond are checked batch by batch, as they are read


class TokenStream:
    """All ids of one split, mapped from disk and checked: `len(stream)`, `stream.windows(starts, length)`."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], block_size: int) -> None:
        """Raises UserError where no window of block_size + 1 ids in meta's vocabulary can be read."""
        self.name = str(folder / split)
        self.meta, self.vocab_size = meta, meta["vocab_size"]
        paths = [folder / f"{split}.bin"]
        if not paths[0].is_file():
            paths = sorted(folder.glob(f"{split}_*.bin"))
        if not paths:
            raise UserError(f"{folder / split}.bin is missing; {how_to_prepare(folder)}")
        self.paths = paths
        self.shards = [map_file(path, np.dtype(meta["dtype"]).newbyteorder("<")) for path in paths]
        self.states = [state_of(path) for path in paths]
        self.begins = np.cumsum([0, *(len(shard) for shard in self.shards)])  # (shards + 1,)
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} has {len(self):,} tokens, too few for block_size={block_size}; "
                f"set --block_size={max(len(self) - 1, 1)} or less, or prepare more text"
            )
        for shard in self.shards:
            self.check(shard[: CHECKED_AT_START // len(self.shards)])
        promised = meta.get("tokens", {}).get(split, len(self))
        if promised != len(self):
            raise UserError(
                f"{self.name} has {len(self):,} tokens, but its meta.json says {promised:,}; "
                "it was cut off or changed: run the dataset's prepare.py again"
            )

    def __len__(self) -> int:
        return int(self.begins[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids from each start on: (N, length), int64. Raises UserError as `check` does, and where a file
        that they are in is not what it was."""
        places = starts[:, None] + np.arange(length)  # (N, length)
        if len(self.shards) == 1:
            self.check_unchanged([0])
            ids = self.shards[0][places]
        else:
            shard_of = np.searchsorted(self.begins, places, side="right") - 1
            ids = np.empty(places.shape, self.shards[0].dtype)
            wanted = np.unique(shard_of)
            self.check_unchanged(wanted)
            for i in wanted:
                here = shard_of == i
                ids[here] = self.shards[i][places[here] - self.begins[i]]
        self.check(ids)
        return ids.astype(np.int64)

    def check_unchanged(self, shards: Iterable[int] | None = None) -> None:
        """Raises UserError where the files of these shards, or of all, were changed, replaced or removed:
        reading on from one that was cut off would kill the process."""
        for i in range(len(self.paths)) if shards is None else shards:
            now = state_of(self.paths[i])
            if now != self.states[i]:
                what = "was removed" if now is None else "changed"
                raise UserError(f"{self.paths[i]} {what} under the run; put back what it was, and resume")

    def check(self, ids: np.ndarray) -> None:
        """Raises UserError where an id is not in the vocabulary, which a GPU could not say."""
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.name} has the id {ids.max()}, but the vocabulary ends at {self.vocab_size - 1}; "
                "file and vocabulary do not belong together: run the dataset's prepare.py again"
            )


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """The ids of one file, mapped. Raises UserError where it is empty or cut off within an id."""
    try:
        size = path.stat().st_size
        if size and size % dtype.itemsize == 0:
            return np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None
    raise UserError(f"{path} has {size:,} bytes, not whole {dtype.name} ids; run its prepare.py again")


def state_of(path: Path) -> tuple[int, ...] | None:
    """What tells whether a file is still the same; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
