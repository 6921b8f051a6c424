"""What every command makes of the checkpoints of diverged runs, of nanoGPT and of others."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, assert_user_error, run_here, sample_here, train_here

from distrogpt.errors import UserError
from distrogpt.loading import load_pretrained
from eval import EvalConfig, measure
from sample import Sampler
from train import TrainConfig, train

BROKEN = "transformer.h.0.mlp.c_fc.weight"


def change(path: Path, **entries: Any) -> dict[str, Any]:
    """Replace entries of a checkpoint, in this file alone; all of its entries."""
    contents = torch.load(path, weights_only=True) | entries
    path.unlink()  # ckpt.pt and last.pt may be two names of a file
    torch.save(contents, path)
    return contents


def spoil(path: Path, value: float = math.nan, name: str = BROKEN) -> None:
    weights = torch.load(path, weights_only=True)["model"]
    weights[name].view(-1)[5] = value
    change(path, model=weights)


@pytest.fixture
def out_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run's folder, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.mark.parametrize(
    ("value", "name"),
    [(math.nan, BROKEN), (math.inf, "transformer.wte.weight"), (-math.inf, "transformer.ln_f.weight")],
)
def test_weights_that_are_not_finite_are_refused_by_every_command(value, name, out_dir, dataset, tmp_path):
    os.remove(out_dir / "last.pt")
    spoil(out_dir / "ckpt.pt", value, name)
    flags, words = f"--out_dir={out_dir}", (f"{name} has NaN or infinite values", "use another checkpoint")
    assert_user_error(sample_here(flags), *words)
    assert_user_error(run_here("export.py", flags, f"--to={tmp_path / 'to'}"), *words)
    assert_user_error(run_here("train.py", *TINY, f"--dataset={dataset}", flags, "--init_from=auto"), *words)
    new = f"--out_dir={tmp_path / 'new'}"
    finetune = run_here("train.py", *TINY, f"--dataset={dataset}", f"--init_from={out_dir}", new)
    assert_user_error(finetune, *words)
    assert not (tmp_path / "new").exists() and not (tmp_path / "to").exists()
    for load in (
        lambda: measure(EvalConfig(out_dir=str(out_dir), device="cpu")),
        lambda: Sampler(str(out_dir), device="cpu"),  # of serve.py, bench.py and notebooks, too
        lambda: load_pretrained(str(out_dir / "ckpt.pt")),
    ):
        with pytest.raises(UserError, match=words[0]):
            load()


def test_the_last_good_file_of_a_run_is_named(dataset, tmp_path):
    out_dir = tmp_path / "a run"
    flags = (*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", "--keep_checkpoints=2")
    train_here(*flags)
    for path, when in (("last.pt", 9), ("ckpt.pt", 8), ("step-00000020.pt", 7), ("step-00000010.pt", 6)):
        os.utime(out_dir / path, (when, when))
    spoil(out_dir / "last.pt")
    resume = (*flags, "--init_from=resume", "--max_iters=22")
    good = out_dir / "ckpt.pt"
    assert_user_error(run_here("train.py", *resume), f"{good} is the last good file: copy it to last.pt")
    averages = torch.load(good, weights_only=True)["optimizer"]
    averages["state"][3]["exp_avg_sq"].view(-1)[0] = math.inf
    change(good, optimizer=averages)
    spoil(out_dir / "step-00000020.pt", math.inf)
    good, wrong = out_dir / "step-00000010.pt", run_here("train.py", *resume)
    assert_user_error(wrong, f"last.pt: {BROKEN}", f"--init_from='{good}'")
    shutil.copy(good, out_dir / "last.pt")
    assert "resumes  after step 10" in train_here(*resume)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_averages_that_are_not_finite_are_refused(key, out_dir, dataset):
    averages = torch.load(out_dir / "last.pt", weights_only=True)["optimizer"]
    averages["state"][2][key].view(-1)[0] = math.nan
    change(out_dir / "last.pt", optimizer=averages)
    os.remove(out_dir / "ckpt.pt")
    flags = (*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}")
    wrong = run_here("train.py", *flags, "--init_from=resume", "--max_iters=22")
    words = (f"the optimizer's {key} has NaN", f"--init_from={out_dir}/last.pt starts a new run")
    assert_user_error(wrong, *words)
    assert sample_here(f"--out_dir={out_dir}", "--num_samples=1").returncode == 0  # its weights are good
    train_here(*flags, "--init_from=resume", "--eval_only=True")  # which needs no averages


def test_a_best_loss_that_is_no_number_is_forgotten(out_dir, dataset):
    change(out_dir / "last.pt", best_val_loss=math.nan)
    settings = {"dataset": str(dataset), "out_dir": str(out_dir), "init_from": "resume", "device": "cpu"}
    sizes = {"block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "eval_iters": 2}
    assert train(TrainConfig(**settings, **sizes, max_iters=22, loss_plot=False)).best_val_loss < 10


def test_weights_too_large_for_the_dtype_are_refused(out_dir, dataset, tmp_path):
    spoil(out_dir / "ckpt.pt", 70_000.0)
    words = (f"{BROKEN} has 7e+04", "too large for float16; set --dtype=bfloat16")
    flags = (f"--out_dir={out_dir}", "--dtype=float16", "--device=cpu")
    assert_user_error(sample_here(*flags), *words)
    assert_user_error(sample_here(*flags, "--int8=True"), *words)
    with pytest.raises(UserError, match="too large for float16"):
        measure(EvalConfig(out_dir=str(out_dir), dtype="float16", device="cpu"))
    new = (f"--dataset={dataset}", f"--init_from={out_dir}", f"--out_dir={tmp_path / 'new'}")
    assert_user_error(run_here("train.py", *TINY, *new, "--dtype=float16"), *words)
    assert sample_here(*flags[::2], "--dtype=bfloat16", "--num_samples=1").returncode == 0
