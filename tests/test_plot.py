"""Curves read from log.csv and drawn: by the command, by a run, in a notebook, in TensorBoard."""

import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from conftest import TINY, assert_user_error, run, train_here

import plot
from configurator import read_settings
from distrogpt.errors import UserError
from distrogpt.plotting import MAX_POINTS, draw, read_log, show, smoothed
from distrogpt.settings import PlotConfig, TrainConfig
from distrogpt.training import logger as logs_file
from distrogpt.training.run_directory import COLUMNS
from train import train

HEADER = ",".join(COLUMNS)
PNG = b"\x89PNG\r\n\x1a\n"


def write_log(folder, rows: list[dict], end: str = "") -> None:
    folder.mkdir(exist_ok=True)
    lines = [",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    (folder / "log.csv").write_text("\n".join([HEADER, *lines]) + "\n" + end)


def write_run(folder, rate: float = 1.0, steps: int = 100) -> None:
    """Write a log of `steps` steps, evaluated at every tenth and at step 0, which has no step of its own."""
    rows = [{"step": 0, "train_loss": 4.0, "val_loss": 4.1}]
    for step in range(1, steps + 1):
        loss = 2 + 2 / (1 + rate * step)
        row = {"step": step, "tokens": 64 * step, "seconds": step / 4 / rate, "loss": loss}
        rows.append(row | ({"train_loss": loss, "val_loss": loss + 0.1} if step % 10 == 0 else {}))
    write_log(folder, rows)


def curves(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): line.get_data() for line in axes.get_lines()}


def test_a_log_is_read_whatever_is_wrong_with_its_lines(tmp_path):
    rows = [{"step": 0, "val_loss": 4.0}, {"step": 5, "loss": 3.5, "lr": 1e-3}]
    write_log(tmp_path, rows, f"6,,\nseven{',' * 11}\n8,,,nan{',' * 8}\n9,512,1.5,3.")
    log = read_log(tmp_path / "log.csv")
    assert list(log) == list(COLUMNS)
    np.testing.assert_array_equal(log["step"], [0, 5, 8])
    np.testing.assert_array_equal(log["val_loss"], [4, np.nan, np.nan])
    np.testing.assert_array_equal(log["loss"], [np.nan, 3.5, np.nan])
    (tmp_path / "log.csv").write_text("step,loss\n1,2.5\n2,2.25\n")  # an older version's
    np.testing.assert_array_equal(read_log(tmp_path / "log.csv")["loss"], [2.5, 2.25])


def test_a_long_log_is_read_and_thinned(tmp_path):
    line = ",64,1.5,3.25,0.001,1,5000" + "," * 5 + "\n"
    text = "".join(f"{step}{line}" for step in range(1, 600_001))
    (tmp_path / "log.csv").write_text(f"{HEADER}\n0{',' * 7}4,4{',' * 3}\n{text}")
    log = read_log(tmp_path / "log.csv")
    figure = draw({"run": log})
    assert len(log["step"]) == 600_001 and log["step"][-1] == 600_000
    steps, losses = curves(figure.axes[0])["step"]
    assert len(steps) <= MAX_POINTS + 1 and steps[-1] == 600_000 and (losses == 3.25).all()


@pytest.mark.parametrize(("by", "between"), [("steps", 10), ("tokens", 640), ("seconds", 2.5)])
def test_runs_are_compared_by_steps_tokens_or_seconds(by, between, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rate=2)
    figure = draw({name: read_log(tmp_path / name / "log.csv") for name in "ab"}, by, 3.12)
    assert len(figure.axes) == 1 and figure.axes[0].get_xlabel() == by
    lines = curves(figure.axes[0])
    x, val = lines["a"]
    np.testing.assert_allclose(x, np.arange(11) * between)
    np.testing.assert_allclose(val[1:], 2.1 + 2 / (1 + np.arange(10, 101, 10)))
    np.testing.assert_allclose(lines["b"][0], x / 2 if by == "seconds" else x)
    colors = {line.get_color() for line in figure.axes[0].get_lines()}
    assert len(colors) == 3  # two runs, and the published level
    assert [text.get_text().strip() for text in figure.axes[0].texts] == ["published 3.12"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_scores_have_panels_if_a_run_has_them(tmp_path):
    write_run(tmp_path / "a")
    write_log(tmp_path / "b", [{"step": 0, "hellaswag": 0.25}, {"step": 9, "val_loss": 3, "hellaswag": 0.3}])
    logs = {name: read_log(tmp_path / name / "log.csv") for name in "ab"}
    figure = draw(logs, baseline_hellaswag=0.2955)
    _, scores = figure.axes
    assert scores.get_ylabel().startswith("HellaSwag") and "published 0.2955" in scores.texts[0].get_text()
    np.testing.assert_array_equal(curves(scores)["b"], [[0, 9], [0.25, 0.3]])
    write_log(tmp_path / "b", [{"step": 5, "loss": 3, "accuracy": 0.5}])
    figure = draw({"b": read_log(tmp_path / "b" / "log.csv")})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats per token)", "accuracy"]


