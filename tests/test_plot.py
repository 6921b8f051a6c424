"""Curves read from log.csv and drawn: by the command, and in a notebook."""

import sys
import types
from itertools import pairwise

import numpy as np
import pytest
from conftest import TINY, assert_user_error, run

import plot
from configurator import read_settings
from distrogpt.errors import UserError
from distrogpt.plotting import MAX_POINTS, draw, read_log, show, smoothed
from distrogpt.settings import PlotConfig, TrainConfig
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
    """Lines by the first line of their label."""
    return {line.get_label().partition("\n")[0]: line.get_data() for line in axes.get_lines()}


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


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
    steps, losses = curves(figure.axes[0])["mean of 40001"]
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
    best = {"b\nbest val 2.1100", "a\nbest val 2.1198"}
    assert set(labels(figure.axes[0])) == {"published 3.12", *best}  # each at the end of its line
    steps, ends = zip(*(text.xy for text in figure.axes[0].texts), strict=True)
    assert steps[-1] == 1 and len(set(ends)) == 3


def test_scores_have_panels_if_a_run_has_them(tmp_path):
    write_run(tmp_path / "a")
    write_log(tmp_path / "b", [{"step": 0, "hellaswag": 0.25}, {"step": 9, "val_loss": 3, "hellaswag": 0.3}])
    logs = {name: read_log(tmp_path / name / "log.csv") for name in "ab"}
    figure = draw(logs, baseline_hellaswag=0.2955)
    _, scores = figure.axes
    assert scores.get_ylabel().startswith("HellaSwag") and "published 0.2955" in labels(scores)
    np.testing.assert_array_equal(curves(scores)["b"], [[0, 9], [0.25, 0.3]])
    write_log(tmp_path / "b", [{"step": 5, "loss": 3, "accuracy": 0.5}])
    figure = draw({"b": read_log(tmp_path / "b" / "log.csv")})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats per token)", "accuracy"]


def test_smoothing_keeps_the_ends_and_the_mean():
    values = np.random.default_rng(0).normal(size=1000).cumsum()
    smooth = smoothed(values)
    assert smooth[0] == values[0] and smooth[-1] == pytest.approx(values[-34:].mean())
    assert smooth[500] == pytest.approx(values[500 - 33 : 500 + 34].mean())
    np.testing.assert_allclose(smoothed(values[:29]), values[:29])


def test_the_first_steps_of_a_long_run_do_not_flatten_the_rest(tmp_path):
    steps = range(1, 1001)
    write_log(tmp_path, [{"step": step, "loss": 10 if step < 10 else 3 + 1 / step} for step in steps])
    low, high = draw({"a": read_log(tmp_path / "log.csv")}, baseline_loss=3.12).axes[0].get_ylim()
    assert 2.9 < low < 3 and 3.12 < high < 3.2


def test_a_run_that_diverges_is_seen_to_diverge(tmp_path):
    losses = [4.0 - step / 500 for step in range(960)] + [float(9 + step) for step in range(40)]
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    rows[-1]["val_loss"] = 60
    write_log(tmp_path, rows)
    low, high = draw({"a": read_log(tmp_path / "log.csv")}).axes[0].get_ylim()
    assert low < 2.1 and high > 60


def test_the_val_loss_of_step_0_does_not_flatten_a_short_run(tmp_path):
    write_log(
        tmp_path, [{"step": step, "val_loss": 9 if not step else 3 - step / 100} for step in (0, 10, 20)]
    )
    low, high = draw({"a": read_log(tmp_path / "log.csv")}).axes[0].get_ylim()
    assert 2.75 < low < 2.8 and 2.9 < high < 2.95
    write_log(tmp_path, [{"step": 0, "val_loss": 9}])
    low, high = draw({"a": read_log(tmp_path / "log.csv")}).axes[0].get_ylim()
    assert low < 9 < high


def test_the_picture_of_one_run_marks_the_best_and_shows_the_learning_rate(tmp_path):
    vals = {0: 4.0, 10: 3.0, 20: 2.5, 30: 2.75}
    rows = [
        {"step": step, "lr": step / 1000, "train_loss": val - 1, "val_loss": val}
        for step, val in vals.items()
    ]
    write_log(
        tmp_path, [row | {"tokens": 64_000 * row["step"], "seconds": 100 * row["step"]} for row in rows]
    )
    figure = draw({"a": read_log(tmp_path / "log.csv")}, "seconds")
    losses, rates = figure.axes
    (best,) = [text for text in losses.texts if "best" in text.get_text()]
    assert best.get_text() == "best val loss 2.5000\nat step 20" and best.xy == pytest.approx((100 / 3, 2.5))
    lines = {line.get_label(): line for line in losses.get_lines()}
    assert lines["val"].get_zorder() >= lines["train"].get_zorder()
    assert losses.get_lines().index(lines["val"]) > losses.get_lines().index(lines["train"])  # above it
    assert {"train", "val"} <= set(labels(losses)) and figure.get_suptitle() == "a"
    assert losses.get_title(loc="left") == "30 steps, 1,920,000 tokens, 50 minutes"
    assert rates.get_xlabel() == "minutes" and rates.get_ylabel() == "learning\nrate"
    np.testing.assert_allclose(rates.get_lines()[0].get_ydata(), [0, 0.01, 0.02, 0.03])


