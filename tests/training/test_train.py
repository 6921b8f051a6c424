"""Training: against a plain loop over transformers' GPT-2, resumed, shared among ranks, interrupted."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    MODERN,
    NANOGPT,
    REPO,
    TINY,
    assert_same_weights,
    assert_user_error,
    run,
    run_here,
    run_warm,
    sample_here,
    start_warm,
    train_here,
    until,
)

from configurator import read_settings
from distrogpt.checkpoint import load_checkpoint
from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.data.meta import read_meta
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.hardware import find_dtype
from distrogpt.kernels.compile import maybe_compile
from distrogpt.runtime import Runtime, enable_onednn_float32, start_logging
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import BatchLoader, MicroBatch, step_batches
from distrogpt.training.optim import make_optimizers
from model import GPT, GPTConfig
from train import train, training_step

CPU = Runtime(torch.device("cpu"), torch.float32)


def config_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, [*TINY, *map(str, flags)])


def weights_of(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def test_training_equals_a_plain_loop_over_transformers(tmp_path, dataset):
    """The whole recipe, written again with other means: accumulation, clipping, AdamW groups, schedule."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    shape = {"n_positions": 16, "vocab_size": 88, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.1)
    )
    theirs.save_pretrained(tmp_path / "hf")
    flags = (
        f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", f"--init_from={tmp_path / 'hf'}",
        "--max_iters=12",
        "--gradient_accumulation_steps=3", "--grad_clip=0.5",
        "--weight_decay=0.3", "--beta2=0.98",
    )  # fmt: skip
    config = config_of(*flags)
    result = train(config)

    meta = read_meta(dataset)
    assert meta["vocab_size"] <= 88
    data = open_dataset(config)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), foreach=False)
    for step in range(12):
        rate = (
            1e-2 * (step + 1) / 3
            if step < 2
            else 1e-3 + 9e-3 * (0.5 + 0.5 * math.cos(math.pi * (step - 2) / 10))
        )
        for group in adamw.param_groups:
            group["lr"] = rate
        batches = step_batches(data, config, CPU, step)
        x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
        logits = theirs(x).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 88), y.reshape(-1))
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs.parameters()))
        for p in theirs.parameters():
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        adamw.step()
        adamw.zero_grad()
    x = torch.from_numpy(data.parts[0].streams["train"].windows(np.arange(8) * 100, 16))
    with torch.no_grad():
        ours_logits, _ = result.model.eval()(x, x)
        torch.testing.assert_close(ours_logits, theirs(x).logits, atol=2e-4, rtol=0)


def test_it_learns(tmp_path, dataset):
    flags = (
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=150",
        "--eval_interval=50",
        "--n_embd=32",
    )
    result = train(config_of(*flags))
    losses = [point["val"] for point in result.losses]
    assert [point["step"] for point in result.losses] == [0, 50, 100, 150]
    assert losses[-1] < 2.9 and result.best_val_loss == min(losses)
    # better than any model that reads no context: the entropy of the characters
    counts = np.bincount(np.fromfile(dataset / "val.bin", "<u2"))
    shares = counts[counts > 0] / counts.sum()
    assert losses[-1] < -(shares * np.log(shares)).sum()


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--dropout=0.2", "--gradient_accumulation_steps=2"),
        ("--dropout=0.2", "--gradient_accumulation_steps=2", "--dtype=bfloat16", "--n_embd=32"),  # block.cpp
        MODERN,
        ("--optimizer=sgd",),
    ],
)
def test_resumed_run_ends_bit_for_bit_as_the_unbroken_one(more, tmp_path, dataset):
    flags = (f"--dataset={dataset}", "--max_iters=20", "--lr_decay_iters=20", *more)
    whole = train(config_of(*flags, f"--out_dir={tmp_path / 'whole'}"))
    train(config_of(*flags, f"--out_dir={tmp_path / 'parts'}", "--max_iters=7"))
    resumed = train(config_of(*flags, f"--out_dir={tmp_path / 'parts'}", "--init_from=resume"))
    assert resumed.iter_num == whole.iter_num == 20
    assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    assert whole.losses[-1] == resumed.losses[-1]


def test_dropout_is_not_the_same_at_each_step(dataset):
    config = config_of(f"--dataset={dataset}", "--gradient_accumulation_steps=2")
    data = open_dataset(config)
    seeds = [batch.dropout_seed for step in range(50) for batch in step_batches(data, config, CPU, step)]
    assert len(set(seeds)) == 100


