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
from settings import ExportConfig

if __name__ == "__main__":
    CONFIG = configure(ExportConfig)  # before torch is loaded, so that --help and mistakes answer at once

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from checkpoint import first_line, load_trained
from data.tokenizer import END_OF_TEXT, Tokenizer, library_file, start_of_text
from errors import MachineError, UserError, one_line_errors
from huggingface import ARCHITECTURES, CODE, model_type_of, to_settings, to_weights
from model import GPTConfig
from model_card import how_to_load, model_card, shared_meta
from sample import find_tokenizer
from settings import SampleConfig

MADE = (
    *("config.json", "model.safetensors", f"{CODE}.py", "tokenizer.json", "tokenizer_config.json"),
    *("generation_config.json", "meta.json", "README.md"),
)


def export(config: ExportConfig) -> Path:
    """Write the folder, and tell what is in it. Raises UserError; MachineError where the disk does not take
    it, and then nothing has changed."""
    to = Path(os.path.abspath(config.to))
    check_place(to, config.overwrite)
    for package in ("safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise UserError(f"export.py needs {package}; run: pip install {package}")
    model, contents, source = load_trained(config.out_dir, config.init_from)
    tokenizer = find_tokenizer(contents, model.config.vocab_size, source)
    shape = replace(model.config, vocab_size=tokenizer.vocab_size)  # without padding, which is never drawn
    weights = to_weights(shape, model.state_dict())
    count = sum(w.numel() for w in weights.values())
    dtype = getattr(torch, config.dtype)
    meta = shared_meta(contents.get("meta"), tokenizer)
    texts = settings_files(shape, tokenizer, dtype)
    texts |= {
        "tokenizer.json": library_file(tokenizer),
        "meta.json": as_json(meta),
        "README.md": model_card(to.name, shape, tokenizer, contents, meta, count, config.dtype),
    }
    if model_type_of(shape) == "distrogpt":
        path = Path(__file__).resolve().parent / "hf" / f"{CODE}.py"
        texts[f"{CODE}.py"] = path.read_text(encoding="utf-8")

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        told = {"format": "pt"}  # which transformers asks for
        stored = {name: w.to(dtype) for name, w in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata=told)

    write_folder(write, to)
    kind = ARCHITECTURES[model_type_of(shape)]
    print(f"{source}\n{config.to}: {kind}, {count:,} parameters in {config.dtype}, {len(texts) + 1} files")
    print("\n".join(how_to_load(config.to, shape, tokenizer)))
    return to


def settings_files(shape: GPTConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, str]:
    """Of each settings file its text."""
    begin, end = start_of_text(tokenizer), tokenizer.end_of_text
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


def check_place(to: Path, overwrite: bool) -> None:
    """Raises UserError where an export cannot go there, or would replace what is none."""
    for folder in (to, beside(to)):  # what is beside it was left by an export that was killed
        if not os.path.lexists(folder):
            continue
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder for --to")
        names = sorted(path.name for path in folder.iterdir())
        strange = [name for name in names if name not in MADE]
        if strange:
            raise UserError(f"{folder} has {strange[0][:60]}, which no export writes; name another folder")
        if names and folder == to and not overwrite:
            raise UserError(f"{to} is there already; name another folder, or set --overwrite=True")


def beside(to: Path) -> Path:
    """The folder that is written first, to be renamed."""
    return to.with_name(to.name + ".tmp")


def write_folder(write: Callable[[Path], None], to: Path) -> None:
    """Let `write` fill a folder beside `to`, flush it to disk, and rename it: `to` is whole or as it was.

    Raises MachineError where the disk does not take it, or UserError where nobody may write there.
    """
    from safetensors import SafetensorError

    new, old = beside(to), to.with_name(to.name + ".old")
    try:
        remove(new)
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{new} cannot be made ({error.strerror}); name another folder") from None
    try:
        write(new)
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        there = to.is_dir()
        if there:
            os.rename(to, old)
        try:
            os.rename(new, to)
        except OSError:
            if there:
                os.rename(old, to)
            raise
    except BaseException as error:
        with suppress(OSError):
            remove(new)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise MachineError(f"{to} cannot be written ({reason}), and is what it was before") from None
    remove(old)


def remove(folder: Path) -> None:
    """Delete an export, never another's file: OSError where there is one."""
    if folder.is_dir():
        for name in MADE:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


if __name__ == "__main__":
    with one_line_errors("close other programs"):
        export(CONFIG)