def test_a_run_may_have_any_name_and_lack_columns(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,accuracy\n1,3.5,0.25\n2,3.25,0.5\n")
    log = read_log(tmp_path / "log.csv")
    for logs in ({"a $ b $x": log}, {"": log, "_": log, "$\\frac$": log}):
        for by in ("steps", "tokens", "seconds"):
            draw(logs, by).savefig(tmp_path / "x.png")


def test_names_and_numbers_have_room(tmp_path):
    columns = ("loss", "val_loss", "hellaswag", "accuracy", "lr")
    write_log(tmp_path, [{"step": step} | dict.fromkeys(columns, 0.3) for step in range(0, 20_001, 1000)])
    log = read_log(tmp_path / "log.csv")
    alone = draw({"a": log}, baseline_hellaswag=0.2955)
    alone.draw_without_rendering()
    boxes = [label.get_window_extent() for label in alone.axes[1].get_xticklabels()]
    assert len(boxes) > 2 and all(left.x1 + 10 < right.x0 for left, right in pairwise(boxes))
    figure = draw({f"{'long/' * 20}{name}": log for name in "ab"})
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(text.get_window_extent().width < axes.bbox.width for text in axes.texts)
        assert any("long/a" in label for label in labels(axes))


def test_many_runs_have_a_legend_and_differ(tmp_path):
    write_log(tmp_path, [{"step": step, "val_loss": 3 - step / 10} for step in (0, 5, 10)])
    axes = draw({f"_{number} $": read_log(tmp_path / "log.csv") for number in range(20)}).axes[0]
    axes.figure.draw_without_rendering()
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == [f"_{number} $, best val 2.0000" for number in range(20)]
    edges = [(box.x1, box.y0) for box in (text.get_window_extent() for text in texts)]
    assert max(edges)[0] <= axes.figure.bbox.x1 and min(y for _, y in edges) > 0
    named = [
        line for line in axes.get_lines() if line.get_label().startswith("_") and "best" in line.get_label()
    ]
    assert len({(line.get_color(), line.get_linestyle()) for line in named}) == 20


def test_the_first_evaluation_is_one_tick(tmp_path):
    write_log(tmp_path, [{"step": 0, "val_loss": 4}])
    axis = draw({"a": read_log(tmp_path / "log.csv")}).axes[0].xaxis
    axis.figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    shown = [t for x, t in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= x <= high]
    assert [label.get_text() for label in shown] == ["0"]


def test_labels_do_not_overlap(tmp_path):
    for number, name in enumerate("abcdef"):
        write_log(
            tmp_path / name, [{"step": step, "val_loss": 3 - step / 10 + number / 1e4} for step in (0, 5, 10)]
        )
    axes = draw({name: read_log(tmp_path / name / "log.csv") for name in "abcdef"}).axes[0]
    axes.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 6
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))


def test_runs_are_named_by_folder_file_or_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b=c"):
        write_run(tmp_path / name)
    (tmp_path / "a" / "log.csv").rename(tmp_path / "old.csv")
    write_run(tmp_path / "a")
    plot.plot(["a", "a/log.csv", "old.csv", "b=c", "large=old.csv", "small=b=c"], PlotConfig())
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert names == ["a:", "old:", "b=c:", "large:", "small:"]
    with pytest.raises(UserError, match=r"two runs are named old; write NAME=old\.csv"):
        plot.plot(["old=a", "old.csv"], PlotConfig())


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
        (["none.csv"], "none.csv cannot be read"),
        (["x=none/log.csv"], "there is no such folder"),
        (["stepless"], "no line with a loss yet"),
        (["old", "--by=tokens"], "old/log.csv has no tokens"),
    ],
)
def test_mistakes_of_the_command(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"empty": None, "other": "a,b\n1,2\n", "fresh": f"{HEADER}\n"}
    texts |= {"stepless": "step,loss\n,3\n", "old": "step,loss\n1,3\n"}
    for name, text in texts.items():
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


def test_a_notebook_shows_the_run_in_place(tmp_path, dataset, monkeypatch):
    shown, cell = [], types.SimpleNamespace(execution_count=1)

    class Handle:
        def update(self, picture) -> None:
            shown.append(("update", picture.data))

    def display(picture, display_id) -> Handle:
        shown.append(("display", picture.data))
        return Handle()

    module = types.SimpleNamespace(display=display, Image=lambda data: types.SimpleNamespace(data=data))
    shell = types.SimpleNamespace(display=module, get_ipython=lambda: cell, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    steps = []

    def live(losses) -> None:
        steps.append([evaluation["step"] for evaluation in losses])
        assert read_log(tmp_path / "log.csv")["step"][-1] == steps[-1][-1]
        show(tmp_path)

    train(read_settings(TrainConfig, flags), on_evaluation=live)
    assert steps == [[0], [0, 10], [0, 10, 20]]
    assert [call for call, _ in shown] == ["display", "update", "update"]
    assert all(data.startswith(PNG) for _, data in shown) and len({data for _, data in shown}) == 3
    cell.execution_count = 2  # run again
    show(tmp_path)
    assert shown[-1][0] == "display"
