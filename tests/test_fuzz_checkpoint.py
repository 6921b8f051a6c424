"""Arbitrary and hostile checkpoints: each can be resumed and sampled from, or raises UserError."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from fuzzing import (
    CHARS,
    META,
    Hostile,
    bombs,
    changed,
    fuzz,
    hostile,
    laughs,
    mutated,
    plain,
    scalars,
    succeeds_or_reports,
)
from hypothesis import given
from hypothesis import strategies as st

from distrogpt.checkpoint import load_checkpoint, restore_model, restore_optimizers, training_state
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.loading import find_tokenizer
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import MicroBatch
from distrogpt.training.optim import make_optimizers
from model import GPT, GPTConfig
from train import training_step

CPU = Runtime(torch.device("cpu"), torch.float32)
SHAPE = {"block_size": 8, "vocab_size": len(CHARS), "n_layer": 1, "n_head": 2, "n_embd": 8}
MODERN = {
    **SHAPE,
    "rotary": True,
    "norm": "rmsnorm",
    "n_kv_head": 1,
    "tied": False,
    "embedding_skip": True,
    "key_offset": True,
}
BATCH = MicroBatch(torch.arange(8)[None], torch.arange(1, 9)[None], 0)


def make_run(shape: dict[str, Any], optimizer: str) -> tuple[GPT, list[torch.optim.Optimizer]]:
    model = GPT(GPTConfig(**shape))
    return model, make_optimizers(model, TrainConfig(optimizer=optimizer), CPU)


def make_checkpoint(shape: dict[str, Any], optimizer: str) -> dict[str, Any]:
    model, optimizers = make_run(shape, optimizer)
    training_step(model, optimizers, torch.amp.GradScaler("cpu", enabled=False), [BATCH], 1.0, CPU)
    extra = {"scaler": torch.amp.GradScaler("cpu").state_dict(), "meta": META, "val_loss": 1.5}
    extra |= {"config": {"dataset": "x", "optimizer": optimizer}}
    return training_state(model, optimizers, iter_num=7, best_val_loss=1.5, **extra)


def to_bytes(contents: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def use_checkpoint(data: bytes) -> None:
    """Load, sample and train for one step, as train.py and sample.py do."""
    path = Path("ckpt.pt")
    path.write_bytes(data)
    with succeeds_or_reports():
        contents = load_checkpoint(path)
        model = restore_model(contents, path)
        float(contents.get("best_val_loss", 0)), float(contents.get("val_loss", 0))
        kind = contents.get("config", {}).get("optimizer", "adamw")
        optimizers = make_optimizers(model, TrainConfig(optimizer=kind if kind == "muon" else "adamw"), CPU)
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(contents.get("scaler") or scaler.state_dict())
        tokenizer = find_tokenizer(contents, model.config.vocab_size, "ckpt.pt")
        idx = torch.tensor(tokenizer.encode("ab"))[None, -model.config.block_size :]
        for column, _ in stream(model, idx, SamplingParams(), torch.rand(1, 2), tokenizer.vocab_size):
            assert isinstance(tokenizer.decode(column[0].tolist()), str)
        restore_optimizers(optimizers, contents, Path())
        x = torch.zeros(1, min(8, model.config.block_size), dtype=torch.long)
        training_step(
            model, optimizers, torch.amp.GradScaler("cpu", enabled=False), [MicroBatch(x, x, 0)], 1.0, CPU
        )


STATES = [make_checkpoint(SHAPE, "adamw"), make_checkpoint(MODERN, "muon")]
FILES = [to_bytes(state) for state in STATES]
ODD_TENSORS = [
    torch.zeros(8, dtype=torch.int64),
    torch.zeros(8, 8, dtype=torch.bool),
    torch.zeros(17, 8, dtype=torch.complex64),
    torch.zeros(17, 8, dtype=torch.float16),
    torch.zeros(17, 8).to_sparse(),
    torch.zeros(17, 8, device="meta"),
    torch.zeros(1).expand(17, 8),
    torch.zeros(1, dtype=torch.float16).expand(10**12),
    torch.full((), torch.nan),
    torch.zeros(0),
]


odd_values = st.sampled_from([*ODD_TENSORS, laughs(40), Hostile(open, "trap", "w")])


def with_pickle(checkpoint: bytes, data: bytes) -> bytes:
    """The checkpoint with other bytes for its pickle, in a valid zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def pickle_of(checkpoint: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))


@fuzz
@given(st.sampled_from(FILES).flatmap(mutated) | st.binary(max_size=40) | st.sampled_from(bombs))
def test_bytes_of_checkpoints(fuzz_folder, data):
    use_checkpoint(data)


@fuzz
@given(st.sampled_from(FILES), st.data())
def test_pickles_in_checkpoints(fuzz_folder, checkpoint, data):
    inner = (
        mutated(pickle_of(checkpoint)) | st.sampled_from(bombs) | st.builds(pickle.dumps, hostile, st.just(2))
    )
    use_checkpoint(with_pickle(checkpoint, data.draw(inner)))


@fuzz
@given(st.sampled_from(STATES).flatmap(lambda state: changed(state, plain | scalars | odd_values)))
def test_any_structure_in_checkpoints(fuzz_folder, state):
    use_checkpoint(to_bytes(state))
