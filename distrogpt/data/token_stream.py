"""Token ids from disk: `TokenStream` reads windows of one split, train.bin or train_000000.bin and so on."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.data.meta import how_to_prepare
from distrogpt.errors import UserError

CHECKED_AT_START = 1 << 28  # ids of a split; those beyond are checked batch by batch, as they are read
FILES_AT_START = 64  # of a split, from all over it; the others are opened when a batch is in them
CHUNK = 1 << 22  # ids read at once where many are


class TokenStream:
    """All ids of one split, checked: `len(stream)`, `stream.windows(starts, length)`.

    A file is open only while it is read, and it is read, not mapped: so a terabyte in thousands of files
    takes no more memory than a megabyte in one, and a file that is cut off under the run is an error that
    can be told, where a map would kill the process.
    """

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], block_size: int) -> None:
        """Raises UserError where no window of block_size + 1 ids in meta's vocabulary can be read."""
        self.name = str(folder / split)
        self.meta, self.vocab_size = meta, meta["vocab_size"]
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        paths = [folder / f"{split}.bin"]
        if not paths[0].is_file():
            paths = sorted(folder.glob(f"{split}_*.bin"))
        if not paths:
            raise UserError(f"{folder / split}.bin is missing; {how_to_prepare(folder)}")
        self.paths = paths
        self.states = [file_signature(path) for path in paths]
        self.begins = [0]  # of each file, in the stream; then the end
        for path, state in zip(paths, self.states, strict=True):
            self.begins.append(self.begins[-1] + ids_in(path, state, self.dtype))
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} has {len(self):,} tokens, too few for block_size={block_size}; "
                f"set --block_size={max(len(self) - 1, 1)} or less, or prepare more text"
            )
        looked_at = np.unique(np.linspace(0, len(paths) - 1, FILES_AT_START).astype(int)).tolist()
        for i in looked_at:
            size = min(self.begins[i + 1] - self.begins[i], CHECKED_AT_START // len(looked_at))
            for _ in self.chunks(self.begins[i], self.begins[i] + size):
                pass
        promised = meta.get("tokens", {}).get(split, len(self))
        if promised != len(self):
            raise UserError(
                f"{self.name} has {len(self):,} tokens, but its meta.json says {promised:,}; "
                "it was cut off or changed: run the dataset's prepare.py again"
            )

    def __len__(self) -> int:
        return self.begins[-1]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids from each start on: (N, length), int64; after the last id comes the first one.

        Raises UserError as `check` and `opened` do.
        """
        ids = np.empty((len(starts), length), self.dtype)
        pieces: dict[int, list[tuple[int, int, int, int]]] = {}  # of each file: row, column, place, count
        for row, start in enumerate(starts.tolist()):
            column = 0
            while column < length:
                place = (start + column) % len(self)
                i = bisect_right(self.begins, place) - 1
                count = min(length - column, self.begins[i + 1] - place)
                pieces.setdefault(i, []).append((row, column, place - self.begins[i], count))
                column += count
        for i, found in pieces.items():
            with self.opened(i) as file:
                for row, column, place, count in found:
                    file.seek(place * self.dtype.itemsize)
                    read = file.readinto(ids[row, column : column + count])
                    if read != count * self.dtype.itemsize:
                        raise self.is_not_what_it_was(i, "changed")
        self.check(ids)
        return ids.astype(np.int64)

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """All ids from `first` up to `end`, in pieces (N,) of bounded size, and where each begins."""
        end = len(self) if end is None else end
        for begin in range(first, end, CHUNK):
            yield begin, self.windows(np.array([begin]), min(CHUNK, end - begin))[0]

    def positions_of(self, token: int) -> np.ndarray:
        """Where that id stands, in order: (N,)."""
        return np.concatenate([begin + np.flatnonzero(ids == token) for begin, ids in self.chunks()])

    @contextmanager
    def opened(self, i: int) -> Iterator[FileIO]:
        """File i, open. Raises UserError where it was changed, replaced or removed since the start."""
        path = self.paths[i]
        try:
            file = open(path, "rb", buffering=0)
        except FileNotFoundError:
            raise self.is_not_what_it_was(i, "was removed") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None
        with file:
            found = os.fstat(file.fileno())
            if (found.st_size, found.st_mtime_ns) != self.states[i]:
                raise self.is_not_what_it_was(i, "changed")
            yield file

    def is_not_what_it_was(self, i: int, what: str) -> UserError:
        return UserError(f"{self.paths[i]} {what} under the run; put back what it was, and resume")

    def check(self, ids: np.ndarray) -> None:
        """Raises UserError where an id is not in the vocabulary, which a GPU could not say."""
        if ids.max() >= self.vocab_size:
            raise UserError(
                f"{self.name} has the id {ids.max()}, but the vocabulary ends at {self.vocab_size - 1}; "
                "file and vocabulary do not belong together: run the dataset's prepare.py again"
            )


def file_signature(path: Path) -> tuple[int, int]:
    """What tells whether a file is still the same: its size in bytes, and when it was changed. UserError."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None
    return found.st_size, found.st_mtime_ns


def ids_in(path: Path, state: tuple[int, int], dtype: np.dtype) -> int:
    """How many ids a file has. Raises UserError where it is empty or cut off within an id."""
    size = state[0]
    if not size or size % dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, not whole {dtype.name} ids; run its prepare.py again")
    return size // dtype.itemsize
