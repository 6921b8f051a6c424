"""Export a trained GPT to Hugging Face's format: python export.py --out_dir=out-stdlib-char --to=my-model

Other commands load the folder with --init_from=my-model. distrogpt/huggingface/export.py lists its files.
With --gguf=q8_0, it writes a file for llama.cpp instead (distrogpt/huggingface/gguf.py).
"""

from configurator import configure
from distrogpt.settings import ExportConfig

if __name__ == "__main__":
    CONFIG = configure(ExportConfig)  # before torch is loaded, so that --help and mistakes answer at once

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from distrogpt.data.tokenizer import Tokenizer
from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors
from distrogpt.huggingface import gguf
from distrogpt.huggingface.export import check_name, check_target, text_files, write_folder
from distrogpt.huggingface.formats import ARCHITECTURES, Weights, model_type_of, to_weights
from distrogpt.huggingface.model_card import how_to_load, limits_of
from distrogpt.loading import find_tokenizer, load_trained
from model import GPTConfig


def export(config: ExportConfig) -> Path:
    """Write the folder or file, and print how to load it. Raises UserError, or MachineError if the disk
    fails."""
    to = Path(os.path.realpath(config.to))  # a link stays; what it points to is replaced
    check_name(to, config.to)
    check = gguf.check_file if config.gguf else check_target
    check(to, config.to, config.overwrite)
    for package in ("gguf",) if config.gguf else ("safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise UserError(f"export.py needs {package}; run: pip install {package}")
    model, contents, source = load_trained(config.out_dir, config.init_from)
    tokenizer = find_tokenizer(contents, model.config.vocab_size, source, config.dataset)
    shape = replace(model.config, vocab_size=tokenizer.vocab_size)  # without padding
    if config.gguf:
        types = gguf.write_gguf(to, shape, model.state_dict(), tokenizer, config.gguf)
        lines = gguf.how_to_run(config.to, shape, tokenizer, types)
    else:
        weights = convert(to_weights(shape, model.state_dict()), config.dtype)
        lines = export_folder(config, to, shape, weights, tokenizer, contents)
    print("\n".join([source, *lines]))
    return to


def export_folder(
    config: ExportConfig,
    to: Path,
    shape: GPTConfig,
    weights: Weights,
    tokenizer: Tokenizer,
    contents: dict[str, Any],
) -> list[str]:
    """Write a folder in Hugging Face's format. Returns lines that say what it is, and how to load it."""
    count = sum(w.numel() for w in weights.values())
    texts = text_files(to.name, shape, tokenizer, contents, count, config.dtype)
    write_folder(to, config.to, config.overwrite, texts, weights)
    kind = ARCHITECTURES[model_type_of(shape)]
    what = f"{config.to}: {kind}, {count:,} parameters in {config.dtype}, {len(texts) + 1} files"
    return [what, *how_to_load(config.to, shape, tokenizer), *limits_of(tokenizer)]


def convert(weights: Weights, dtype: str) -> Weights:
    """The weights in this dtype. Raises UserError if some are not finite in it."""
    converted = {name: w.to(getattr(torch, dtype)) for name, w in weights.items()}
    for name, w in converted.items():
        if not w.isfinite().all():
            larger = "bfloat16" if dtype == "float16" else "float32"
            raise UserError(f"{name} has weights that are not finite in {dtype}; set --dtype={larger}")
    return converted


if __name__ == "__main__":
    with cli_errors(CLOSE_OTHERS):
        export(CONFIG)
