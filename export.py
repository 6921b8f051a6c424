"""Write a trained GPT in Hugging Face's format: python export.py --out_dir=out-stdlib-char --to=my-model

config.json              the network's shape, and which architecture of transformers it is
model.safetensors        its weights
modeling_distrogpt.py    its code, only where no architecture of transformers computes it
tokenizer.json           its tokenizer, and tokenizer_config.json: how it is used
generation_config.json   how sample.py samples by default
meta.json                what the dataset is, for the way back: --init_from=my-model
README.md                the model card
"""

from configurator import configure
from distrogpt.settings import ExportConfig

if __name__ == "__main__":
    CONFIG = configure(ExportConfig)  # before torch is loaded, so that --help and mistakes answer at once

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copymode, rmtree
from tempfile import mkdtemp
from typing import Any
from unicodedata import category

import torch

from distrogpt.checkpoint import first_line
from distrogpt.data.tokenizer import END_OF_TEXT, Tokenizer, start_token, tokenizer_json
from distrogpt.errors import MachineError, UserError, cli_errors
from distrogpt.huggingface.formats import ARCHITECTURES, CODE, model_type_of, to_settings, to_weights
from distrogpt.huggingface.model_card import how_to_load, limits_of, model_card, shared_meta
from distrogpt.loading import find_tokenizer, load_trained
from distrogpt.settings import SampleConfig
from model import GPTConfig

MADE = (
    *("config.json", "model.safetensors", f"{CODE}.py", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "meta.json", "README.md"),
)


def export(config: ExportConfig) -> Path:
    """Write the folder, and tell what is in it. Raises UserError; MachineError where the disk does not take
    it, and then nothing has changed."""
    to = Path(os.path.realpath(config.to))  # where a link leads to, so that the link stays one
    check_place(to, config.to, config.overwrite)
    for package in ("safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise UserError(f"export.py needs {package}; run: pip install {package}")
    model, contents, source = load_trained(config.out_dir, config.init_from)
    tokenizer = find_tokenizer(contents, model.config.vocab_size, source)
    shape = replace(model.config, vocab_size=tokenizer.vocab_size)  # without padding, which is never drawn
    weights = to_weights(shape, model.state_dict())
    count = sum(w.numel() for w in weights.values())
    dtype = getattr(torch, config.dtype)
    stored = {name: w.to(dtype) for name, w in weights.items()}
    for name, w in stored.items():
        if not w.isfinite().all():
            mend = "set --dtype=bfloat16" if weights[name].isfinite().all() else "use another checkpoint"
            raise UserError(f"{name} has weights that are not finite in {config.dtype}; {mend}")
    meta = shared_meta(contents.get("meta"), tokenizer)
    texts = settings_files(shape, tokenizer, dtype)
    texts |= {
        "tokenizer.json": tokenizer_json(tokenizer),
        "meta.json": as_json(meta),
        "README.md": model_card(to.name, shape, tokenizer, contents, meta, count, config.dtype),
    }
    if model_type_of(shape) == "distrogpt":
        path = Path(__file__).resolve().parent / "distrogpt" / "huggingface" / f"{CODE}.py"
        texts[f"{CODE}.py"] = path.read_text(encoding="utf-8")

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        told = {"format": "pt"}  # which transformers asks for
        save_file(stored, folder / "model.safetensors", metadata=told)
        copymode(folder / "config.json", folder / "model.safetensors")  # which its writer hides from others

    write_folder(write, to, config.to)
    kind = ARCHITECTURES[model_type_of(shape)]
    print(f"{source}\n{config.to}: {kind}, {count:,} parameters in {config.dtype}, {len(texts) + 1} files")
    print("\n".join([*how_to_load(config.to, shape, tokenizer), *limits_of(tokenizer)]))
    return to


def settings_files(shape: GPTConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, str]:
    """Of each settings file its text."""
    begin, end = start_token(tokenizer), tokenizer.end_of_text
    # not a character in their place: transformers drops each of it from what it writes
    marks = ("bos_token", "eos_token", "pad_token") if end is not None else ()
    ends = {"eos_token_id": end, "pad_token_id": end} if end is not None else {}
    chosen = {"temperature": SampleConfig.temperature, "top_k": SampleConfig.top_k}
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # text comes back as it was
        "model_max_length": shape.block_size,
        "padding_side": "left",  # where prompts of a batch are of several lengths
        **dict.fromkeys(marks, END_OF_TEXT),
    }
    return {
        "config.json": as_json(to_settings(shape, dtype, begin, end)),
        "generation_config.json": as_json({"bos_token_id": begin, **ends, "do_sample": True, **chosen}),
        "tokenizer_config.json": as_json(of_tokenizer),
    }


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def check_place(to: Path, shown: str, overwrite: bool) -> None:
    """Raises UserError where an export cannot go there, or would replace what is none; `shown` is what the
    user calls it."""
    if not to.name or any(category(char) in ("Cc", "Zl", "Zp") for char in shown):
        raise UserError(f"to={shown} is no name of a folder that fits into a line; name another")
    if not os.path.lexists(to):
        return
    if not to.is_dir():
        raise UserError(f"{shown} is a file; name a folder for --to")
    try:
        stranger, there = stranger_in(to), any(to.iterdir())
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror}); name another folder") from None
    if stranger:
        raise UserError(f"{shown} has {stranger[:60]}, which is of no export; name another folder")
    if there and not overwrite:
        raise UserError(f"{shown} is there already; name another folder, or set --overwrite=True")


def stranger_in(folder: Path) -> str | None:
    """The first name in a folder that no export leaves there; without a config.json, any. Raises OSError."""
    with os.scandir(folder) as entries:
        ours = {entry.name: entry.name in MADE and entry.is_file(follow_symlinks=False) for entry in entries}
    whole = ours.get("config.json", False)
    return min((name for name, made in ours.items() if not (made and whole)), default=None)


def write_folder(write: Callable[[Path], None], to: Path, shown: str) -> None:
    """Let `write` fill a folder beside `to`, flush it to disk, and rename it: `to` is whole or as it was.

    Raises MachineError where the disk does not take it, or UserError where nobody may write there.
    """
    from safetensors import SafetensorError

    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        room = Path(mkdtemp(prefix=f".{to.name[:40]}.", dir=to.parent))  # by a name that nobody has
        new, old = room / "new", room / "old"
        new.mkdir()  # for whom the umask says, where mkdtemp's is for its maker alone
    except OSError as error:
        raise UserError(f"{shown} cannot be made ({error.strerror}); name another folder") from None
    try:
        write(new)
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if to.is_dir():
            os.rename(to, old)
        os.rename(new, to)
    except BaseException as error:
        with suppress(OSError):
            if old.is_dir() and not os.path.lexists(to):
                os.rename(old, to)
        rmtree(new, ignore_errors=True)
        with suppress(OSError):
            room.rmdir()
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        kept = f"what was there is {old}" if old.is_dir() else "and is what it was before"
        raise MachineError(f"{shown} cannot be written ({reason}), {kept}") from None
    try:
        if old.is_dir():
            remove(old)
        room.rmdir()
    except OSError as error:
        reason = error.strerror or error
        print(f"note: {old} is what was in {shown}; delete it yourself ({reason})", file=sys.stderr)


def remove(folder: Path) -> None:
    """Delete an export, or nothing: OSError where another's file is among its own."""
    if stranger := stranger_in(folder):
        raise OSError(f"{stranger[:60]} is of no export")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    with cli_errors("close other programs"):
        export(CONFIG)
