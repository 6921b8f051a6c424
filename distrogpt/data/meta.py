"""The folder of a dataset, and its meta.json, or nanoGPT's meta.pkl, which describes its token ids."""

import json
import os
import pickle
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrogpt.data.token_stream import NAMING, how_to_prepare
from distrogpt.errors import UserError, near_name

DATA = Path(__file__).resolve().parents[2] / "data"
DATASET_FILE = re.compile(r"(train|val)(_.*)?\.bin|meta\.(json|pkl|json\.tmp)|progress.*\.json")
MAX_PICKLE = 1 << 26  # bytes: a vocabulary of all of Unicode fits
GPT2_META = {"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257, "dtype": "uint16"}


def folders_of(name: str) -> list[Path]:
    """The possible folders of a dataset: data/NAME here or in the repository, or NAME as a path."""
    return [Path("data") / name, DATA / name, Path(name)]


def has_dataset(folder: Path, suffix: str = "") -> bool:
    """Whether a folder has a file of token ids or their meta, complete or not, with that suffix."""
    with suppress(OSError, ValueError):  # it is missing; ValueError: a null character in the name
        names = os.listdir(folder)
        return any(name.endswith(suffix) and DATASET_FILE.fullmatch(name) for name in names)
    return False


def dataset_folder(name: str) -> Path | None:
    """The folder that find_dataset finds, or None."""
    return next(filter(has_dataset, folders_of(name)), None)


def find_dataset(name: str) -> Path:
    """The folder of a dataset: data/NAME here or in the repository, or NAME as a path. Raises UserError."""
    if folder := dataset_folder(name):
        return folder
    if folder := next(filter(os.path.isdir, folders_of(name)), None):
        script = folder if (folder / "prepare.py").is_file() else DATA / "text"
        raise UserError(f"{folder / 'train.bin'} is missing; {how_to_prepare(script)}")
    if os.path.isfile(name):
        here = has_dataset(Path(name).parent)
        hint = f"give its folder, {Path(name).parent}" if here else how_to_prepare(DATA / "text")
        raise UserError(f"dataset {name} is a file; {hint}")
    scripts = {path.parent.name for path in DATA.glob("*/prepare.py")}
    hint = did_you_mean(name, scripts - set(NAMING))
    hint = hint or f"prepared: {prepared_names(name)}; scripts in data/: {', '.join(sorted(scripts))}"
    raise UserError(f"there is no dataset {name[:200]}; {hint}")


def prepared_near(name: str) -> list[str]:
    """The names of the datasets in data/, here and in the repository, and of those beside the path `name`."""
    found: set[str] = set()
    for parent, prefix in ((Path("data"), ""), (DATA, ""), (Path(name).parent, Path(name).parent)):
        with suppress(OSError, ValueError):
            entries = (entry for entry in os.listdir(parent) if has_dataset(parent / entry, ".bin"))
            found.update(str(Path(prefix, entry)) for entry in entries)
    return sorted(found, key=lambda dataset: (os.sep in dataset, dataset))


def prepared_names(name: str) -> str:
    """The names of prepared_near as text, at most 20."""
    names = prepared_near(name)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "") or "none"


def did_you_mean(name: str, others: Iterable[str]) -> str:
    """A question for a misspelt name: whether one of prepared_near, or of the others, is meant; or ""."""
    by_last_part = {Path(known).name: known for known in [*others, *prepared_near(name)]}
    near = near_name(Path(name).name, by_last_part)
    return f"did you mean {by_last_part[near]}?" if near else ""


def read_meta(folder: Path) -> dict[str, Any]:
    """A dataset's tokenizer (a description or None), vocab_size and dtype: from meta.json, or else nanoGPT's
    meta.pkl; without either it is GPT-2's BPE, as in nanoGPT. Raises UserError."""
    path, pickled = folder / "meta.json", folder / "meta.pkl"
    if not path.is_file() and not pickled.is_file():
        if (folder / "meta.json.tmp").is_file() or next(folder.glob("progress*.json"), None):
            raise UserError(f"{folder} is not complete; wait for its prepare.py to finish, or run it again")
        return GPT2_META
    try:
        if path.is_file():
            return checked_meta(json.loads(path.read_bytes()))
        path = pickled
        return checked_meta(read_meta_pickle(path))
    except Exception as error:  # bytes from anywhere can fail in any way
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} cannot be read ({reason}); run the dataset's prepare.py again") from None


def checked_meta(meta: Any) -> dict[str, Any]:
    """`meta`, of a dataset or a checkpoint. Raises ValueError if it is not as its readers expect."""
    if not isinstance(meta, dict) or not set(GPT2_META) <= set(meta):
        raise ValueError("tokenizer, vocab_size or dtype is missing")
    tokenizer, vocab_size = meta["tokenizer"], meta["vocab_size"]
    if not isinstance(tokenizer, dict | None) or meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError("tokenizer or dtype is not supported")
    counts = [vocab_size, *meta.get("tokens", {}).values(), *meta.get("bytes", {}).values()]
    if any(type(count) is not int or count < 1 for count in counts) or vocab_size >= 1 << 31:
        raise ValueError("vocab_size, tokens, bytes are not positive numbers, or vocab_size is over 31 bits")
    described = described_vocab_size(tokenizer or {})
    if described > vocab_size:
        raise ValueError(f"the tokenizer has {described} ids, more than vocab_size={vocab_size}")
    return meta


def described_vocab_size(tokenizer: dict[str, Any]) -> int:
    """The number of ids of a tokenizer by its description; 0 if unknown."""
    chars, merges = tokenizer.get("chars"), tokenizer.get("merges")
    if isinstance(chars, str):
        return len(chars) + bool(tokenizer.get("ends"))
    if isinstance(merges, str):
        return 256 + len(merges.splitlines()) + 1
    return {"gpt2": GPT2_META["vocab_size"], "byte": 257}.get(str(tokenizer.get("kind")), 0)


def tokenizers_differ(trained_on: dict[str, Any] | None, given: dict[str, Any] | None) -> bool:
    """Whether two descriptions differ, as far as both are known."""
    return None not in (trained_on, given) and trained_on != given


class VocabularyUnpickler(pickle._Unpickler):
    """Reads dicts, lists, strings and numbers. Refuses all that would run code, and tuples: nested ones can
    take years to hash. Its base class, in Python, has a dict as memo: a large index allocates no memory."""

    dispatch = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if "tuple" not in load.__name__
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it loads {module}.{name}, which a vocabulary does not need")


def read_meta_pickle(path: Path) -> dict[str, Any]:
    """The contents of nanoGPT's meta.pkl in the form of a meta.json. Raises errors of many kinds."""
    if path.stat().st_size > MAX_PICKLE:
        raise ValueError("it is too large for a vocabulary")
    with open(path, "rb") as file:
        meta = VocabularyUnpickler(file).load()
    vocab_size, itos = int(meta["vocab_size"]), meta.get("itos")
    tokenizer = None
    if itos:
        chars = "".join(itos[i] for i in range(vocab_size))
        if not len(set(chars)) == len(chars) == vocab_size:
            raise ValueError("itos does not have one character for each id")
        tokenizer = {"kind": "char", "chars": chars}
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16"}
