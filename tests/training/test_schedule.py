"""Schedules that are fitted to the time that is left (max_minutes)."""

import csv
import math
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_weights, ranks

from configurator import read_settings
from distrogpt.checkpoint import load_checkpoint
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.hardware import peak_flops
from distrogpt.settings import TrainConfig
from distrogpt.training.schedule import get_lr, shortened
from distrogpt.training.state import Fit
from train import train

WSD = "--lr_schedule=wsd --cooldown=0.5 --min_lr=0 --warmup_iters=0 --max_iters=1000000".split()
WSD.append("--log_interval=1")


def config_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, [*TINY, *map(str, flags)])


def rows_of(out_dir: Path, name: str = "log.csv") -> list[dict[str, str]]:
    with open(out_dir / name) as file:
        return list(csv.DictReader(file))


def lrs_of(out_dir: Path) -> list[float]:
    return [float(row["lr"]) for row in rows_of(out_dir) if row["lr"]]


@pytest.fixture
def clock(monkeypatch) -> Callable:
    """A clock that stands still except for a training step: set_speed(seconds of the Nth step, by N)."""
    peak_flops(torch.device("cpu"), torch.float32)  # measured once, by the real clock
    now, steps, norm = [1000.0], [0], torch.nn.utils.get_total_norm
    speeds: list[Callable[[int], float]] = [lambda step: 1.0]

    def slow(*args):
        steps[0] += 1
        now[0] += speeds[-1](steps[0])
        return norm(*args)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def set_speed(seconds: Callable[[int], float]) -> list[float]:
        steps[0] = 0
        speeds.append(seconds)
        return now

    return set_speed


def slow_evaluations(monkeypatch, now: list[float], seconds: float) -> None:
    """Let each evaluation take so long on the clock."""
    evaluate = Evaluator.evaluate

    def slow(*args):
        now[0] += seconds
        return evaluate(*args)

    monkeypatch.setattr(Evaluator, "evaluate", slow)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (lambda step: 0.5, 119),
        (lambda step: 0.4 if step < 80 else 1.2, None),  # from half of the time on, other programs run
        (lambda step: 2.0 if step < 15 else 0.4, None),  # they end
        (lambda step: 0.3 + 0.3 * math.sin(step / 7) ** 2, None),
    ],
)
def test_the_learning_rate_reaches_its_end_when_the_time_is_over(dataset, tmp_path, clock, seconds, steps):
    now = clock(seconds)
    begin = now[0]
    result = train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--max_minutes=1"))
    assert 58 <= now[0] - begin <= 60
    assert steps is None or result.iter_num == steps
    lrs = lrs_of(tmp_path)
    assert len(lrs) == result.iter_num
    assert lrs[0] == lrs[10] == 1e-2 and lrs[-1] < 1e-3
    assert max(a - b for a, b in pairwise(lrs)) < 6e-4, "a jump"
    assert all(a >= b for a, b in pairwise(lrs)), "it rose again"
    assert result.losses[-1]["step"] == result.iter_num


def test_a_first_step_that_compiles_does_not_count_as_the_length_of_a_step(dataset, tmp_path, clock):
    now = clock(lambda step: 30.0 if step == 1 else 0.25)
    begin = now[0]
    result = train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--max_minutes=1"))
    assert now[0] - begin <= 60 and result.iter_num == 120


def test_evaluations_are_part_of_the_time(dataset, tmp_path, clock, monkeypatch):
    now = clock(lambda step: 0.25)
    slow_evaluations(monkeypatch, now, 5)
    begin = now[0]
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--max_minutes=1", "--eval_interval=50")
    result = train(config_of(*flags))
    assert 57 <= now[0] - begin <= 60
    # 25 of 60 seconds for five evaluations; another step after that of 150 would need a sixth
    assert [point["step"] for point in result.losses] == [0, 50, 100, 150]
    assert lrs_of(tmp_path)[-1] < 1e-3


def test_a_resumed_run_knows_how_long_its_last_evaluation_will_take(dataset, tmp_path, clock, monkeypatch):
    now = clock(lambda step: 0.25)
    slow_evaluations(monkeypatch, now, 8)
    flags = [
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        *WSD,
        "--max_minutes=1",
        "--eval_interval=100000",
    ]
    train(config_of(*flags, "--save_interval=20", "--keep_checkpoints=100"))
    (tmp_path / "step-00000060.pt").rename(tmp_path / "last.pt")
    (tmp_path / "schedule.csv").unlink()
    seconds, begin = load_checkpoint(tmp_path / "last.pt")["seconds"], now[0]
    train(config_of(*flags, "--init_from=resume"))
    assert seconds == 8 + 60 * 0.25 and 57 <= seconds + now[0] - begin <= 60


def test_max_iters_end_a_run_before_its_time(dataset, tmp_path, clock):
    clock(lambda step: 0.25)
    flags = [f"--dataset={dataset}", *WSD, "--max_iters=40"]
    train(config_of(*flags, f"--out_dir={tmp_path / 'timed'}", "--max_minutes=1"))
    train(config_of(*flags, f"--out_dir={tmp_path / 'steps'}"))
    assert lrs_of(tmp_path / "timed") == pytest.approx(lrs_of(tmp_path / "steps"))