def test_batches_that_are_read_ahead_are_those_of_their_steps(dataset, monkeypatch):
    """A failure ends the run at its own step, not at those that were read with it."""
    config = config_of(f"--dataset={dataset}")
    data = open_dataset(config)

    def read(data: Dataset, config: TrainConfig, runtime: Runtime, step: int) -> list[MicroBatch]:
        if step == 40:
            raise UserError("step 40")
        return step_batches(data, config, runtime, step)

    monkeypatch.setattr("distrogpt.training.batches.step_batches", read)
    loader = BatchLoader(data, config, CPU, 3)
    for step in range(3, 40):
        assert loader.error is None
        for batch, expected in zip(loader, step_batches(data, config, CPU, step), strict=True):
            assert bool((batch.x == expected.x).all()) and batch.dropout_seed == expected.dropout_seed
    assert str(loader.error) == "step 40"


@pytest.mark.parametrize("sampling", ["random", "epochs", "lines"])
def test_a_step_trains_on_the_same_samples_however_it_is_shared(sampling, dataset):
    data = open_dataset(config_of(f"--dataset={dataset}", f"--sampling={sampling}"))

    def samples(batch_size, micro_steps, world_size):
        flags = [f"--batch_size={batch_size}", f"--gradient_accumulation_steps={micro_steps}"]
        flags += [f"--sampling={sampling}"]
        ranks = [Runtime(torch.device("cpu"), torch.float32, rank, world_size) for rank in range(world_size)]
        batches = [batch for rank in ranks for batch in step_batches(data, config_of(*flags), rank, 4)]
        rows = torch.cat([torch.cat([batch.x, batch.y[:, -1:]], 1) for batch in batches])
        return sorted(map(tuple, rows.tolist()))

    expected = samples(24, 1, 1)
    assert len(expected) == 24 and len(set(expected)) > 20
    for shared in ((4, 6, 1), (4, 6, 2), (2, 12, 4), (1, 24, 3)):
        assert samples(*shared) == expected


