"""What lies in out_dir: whole after every fault, gone on with bit for bit, and written by one run alone."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    assert_same_weights,
    assert_user_error,
    losses_of,
    run_here,
    run_limited,
    run_warm,
    sample_here,
    start_warm,
    train_here,
    until,
)
from warm import Started

from configurator import read_settings
from distrogpt.checkpoint import load_checkpoint
from distrogpt.errors import Diverged, UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.runtime import Runtime, start_logging
from distrogpt.settings import TrainConfig
from distrogpt.training.logger import LossSpikeDetector
from distrogpt.training.run_directory import COLUMNS, RunDirectory
from train import train

LONG = [
    *TINY,
    "--max_iters=200",
    "--eval_interval=50",
    "--log_interval=1",
    "--dropout=0.1",
    "--init_from=auto",
]
no_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")

on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")


def begin(*flags: object) -> Started:
    """The run as a process of its own."""
    return start_warm("train.py", *LONG, *flags)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, dataset):
    """The out_dir of a run that nothing interrupts."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    train_here(*LONG, f"--dataset={dataset}", f"--out_dir={out_dir}")
    return out_dir


def assert_ends_as(unbroken, out_dir, *flags) -> str:
    """Started again, the run ends with the unbroken one's weights, averages and log; what it printed."""
    printed = train_here(*LONG, f"--out_dir={out_dir}", *flags)
    assert_same_weights(unbroken / "last.pt", out_dir / "last.pt")
    assert_same_weights(unbroken / "ckpt.pt", out_dir / "ckpt.pt")
    assert losses_of(unbroken) == losses_of(out_dir)
    return printed


@no_signals
@pytest.mark.parametrize("at", ["step 7: loss", "step 120: loss"])
def test_a_killed_run_goes_on_as_the_unbroken_one(at, unbroken, tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}")
    process = begin(*flags)
    assert until(process, at)
    process.kill()
    process.communicate()
    text = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(text + b"121,7744,0.4,3.3")  # it was just writing a line
    assert_ends_as(unbroken, tmp_path, *flags)