def test_a_resumed_run_repeats_the_fits_that_were_made_after_its_checkpoint(dataset, tmp_path, clock):
    clock(lambda step: 0.5 + 0.3 * math.sin(step))
    flags = [f"--dataset={dataset}", *WSD, "--max_minutes=1", "--eval_interval=10", "--keep_checkpoints=100"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    end = train(config_of(*flags, f"--out_dir={whole}")).iter_num
    shutil.copytree(whole, resumed)
    (resumed / "step-00000050.pt").rename(resumed / "last.pt")  # as if it had been killed after it
    clock(lambda step: 0.1)  # now the machine is faster
    result = train(config_of(*flags, f"--out_dir={resumed}", "--init_from=resume"))
    assert result.iter_num == end
    assert_same_weights(whole / "last.pt", resumed / "last.pt")
    assert lrs_of(whole) == lrs_of(resumed)
    assert (whole / "schedule.csv").read_text() == (resumed / "schedule.csv").read_text()


def test_a_run_continues_by_its_own_clock_after_the_last_recorded_fit(dataset, tmp_path, clock):
    now = clock(lambda step: 0.5)
    flags = [f"--dataset={dataset}", *WSD, "--max_minutes=1", "--eval_interval=10", "--keep_checkpoints=100"]
    train(config_of(*flags, f"--out_dir={tmp_path}"))
    (tmp_path / "step-00000050.pt").rename(tmp_path / "last.pt")
    lines = (tmp_path / "schedule.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line[0] == "s" or int(line.split(",")[0]) <= 60]
    (tmp_path / "schedule.csv").write_text("".join(kept) + "61,0.5")  # cut off, as by a full disk
    clock(lambda step: 0.25)
    begin = now[0]
    result = train(config_of(*flags, f"--out_dir={tmp_path}", "--init_from=resume"))
    assert 58 <= 25 + now[0] - begin <= 60 and result.iter_num > 150
    assert lrs_of(tmp_path)[-1] < 1e-3
    fits = rows_of(tmp_path, "schedule.csv")
    assert len({fit["step"] for fit in fits}) == len(fits)


def test_more_minutes_prolong_a_finished_run(dataset, tmp_path, clock):
    now = clock(lambda step: 0.5)
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--init_from=auto"]
    first = train(config_of(*flags, "--max_minutes=0.5")).iter_num
    assert train(config_of(*flags, "--max_minutes=0.5")).iter_num == first  # nothing left to do
    begin = now[0]
    last = train(config_of(*flags, "--max_minutes=1")).iter_num
    assert 25 <= now[0] - begin <= 30 and last == pytest.approx(2 * first, rel=0.1)
    lrs = lrs_of(tmp_path)
    assert lrs[first - 1] < 1e-3 < lrs[first + 5] and lrs[-1] < 1e-3


def test_a_fit_is_in_the_checkpoint_and_a_wrong_one_is_refused(dataset, tmp_path, clock):
    clock(lambda step: 0.5)
    train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--max_minutes=0.2"))
    contents = load_checkpoint(tmp_path / "last.pt")
    assert contents["fits"][-1][2] == contents["iter_num"]
    contents["fits"][-1][1] = 7.5
    torch.save(contents, tmp_path / "last.pt")
    with pytest.raises(Exception, match="fits is missing or invalid"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_shortened_schedule_keeps_its_shape():
    config = config_of("--max_iters=1000", "--warmup_iters=200", "--lr_decay_iters=800", "--min_lr=1e-4")
    for steps in (50, 500, 5000):
        short = shortened(config, steps)
        assert short.warmup_iters == min(200, steps // 10) and short.lr_decay_iters == 0.8 * steps
        assert get_lr(0.85 * steps, short) == 1e-4 < get_lr(0.7 * steps, short)
    assert shortened(config_of("--lr_decay_iters=9999"), 50).lr_decay_iters == 50  # it ends in time


def test_progress_is_continuous_between_fits():
    fit = Fit(100, 0.25, 400)
    assert [fit.progress_at(step) for step in (100, 200, 400, 500)] == [0.25, 0.5, 1.0, 1.0]
    assert Fit(100, 0.9, 100).progress_at(100) == 1.0


def test_ranks_follow_the_clock_of_rank_0(dataset, tmp_path):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", *WSD, "--gradient_accumulation_steps=2")
    ends = ("--max_minutes=0.1", "--eval_interval=200", "--log_interval=10")
    done = ranks(*[("train.py", *TINY, *flags, *ends)] * 2)
    assert done.returncode == 0, done.stderr
    assert "max_minutes=0.1 is reached; best val loss" in done.stdout and "early" not in done.stdout
    assert lrs_of(tmp_path)[-1] < 5e-3  # the peak is twice that
