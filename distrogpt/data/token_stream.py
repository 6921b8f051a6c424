"""The token ids of a split on disk, memory-mapped: train.bin, or train_000000.bin, train_000001.bin, ..."""

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.errors import UserError, path_from_here

IDS_CHECKED = 1 << 28  # at the start; the ids beyond are checked batch by batch
FILES_CHECKED = 64  # at the start, evenly spaced; the others are opened when a batch reads them
CHUNK = 1 << 22  # ids that a scan reads at once
MAX_MAPS = 128  # files mapped at the same time; each map holds a file descriptor

NAMING = {  # folders of scripts that write datasets of any name, and the commands for them
    "text": "data/text/prepare.py --input FILE --name NAME, then use --dataset=NAME",
    "audio": "data/audio/prepare.py --input FOLDER --name NAME, then use --dataset=NAME",
    "hub": "data/hub/prepare.py --dataset OWNER/SET --output data/NAME, then use --dataset=NAME",
}


def how_to_prepare(folder: Path) -> str:
    """The advice if a dataset's token files are missing."""
    script = folder / "prepare.py"
    if not script.is_file():
        return "prepare the dataset again"
    _, space, options = NAMING.get(folder.resolve().name, "").partition(" ")
    return f"run: python {path_from_here(script.resolve())}{space}{options}"


class TokenStream:
    """All ids of one split as one sequence: `len(stream)`, `stream.windows(starts, length)`.

    Before a batch reads a file, its size and modification time are compared with those at the start: reading
    the map of a file that was truncated would kill the process.
    """

    def __init__(
        self, folder: Path, split: str, meta: dict[str, Any], block_size: int, ids_checked: int = IDS_CHECKED
    ) -> None:
        """Raises UserError if no window of block_size + 1 ids can be read, or ids exceed the vocabulary."""
        self.name = str(folder / split)
        self.vocab_size = meta["vocab_size"]
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        single = folder / f"{split}.bin"
        self.paths = [single] if single.is_file() else sorted(folder.glob(f"{split}_*.bin"))
        if not self.paths:
            raise UserError(f"{single} is missing; {how_to_prepare(folder)}")
        self.signatures = [file_signature(path) for path in self.paths]
        self.offsets = [0]  # of each file in the sequence, then the end
        for path, (size, _) in zip(self.paths, self.signatures, strict=True):
            if not size or size % self.dtype.itemsize:
                fault = f"{size:,} bytes, which is not a positive multiple of {self.dtype.itemsize}"
                raise UserError(f"{path} has {fault}; run its prepare.py again")
            self.offsets.append(self.offsets[-1] + size // self.dtype.itemsize)
        if len(self) <= block_size:
            raise UserError(
                f"{self.name} has {len(self):,} tokens, too few for block_size={block_size}; "
                f"set --block_size={max(len(self) - 1, 1)} or less, or prepare more text"
            )
        files = np.unique(np.linspace(0, len(self.paths) - 1, FILES_CHECKED).astype(int)).tolist()
        for i in files:
            end = min(self.offsets[i + 1], self.offsets[i] + ids_checked // len(files))
            for _ in self.chunks(self.offsets[i], end):  # each is checked
                pass
        expected = meta.get("tokens", {}).get(split, len(self))
        if expected != len(self):
            fault = f"{len(self):,} tokens, but its meta.json says {expected:,} (cut off or changed)"
            raise UserError(f"{self.name} has {fault}; run the dataset's prepare.py again")

    def __len__(self) -> int:
        return self.offsets[-1]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` ids from each start, (N, length), int64, continuing at the first after the last.
        Raises UserError if a file has changed, or an id is not in the vocabulary."""
        ids = np.empty((len(starts), length), self.dtype)
        unchanged: set[int] = set()
        for row, start in enumerate(starts.tolist()):
            column = 0
            while column < length:
                position = (start + column) % len(self)
                i = bisect_right(self.offsets, position) - 1
                if i not in unchanged:
                    self.check_unchanged(i)
                    unchanged.add(i)
                tokens = map_file(self.paths[i], self.dtype, self.signatures[i])
                begin = position - self.offsets[i]
                piece = tokens[begin : begin + length - column]
                ids[row, column : column + len(piece)] = piece
                column += len(piece)
        self.check_vocabulary(ids)
        return ids.astype(np.int64)

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The ids from `first` up to `end` in chunks (N,), each with its position; read, not mapped, as the
        system reads ahead in files, but not in maps for random access. Raises UserError."""
        end = len(self) if end is None else end
        while first < end:
            i = bisect_right(self.offsets, first) - 1
            count = min(CHUNK, end - first, self.offsets[i + 1] - first)
            self.check_unchanged(i)
            with open_file(self.paths[i]) as file:
                file.seek((first - self.offsets[i]) * self.dtype.itemsize)
                ids = np.fromfile(file, self.dtype, count)
            self.check_vocabulary(ids)
            yield first, ids
            first += count

    def positions_of(self, token: int) -> np.ndarray:
        """All positions of a token, in order: (N,)."""
        return np.concatenate([begin + np.flatnonzero(ids == token) for begin, ids in self.chunks()])

    def check_vocabulary(self, ids: np.ndarray) -> None:
        """Raises UserError if an id is not in the vocabulary."""
        if ids.max() >= self.vocab_size:  # which a GPU could not report
            fault = f"the id {ids.max()}, but the vocabulary ends at {self.vocab_size - 1}"
            raise UserError(f"{self.name} has {fault}; run the dataset's prepare.py again")

    def check_unchanged(self, i: int) -> None:
        """Raises UserError if file i was changed, replaced or removed since the start."""
        signature = file_signature(self.paths[i])
        if signature != self.signatures[i]:
            event = "was removed" if signature == (0, 0) else "changed"
            raise UserError(f"{self.paths[i]} {event} during the run; restore it, then resume")


def file_signature(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time of a file, which differ if it was replaced; zeros if missing."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return 0, 0


@lru_cache(MAX_MAPS)
def map_file(path: Path, dtype: np.dtype, signature: tuple[int, int]) -> np.ndarray:
    """The ids of a file, (N,), memory-mapped; another signature means another file. Raises UserError."""
    with open_file(path) as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(pages, "madvise"):  # else the system reads megabytes around each window
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype)


@contextmanager
def open_file(path: Path) -> Iterator[FileIO]:
    """Open a file for reading, unbuffered. Raises UserError."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
