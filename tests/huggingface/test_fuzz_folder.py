"""Arbitrary and hostile folders in Hugging Face's format: each is usable, or raises UserError."""

import json
from pathlib import Path
from typing import Any

import torch
from fuzzing import META, bombs, changed, fuzz, mutated, plain, scalars, succeeds_or_reports
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from test_fuzz_checkpoint import SHAPE

from distrogpt.data.tokenizer import from_description
from distrogpt.huggingface.export import settings_files
from distrogpt.huggingface.formats import to_weights
from distrogpt.loading import find_tokenizer, load_pretrained
from model import GPT, GPTConfig

NEW = {"norm": "rmsnorm", "rotary": True, "bias": False}
KINDS = (
    {},
    {**NEW, "activation": "swiglu", "qk_norm": True},
    {**NEW, "activation": "relu2"},
    {"rotary": True},
)


def make_folder(settings: dict[str, Any]) -> dict[str, bytes]:
    """The contents of the files, by name."""
    config = GPTConfig(**SHAPE, **settings)
    weights = to_weights(config, GPT(config).state_dict())
    files = settings_files(config, from_description(META["tokenizer"]), "float32")
    return {
        "config.json": files["config.json"].encode(),
        "meta.json": json.dumps(META).encode(),
        "model.safetensors": save({name: w.clone() for name, w in weights.items()}),
    }


FOLDERS = [make_folder(settings) for settings in KINDS]


def use_folder(files: dict[str, bytes]) -> None:
    """Load and sample, as train.py and sample.py do."""
    folder = Path("folder")
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with succeeds_or_reports():
        model, contents = load_pretrained("folder")
        tokenizer = find_tokenizer(contents, model.config.vocab_size, "folder")
        idx = torch.tensor(tokenizer.encode("ab"))[None, -model.config.block_size :]
        assert model.generate(idx, 2, temperature=0).shape == (1, idx.size(1) + 2)


@fuzz
@given(st.sampled_from(FOLDERS), st.data())
def test_any_settings_in_folders(fuzz_folder, files, data):
    name = data.draw(st.sampled_from(["config.json", "config.json", "config.json", "meta.json"]))
    settings = data.draw(changed(json.loads(files[name]), plain | scalars | st.just("[" * 10**5)))
    use_folder({**files, name: json.dumps(settings).encode()})


@fuzz
@given(
    st.sampled_from(FOLDERS), st.sampled_from(["config.json", "model.safetensors", "meta.json"]), st.data()
)
def test_bytes_of_folders(fuzz_folder, files, name, data):
    use_folder({**files, name: data.draw(mutated(files[name]))})


@fuzz
@given(st.sampled_from(FOLDERS), st.sampled_from(bombs) | st.binary(max_size=40))
def test_pickles_in_folders(fuzz_folder, files, data):
    files = {name: content for name, content in files.items() if name != "model.safetensors"}
    use_folder({**files, "pytorch_model.bin": data})
