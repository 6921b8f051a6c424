"""Token ids to disk: `write_dataset` writes train.bin, val.bin and meta.json.

A .bin file is raw little-endian ids without header, uint16 unless meta.json says uint32.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from errors import MachineError, UserError


@contextmanager
def write_dataset(
    folder: Path, tokenizer: Tokenizer, **about: Any
) -> Iterator[Callable[[str, np.ndarray | list[int]], None]]:
    """Yields add(split, ids), which appends to "train" or "val"; the files appear when the block ends well.

    `about` goes into meta.json: where the text came from, its sha256.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    names = {"train": "train.bin", "val": "val.bin"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {split: open(folder / f"{name}.tmp", "wb") for split, name in names.items()}
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --output") from None
    counts = dict.fromkeys(names, 0)

    def add(split: str, ids: np.ndarray | list[int]) -> None:
        files[split].write(np.asarray(ids).astype(dtype).tobytes())
        counts[split] += len(ids)

    try:
        yield add
        for split, file in files.items():
            if not counts[split]:
                raise UserError(f"the text is too short: nothing is left for {split}; give a longer one")
            file.flush()
            os.fsync(file.fileno())
            file.close()
    except BaseException as error:
        for split, file in files.items():
            with suppress(OSError):  # what the disk did not take, it does not take now
                file.close()
            (folder / f"{names[split]}.tmp").unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MachineError(
                f"{folder} takes no more ({error.strerror}); nothing there was changed"
            ) from None
        raise
    meta = {
        "version": 1,
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if dtype.itemsize == 2 else "uint32",
        "tokens": counts,
        **about,
    }
    (folder / "meta.json.tmp").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for name in (*names.values(), "meta.json"):
        os.replace(folder / f"{name}.tmp", folder / name)
    for split, count in counts.items():
        print(f"{folder / names[split]}: {count:,} tokens")