def test_smoothing_keeps_the_ends_and_the_mean():
    values = np.random.default_rng(0).normal(size=1000).cumsum()
    smooth = smoothed(values)
    assert smooth[0] == values[0] and smooth[-1] == pytest.approx(values[-1])
    assert smooth[500] == pytest.approx(values[495:506].mean())
    np.testing.assert_allclose(smoothed(values[:50]), values[:50])


def test_the_first_steps_of_a_long_run_do_not_flatten_the_rest(tmp_path):
    steps = range(1, 1001)
    write_log(tmp_path, [{"step": step, "loss": 10 if step < 10 else 3 + 1 / step} for step in steps])
    low, high = draw({"a": read_log(tmp_path / "log.csv")}, baseline_loss=3.12).axes[0].get_ylim()
    assert 2.9 < low < 3 and 3.12 < high < 3.2


def test_the_command_draws_and_prints_the_best(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rate=2)
    done = run("plot.py", "a", "b", "--by=tokens", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run      b: step 100, best val loss 2.1100 at step 100\n" in done.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "compare.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no run is named"),
        (["none"], "there is no such folder"),
        (["empty"], "log.csv cannot be read"),
        (["other"], "is not a log of train.py"),
        (["fresh"], "no line with a loss yet"),
        (["good", "--output=none/x.png"], "cannot be written"),
        (["good", "--output=x.docx"], "is not the name of a picture"),
    ],
)
def test_mistakes_of_the_command(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("empty", None), ("other", "a,b\n1,2\n"), ("fresh", f"{HEADER}\n")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "log.csv").write_text(text)
    write_run(tmp_path / "good")
    config = read_settings(PlotConfig, words[1:])
    with pytest.raises(UserError, match=f"{message}.*; "):
        plot.plot(words[:1], config)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("x.*"))


def test_mistakes_are_one_line():
    assert_user_error(run("plot.py"), "no run is named")
    assert_user_error(run("plot.py", "out", "--bye=steps"), "did you mean by?")


def test_a_run_draws_its_picture_in_the_background(tmp_path, dataset):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--loss_plot=True", "--baseline_loss=3"]
    printed = train_here(*flags)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)  # the last one is waited for
    assert printed.count(", published 3 (+") == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_the_picture_is_one_of_the_last_evaluation(tmp_path):
    """Asked for while another is drawn, it is drawn afterwards."""
    write_run(tmp_path, steps=50)
    picture = plot.Picture(tmp_path, None, None)
    picture.share = float("inf")
    picture.redraw()
    for _ in range(5):
        picture.redraw()  # waits for nothing
    until(lambda: not picture.drawing())
    before = (tmp_path / "loss.png").read_bytes()
    write_run(tmp_path, steps=100)
    picture.share = 1e-9  # the next one would be due in a year
    picture.redraw()
    picture.finish()
    assert picture.child.poll() == 0
    assert (tmp_path / "loss.png").read_bytes() not in (b"", before)


