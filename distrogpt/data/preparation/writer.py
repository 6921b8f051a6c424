"""Token ids to disk: documents, encoded on all cores, in order, as train.bin, val.bin and meta.json.

A .bin file is raw little-endian ids without header, uint16 unless meta.json says uint32.
"""

import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from distrogpt.data.preparation.documents import Piece
from distrogpt.data.tokenizer import Tokenizer
from distrogpt.errors import MachineError, UserError, why_not_written
from distrogpt.files import TEMPORARY, locked, write_text
from distrogpt.progress import bar_size, show_wait

Encoded = tuple[Piece, np.ndarray]
BATCH = 16  # pieces that a thread encodes at once
UNCHANGED = "its files are unchanged: free some space, then try again"


def encode_in_order(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Each piece with its ids, (N,), a few megabytes at a time; documents end with end_of_text. Threads are
    enough, since tiktoken and numpy release Python's lock."""
    dtype, end, local = id_dtype(tokenizer), tokenizer.end_of_text, threading.local()

    def encode(batch: list[Piece]) -> list[Encoded]:
        if not hasattr(local, "tokenizer"):
            local.tokenizer = tokenizer.for_thread()
        encoded = []
        for piece in batch:
            ids = local.tokenizer.encode_text(piece.text)
            if piece.ends and end is not None:
                ids = np.append(ids, end)
            encoded.append((piece, ids.astype(dtype)))
        return encoded

    pieces, waiting = iter(pieces), deque()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(pieces, BATCH)):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def text_bytes(text: str) -> int:
    """The number of bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def dataset_files(folder: Path) -> list[Path]:
    """The files that a prepare.py wrote into a folder."""
    patterns = ("train*.bin", "val*.bin", "meta.json", "meta.pkl", "tokenizer.json", "progress*.json")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


@contextmanager
def lock_folder(folder: Path, timeout: float = 0.5) -> Iterator[None]:
    """Create the folder of a dataset, and keep other processes from writing there during the block. Raises
    UserError if another prepare.py still holds it after `timeout` seconds, or if it cannot be written."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with show_wait(f"waiting for another prepare.py, which is writing to {folder}"):
                stack.enter_context(locked(folder / "prepare.lock", busy(folder), timeout))
        except OSError as error:
            advice = "choose another --output"
            raise UserError(f"{folder} cannot be written ({error.strerror}); {advice}") from None
        yield


def busy(folder: Path) -> str:
    """The message if another process is writing to the folder."""
    return f"another prepare.py is writing to {folder}; wait until it ends, or choose another --output"


def busy_parts(folder: Path) -> set[str]:
    """Stems of the progress files of the parts that other processes are writing, such as progress_00002."""
    stems = set()
    for path in folder.glob("progress*.lock"):
        try:
            with locked(path, busy(folder), timeout=0):
                pass
        except UserError:
            stems.add(path.stem)
    return stems


@contextmanager
def claim_folder(
    folder: Path, overwrite: bool, advice: str = "choose another --output", **about: Any
) -> Iterator[None]:
    """Claim the folder of a new dataset during the block. Raises UserError if it already has a dataset,
    unless that is `about` the same or `overwrite` is set; or if another process is writing there."""
    with lock_folder(folder):
        same = bool(about) and about.items() <= read_json(folder / "meta.json").items()
        if not (overwrite or same) and any(
            path.suffix == ".bin" or path.stem == "meta" for path in dataset_files(folder)
        ):
            raise UserError(f"{folder} has a dataset already; {advice}, or give --overwrite")
        if busy_parts(folder):
            raise UserError(busy(folder))
        for path in folder.glob(f"{TEMPORARY}*"):  # of a command that was killed
            path.unlink()
        yield


def write_meta(path: Path, tokenizer: Tokenizer, tokens: dict, text: dict, **about: Any) -> None:
    """Write a meta.json: tokens and bytes of text of each split, and `about`."""
    vocabulary = {"vocab_size": tokenizer.vocab_size, "dtype": id_dtype(tokenizer).name}
    meta = {"version": 1, "tokenizer": tokenizer.describe(), **vocabulary, "tokens": tokens, "bytes": text}
    write_json(path, meta | about)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a file; {} if it cannot be read."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def write_json(path: Path, contents: Any) -> None:
    write_text(path, json.dumps(contents, indent=1))


def sync(file: IO[Any]) -> None:
    """Flush a file to disk and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def token_progress(done: Callable[[], float], delay: float = 0) -> Iterator[Callable[[int], None]]:
    """Yields advance(tokens) of a progress bar, which appears after `delay` seconds; it shows the time left,
    by `done()`, the fraction that is done."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 5
    with tqdm(unit=" tokens", unit_scale=True, mininterval=interval, delay=delay, **bar_size()) as bar:

        def advance(tokens: int) -> None:
            fraction = done()
            bar.total = max(bar.n + tokens, int((bar.n + tokens) / fraction) if fraction else 0)
            bar.update(tokens)

        yield advance
        bar.total = bar.n  # shown at the end of the bar


@contextmanager
def report_full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Raises MachineError for an OSError in the block; `kept` says what is left, and what to do."""
    try:
        yield
    except OSError as error:
        reason = why_not_written(error, folder / "train.bin")
        raise MachineError(f"{folder} cannot be written ({reason}); {kept}") from None


@contextmanager
def write_dataset(
    folder: Path, tokenizer: Tokenizer, overwrite: bool = False, **about: Any
) -> Iterator[Callable]:
    """write_splits in a folder that claim_folder claims."""
    with claim_folder(folder, overwrite, **about), write_splits(folder, tokenizer, **about) as add:
        yield add


@contextmanager
def write_splits(folder: Path, tokenizer: Tokenizer, **about: Any) -> Iterator[Callable]:
    """Yields add(split, ids, text_bytes), which appends to "train" or "val"; the files appear if the block
    succeeds. Raises UserError if a split is too short, MachineError if the disk is full."""
    dtype, tokens, text = id_dtype(tokenizer), {"train": 0, "val": 0}, {"train": 0, "val": 0}
    names = ["train.bin", "val.bin", "meta.json"]
    with report_full_disk(folder, UNCHANGED):
        files = {split: open(folder / f"{split}.bin.tmp", "wb") for split in tokens}

    def add(split: str, ids: np.ndarray | list[int], text_bytes: int) -> None:
        with report_full_disk(folder, UNCHANGED):
            files[split].write(np.ascontiguousarray(ids, dtype).data)
        tokens[split] += len(ids)
        text[split] += text_bytes

    try:
        yield add
        for split, count in tokens.items():
            if count < 2:
                raise UserError(f"the text is too short: {split} has {count} tokens; give a longer one")
        with report_full_disk(folder, UNCHANGED), show_wait("writing to disk"):
            for file in files.values():
                sync(file)
            write_meta(folder / "meta.json.tmp", tokenizer, tokens, text, **about)
        for path in dataset_files(folder):
            if path.name not in names[:2]:  # such as the shards of a dataset that was here before
                path.unlink()
        for name in names:  # until the last one is renamed, the dataset is not complete
            os.replace(folder / f"{name}.tmp", folder / name)
    finally:
        for file in files.values():
            with suppress(OSError):  # a full disk fails again
                file.close()
        for name in names:
            (folder / f"{name}.tmp").unlink(missing_ok=True)
    for split, count in tokens.items():
        print(f"{folder / f'{split}.bin'}: {count:,} tokens")
