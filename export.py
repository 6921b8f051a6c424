"""Export a trained GPT to Hugging Face's format: python export.py --out_dir=out-stdlib-char --to=my-model

Other commands load the folder with --init_from=my-model. distrogpt/huggingface/export.py lists its files.
"""

from configurator import configure
from distrogpt.settings import ExportConfig

if __name__ == "__main__":
    CONFIG = configure(ExportConfig)  # before torch is loaded, so that --help and mistakes answer at once

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors
from distrogpt.huggingface.export import check_target, text_files, write_folder
from distrogpt.huggingface.formats import ARCHITECTURES, Weights, model_type_of, to_weights
from distrogpt.huggingface.model_card import how_to_load, limits_of
from distrogpt.loading import find_tokenizer, load_trained


def export(config: ExportConfig) -> Path:
    """Write the folder, and print how to load it. Raises UserError, or MachineError if the disk fails."""
    to = Path(os.path.realpath(config.to))  # a link stays; the folder that it points to is replaced
    check_target(to, config.to, config.overwrite)
    for package in ("safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise UserError(f"export.py needs {package}; run: pip install {package}")
    model, contents, source = load_trained(config.out_dir, config.init_from)
    tokenizer = find_tokenizer(contents, model.config.vocab_size, source, config.dataset)
    shape = replace(model.config, vocab_size=tokenizer.vocab_size)  # without padding
    weights = convert(to_weights(shape, model.state_dict()), config.dtype)
    count = sum(w.numel() for w in weights.values())
    texts = text_files(to.name, shape, tokenizer, contents, count, config.dtype)
    write_folder(to, config.to, config.overwrite, texts, weights)
    kind = ARCHITECTURES[model_type_of(shape)]
    print(f"{source}\n{config.to}: {kind}, {count:,} parameters in {config.dtype}, {len(texts) + 1} files")
    print("\n".join([*how_to_load(config.to, shape, tokenizer), *limits_of(tokenizer)]))
    return to


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