def until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_child_that_dies_stops_nothing(tmp_path):
    write_run(tmp_path)
    picture = plot.Picture(tmp_path, None, None)
    picture.redraw()
    until(lambda: picture.child)
    picture.child.kill()
    picture.thread.join(60)
    for _ in range(3):
        picture.redraw()
    assert not picture.drawing()
    picture.finish()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_child_ends_with_its_parent(tmp_path):
    write_run(tmp_path)
    code = (
        "import os, pathlib, plot, signal, time\n"
        f"picture = plot.Picture(pathlib.Path({str(tmp_path)!r}), None, None)\n"
        "picture.redraw()\n"
        "while picture.drawing(): time.sleep(0.01)\n"
        "print(picture.child.pid, os.getpgid(picture.child.pid) != os.getpgid(0), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.path.dirname(plot.__file__)
    parent = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL and parent.stderr == ""
    child, own_group = parent.stdout.split()
    assert own_group == "True"  # Ctrl-C is not for it
    until(lambda: not alive(int(child)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # nobody may take notice that it ended
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_without_matplotlib_a_run_says_so_and_trains(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--loss_plot=True", "--max_iters=2"]
    printed = train_here(*flags)
    assert printed.count("loss.png: pip install matplotlib") == 1 and "step 2: train loss" in printed
    assert not (tmp_path / "loss.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw({"a": read_log(tmp_path / "log.csv")})


def test_a_notebook_shows_the_run_in_place(tmp_path, dataset, monkeypatch):
    shown, cell = [], types.SimpleNamespace(execution_count=1)

    class Handle:
        def update(self, picture) -> None:
            shown.append(("update", picture.data))

    def display(picture, display_id) -> Handle:
        shown.append(("display", picture.data))
        return Handle()

    there = types.SimpleNamespace(display=display, Image=lambda data: types.SimpleNamespace(data=data))
    shell = types.SimpleNamespace(display=there, get_ipython=lambda: cell, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", there)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    steps = []

    def live(losses) -> None:
        steps.append([found["step"] for found in losses])
        assert read_log(tmp_path / "log.csv")["step"][-1] == steps[-1][-1]
        show(tmp_path)

    train(read_settings(TrainConfig, flags), on_evaluation=live)
    assert steps == [[0], [0, 10], [0, 10, 20]]
    assert [how for how, _ in shown] == ["display", "update", "update"]
    assert all(data.startswith(PNG) for _, data in shown) and len({data for _, data in shown}) == 3
    cell.execution_count = 2  # run again
    show(tmp_path)
    assert shown[-1][0] == "display"


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
    with pytest.raises(UserError, match="pip install tensorboard, or --tensorboard_log=False"):
        train_here(*flags)
    assert not (tmp_path / "out").exists()


def test_scores_go_wherever_losses_go_and_none_is_needed(tmp_path, dataset, monkeypatch):
    said = []
    flags = [*TINY, f"--dataset={dataset}", "--tensorboard_log=True", "--baseline_hellaswag=0.25"]
    config = read_settings(TrainConfig, [*flags, f"--out_dir={tmp_path}"])
    runtime = types.SimpleNamespace(say=said.append, is_main=True)
    gone = []
    monkeypatch.setattr(logs_file, "start_wandb", lambda config, run_id: types.SimpleNamespace(
        log=lambda values, step: gone.append((step, values)), finish=lambda: gone.append("finished")
    ))  # fmt: skip
    config.wandb_log = True
    with (
        logs_file.RunDirectory(tmp_path, said.append) as folder,
        logs_file.TrainLogger(config, runtime, folder, "0", 0, 0.0) as logs,
    ):
        logs.write(0, {"hellaswag": 0.3, "accuracy": 0.5, "val/part": 2.0})
        logs.write(1, None)
        logs.write(2, {"train": 3.0})
    log = read_log(tmp_path / "log.csv")
    np.testing.assert_array_equal(log["step"], [0, 2])
    np.testing.assert_array_equal(log["hellaswag"], [0.3, np.nan])
    np.testing.assert_array_equal(log["accuracy"], [0.5, np.nan])
    shown = {"val/hellaswag": 0.3, "val/accuracy": 0.5, "val/part/loss": 2.0}
    assert gone == [(0, shown), (2, {"train/loss": 3.0}), "finished"]
    assert set(scalars(tmp_path / "tensorboard")) == {*shown, "train/loss"}
    assert said == ["step 0: HellaSwag 0.3000, published 0.25 (+0.0500)"]


def test_lines_wait_at_most_until_a_save(tmp_path, dataset, monkeypatch):
    """What a checkpoint goes on from is in log.csv before it is written."""
    from distrogpt.checkpoint import atomic_write

    seen = []

    def write(how, *paths) -> None:
        if paths[0].suffix == ".pt":
            seen.append((tmp_path / "log.csv").read_text().splitlines()[-1].split(",")[0])
        atomic_write(how, *paths)

    monkeypatch.setattr("distrogpt.training.run_directory.atomic_write", write)
    monkeypatch.setattr(logs_file, "TOGETHER", 1e9)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--save_interval=7", "--log_interval=1"]
    train_here(*flags, "--eval_interval=100", "--max_iters=16")
    assert seen == ["7", "14", "16"]
