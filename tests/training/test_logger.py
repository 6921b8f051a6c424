"""Where the numbers of a run go: loss.png, TensorBoard, Weights & Biases, log.csv."""

import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import TINY, train_here

from configurator import read_settings
from distrogpt.errors import UserError
from distrogpt.plotting import draw, read_log
from distrogpt.runtime import start_runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.logger import LossPlot, TrainLogger
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.state import TrainState
from model import GPT, GPTConfig

PNG = b"\x89PNG\r\n\x1a\n"


def until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_draws_its_losses_in_the_background(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--loss_plot=True", "--baseline_loss=3"]
    printed = train_here(*flags)
    until((tmp_path / "loss.png").exists)  # train waits for it, but not forever
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert printed.count(", published 3 (+") == 3


def write_log(folder, steps: int) -> None:
    lines = [f"{step},{3 - step / 1000}" for step in range(steps)]
    (folder / "log.csv").write_text("\n".join(["step,loss", *lines]) + "\n")


def test_the_last_evaluation_is_drawn_even_if_the_one_before_is_still_being_drawn(tmp_path):
    plot = LossPlot(TrainConfig(out_dir=str(tmp_path)), interval=0)
    write_log(tmp_path, steps=50)
    plot.redraw()
    plot.finish(60)
    before = (tmp_path / "loss.png").read_bytes()
    plot.redraw()
    write_log(tmp_path, steps=100)
    for _ in range(5):
        plot.redraw()  # waits for nothing
    plot.finish(60)
    assert plot.process.poll() is not None and (tmp_path / "loss.png").read_bytes() != before


def test_evaluations_in_quick_succession_are_drawn_once_at_the_end(tmp_path):
    plot = LossPlot(TrainConfig(out_dir=str(tmp_path)))
    for steps in (50, 100):
        write_log(tmp_path, steps)
        plot.redraw()
    assert plot.process is None  # a drawing takes cores from training
    plot.finish(60)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_a_drawing_that_fails_stops_nothing(tmp_path):
    plot = LossPlot(TrainConfig(out_dir=str(tmp_path)), interval=0)
    for _ in range(2):  # there is no log
        plot.redraw()
        plot.process.kill()
        plot.finish(60)
    plot.command[0] = str(tmp_path / "no-python")
    plot.redraw()
    plot.finish(60)
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs nice values")
def test_drawing_has_a_low_priority_and_gets_no_ctrl_c(tmp_path):
    plot = LossPlot(TrainConfig(out_dir=str(tmp_path)), interval=0)
    plot.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    plot.redraw()
    try:
        assert os.getpriority(os.PRIO_PROCESS, plot.process.pid) == 19
        assert os.getpgid(plot.process.pid) != os.getpgid(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", None)  # none is started while it runs
            plot.redraw()
        plot.finish(0.1)  # waits no longer
    finally:
        plot.process.kill()


def test_without_matplotlib_a_run_says_so_and_trains(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--loss_plot=True", "--max_iters=2"]
    printed = train_here(*flags)
    assert printed.count("loss.png cannot be drawn without matplotlib; run: pip install matplotlib") == 1
    assert "step 2: train loss" in printed
    assert not (tmp_path / "loss.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw({"a": read_log(tmp_path / "log.csv")})


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_and_the_log_have_each_step_once_after_a_resumption(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--tensorboard_log=True"]
    flags += ["--log_interval=1", "--lr_decay_iters=20", "--save_interval=6", "--keep_checkpoints=9"]
    train_here(*flags, "--max_iters=20")
    os.replace(tmp_path / "step-00000006.pt", tmp_path / "last.pt")  # as if killed before its next save
    train_here(*flags, "--max_iters=12", "--init_from=resume", "--eval_interval=6")
    os.replace(tmp_path / "step-00000010.previous-1.pt", tmp_path / "last.pt")
    train_here(*flags, "--max_iters=20", "--init_from=resume")
    found, log = scalars(tmp_path / "tensorboard"), read_log(tmp_path / "log.csv")
    names = {
        "loss",
        "lr",
        "grad_norm",
        "mfu",
        "tokens_per_second",
        "train/loss",
        "val/loss",
        "val/bits_per_byte",
    }
    assert set(found) == names
    for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
        there = np.isfinite(log[name])
        assert [step for step, _ in found[name]] == list(range(1, 21)) == log["step"][there].tolist()
        np.testing.assert_allclose([value for _, value in found[name]], log[name][there], rtol=1e-5)
    evaluated = np.isfinite(log["val_loss"])
    assert [step for step, _ in found["val/loss"]] == log["step"][evaluated].tolist() == [0, 6, 20]
    values = [value for _, value in found["val/loss"]]
    np.testing.assert_allclose(values, log["val_loss"][evaluated], rtol=1e-5)
    # another run in the same folder has its own
    train_here(*flags, "--max_iters=2", "--init_from=scratch")
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["loss"]] == [1, 2]
    assert len(scalars(next(tmp_path.glob("tensorboard.previous-*")))["loss"]) == 20


def test_without_tensorboard_it_is_told_before_anything_is_made(tmp_path, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--tensorboard_log=True"]
    with pytest.raises(UserError, match="pip install tensorboard, or set --tensorboard_log=False"):
        train_here(*flags)
    assert not (tmp_path / "out").exists()


def test_scores_go_wherever_losses_go_and_none_is_needed(tmp_path, dataset, monkeypatch, capsys):
    flags = [*TINY, f"--dataset={dataset}", "--tensorboard_log=True", "--baseline_hellaswag=0.25"]
    config = read_settings(TrainConfig, [*flags, "--wandb_log=True", f"--out_dir={tmp_path}"])
    runtime, model, state, sent = start_runtime("cpu", "float32"), GPT(GPTConfig()), TrainState(), []
    wandb_run = types.SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("finished")
    )
    wandb = types.SimpleNamespace(init=lambda **settings: wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunDirectory(config, runtime) as run, TrainLogger(run, state, model) as logger:
        evaluations = ({"hellaswag": 0.3, "accuracy": 0.5, "val/part": 2.0}, None, {"train": 3.0})
        for state.step, losses in enumerate(evaluations):
            logger.write(losses)
    log = read_log(tmp_path / "log.csv")
    np.testing.assert_array_equal(log["step"], [0, 2])
    np.testing.assert_array_equal(log["hellaswag"], [0.3, np.nan])
    np.testing.assert_array_equal(log["accuracy"], [0.5, np.nan])
    shown = {"val/hellaswag": 0.3, "val/accuracy": 0.5, "val/part/loss": 2.0}
    assert sent == [(0, shown), (2, {"train/loss": 3.0}), "finished"]
    assert set(scalars(tmp_path / "tensorboard")) == {*shown, "train/loss"}
    assert capsys.readouterr().out == "step 0: HellaSwag 0.3000, published 0.25 (+0.0500)\n"


def test_a_row_is_in_the_log_before_its_checkpoint_is_written(tmp_path, dataset, monkeypatch):
    save, steps = torch.save, []

    def save_and_look(*args) -> None:
        steps.append((tmp_path / "log.csv").read_text().splitlines()[-1].split(",")[0])
        save(*args)

    monkeypatch.setattr(torch, "save", save_and_look)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--save_interval=7", "--log_interval=20"]
    train_here(*flags, "--eval_interval=100", "--max_iters=16")
    assert steps == ["0", "0", "16"]
