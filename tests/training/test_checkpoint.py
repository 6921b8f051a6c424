"""Checkpoints: written atomically, read without running code; and nanoGPT's own."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import NANOGPT

from distrogpt.checkpoint import (
    atomic_write,
    load_checkpoint,
    restore_model,
    restore_optimizers,
    training_state,
)
from distrogpt.data.meta import read_meta
from distrogpt.data.token_stream import TokenStream
from distrogpt.errors import MachineError, UserError
from distrogpt.runtime import Runtime
from distrogpt.training.batches import MicroBatch
from model import GPT, GPTConfig
from train import training_step

CPU = Runtime(torch.device("cpu"), torch.float32)
SHAPE = {"block_size": 8, "vocab_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}


def make_state(**settings) -> dict:
    model = GPT(GPTConfig(**SHAPE, **settings))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    _, loss = model(torch.arange(8)[None], torch.arange(1, 9)[None])
    loss.backward()
    optimizer.step()
    return training_state(model, [optimizer], iter_num=7, best_val_loss=1.5, config={"dataset": "x"})


def save_checkpoint(path, contents) -> None:
    atomic_write(lambda file: torch.save(contents, file), path)


def test_save_and_load(tmp_path):
    state = make_state()
    save_checkpoint(tmp_path / "ckpt.pt", state)
    loaded = load_checkpoint(tmp_path / "ckpt.pt")
    assert loaded["iter_num"] == 7 and loaded["best_val_loss"] == 1.5
    model = restore_model(loaded, tmp_path)
    for name, tensor in state["model"].items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_restored_network_has_its_own_trainable_weights(tied, tmp_path):
    contents = make_state(tied=tied)
    contents["model"] = {name: tensor.half() for name, tensor in contents["model"].items()}
    model = restore_model(contents, tmp_path)
    assert model.training and (model.lm_head.weight is model.transformer.wte.weight) == tied
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.is_contiguous() and parameter.dtype == torch.float32, (
            name
        )
        saved = contents["model"][name].clone()
        parameter.data.add_(1)
        assert torch.equal(contents["model"][name], saved), name


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"old": 1})
    before = path.read_bytes()

    def write_to_full_disk(file) -> None:
        file.write(b"begun")
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left"):
        atomic_write(write_to_full_disk, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_reported(tmp_path):
    (tmp_path / "ckpt.pt.tmp").symlink_to("/dev/full")  # a full disk
    with pytest.raises(MachineError, match="cannot be written"):
        save_checkpoint(tmp_path / "ckpt.pt", make_state())
    assert os.listdir(tmp_path) == []


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_checkpoint_runs_nothing(write, tmp_path):
    trap = tmp_path / "trap"
    write({"model": Hostile(trap), "model_args": {}, "iter_num": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not trap.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(UserError, match="is missing"):
        load_checkpoint(path)
    save_checkpoint(path, make_state())
    data = path.read_bytes()
    for end in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            load_checkpoint(path)
    for foreign in (
        [1, 2],
        {"state_dict": {}},
        {"model": {}, "model_args": {}, "iter_num": "7"},
        {**make_state(), "iter_num": -5},
        {**make_state(), "best_val_loss": "abc"},
        {**make_state(), "meta": 5},
        {**make_state(), "meta": {}},
        {**make_state(), "config": 5},
        {**make_state(), "config": {"dataset": 5}},
        {**make_state(), "model": {5: torch.zeros(1)}},
        {**make_state(), "best_val_loss": torch.tensor(1j)},
        {**make_state(), "best_val_loss": 10**400},
        {**make_state(), "iter_num": 2**63},
        {**make_state(), "scaler": {"scale": "x"}},
        {**make_state(), "meta": {"tokenizer": [], "vocab_size": 5, "dtype": "uint16"}},
        {**make_state(), "meta": {"tokenizer": None, "vocab_size": "5", "dtype": "uint16"}},
    ):
        save_checkpoint(path, foreign)
        with pytest.raises(UserError, match="is not a checkpoint of distroGPT"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_args": {**SHAPE, "n_layer": 2}},
        {"model_args": {**SHAPE, "n_embd": 9}},
        {"model_args": {**SHAPE, "n_embd": "8"}},
        {"model_args": {**SHAPE, "n_expert": 8}},
        {"model_args": {"n_layer": 1}},
        {"model": {}},
        {"model": {"transformer.wte.weight": "text"}},
        {"model_args": {**SHAPE, "n_layer": 10**9}},  # would take a day to build
        {"model_args": {**SHAPE, "n_embd": 2**30}},  # would take petabytes
        {"model_args": {**SHAPE, "n_layer": True}},
        {"model_args": {**SHAPE, "logit_softcap": math.nan}},
        {"model": {"transformer.wte.weight": torch.zeros(1).expand(16, 8)}},
    ],
)
def test_weights_that_do_not_fit_are_refused(change, tmp_path):
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        restore_model({**make_state(), **change}, tmp_path / "ckpt.pt")


def test_an_optimizer_state_that_does_not_fit_is_refused(tmp_path):
    model = GPT(GPTConfig(**{**SHAPE, "n_layer": 2}))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for contents in (make_state(), {"optimizer": {}}, {"optimizer": {"param_groups": [], "state": {}}}):
        with pytest.raises(UserError, match="optimizer state does not fit"):
            restore_optimizers([optimizer], contents, tmp_path)


@pytest.mark.parametrize(
    "averages",
    [
        5,
        {"step": torch.tensor(1.0)},
        {"step": [], "exp_avg": torch.zeros(16, 8), "exp_avg_sq": torch.zeros(16, 8)},
        {"step": 1.0, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(16, 8)},
        {"step": 1.0, "exp_avg": torch.zeros(1).expand(16, 8), "exp_avg_sq": torch.zeros(16, 8)},
    ],
)
def test_an_optimizer_state_that_fails_at_the_first_step_is_refused(averages, tmp_path):
    optimizer = GPT(GPTConfig(**SHAPE)).configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    contents = make_state()
    contents["optimizer"]["state"][0] = averages
    with pytest.raises(UserError, match="optimizer state does not fit"):
        restore_optimizers([optimizer], contents, tmp_path)


@pytest.mark.parametrize(("name", "tag"), [("ckpt.pt", "plain"), ("ckpt_compiled.pt", "compiled")])
def test_nanogpts_checkpoints_give_its_logits_and_losses(name, tag):
    contents = load_checkpoint(NANOGPT / name)
    assert any(key.startswith("_orig_mod.") for key in contents["model"]) == (tag == "compiled")
    assert contents["iter_num"] == 40 and math.isfinite(float(contents["best_val_loss"]))
    model = restore_model(contents, NANOGPT / name).train()
    assert model.config.activation == "gelu"
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    restore_optimizers([optimizer], contents, NANOGPT)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    expected = np.load(NANOGPT / "expected.npz")
    stream = TokenStream(NANOGPT, "train", read_meta(NANOGPT), 32)
    batches = [torch.from_numpy(stream.windows(starts, 33)) for starts in expected["starts"]]
    with torch.no_grad():
        logits, _ = model(batches[0][:, :-1], batches[0][:, 1:])
    np.testing.assert_allclose(logits[:2].numpy(), expected[f"{tag}_logits"], atol=1e-6)
    losses = [
        training_step(model, [optimizer], scaler, [MicroBatch(ids[:, :-1], ids[:, 1:], 0)], 1.0, CPU).loss
        for ids in batches
    ]
    np.testing.assert_allclose(losses, expected[f"{tag}_losses"], atol=2e-6)
