"""Token ids to disk: documents to ids on all cores, in their order; train.bin, val.bin and meta.json.

A .bin file is raw little-endian ids without header, uint16 unless meta.json says uint32.
"""

import json
import os
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.data.preparation.documents import Piece
from distrogpt.data.tokenizer import Tokenizer
from distrogpt.errors import MachineError, UserError

Encoded = tuple[Piece, np.ndarray]
BATCH = 1 << 18  # characters that a thread gets at once, or some more


def encode_in_order(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Each piece with its ids, (N,), a document's last with the id that ends it; a few megabytes at a time.

    In threads: tiktoken and numpy work outside of Python's lock, and nothing has to be sent.
    """
    dtype, own = id_dtype(tokenizer), threading.local()

    def begin() -> None:
        own.tokenizer = tokenizer.for_thread()

    def encode(batch: list[Piece]) -> list[Encoded]:
        found = own.tokenizer.encode_texts([piece.text for piece in batch])
        return [
            (piece, with_end(piece, ids, dtype, tokenizer.end_of_text))
            for piece, ids in zip(batch, found, strict=True)
        ]

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        for batch in batches(pieces):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def with_end(piece: Piece, ids: np.ndarray, dtype: np.dtype, end: int | None) -> np.ndarray:
    """The ids of a piece, and the one that ends its document."""
    made = np.empty(len(ids) + (piece.ends and end is not None), dtype)
    made[: len(ids)], made[len(ids) :] = ids, end or 0
    return made


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of a quarter of a million characters or more: work for a thread."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 100  # many small ones are work, too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def id_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def text_bytes(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def dataset_files(folder: Path) -> list[Path]:
    """What a prepare.py has written into a folder."""
    patterns = ("train*.bin", "val*.bin", "meta.json", "meta.pkl", "tokenizer.json", "progress*.json")
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder of a new dataset. Raises UserError where one is there that is not to be overwritten."""
    if not overwrite and any(not path.name.startswith("progress") for path in dataset_files(folder)):
        raise UserError(
            f"{folder} has a dataset already; choose another --name or --output, or give --overwrite"
        )
    make_folder(folder)


def make_folder(folder: Path) -> None:
    """Raises UserError where nothing can be written into a folder of that name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output") from None


def write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    tokens: dict[str, int],
    text: dict[str, int],
    suffix: str = "",
    **about: Any,
) -> None:
    """Write meta.json: `tokens` and bytes of `text` for each split, and `about`."""
    meta = {
        "version": 1,
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if id_dtype(tokenizer).itemsize == 2 else "uint32",
        "tokens": tokens,
        "bytes": text,
        **about,
    }
    write_json(folder / f"meta.json{suffix}", meta)


def read_json(path: Path) -> dict[str, Any]:
    """What is in a file; {} where that cannot be read."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def write_json(path: Path, contents: Any) -> None:
    """Write a file whole or not at all."""
    write_text(path, json.dumps(contents, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # several machines may write it
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def token_progress(share_done: Callable[[], float], delay: float = 0) -> Iterator[Callable[[int], None]]:
    """Yields advance(tokens) of a progress bar with tokens/s, and the time left by the share that is done.

    What takes less than `delay` seconds has no bar.
    """
    from tqdm import tqdm

    quick = sys.stderr.isatty()
    often = {"mininterval": 0.1 if quick else 5, "delay": delay}
    with tqdm(unit=" tokens", unit_scale=True, dynamic_ncols=True, **often) as bar:

        def advance(tokens: int) -> None:
            share = share_done()
            bar.total = max(bar.n + tokens, int((bar.n + tokens) / share) if share else 0)
            bar.update(tokens)

        yield advance
        bar.total = bar.n  # which the bar's end shows


@contextmanager
def report_full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Raises MachineError where the block meets what a disk says; `kept` is what is still there."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{folder} takes no more ({error.strerror}); {kept}") from None


@contextmanager
def write_dataset(
    folder: Path, tokenizer: Tokenizer, overwrite: bool = False, **about: Any
) -> Iterator[Callable[[str, np.ndarray | list[int], int], None]]:
    """Yields add(split, ids, text_bytes), which appends to "train" or "val"; the files appear when the block
    ends well.

    `about` goes into meta.json: where the text came from, its sha256. Raises UserError where the folder has a
    dataset about something else, unless `overwrite`.
    """
    dtype = id_dtype(tokenizer)
    names = {"train": "train.bin", "val": "val.bin"}
    there = read_json(folder / "meta.json")
    claim_folder(folder, overwrite or (about and about.items() <= there.items()))  # the same anew is no loss
    try:
        files = {split: open(folder / f"{name}.tmp", "wb") for split, name in names.items()}
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output") from None
    counts, text = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def add(split: str, ids: np.ndarray | list[int], text_bytes: int) -> None:
        with report_full_disk(folder, "nothing there was changed"):
            files[split].write(np.ascontiguousarray(ids, dtype).data)
        counts[split] += len(ids)
        text[split] += text_bytes

    try:
        yield add
        for split, count in counts.items():
            if count < 2:
                raise UserError(f"the text is too short: {split} has {count} tokens; give a longer one")
        with report_full_disk(folder, "nothing there was changed"):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            write_meta(folder, tokenizer, counts, text, suffix=".tmp", **about)
    except BaseException:
        for split, file in files.items():
            with suppress(OSError):  # what the disk did not take, it does not take now
                file.close()
            (folder / f"{names[split]}.tmp").unlink(missing_ok=True)
        (folder / "meta.json.tmp").unlink(missing_ok=True)
        raise
    for path in dataset_files(folder):
        if path.name not in names.values():  # such as the shards of a dataset that was here before
            path.unlink()
    for name in (*names.values(), "meta.json"):
        os.replace(folder / f"{name}.tmp", folder / name)
    for split, count in counts.items():
        print(f"{folder / names[split]}: {count:,} tokens")
