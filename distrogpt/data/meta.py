"""What is known of a dataset: where it lies, and what its meta.json, or nanoGPT's meta.pkl, says of it."""

import difflib
import io
import json
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

from distrogpt.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "data"
GPT2_META = {"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257, "dtype": "uint16"}
# What a pickled vocabulary is made of: numbers, text, lists, dicts. Tuples of tuples can take years to hash.
PLAIN_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE "
    "STRING BINSTRING SHORT_BINSTRING EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS".split()
)


def dataset_folder(name: str) -> Path | None:
    """The folder that find_dataset finds, None where there is none."""
    for folder in (Path("data") / name, DATA / name, Path(name)):
        if os.path.isdir(folder):  # Path.is_dir raises OSError for 5,000 characters
            return folder
    return None


def find_dataset(name: str) -> Path:
    """The folder of a dataset: data/NAME here or in the repository, or NAME as a path. Raises UserError."""
    if folder := dataset_folder(name):
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
    elif (folder / "meta.json.tmp").is_file() or next(folder.glob("progress*.json"), None):
        raise UserError(f"{folder} is not whole yet; let its prepare.py come to its end, or run it again")
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
    sizes = (tokens, meta.get("bytes", {}))
    counts = [None]
    if all(isinstance(size, dict) for size in sizes):
        counts = [vocab_size, *(count for size in sizes for count in size.values())]
    if any(type(count) is not int or count < 1 for count in counts) or vocab_size >= 1 << 31:
        raise ValueError(
            "vocab_size, tokens and bytes are not positive numbers, or vocab_size has over 31 bits"
        )
    named = described_vocab_size(tokenizer or {})
    if named > vocab_size:
        raise ValueError(f"the tokenizer has {named} ids, which are more than vocab_size={vocab_size}")
    return meta


def described_vocab_size(tokenizer: dict[str, Any]) -> int:
    """How many ids the description of a tokenizer is of; 0 where that is not known."""
    chars, merges = tokenizer.get("chars"), tokenizer.get("merges")
    if isinstance(chars, str):
        return len(chars) + bool(tokenizer.get("ends"))
    if isinstance(merges, str):
        return 256 + len(merges.splitlines()) + 1
    return {"gpt2": GPT2_META["vocab_size"], "byte": 257}.get(str(tokenizer.get("kind")), 0)


def tokenizers_differ(trained_on: dict[str, Any] | None, given: dict[str, Any] | None) -> bool:
    """Whether ids of the one mean something else to the other, as far as both are known."""
    return None not in (trained_on, given) and trained_on != given


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
