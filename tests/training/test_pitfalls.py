"""Settings that make a run useless are noted at its start, each once; the others are not."""

import json
import re

import numpy as np
import pytest
from conftest import REPO, TINY, train_here

from configurator import read_settings
from distrogpt.data.dataset import open_dataset
from distrogpt.settings import TrainConfig
from distrogpt.training.pitfalls import pitfalls

GOOD = (*TINY, "--eval_iters=20")


def found(dataset, *flags: str) -> list[str]:
    config = read_settings(TrainConfig, [*GOOD, f"--dataset={dataset}", *flags])
    return pitfalls(config, open_dataset(config))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--warmup_iters=20",
            "warmup_iters=20 does not end within the run of 20 .* has 95% of .*--warmup_iters=1",
        ),
        ("--warmup_iters=2000", "has 1% of learning_rate"),
        ("--lr_decay_iters=400", "lr_decay_iters=400 is beyond the run of 20 steps: .* has 100%"),
        ("--lr_decay_iters=10 --warmup_iters=15", "lr_decay_iters=10 is within warmup_iters=15"),
        ("--lr_decay_iters=10 --min_lr=0", "min_lr=0 from step 10 "),
        ("--lr_schedule=wsd --cooldown=1 --warmup_iters=10", "cooldown=1 begins within warmup_iters=10"),
        ("--min_lr=0.1", "min_lr=0.1 is above learning_rate=0.01"),
        ("--learning_rate=1e-9", "learning_rate=1e-09 hardly changes"),
        ("--weight_decay=90", "weight_decay=90 removes"),
        ("--max_iters=0", "max_iters=0 trains nothing"),
        (
            "--eval_interval=21",
            "eval_interval=21 is longer than the run of 20 steps: .*--eval_interval=2",
        ),
        ("--save_interval=50", "save_interval=50 is longer"),
        ("--log_interval=50", "log_interval=50 is longer"),
        ("--patience=2", "patience=2 evaluations cannot stop it early: the run has only 2"),
        ("--eval_iters=1", "eval_iters=1: the loss of 64 tokens is noisy"),
        (
            "--batch_size=4000 --gradient_accumulation_steps=40",
            "a step reads 2,560,000 tokens",
        ),
        ("--eval_only=True", "eval_only evaluates a new, untrained model, .*--init_from=resume"),
    ],
)
def test_what_makes_a_run_useless_is_said(flags, says, dataset):
    (line,) = found(dataset, *flags.split())
    assert re.search(says, line), line


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--warmup_iters=0",
        "--warmup_iters=2000 --decay_lr=False",
        "--lr_decay_iters=20 --min_lr=0",
        "--lr_schedule=wsd --cooldown=0.9",
        "--patience=1 --eval_interval=20 --max_iters=100",
        "--eval_interval=20 --log_interval=20",
        "--eval_iters=0",
        "--head_lr=0.1 --tied=False",
        "--eval_only=True --init_from=auto",
    ],
)
def test_what_is_fine_is_not(flags, dataset):
    assert found(dataset, *flags.split()) == []


def test_no_config_has_any(dataset):
    for path in sorted((REPO / "config").glob("[!_]*.py")):
        config = read_settings(
            TrainConfig, [str(path), f"--dataset={dataset}", "--batch_size=1", "--block_size=256"]
        )
        if config.eval_iters:
            config.eval_iters = 20
        assert pitfalls(config, open_dataset(config)) == [], path


def test_a_val_split_of_a_few_tokens_is_noted_once_and_the_run_trains(copy, tmp_path):
    ids = np.fromfile(copy / "val.bin", "<u2")
    ids[:60].tofile(copy / "val.bin")
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "tokens": {}}))
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--max_iters=4", "--eval_interval=2")
    printed = train_here(*GOOD, *flags)
    assert printed.count(f"note     {copy} has only 60 val tokens: their loss, ") == 1
    assert "step 4: train loss" in printed