def wait_until_it_catches(process, number: int) -> None:
    """Until then, while it starts, a signal just ends it."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            caught = int(re.search(r"SigCgt:\s+(\w+)", status.read())[1], 16)
        if caught >> (number - 1) & 1 and caught >> (signal.SIGUSR1 - 1) & 1:
            return
        time.sleep(0.02)
    raise AssertionError(f"it never caught signal {number}")


@on_linux
def test_a_signal_during_an_evaluation_stops_it_and_it_is_made_on_resume(unbroken, tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--lr_decay_iters=200")
    process = begin(*flags, "--eval_iters=100000")  # an evaluation of minutes
    wait_until_it_catches(process, signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR1, errors
    assert "stopped after step 0" in output and not list(tmp_path.glob("*.pt"))
    # later, where there is something to save
    train_here(*LONG, *flags, "--max_iters=49")
    process = begin(*flags, "--eval_iters=100000")
    assert until(process, "step 50: loss")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "stopped after step 50" in output, errors
    assert load_checkpoint(tmp_path / "last.pt")["evaluated"] is False
    assert "step 50: train loss" in train_here(*LONG, *flags)
    assert_same_weights(unbroken / "last.pt", tmp_path / "last.pt")
    ours, theirs = ([row for row in losses_of(out) if row[0] != "49"] for out in (tmp_path, unbroken))
    assert ours == theirs  # in step 49, the first of the three runs was evaluated


def test_the_log_has_a_line_for_each_step(unbroken):
    rows = losses_of(unbroken)
    assert (unbroken / "log.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [int(row[0]) for row in rows[1:]] == list(range(201))
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [row["step"] for row in table if row["val_loss"]] == ["0", "50", "100", "150", "200"]
    assert [int(row["tokens"] or 0) for row in table] == [64 * step for step in range(201)]
    assert float(table[-1]["loss"]) < float(table[1]["loss"]) - 0.5
    assert float(table[-1]["lr"]) == pytest.approx(1e-3, rel=1e-2) and float(table[9]["grad_norm"]) > 0
    contents = load_checkpoint(unbroken / "last.pt")
    assert contents["val_loss"] == float(table[-1]["val_loss"]) and contents["seconds"] > 0


@no_signals
def test_two_runs_in_one_folder_are_refused_until_the_first_ends_however_it_ends(tmp_path, dataset):
    flags = (
        f"--dataset={dataset}",
        f"--out_dir={tmp_path}",
        "--max_iters=1000000",
        "--eval_interval=1000000",
    )
    first = begin(*flags)
    assert until(first, "step 5: loss")
    before = (tmp_path / "log.csv").read_bytes()
    config = read_settings(TrainConfig, [*LONG, *flags])
    with pytest.raises(UserError, match=f"process {first.pid} on .* is writing to out_dir=.*--out_dir"):
        with RunDirectory(config, Runtime(torch.device("cpu"), torch.float32), lock_timeout=0.2):
            pass
    assert (tmp_path / "log.csv").read_bytes().startswith(before) and first.poll() is None
    first.kill()
    first.communicate()
    train_here(*LONG, *flags, "--max_iters=2", "--eval_interval=2")


@no_signals
def test_a_run_that_waits_for_another_ones_end_goes_on_from_it(tmp_path, dataset):
    """Ctrl-C, and the same command again at once."""
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=900000", "--eval_interval=900000")
    first = begin(*flags)
    assert until(first, "step 30: loss")
    second = begin(*flags)
    assert until(second, f"note     waiting for process {first.pid} on ")
    first.send_signal(signal.SIGTERM)
    stopped = int(re.search(r"stopped after step (\d+)", first.communicate(timeout=30)[0])[1])
    assert until(second, "resumes").startswith(f"resumes  after step {stopped}\n")
    second.kill()
    second.communicate()


def run_in(path, lock_timeout: float = 5.0, **settings) -> RunDirectory:
    config = TrainConfig(out_dir=str(path), **settings)
    return RunDirectory(config, Runtime(torch.device("cpu"), torch.float32), lock_timeout)


def test_a_folder_is_held_against_the_own_process_too_and_keeps_what_is_not_ours(tmp_path):
    for name in ("thesis.tmp", "last.pt.tmp"):
        (tmp_path / name).write_text("x")
    with run_in(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing to"):
        run_in(tmp_path, lock_timeout=0.1).__enter__()
    with run_in(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "run.owner", "thesis.tmp"]
    with pytest.raises(UserError), run_in(tmp_path / "new"):
        raise UserError("the first file is still to come; see there")
    assert not (tmp_path / "new").exists()


def test_a_restart_takes_only_what_its_own_run_has_written(tmp_path, dataset, monkeypatch):
    """A run of the same name lies there; the new one is killed before, then after its first line."""
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "gpt2")
    train_here(*flags, "--seed=7")
    old = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "loss.png").write_bytes(b"a picture")
    with run_in(tmp_path):  # the first start: it ends before it has written
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with run_in(tmp_path) as run:
        assert run.restarted_id is None
    assert "resumes" not in train_here(*flags)
    assert (tmp_path / "last.previous-1.pt").read_bytes() == old
    assert (tmp_path / "loss.previous-1.png").read_bytes() == b"a picture"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert "resumes  after step 3" in train_here(*flags)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert "resumes" not in train_here(*flags)


def test_the_line_that_a_run_goes_on_from_is_never_out_of_the_log(tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=10")
    train_here(*LONG, *flags)
    before = (tmp_path / "log.csv").read_bytes()
    with run_in(tmp_path) as run:  # killed before it trains
        run.resume(load_checkpoint(tmp_path / "last.pt"))
    assert (tmp_path / "log.csv").read_bytes() == before


def test_a_writer_that_ends_in_any_way_is_told(tmp_path, dataset, monkeypatch):
    save, calls = torch.save, []

    def second_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        save(*args)

    monkeypatch.setattr(torch, "save", second_fails)
    flags = [*TINY, "--max_iters=30", f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    printed = train_here(*flags)
    assert printed.count("cannot be written (MemoryError)") == 1 and printed.count(": wrote") == 2
    assert load_checkpoint(tmp_path / "last.pt")["iter_num"] == 30 and not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_told_with_what_is_needed_and_free(tmp_path, dataset, monkeypatch):
    def full(contents, file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos 833280 vs 833168") from None  # torch's words

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=123_456_789))
    done = run_here(
        "train.py", *TINY, "--n_embd=256", f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "unexpected" not in done.stderr
    reason = r"No space left on device: ([\d.]+) MB needed, 123\.5 MB free"
    weights = 256 * (88 + 16) + 12 * 256**2  # and two averages of each
    assert float(re.search(reason, done.stderr)[1]) == pytest.approx(3 * 4 * weights / 1e6, rel=0.02)


def test_a_resumed_run_compiles_as_the_whole_one_does(tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--save_interval=5", "--keep_checkpoints=9")
    flags += ("--max_iters=20", "--compile=auto")
    weighed = "compile  off: compiling takes half a minute, more than it saves in 20 steps"
    assert weighed in train_here(*LONG, *flags)
    os.rename(tmp_path / "step-00000005.pt", tmp_path / "last.pt")
    printed = train_here(*LONG, *flags)
    assert "resumes  after step 5" in printed and weighed in printed


@no_signals
def test_a_second_ctrl_c_ends_a_save_too_and_leaves_no_half_of_it(
    tmp_path, dataset, monkeypatch, at_each_step
):
    flags = (*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=auto")
    train_here(*flags, "--max_iters=10")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    begun = threading.Event()

    def endless(contents, file):
        begun.set()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            file.write(b"more")

    def interrupt_twice(step, gradients):
        if step == 12:
            assert begun.wait(5)
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "save", endless)
    at_each_step(interrupt_twice)
    done = run_here("train.py", *flags, "--max_iters=40")
    assert done.returncode == 130 and not done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before


def limited(size: int, *flags: object) -> subprocess.CompletedProcess:
    return run_limited(size, "train.py", *LONG, *flags)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of files")
def test_a_full_disk_is_told_and_the_run_goes_on_with_the_old_files_whole(unbroken, tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--lr_decay_iters=200")
    train_here(*LONG, *flags, "--max_iters=50")
    before = {name: (tmp_path / name).read_bytes() for name in ("ckpt.pt", "last.pt")}
    full = limited(len(before["last.pt"]) // 2, *flags)
    assert full.returncode == 1 and full.stderr.startswith("error: ") and len(full.stderr.splitlines()) == 1
    size = f"{len(before['last.pt']) / 1e6:.1f}"
    assert f"last.pt cannot be written (File too large: {size} MB needed)" in full.stderr
    assert full.stdout.count("the run continues and tries again") == 2 and "step 200: train" in full.stdout
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ckpt.pt",
        "config.py",
        "last.pt",
        "log.csv",
        "run.lock",
        "run.owner",
    ]
    assert_ends_as(unbroken, tmp_path, *flags)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of files")
def test_a_log_that_the_disk_does_not_take_stops_nothing(tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=20", "--eval_interval=1000")
    full = limited(300, *flags)
    assert full.stdout.count("log.csv cannot be written") == 1 and "step 20: loss" in full.stdout
    lines = (tmp_path / "log.csv").read_text()
    assert lines.endswith("\n") and all(line.count(",") == len(COLUMNS) - 1 for line in lines.splitlines())


def test_a_folder_that_vanishes_is_told(tmp_path, dataset):
    out_dir = tmp_path / "out"
    process = begin(f"--dataset={dataset}", f"--out_dir={out_dir}", "--max_iters=400")
    assert until(process, "step 60: loss")
    os.rename(out_dir, tmp_path / "elsewhere")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "the run continues" in output
    assert errors.startswith("error: ") and "No such file" in errors and len(errors.splitlines()) == 1
    assert load_checkpoint(tmp_path / "elsewhere" / "last.pt")["iter_num"] == 50


def test_the_best_of_a_failed_save_does_not_count(tmp_path, dataset, monkeypatch):
    """ckpt.pt is then the best of those that were written."""
    save, calls = torch.save, []

    def first_fails(*args):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the disk is full")
        save(*args)

    monkeypatch.setattr(torch, "save", first_fails)
    losses = iter([4.0, 4.0, 3.0, 3.0, 3.5, 3.5, 3.6, 3.6])
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"train": next(losses), "val": next(losses)})
    flags = [*TINY, "--max_iters=30", "--eval_interval=10", "--always_save_checkpoint=False"]
    result = train(read_settings(TrainConfig, [*flags, f"--dataset={dataset}", f"--out_dir={tmp_path}"]))
    best = load_checkpoint(tmp_path / "ckpt.pt")
    assert (best["iter_num"], best["best_val_loss"], result.best_val_loss) == (20, 3.5, 3.5)


def test_history_and_more_frequent_saves(tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}")
    train_here(*LONG, *flags, "--save_interval=20", "--keep_checkpoints=3", "--max_iters=100")
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["ckpt.pt", "last.pt", "step-00000060.pt", "step-00000080.pt", "step-00000100.pt"]
    assert [load_checkpoint(tmp_path / name)["iter_num"] for name in kept] == [100, 100, 60, 80, 100]
    assert os.path.samefile(tmp_path / "last.pt", tmp_path / "step-00000100.pt")  # one copy on disk
    sampled = sample_here(f"--init_from={tmp_path / kept[2]}", "--num_samples=1", "--max_new_tokens=5")
    assert sampled.returncode == 0, sampled.stderr
    # going back: the state of that step, and the same run from there
    (tmp_path / "last.pt").unlink()
    os.rename(tmp_path / kept[2], tmp_path / "last.pt")
    assert "resumes  after step 60" in train_here(*LONG, *flags, "--max_iters=100")
    assert_same_weights(tmp_path / "step-00000100.previous-1.pt", tmp_path / "last.pt")
    # a state that was saved between two evaluations is evaluated where it is made the last
    os.rename(tmp_path / "step-00000080.previous-1.pt", tmp_path / "last.pt")
    (tmp_path / "ckpt.pt").unlink()
    assert "step 80: train loss" in train_here(*LONG, *flags, "--max_iters=80")
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 80


def test_a_new_run_renames_the_old_ones_files_and_removes_those_of_the_run_before(tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=3", "--init_from=scratch")
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "last.previous-2.pt").write_text("of an older version")
    for seed in (1, 2, 3):
        (tmp_path / "tensorboard").mkdir()
        (tmp_path / "tensorboard" / "events").write_text(str(seed))
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*[ptvg]") if path.is_file()}
        printed = train_here(*LONG, *flags, f"--seed={seed}", f"--keep_checkpoints={3 - seed}")
        moved = {name: content for name, content in before.items() if "previous" not in name}
        for name, content in moved.items():
            stem, suffix = name.rsplit(".", 1)
            kept = name if name == "thesis.txt" else f"{stem}.previous-1.{suffix}"
            assert (tmp_path / kept).read_bytes() == content
        assert (tmp_path / "tensorboard.previous-1" / "events").read_text() == str(seed)
    assert printed.count("is not part of this run") == 6 and printed.count("of an older run was removed") == 6
    names = {path.name for path in tmp_path.glob("*.previous-*")}
    files = {"ckpt.previous-1.pt", "last.previous-1.pt", "log.previous-1.csv", "tensorboard.previous-1"}
    assert names == files | {"step-00000003.previous-1.pt", "last.previous-2.pt", "config.previous-1.py"}


def test_a_run_that_saved_nothing_costs_no_checkpoint_of_an_earlier_one(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=scratch"]
    train_here(*flags, "--max_iters=3", "--seed=1")
    good, logs = (tmp_path / "last.pt").read_bytes(), []
    for steps in (3, 4, 5):
        train_here(*flags, f"--max_iters={steps}", "--seed=2")
        logs.append((tmp_path / "log.csv").read_bytes())
        for path in tmp_path.glob("*[!1].pt"):  # as if it had been killed before it saved
            path.unlink()
    assert (tmp_path / "last.previous-1.pt").read_bytes() == good
    assert (tmp_path / "log.previous-1.csv").read_bytes() == logs[-2]  # no log of the last run is lost


@on_linux
def test_a_start_too_many_that_is_stopped_at_once_moves_nothing(trained, dataset):
    before = {
        path.name: path.read_bytes() for path in trained.iterdir() if path.suffix not in (".lock", ".owner")
    }
    process = begin(
        f"--dataset={dataset}", f"--out_dir={trained}", "--init_from=scratch", "--eval_iters=100000"
    )
    wait_until_it_catches(process, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert "stopped after step 0" in output
    after = {
        path.name: path.read_bytes() for path in trained.iterdir() if path.suffix not in (".lock", ".owner")
    }
    assert after == before


@pytest.mark.parametrize("how", ["cut off", "removed"])
def test_data_that_changes_under_a_run_stops_it_with_its_state_saved(how, copy, unbroken, tmp_path):
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}")
    path, whole = copy / "train.bin", (copy / "train.bin").read_bytes()
    process = begin(*flags)
    assert until(process, "step 60: loss")
    if how == "cut off":
        os.truncate(path, 1000)
    else:
        path.unlink()
    _, errors = process.communicate(timeout=60)
    said = "was removed" if how == "removed" else "changed"
    assert process.returncode == 2 and errors.startswith(f"error: {path} {said} during the run; restore it")
    assert len(errors.splitlines()) == 1 and "Traceback" not in errors
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] >= 60
    path.write_bytes(whole)
    assert "the data has changed" not in assert_ends_as(unbroken, tmp_path / "out", *flags)


@on_linux
def test_data_that_changes_under_an_evaluation_ends_it(copy, tmp_path):
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--eval_iters=100000")
    process = begin(*flags)
    wait_until_it_catches(process, signal.SIGTERM)
    # replaced, not truncated in place: that could hit the microseconds in which a batch is copied
    (copy / "short.bin").write_bytes(bytes(100))
    os.replace(copy / "short.bin", copy / "train.bin")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith(f"error: {copy / 'train.bin'} changed during the run")


def test_other_data_on_resume_is_told(copy, tmp_path, monkeypatch):
    flags = [*TINY, f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}"]
    train_here(*flags)
    ids = np.fromfile(copy / "train.bin", "<u2")
    ids[::-1].tofile(copy / "train.bin")
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        again = run_here("train.py", *flags, "--init_from=auto")
    assert_user_error(again, "the data changed during the run")  # nobody reads torchrun's notes
    assert "note     the data has changed since" in train_here(*flags, "--init_from=resume", "--max_iters=22")


def test_steps_without_finite_gradients_are_skipped_and_counted(at_each_step, tmp_path, dataset, capsys):
    def poison(step, gradients):
        if step in (4, 9, 10):
            gradients[0].mul_(math.nan)

    at_each_step(poison)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--grad_clip=0", "--log_interval=1"]
    result = train(read_settings(TrainConfig, flags))
    assert result.iter_num == 20 and all(p.isfinite().all() for p in result.model.parameters())
    assert re.findall(r"step (\d+) is skipped", capsys.readouterr().out) == ["4", "9", "10"]
    contents = load_checkpoint(tmp_path / "last.pt")
    assert contents["skipped"] == 3
    assert {float(averages["step"]) for averages in contents["optimizer"]["state"].values()} == {17.0}


def test_a_few_such_steps_in_a_row_end_the_run_with_the_last_good_state(at_each_step, tmp_path, dataset):
    def poison(step, gradients):
        if step >= 12:
            gradients[0].mul_(math.nan)

    at_each_step(poison)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--skip_limit=3"]
    with pytest.raises(Diverged, match=r"no longer finite at step 14; .*last\.pt is the last good"):
        train(read_settings(TrainConfig, flags))
    contents = load_checkpoint(tmp_path / "last.pt")
    assert contents["iter_num"] == 10 and all(
        tensor.isfinite().all() for tensor in contents["model"].values()
    )


def test_jumps_of_the_loss_are_reported(capsys):
    start_logging(is_main=True)
    detector = LossSpikeDetector()
    losses = 3 + 0.05 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    for step, loss in enumerate(losses.tolist(), 1):
        detector.update(step, 5.0 if step in (20, 200, 210) else loss)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("note     step 200: the loss jumped to 5.0000 from a mean")
    assert float(re.search(r"mean of ([\d.]+)", lines[0])[1]) == pytest.approx(3, abs=0.1)


@no_signals
def test_wandb_gets_losses_and_its_run_goes_on(tmp_path, dataset):
    """With wandb's own offline mode, which names its folders by the run's id; its files are its record."""
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    flags = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--wandb_log=True"]
    flags.append("--wandb_project=p")
    for steps in (50, 51):
        done = run_warm("train.py", *flags, f"--max_iters={steps}", env=env)
        assert done.returncode == 0, done.stderr
        files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
        assert len(files) == steps - 49 and all(b"val/loss" in path.read_bytes() for path in files)
    ids = {path.name.rsplit("-", 1)[1] for path in tmp_path.glob("wandb/offline-run-*")}
    assert ids == {load_checkpoint(tmp_path / "out" / "last.pt")["run_id"]}


def test_auto_begins_from_a_model_and_then_goes_on(trained, dataset, tmp_path):
    flags = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}", f"--init_from=auto:{trained}"]
    assert "resumes" not in train_here(*flags, "--max_iters=2", "--learning_rate=1e-9")
    ours, theirs = (
        load_checkpoint(path)["model"]["lm_head.weight"]
        for path in (tmp_path / "last.pt", trained / "ckpt.pt")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert "resumes  after step 2" in train_here(*flags, "--max_iters=3")
