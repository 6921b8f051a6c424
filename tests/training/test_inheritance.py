"""What a resumed run takes from its checkpoint: each setting that the command line does not give."""

import csv
import re
import shutil

import pytest
import torch
from conftest import (
    MODERN,
    NANOGPT,
    TINY,
    assert_same_weights,
    assert_user_error,
    losses_of,
    run_here,
    train_here,
)

from distrogpt.settings import OF_THIS_CALL

HALF = (*TINY, *MODERN, "--dropout=0.1", "--seed=5", "--lr_decay_iters=20", "--max_iters=10", "--bias=True")


@pytest.fixture(scope="module")
def half(dataset, tmp_path_factory):
    """The out_dir of a run of ten steps, to be resumed."""
    out_dir = tmp_path_factory.mktemp("half")
    train_here(*HALF, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return out_dir


@pytest.fixture
def resumable(half, tmp_path):
    """A copy of it, and the flags that are enough to resume it."""
    out_dir = shutil.copytree(half, tmp_path / "out")
    return out_dir, ("--init_from=resume", f"--out_dir={out_dir}", "--device=cpu")


def settings_line(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("settings "))


def test_a_resumed_run_needs_no_setting_and_ends_bit_for_bit_as_the_unbroken_one(
    resumable, dataset, tmp_path
):
    out_dir, flags = resumable
    train_here(*HALF, f"--dataset={dataset}", f"--out_dir={tmp_path / 'whole'}", "--max_iters=20")
    printed = train_here(*flags, "--max_iters=20")
    assert_same_weights(tmp_path / "whole" / "last.pt", out_dir / "last.pt")
    assert losses_of(tmp_path / "whole") == losses_of(out_dir)
    line = settings_line(printed)
    assert f"dataset={dataset}, " in line and "lr_schedule=wsd" in line and "seed=5" in line
    assert line.endswith("; changed: max_iters=20 (was 10)") and "has no effect" not in printed
    assert not any(f"{name}=" in line for name in OF_THIS_CALL)
    assert "nothing left to do" in train_here(*flags)


def test_a_folder_without_a_checkpoint_is_what_is_wrong(tmp_path):
    for flags in ((), ("--eval_only=True",)):
        done = run_here("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'none'}", *flags)
        assert_user_error(done, f"{tmp_path / 'none' / 'last.pt'} is missing", "--out_dir")
        assert not (tmp_path / "none").exists()


def test_an_evaluation_alone_needs_no_setting(resumable):
    printed = train_here(*resumable[1], "--eval_only=True")
    with open(resumable[0] / "log.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert (
        f"step 10: train loss {float(last['train_loss']):.4f}, val loss {float(last['val_loss']):.4f}"
        in printed
    )
    assert train_here(*resumable[1], "--eval_only=True", "--eval_iters=1") != printed


def test_what_a_config_file_says_wins_even_if_it_is_the_default(resumable, tmp_path):
    (tmp_path / "c.py").write_text("dropout = 0.0\nlr_decay_iters = None\nloss_plot = False\n")
    line = settings_line(train_here(tmp_path / "c.py", *resumable[1], "--max_iters=12"))
    assert line.endswith(
        "; changed: dropout=0.0 (was 0.1), max_iters=12 (was 10), lr_decay_iters=None (was 20)"
    )
    assert not re.search("from the checkpoint:[^;]*(dropout|lr_decay_iters)", line)


def test_steps_that_are_given_count_and_not_the_epochs_of_before(half, dataset, tmp_path):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--batch_size=128", "--max_epochs=0.01")
    train_here(*HALF, *flags)
    resumed = train_here("--init_from=resume", f"--out_dir={tmp_path}", "--max_iters=2")
    assert "after step 2, and log.csv" in resumed and "epoch of" not in resumed


def test_auto_says_all_of_a_run_if_it_names_the_data(resumable, dataset):
    auto = ("--init_from=auto", f"--out_dir={resumable[0]}", "--device=cpu")
    assert "seed=5" in settings_line(train_here(*auto))
    same = [flag for flag in HALF if not flag.startswith("--seed")]
    printed = train_here(*same, *auto, f"--dataset={dataset}", "--max_iters=11")
    assert "seed" not in settings_line(printed).split("changed: ")[0]


def test_a_checkpoint_of_nanogpt_has_its_settings_too(tmp_path):
    shutil.copy(NANOGPT / "ckpt_compiled.pt", tmp_path / "ckpt.pt")
    flags = ("--init_from=resume", f"--out_dir={tmp_path}", f"--dataset={NANOGPT}", "--device=cpu")
    printed = train_here(*flags, "--max_iters=42", "--log_interval=1", "--loss_plot=False")
    assert "2 layers, 2 heads, width 16, block size 32" in printed and "has no effect" not in printed
    line = settings_line(printed)
    assert "learning_rate=0.001" in line and "activation=gelu" in line and "dtype=" not in line
    assert "dataset=" in line.split("changed: ")[1] and "log_interval=1 (was 10)" in line
    with open(tmp_path / "log.csv") as file:
        assert {float(row["lr"]) for row in csv.DictReader(file) if row["lr"]} == {1e-4}  # its min_lr


def test_a_checkpoint_that_names_no_dataset_asks_for_it(resumable):
    out_dir, flags = resumable
    contents = torch.load(out_dir / "last.pt", weights_only=True)
    del contents["config"]["dataset"]
    torch.save(contents, out_dir / "last.pt")
    done = run_here("train.py", *flags)
    assert_user_error(done, "does not name the dataset that it was trained on", "--dataset=NAME")


@pytest.mark.parametrize(
    ("name", "value"), [("n_layer", "x"), ("sampling", "all"), ("max_iters", -1), ("seed", [])]
)
def test_a_setting_of_a_checkpoint_is_checked(name, value, resumable):
    contents = torch.load(resumable[0] / "last.pt", weights_only=True)
    contents["config"] = {**contents["config"], name: value, "no_setting_of_ours": value}
    if name in contents["model_args"]:
        contents["model_args"][name] = value
    torch.save(contents, resumable[0] / "last.pt")
    assert_user_error(run_here("train.py", *resumable[1]), str(resumable[0] / "last.pt"), f"{name}=")
