"""A network to use or to start from, and its tokenizer: from a run, a folder or a hub name."""

import difflib
import math
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from distrogpt.checkpoint import best_checkpoint, first_line, load_checkpoint, restore_model
from distrogpt.data.dataset import read_dataset_meta
from distrogpt.data.meta import GPT2_META, read_meta
from distrogpt.data.tokenizer import Tokenizer, from_description
from distrogpt.errors import UserError
from model import GPT

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def load_pretrained(name: str, dropout: float = 0.0) -> tuple[GPT, dict[str, Any]]:
    """A network to start from, on the CPU, and the checkpoint that it stood in; of a folder in Hugging Face's
    format only the meta of its dataset, and {} of a GPT-2 without one.

    `name` is gpt2, gpt2-medium, gpt2-large, gpt2-xl, a hub name, a folder in Hugging Face's format, a run's,
    or one of its .pt files. Raises UserError.
    """
    folder = Path(name)
    is_folder = os.path.isdir(folder)  # folder.is_dir() raises OSError for 5,000 characters
    if folder.suffix == ".pt" or (is_folder and not (folder / "config.json").is_file()):
        path = best_checkpoint(folder) if is_folder else folder
        contents = load_checkpoint(path)
        return restore_model(contents, path, dropout), contents
    if not is_folder and (name.startswith((".", "~")) or os.path.isabs(name)):
        raise UserError(
            f"init_from={name[:200]} is not there; give a run's folder, or one in Hugging Face's format"
        )
    if not is_folder and name not in GPT2_NAMES and "/" not in name:
        near = difflib.get_close_matches(name, ("scratch", "resume", "auto", *GPT2_NAMES), n=1)
        hint = f"did you mean {near[0]}?" if near else f"use a folder, or one of {', '.join(GPT2_NAMES)}"
        raise UserError(f"init_from={name[:200]} is neither a way to start nor a folder; {hint}")
    try:
        if not is_folder:
            check_hub(name)
        from distrogpt.huggingface.formats import find_folder, model_type_of, read_pretrained

        folder = find_folder(name)
        model = read_pretrained(folder, dropout=dropout)
    except ImportError as error:
        raise UserError(f"init_from={name} needs {error.name}; run: pip install {error.name}") from None
    except Exception as error:  # no network, no such name, a damaged or hostile file: there are many kinds
        raise UserError(
            f"init_from={name} cannot be loaded ({first_line(error)}); give a folder with its "
            "config.json and model.safetensors, or go online"
        ) from None
    if (folder / "meta.json").is_file():
        return model, {"meta": read_meta(folder)}
    unknown = {"tokenizer": None, "vocab_size": model.config.vocab_size, "dtype": "uint32"}
    return model, {} if model_type_of(model.config) == "gpt2" else {"meta": unknown}


def load_trained(out_dir: str, init_from: str) -> tuple[GPT, dict[str, Any], str]:
    """A network to use, on the CPU: out_dir's best with init_from="resume", else a pretrained one; the
    checkpoint that it stood in, and what to call it. Raises UserError."""
    if init_from != "resume":
        return *load_pretrained(init_from), init_from
    path = best_checkpoint(Path(out_dir))
    contents = load_checkpoint(path)
    loss = contents.get("val_loss", contents.get("best_val_loss", math.nan))
    split = "train" if contents.get("config", {}).get("eval_splits") == "train" else "val"
    told = f"{path}, step {contents['iter_num']}, {split} loss {float(loss):.4f}"
    return restore_model(contents, path), contents, told


def check_hub(name: str) -> None:
    """Raises OSError where `name` is not in the hub's cache and the hub does not answer: its client would try
    for half a minute."""
    import huggingface_hub

    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        try:
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
        except urllib.error.HTTPError:
            pass  # it answers


def find_tokenizer(contents: dict[str, Any], vocab_size: int, source: str) -> Tokenizer:
    """The tokenizer of a checkpoint: its own, or that of its dataset, or else GPT-2's. Raises UserError."""
    meta = contents.get("meta")
    if meta is None and "dataset" in contents.get("config", {}):  # nanoGPT's checkpoints name it only
        meta = read_dataset_meta(contents["config"]["dataset"])
    meta = meta or GPT2_META
    if not meta["tokenizer"]:
        raise UserError(f"the vocabulary of {source} names no characters; put its meta.json beside the data")
    if meta["vocab_size"] > vocab_size:
        raise UserError(
            f"{source} has {vocab_size} tokens, its tokenizer {meta['vocab_size']}; "
            "put the meta.json that it was trained with into its data folder"
        )
    return from_description(meta["tokenizer"])
