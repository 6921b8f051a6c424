"""Load a network and its tokenizer: from a run, from a folder in Hugging Face's format, or from the hub."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrogpt.checkpoint import NotFinite, best_checkpoint, load_checkpoint, restore_model
from distrogpt.data.dataset import find_parts, parse_mixture
from distrogpt.data.meta import GPT2_META, dataset_folder, described_vocab_size, read_meta, tokenizers_differ
from distrogpt.data.tokenizer import Tokenizer, described_by_json, tokenizer_of
from distrogpt.errors import UserError, first_line, near_name, warn
from distrogpt.runtime import activity
from model import GPT, GPTConfig

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NAME_DATASET = "give the folder with its meta.pkl or meta.json: --dataset=FOLDER"


@activity("loading the model")
def load_trained(out_dir: str, init_from: str) -> tuple[GPT, dict[str, Any], str]:
    """The network to use, on the CPU, the contents of its checkpoint, and a line that describes its source.
    init_from="resume" is the best checkpoint in out_dir; otherwise see load_pretrained. Raises UserError."""
    if init_from != "resume":
        return *load_pretrained(init_from), init_from
    path = best_checkpoint(Path(out_dir))
    contents = load_checkpoint(path)
    loss = contents.get("val_loss", contents.get("best_val_loss", math.nan))
    split = "train" if contents.get("config", {}).get("eval_splits") == "train" else "val"
    source = f"{path}, step {contents['iter_num']}, {split} loss {float(loss):.4f}"
    return restore_model(contents, path), contents, source


def load_pretrained(
    name: str, dropout: float = 0.0, ways: tuple[str, ...] = ("resume",)
) -> tuple[GPT, dict[str, Any]]:
    """The network, on the CPU, and the contents of its checkpoint. Raises UserError.

    `name` is a run's folder or one of its .pt files, a folder in Hugging Face's format, or a name on the hub.
    For Hugging Face's format, contents has only meta, or nothing (GPT-2). `ways` are the other values of
    init_from that the command takes.
    """
    folder = Path(name)
    is_folder = os.path.isdir(folder)  # folder.is_dir() raises OSError for 5,000 characters
    if folder.suffix == ".pt" or (is_folder and not (folder / "config.json").is_file()):
        path = best_checkpoint(folder) if is_folder else folder
        contents = load_checkpoint(path)
        return restore_model(contents, path, dropout), contents
    if not is_folder:
        check_name(name, ways)
    try:
        from distrogpt.huggingface.formats import find_folder, model_type_of, read_pretrained

        folder = find_folder(name)
        model = read_pretrained(folder, dropout)
    except NotFinite as error:
        raise UserError(f"init_from={name}: {error}; use another model") from None
    except ImportError as error:
        raise UserError(f"init_from={name} needs {error.name}; run: pip install {error.name}") from None
    except Exception as error:  # no network, an unknown name, damaged or hostile files: errors of many types
        advice = "check the name and your connection, or give a folder with config.json and model.safetensors"
        advice = "use another model, or update distroGPT" if is_folder else advice
        raise UserError(f"init_from={name} cannot be loaded ({first_line(error)}); {advice}") from None
    if (folder / "meta.json").is_file():
        return model, {"meta": read_meta(folder)}
    described = None
    if (folder / "tokenizer.json").is_file():  # of an export that was saved again elsewhere
        with suppress(Exception):  # a file from anywhere
            described = described_by_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    elif model_type_of(model.config) == "gpt2" and model.config.vocab_size >= GPT2_META["vocab_size"]:
        return model, {}
    vocab_size = described_vocab_size(described) if described else model.config.vocab_size
    return model, {"meta": {"tokenizer": described, "vocab_size": vocab_size, "dtype": "uint32"}}


def check_name(name: str, ways: tuple[str, ...]) -> None:
    """Raises UserError if `name` can be neither one of GPT2_NAMES nor a name on the hub."""
    if name.startswith((".", "~")) or os.path.isabs(name):
        raise UserError(f"init_from={name[:200]} does not exist; give the folder of a run or model")
    if name.partition(":")[0] in ("scratch", "auto") and name not in ways:
        raise UserError(f"init_from={name[:200]} is only for train.py; to use a run, give --out_dir=FOLDER")
    if name not in GPT2_NAMES and "/" not in name:
        near = near_name(name, (*ways, *GPT2_NAMES))
        hint = f"did you mean {near}?" if near else f"use a folder, or one of {', '.join(GPT2_NAMES)}"
        raise UserError(f"init_from={name[:200]} is neither a known value nor a folder; {hint}")


def find_tokenizer(
    contents: dict[str, Any], vocab_size: int, source: str, dataset: str | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint, as find_meta says; if there is none, one that reads and writes ids, with
    a note. Raises UserError."""
    source = source.partition(", step ")[0]
    meta = find_meta(contents, vocab_size, source, dataset)
    count = meta["vocab_size"]
    sizes = f"{source} has a vocabulary of {vocab_size:,}, but its tokenizer has {count:,} tokens"
    if count > vocab_size:
        raise UserError(f"{sizes}; {NAME_DATASET}")
    if "meta" not in contents and vocab_size - count >= 128:  # more than padding
        warn(f"note     {sizes}")
    if not meta["tokenizer"]:
        ids = f"prompts and samples are token ids, 0 to {count - 1}"
        warn(f"note     {source} has no known tokenizer: {ids} (--dataset=FOLDER gives one)")
    return tokenizer_of(meta)


def find_meta(
    contents: dict[str, Any], vocab_size: int, source: str, dataset: str | None = None
) -> dict[str, Any]:
    """The meta of a checkpoint's vocabulary: its own; else that of `dataset`, or of the dataset that it was
    trained on if that is found; else GPT-2's if the size fits, with a note. Raises UserError."""
    own, trained_on = contents.get("meta"), contents.get("config", {}).get("dataset")
    if dataset:
        *_, meta = find_parts(dataset)[0]
        if own and tokenizers_differ(own["tokenizer"], meta["tokenizer"]):
            advice = "use a dataset with the model's tokenizer"
            raise UserError(f"{dataset} has a different tokenizer than {source}; {advice}")
        return own if own and own["tokenizer"] else meta
    if own:
        return own
    if trained_on and is_here(trained_on):  # nanoGPT saves only the dataset's name
        *_, meta = find_parts(trained_on)[0]
        return meta
    if not contents:
        return GPT2_META
    names = f"was trained on {trained_on[:200]}, which is not here" if trained_on else "names no dataset"
    if vocab_size not in (GPT2_META["vocab_size"], GPTConfig.vocab_size):
        raise UserError(f"{source} {names}, and its {vocab_size} tokens are not GPT-2's; {NAME_DATASET}")
    warn(f"note     {source} {names}; using GPT-2's tokenizer for its {vocab_size:,} tokens")
    return GPT2_META


def is_here(dataset: str) -> bool:
    """Whether there is a folder for each part of a mixture."""
    return all(dataset_folder(name) for name, _ in parse_mixture(dataset))
