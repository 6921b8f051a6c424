"""Token ids on disk: `write_dataset` writes train.bin, val.bin and meta.json, `TokenStream` maps them.

A .bin file is raw little-endian ids without header, uint16 unless meta.json says uint32. A split is one file,
train.bin, or many, train_000000.bin, train_000001.bin, ..., read as one stream.
"""

import difflib
import io
import json
import math
import os
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from errors import MachineError, UserError

DATA = Path(__file__).resolve().parent
CHECKED_AT_START = 1 << 28  # ids of a split; those beyond are checked batch by batch, as they are read
GPT2_META = {"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257, "dtype": "uint16"}
# What a pickled vocabulary is made of: numbers, text, lists, dicts. Tuples of tuples can take years to hash.
PLAIN_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE "
    "STRING BINSTRING SHORT_BINSTRING EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS".split()
)


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


def random_starts(seed: int, step: int, count: int, end: int, purpose: int = 0) -> np.ndarray:
    """`count` random numbers below `end`, (count,): a function of the arguments, not of earlier draws.

    Philox is a counter-based generator ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011).
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, purpose, step])
    return np.random.Generator(philox).integers(0, end, size=count)


def epoch_starts(seed: int, first: int, count: int, length: int, T: int) -> np.ndarray:
    """Where samples first, first + 1, ... start, of T tokens and a target, among `length` ids: (count,).

    Each epoch cuts the text into windows, at places of its own, and takes each window once, in an order of
    its own: sample n is window n % windows of epoch n // windows, so that nothing is stored.
    """
    windows = max(1, (length - 1) // T - 1)  # one less than fit: it leaves T + 1 or more places for the first
    numbers = first + np.arange(count)
    starts = np.empty(count, np.int64)
    for epoch in np.unique(numbers // windows):
        here = numbers // windows == epoch
        keys = np.random.SeedSequence((seed, int(epoch))).generate_state(7, np.uint64)
        offset = int(keys[6]) % (length - windows * T)
        starts[here] = shuffled(numbers[here] % windows, windows, keys[:6]) * T + offset
    return starts


def shuffled(places: np.ndarray, end: int, keys: np.ndarray) -> np.ndarray:
    """Where these of the numbers 0..end-1 go when all of them are shuffled by the keys, (N,): each by itself.

    A Feistel network of six rounds permutes the numbers below the next 4^bits; what is not below `end` goes
    in again until it is ("Ciphers with Arbitrary Finite Domains", Black and Rogaway, 2002).
    """
    bits = np.uint64(max(1, math.ceil(int(end - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(bits)) - 1)
    x = places.astype(np.uint64)
    out = np.ones(len(x), bool)
    while out.any():
        left, right = x[out] >> bits, x[out] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        x[out] = (left << bits) | right
        out = x >= end
    return x.astype(np.int64)


def find_dataset(name: str) -> Path:
    """The folder of a dataset: data/NAME here or in the repository, or NAME as a path. Raises UserError."""
    for folder in (Path("data") / name, DATA / name, Path(name)):
        if os.path.isdir(folder):  # Path.is_dir raises OSError for 5,000 characters
            return folder
    known = sorted(path.parent.name for path in DATA.glob("*/prepare.py"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"data/ has {', '.join(known)}"
    raise UserError(f"no dataset {name[:200]}; {hint}")


def how_to_prepare(folder: Path) -> str:
    """What to run where a dataset's files are missing."""
    script = folder / "prepare.py"
    return f"run: python {script}" if script.is_file() else "write it with a prepare.py"


def read_meta(folder: Path) -> dict[str, Any]:
    """What is known of a dataset: tokenizer (a description or None), vocab_size, dtype. Raises UserError.

    From meta.json, or else from nanoGPT's meta.pkl; without either it is GPT-2's BPE, as in nanoGPT.
    """
    if (folder / "meta.json").is_file():
        path, read = folder / "meta.json", read_meta_json
    elif (folder / "meta.pkl").is_file():
        path, read = folder / "meta.pkl", read_meta_pickle
    else:
        return GPT2_META
    try:
        return checked_meta(read(path))
    except Exception as error:  # bytes from anywhere can fail in any way
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} cannot be read ({reason}); run the dataset's prepare.py again") from None


def checked_meta(meta: Any) -> dict[str, Any]:
    """`meta`, of a dataset or a checkpoint, where it is as its readers expect it. Raises ValueError."""
    if not isinstance(meta, dict) or not set(GPT2_META) <= set(meta):
        raise ValueError("tokenizer, vocab_size or dtype is missing")
    tokenizer, vocab_size, tokens = meta["tokenizer"], meta["vocab_size"], meta.get("tokens", {})
    if not isinstance(tokenizer, dict | None) or meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError("tokenizer or dtype is not what this version writes")
    counts = (vocab_size, *tokens.values()) if isinstance(tokens, dict) else (None,)
    if any(type(count) is not int or count < 1 for count in counts) or vocab_size >= 1 << 31:
        raise ValueError("vocab_size and tokens are not positive numbers, or vocab_size has over 31 bits")
    kind, chars = (tokenizer or {}).get("kind"), (tokenizer or {}).get("chars")
    named = GPT2_META["vocab_size"] if kind == "gpt2" else len(chars) if isinstance(chars, str) else 0
    if named > vocab_size:
        raise ValueError(f"the tokenizer has {named} ids, which are more than vocab_size={vocab_size}")
    return meta


def read_meta_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_meta_pickle(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name not in PLAIN_OPCODES:
            raise pickle.UnpicklingError(f"it has {opcode.name} {number}, which a vocabulary does not need")
        if "PUT" in opcode.name and number > len(data):  # memory is taken up to this number
            raise pickle.UnpicklingError(f"it has {opcode.name} {number}, but fewer objects")
    meta = PlainUnpickler(io.BytesIO(data)).load()
    vocab_size, itos = int(meta["vocab_size"]), meta.get("itos")
    tokenizer = None
    if itos:
        tokenizer = {"kind": "char", "chars": "".join(itos[i] for i in range(vocab_size))}
        if not len(set(tokenizer["chars"])) == len(tokenizer["chars"]) == vocab_size:
            raise ValueError("itos does not name one character for each id")
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16"}


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, str, int and the like; refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a vocabulary does not need")
