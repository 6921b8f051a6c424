"""The files of an export, and the folder, which may replace an earlier export."""

import json
import os
from contextlib import suppress
from pathlib import Path
from shutil import copymode, rmtree
from tempfile import mkdtemp
from typing import Any
from unicodedata import category

from distrogpt.data.tokenizer import END_OF_TEXT, IdTokenizer, Tokenizer, start_token, tokenizer_json
from distrogpt.errors import MachineError, UserError, warn, why_not_written
from distrogpt.files import locked
from distrogpt.huggingface.formats import CODE, Weights, model_type_of, to_settings
from distrogpt.huggingface.model_card import model_card, public_meta
from distrogpt.settings import SampleConfig
from model import GPTConfig

FILES = """config.json model.safetensors modeling_distrogpt.py tokenizer.json tokenizer_config.json
    generation_config.json meta.json README.md""".split()


def text_files(
    name: str, shape: GPTConfig, tokenizer: Tokenizer, contents: dict[str, Any], count: int, dtype: str
) -> dict[str, str]:
    """The text of each file but the weights; the arguments are model_card's."""
    texts = settings_files(shape, tokenizer, dtype) | {
        "meta.json": to_json(public_meta(contents.get("meta"), tokenizer)),
        "README.md": model_card(name, shape, tokenizer, contents, count, dtype),
    }
    if isinstance(tokenizer, IdTokenizer):
        del texts["tokenizer_config.json"]
    else:
        texts["tokenizer.json"] = tokenizer_json(tokenizer)
    if model_type_of(shape) == "distrogpt":
        texts[f"{CODE}.py"] = Path(__file__).with_name(f"{CODE}.py").read_text(encoding="utf-8")
    return texts


def settings_files(shape: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, str]:
    """config.json, generation_config.json with the defaults of sample.py, and tokenizer_config.json."""
    bos, eos = start_token(tokenizer), tokenizer.end_of_text
    generation: dict[str, Any] = {"bos_token_id": bos}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # does not change decoded text
        "model_max_length": shape.block_size,
        "padding_side": "left",  # of a batch of prompts with different lengths
    }
    if eos is not None:  # another token would be removed from decoded text by transformers
        generation |= {"eos_token_id": eos, "pad_token_id": eos}
        tokenizer_config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    generation |= {"do_sample": True, "temperature": SampleConfig.temperature, "top_k": SampleConfig.top_k}
    return {
        "config.json": to_json(to_settings(shape, dtype, bos, eos)),
        "generation_config.json": to_json(generation),
        "tokenizer_config.json": to_json(tokenizer_config),
    }


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def check_name(to: Path, shown: str) -> None:
    """Raises UserError if `to`, called `shown` by the user, is not a name, or cannot be printed."""
    if not to.name or any(category(char) in ("Cc", "Zl", "Zp") for char in shown):
        raise UserError(f"to={shown} is not a valid name; choose another")


def check_target(to: Path, shown: str, overwrite: bool) -> None:
    """Raises UserError if `to`, called `shown` by the user, exists and is not an export."""
    if not os.path.lexists(to):
        return
    try:
        foreign, is_empty = foreign_file(to), not any(to.iterdir())
    except OSError as error:
        reason = f"cannot be read ({error.strerror})" if to.is_dir() else "is a file"
        raise UserError(f"{shown} {reason}; choose another folder for --to") from None
    if foreign:
        raise UserError(f"{shown} has {foreign[:60]}, which is not part of an export; choose another folder")
    if not is_empty and not overwrite:
        raise UserError(f"{shown} exists already; choose another folder, or set --overwrite=True")


def foreign_file(folder: Path) -> str | None:
    """The first name in a folder that is not of an export; any name if it has no config.json."""
    with os.scandir(folder) as entries:
        ours = {entry.name: entry.name in FILES and entry.is_file(follow_symlinks=False) for entry in entries}
    is_export = ours.get("config.json", False)
    return min((name for name, is_ours in ours.items() if not (is_ours and is_export)), default=None)


def write_folder(to: Path, shown: str, overwrite: bool, texts: dict[str, str], weights: Weights) -> None:
    """Write the files into a folder beside `to`, then rename it: `to` is complete, or unchanged.
    Raises MachineError if the disk fails, UserError if the folder cannot be made, or as check_target."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(mkdtemp(prefix=f".{to.name[:40]}.", dir=to.parent))
        new, old = workspace / "new", workspace / "old"
        new.mkdir()  # with the permissions of the umask; mkdtemp's are for the owner alone
    except OSError as error:
        raise UserError(f"{shown} cannot be created ({error.strerror}); choose another folder") from None
    try:
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})  # read by transformers
        copymode(new / "config.json", new / "model.safetensors")  # save_file's is for the owner alone
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        busy = f"another export.py is writing to {shown}; wait until it ends, or choose another folder"
        with locked(to.with_name(f".{to.name[:40]}.lock"), busy, timeout=10):
            if not overwrite:
                check_target(to, shown, overwrite)  # again, as another export may have ended since
            if to.is_dir():
                os.rename(to, old)
            os.rename(new, to)
    except BaseException as error:
        rmtree(new, ignore_errors=True)
        with suppress(OSError):
            if old.is_dir() and not os.path.lexists(to):
                os.rename(old, to)
            workspace.rmdir()
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = why_not_written(error, to, sum(weight.nbytes for weight in weights.values()))
        before = f"its old files are in {old}" if old.is_dir() else "it is unchanged: free some space"
        raise MachineError(f"{shown} cannot be written ({reason}); {before}") from None
    try:
        if old.is_dir() and (foreign := foreign_file(old)):  # added to the old export in the meantime
            raise OSError(f"{foreign[:60]} is not part of an export")
        rmtree(workspace)
    except OSError as error:
        warn(f"note     {old} has the old files of {shown}; delete it yourself ({error.strerror or error})")