def test_whole_evaluation_counts_each_token_once(dataset):
    config = config_of(f"--dataset={dataset}", "--eval_iters=0")
    meta = read_meta(dataset)
    data = open_dataset(config)
    torch.manual_seed(0)
    from model import GPTConfig

    model = GPT(GPTConfig(block_size=16, vocab_size=meta["vocab_size"], n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.lm_head.weight *= 30  # losses that differ from token to token
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    total = 0.0
    model.eval()
    for begin in range(0, len(ids) - 1, 16):
        # the last window is moved back, so that it is full; what it repeats does not count
        start = min(begin, len(ids) - 17)
        with torch.no_grad():
            logits, _ = model(ids[None, start : start + 16], ids[None, start + 1 : start + 17])
        scores = torch.log_softmax(logits[0].double(), -1)
        for place in range(begin - start, 16):
            total -= float(scores[place, ids[start + place + 1]])
    evaluator = Evaluator(config, data, CPU)
    found = evaluator.evaluate(model)
    assert found["val"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert model.training and found == evaluator.evaluate(model)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", "--max_iters=400", "--eval_interval=300", "--log_interval=1"]
    train_here(*flags, f"--out_dir={tmp_path / 'whole'}")
    process = start_warm("train.py", *flags, f"--out_dir={tmp_path / 'parts'}")
    assert until(process, "step 20: loss")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    stopped_at = load_checkpoint(tmp_path / "parts" / "last.pt")["iter_num"]
    assert 20 <= stopped_at < 400 and f"stopped after step {stopped_at}" in output
    resumed = train_here(*flags, f"--out_dir={tmp_path / 'parts'}", "--init_from=auto")
    assert f"resumes  after step {stopped_at}" in resumed
    assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_a_reader_that_leaves_stops_the_run_with_its_state_saved(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=100000", "--log_interval=1"]
    command = [sys.executable, str(REPO / "train.py"), *flags, "--eval_interval=100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO, env=ENVIRONMENT
    )
    while not process.stdout.readline().startswith(b"step 3: loss"):  # lines come as they are made
        pass
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert process.stderr.read() == b"" and load_checkpoint(tmp_path / "last.pt")["iter_num"] >= 3
    process.stderr.close()


def test_a_finished_run_has_nothing_left_to_do(trained, dataset):
    before = (trained / "last.pt").read_bytes()
    again = train_here(*TINY, f"--dataset={dataset}", f"--out_dir={trained}", "--init_from=auto")
    assert "nothing left to do" in again
    assert (trained / "last.pt").read_bytes() == before


def test_best_and_newest_checkpoints(tmp_path, dataset):
    """With a learning rate that ruins the model after the first evaluation, ckpt.pt stays the better one."""
    flags = (
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--always_save_checkpoint=False",
        "--decay_lr=False",
    )
    train(config_of(*flags, "--max_iters=10", "--learning_rate=0.01"))
    result = train(config_of(*flags, "--max_iters=20", "--learning_rate=3", "--init_from=resume"))
    best, newest = (load_checkpoint(tmp_path / name) for name in ("ckpt.pt", "last.pt"))
    assert (best["iter_num"], newest["iter_num"]) == (10, 20)
    assert best["best_val_loss"] == newest["best_val_loss"] == result.best_val_loss < result.losses[-1]["val"]


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--decay_lr=False"]
    train_here(*flags, "--max_iters=10")
    before = [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "last.pt")]
    wild = run_here(
        "train.py", *flags, "--init_from=resume", "--max_iters=500", "--learning_rate=1e38", "--grad_clip=0"
    )
    assert_user_error(wild, "no longer finite", "last.pt is the last good checkpoint", "--learning_rate")
    assert wild.stdout.count("is skipped") == 5
    assert [(tmp_path / name).read_bytes() for name in ("ckpt.pt", "last.pt")] == before
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "last.pt").values())


def test_finetuning_from_a_run_crops_the_block_and_starts_anew(trained, dataset, tmp_path):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", f"--init_from={trained}")
    result = train(config_of(*flags, "--block_size=8", "--max_iters=2", "--learning_rate=1e-9"))
    assert result.model.config.block_size == 8 and result.iter_num == 2
    old = weights_of(trained / "ckpt.pt")
    new = result.model.state_dict()
    torch.testing.assert_close(new["lm_head.weight"], old["lm_head.weight"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        new["transformer.wpe.weight"], old["transformer.wpe.weight"][:8], atol=1e-6, rtol=0
    )


def test_resuming_with_a_shorter_block_goes_on_without_adamws_averages(trained, dataset, tmp_path):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=resume"]
    printed = train_here(*flags, "--block_size=8", "--max_iters=25")
    assert "the optimizer state is not resumed" in printed and "step 25: loss" in printed
    assert load_checkpoint(tmp_path / "last.pt")["model_args"]["block_size"] == 8


def test_eval_only_writes_nothing(trained, dataset, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    flags = [*TINY, f"--dataset={dataset}", "--eval_only=True", "--init_from=resume", f"--out_dir={trained}"]
    assert re.search(r"step 20: train loss \d\.\d{4}, val loss \d\.\d{4}", train_here(*flags))
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    train_here(*flags, f"--init_from={trained}", f"--out_dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_nanogpts_run_goes_on(tmp_path):
    """nanoGPT's ckpt.pt, meta.pkl and .bin files, as they are, and nanoGPT's names of settings."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes((NANOGPT / "ckpt_compiled.pt").read_bytes())
    flags = (
        "--init_from=resume --device=cpu --dtype=float32 --compile=False --eval_iters=4 --loss_plot=False "
        "--log_interval=10 --eval_interval=20 "
        "--block_size=32 --batch_size=8 --n_layer=2 --n_head=2 --n_embd=16 "
        "--max_iters=80 --lr_decay_iters=80 --dropout=0.0 --bias=True --warmup_iters=5 "
        "--gradient_accumulation_steps=1 --learning_rate=1e-2"
    ).split()
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = run("train.py", *flags, f"--dataset={NANOGPT}", f"--out_dir={tmp_path / 'out'}", env=env)
    assert done.returncode == 0, done.stderr
    assert "resumes  after step 40" in done.stdout
    assert (
        "torch.nn" in done.stderr and "torch._dynamo" not in done.stderr
    )  # a second, where nothing is compiled
    losses = [float(loss) for loss in re.findall(r"val loss (\d\.\d+)", done.stdout)]
    assert losses[-1] < 3.5  # it was 3.75
    flags = (f"--out_dir={tmp_path / 'out'}", "--num_samples=1", "--max_new_tokens=20", "--start=First")
    sampled = sample_here(*flags)
    assert sampled.returncode == 0 and sampled.stdout.startswith("First")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_too(dtype, tmp_path, dataset):
    result = train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path}", f"--dtype={dtype}"))
    assert result.losses[-1]["val"] < 3.5 < result.losses[0]["val"] - 0.8
    plain = train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path / 'plain'}"))
    assert 0 < abs(result.losses[0]["val"] - plain.losses[0]["val"]) < 0.02  # it rounds, a little
    assert all(p.dtype == torch.float32 for p in result.model.parameters())  # master weights
    scaler = load_checkpoint(tmp_path / "last.pt")["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_arithmetic_of_cpus_by_what_the_chip_has(monkeypatch):
    cpu = torch.device("cpu")
    for bf16, amx, expected in ((0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda bf16=bf16: bool(bf16))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx))
        assert find_dtype("auto", cpu) == expected and find_dtype("float32", cpu) == torch.float32


def test_fast_products_are_taken_where_they_are_exact():
    before = torch.get_float32_matmul_precision()
    try:
        a, b = (torch.randn(n, 300, generator=torch.Generator().manual_seed(n)) for n in (200, 100))
        exact = a.double() @ b.double().T
        torch.set_float32_matmul_precision("medium")
        rounds = bool((a @ b.T - exact).abs().max() > 1e-5 * exact.abs().max())
        torch.set_float32_matmul_precision("highest")
        enable_onednn_float32(CPU)
        assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")
        assert (a @ b.T - exact).abs().max() < 1e-5 * exact.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)


def test_fast_products_that_round_are_not_taken(monkeypatch):
    product, before = torch.Tensor.__matmul__, torch.get_float32_matmul_precision()

    def rounding(a, b):  # as chips with AMX do
        c = product(a, b)
        rounds = c.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return c.bfloat16().float() if rounds else c

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    try:
        enable_onednn_float32(CPU)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_compile_auto_weighs_the_run_and_says_why(capsys):
    start_logging(is_main=True)
    small, large = (torch.nn.Linear(n, n) for n in (10, 2000))
    for model, steps, said in (
        (small, 100, "more than it saves in 100 steps"),
        (large, 10**6, "does not speed up"),
    ):
        maybe_compile(model, "auto", torch.device("cpu"), steps)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and said in lines[0] and model._compiled_call_impl is None


def test_the_recipe_learns_more_from_as_many_steps(tmp_path, dataset):
    """Each part of it, and all together: the modern network, and Muon, which SGD and AdamW do not reach."""
    flags = (
        f"--dataset={dataset}",
        "--max_iters=120",
        "--eval_interval=120",
        "--eval_iters=0",
        "--n_embd=32",
    )
    ways = {"gpt2": (), "network": MODERN[:9], "muon": ("--optimizer=muon",), "all": MODERN}
    found = {
        name: train(config_of(*flags, *way, f"--out_dir={tmp_path / name}")).best_val_loss
        for name, way in ways.items()
    }
    assert max(found["muon"], found["network"]) < found["gpt2"] - 0.05
    assert found["all"] < found["gpt2"] - 0.2, found


def test_a_run_goes_on_with_its_own_optimizer_alone(trained, dataset, tmp_path):
    flags = [*TINY, f"--dataset={dataset}", "--optimizer=muon", "--max_iters=22"]
    before = (trained / "last.pt").read_bytes()
    refused = run_here("train.py", *flags, f"--out_dir={trained}", "--init_from=resume")
    assert_user_error(refused, "optimizer=adamw", f"--init_from={trained}")
    assert (trained / "last.pt").read_bytes() == before
    assert "val loss" in train_here(*flags, f"--out_dir={trained}", "--init_from=resume", "--eval_only=True")
    printed = train_here(*flags, f"--out_dir={tmp_path}", f"--init_from={trained}", "--rotary=True")
    assert "rotary=True has no effect: the loaded model has rotary=False" in printed


def test_an_overflow_in_fp16_lets_no_optimizer_step():
    model = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=1, n_head=2, n_embd=16, tied=False))
    config = config_of("--optimizer=muon", "--tied=False")
    for value in (math.nan, math.inf):
        optimizers = make_optimizers(model, config, replace(CPU, dtype=torch.float16))
        scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
        before = [p.detach().clone() for p in model.parameters()]
        x = torch.arange(16)[None]
        hook = model.lm_head.weight.register_hook(lambda gradient, value=value: gradient * value)
        training_step(model, optimizers, scaler, [MicroBatch(x, x, 0)], 1.0, CPU)
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert scaler.get_scale() == 2.0
        training_step(model, optimizers, scaler, [MicroBatch(x, x, 0)], 0.0, CPU)  # and the next step is one
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert not torch.equal(before[0], next(iter(model.parameters())))


def test_the_network_is_what_the_settings_say(tmp_path, dataset):
    shape = {"block_size": 12, "n_layer": 3, "n_head": 4, "n_embd": 24, "dropout": 0.1, "bias": False}
    shape |= {"activation": "swiglu", "norm": "rmsnorm", "rotary": True, "qk_norm": True, "n_kv_head": 2}
    shape |= {
        "tied": False,
        "logit_softcap": 9.0,
        "embedding_skip": True,
        "key_offset": True,
        "zero_init": True,
    }
    flags = [f"--{name}={value}" for name, value in shape.items()]
    result = train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=1", *flags))
    made = dict(vars(result.model.config))
    assert {name: made[name] for name in shape} == shape
    del made["qk_norm_weights"]  # False: left out, as earlier versions do not know it
    assert load_checkpoint(tmp_path / "last.pt")["model_args"] == made


def test_activation_checkpointing_is_the_same_training(tmp_path, dataset):
    flags = (f"--dataset={dataset}", "--dropout=0.1", "--max_iters=4")
    plain = train(config_of(*flags, f"--out_dir={tmp_path / 'a'}"))
    saved = train(config_of(*flags, f"--out_dir={tmp_path / 'b'}", "--activation_checkpointing=True"))
    assert plain.losses == saved.losses


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
@pytest.mark.parametrize("more", [(), (*MODERN, "--zero_init=False")])
def test_compiled_training_is_the_same_training(more, tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", *more]
    plain = train_here(*flags, f"--out_dir={tmp_path / 'plain'}")
    compiled = run_warm("train.py", *flags, f"--out_dir={tmp_path / 'compiled'}", "--compile=True")
    assert compiled.returncode == 0, compiled.stderr
    assert "does not work here" not in compiled.stdout
    ours, theirs = (re.findall(r"loss (\d\.\d+)", printed) for printed in (plain, compiled.stdout))
    np.testing.assert_allclose(np.array(ours, float), np.array(theirs, float), atol=1e-3)
    names = weights_of(tmp_path / "compiled" / "last.pt").keys()
    assert names == weights_of(tmp_path / "plain" / "last.pt").keys()  # no _orig_mod. before them


def test_compile_without_a_compiler_falls_back_and_says_so(tmp_path, dataset):
    flags = [
        *TINY,
        f"--dataset={dataset}",
        f"--out_dir={tmp_path / 'out'}",
        "--compile=True",
        "--max_iters=3",
    ]
    env = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run("train.py", *flags, env=env)
    assert done.returncode == 0, done.stderr
    assert "torch.compile does not work here" in done.stdout and "step 3: loss" in done.stdout
    assert "Traceback" not in done.stderr


def test_log_lines_say_what_they_should(trained, dataset, tmp_path):
    done = run("train.py", *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    line = r"^step 5: loss \d+\.\d{4}, \d+\.\d\d ms, [\d,]+ tokens/s, mfu \d+\.\d%$"
    assert re.search(line, done.stdout, re.M), done.stdout
    for word in (
        "parameters",
        "float32",
        "64 tokens: 1 x 4 sequences of 16",
        f"{tmp_path}/ckpt.pt",
        "last.pt",
    ):
        assert word in done.stdout
    assert done.stderr == ""  # a file gets plain lines, no bar


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_on_a_terminal_there_is_a_bar_with_the_time_left(tmp_path, dataset):
    import fcntl
    import pty
    import struct
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, str(REPO / "train.py"), *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=child, stderr=child, cwd=REPO, env=ENVIRONMENT)
    os.close(child)
    shown = b""
    deadline = time.time() + 60
    while time.time() < deadline:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0
    assert b"20/20" in shown and b"step 20: loss" in shown and b"\r" in shown
    assert re.search(rb"20/20 \[[^\]]*<[^\]]*, loss \d\.\d{4}\]", shown)  # the time left, and the loss
    os.close(parent)


def test_checkpoint_tells_its_settings_and_its_tokenizer(trained, dataset):
    contents = load_checkpoint(trained / "ckpt.pt")
    assert contents["config"]["dataset"] == str(dataset) and contents["config"]["learning_rate"] == 1e-2
    assert contents["meta"] == json.loads((dataset / "meta.json").read_text())
    assert {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"} < set(
        contents["model_args"]
    )
