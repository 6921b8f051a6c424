"""Curves of runs: read log.csv, draw losses and scores into a file or a notebook. Needs no torch."""

import io
import os
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.errors import UserError, command, why_not_written

LOG, PICTURE = "log.csv", "loss.png"  # files of an out_dir
MAX_POINTS = 2000  # of a line: more than a picture has columns
COLORS = ("#4477aa", "#cc6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#777777", "#ee7733")
Baseline = float | None  # a published value
Log = dict[str, np.ndarray]  # columns by name, nan where a line has no value
DISPLAYED: dict[str, tuple[Any, Any]] = {}  # by out_dir: the number of a notebook's cell, and its picture


def read_log(path: Path) -> Log:
    """The columns of a log.csv; incomplete lines are left out. Raises UserError if it has no loss."""
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    except OSError as error:
        reason = error.strerror if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"{path} cannot be read ({reason}); name the out_dir of a run") from None
    names = header.split(",")
    if "step" not in names:
        raise UserError(f"{path} is not a log of train.py; name the out_dir of a run")
    values = array("d")  # a list would take four times the memory
    for line in lines:
        with suppress(ValueError):  # a line that is damaged
            numbers = [float(field or "nan") for field in line.split(",")]
            if len(numbers) == len(names):
                values.extend(numbers)
    log = dict(zip(names, np.array(values).reshape(-1, len(names)).T, strict=True))
    losses = [log[name] for name in ("loss", "train_loss", "val_loss") if name in log]
    if not any(np.isfinite(column).any() for column in losses):
        raise UserError(f"{path} has no line with a loss yet; wait for the first evaluation")
    return log


def points(log: Log, name: str, by: str = "steps") -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve: the lines that have a value of `name`. Evaluations between two log lines have their
    tokens and seconds interpolated."""
    steps, nothing = log["step"], np.full(len(log["step"]), np.nan)
    values = log.get(name, nothing)
    known = np.isfinite(values + steps)
    x = steps[known]
    if by != "steps":
        other = log.get(by, nothing)
        logged = np.isfinite(other + steps)
        x = np.interp(x, [0, *steps[logged]], [0, *other[logged]]) if logged.any() else nothing[known]
    return x, values[known]


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of a hundredth of all values around each, of fewer near the ends."""
    index = np.arange(len(values))
    reach = np.minimum(len(values) // 200, np.minimum(index, index[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MAX_POINTS of the points, the last one included."""
    every = max(1, -(-len(x) // MAX_POINTS))
    return x[::-every][::-1], y[::-every][::-1]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which would change a notebook's settings
    except ImportError:
        raise UserError("a picture needs matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw(
    logs: dict[str, Log],
    by: str = "steps",
    baseline_loss: Baseline = None,
    baseline_hellaswag: Baseline = None,
) -> Any:
    """A figure of the runs by their names: losses, and HellaSwag and accuracy if a run has them."""
    panels = {"loss": ("loss (nats per token)", baseline_loss)}
    panels |= {"hellaswag": ("HellaSwag (accuracy)", baseline_hellaswag), "accuracy": ("accuracy", None)}
    for name in ("hellaswag", "accuracy"):
        if not any(len(points(log, name)[0]) for log in logs.values()):
            del panels[name]
    figure = new_figure(8 if len(panels) == 1 else 5.5 * len(panels), 5)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, (title, baseline)) in zip(all_axes, panels.items(), strict=True):
        for number, (run, log) in enumerate(logs.items()):
            color = COLORS[number % len(COLORS)]
            if name == "loss":
                draw_losses(axes, log, by, color, run if len(logs) > 1 else "")
            else:
                axes.plot(*points(log, name, by), "o-", color=color, markersize=4, label=run)
        if baseline is not None:
            axes.axhline(baseline, color="black", linestyle="--", linewidth=0.8)
            text = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 8}
            axes.text(1, baseline, f"published {baseline:g} ", **text)
        axes.set(xlabel=by, ylabel=title)
        axes.grid(alpha=0.25)
        if name == "loss" or len(logs) > 1:
            axes.legend(fontsize=8)
    all_axes[0].set_ylim(loss_range(logs.values(), baseline_loss))
    if len(logs) > 1:
        all_axes[0].set_title("dots: val; dashed: train; pale: each step", fontsize=8)
    return figure


def draw_losses(axes: Any, log: Log, by: str, color: str, run: str) -> None:
    """Losses of steps, as they are and smoothed, and of evaluations; a named run has one legend entry."""
    x, loss = points(log, "loss", by)
    val, train = points(log, "val_loss", by), points(log, "train_loss", by)
    labels = {"loss": "step", "val": "val", "train": "train"}
    if run:
        first = "val" if len(val[0]) else "train" if len(train[0]) else "loss"
        labels = {"loss": "_", "val": "_", "train": "_", first: run}
    alpha = 1 if run and labels["loss"] == run else 0.55
    axes.plot(*thinned(x, loss), color=color, linewidth=0.5, alpha=0.25, label="_each step")
    axes.plot(*thinned(x, smoothed(loss)), color=color, linewidth=1, alpha=alpha, label=labels["loss"])
    axes.plot(*train, "o--", color=color, markersize=3, alpha=0.6, label=labels["train"])
    axes.plot(*val, "o-", color=color, markersize=4, label=labels["val"])


def loss_range(logs: Iterable[Log], baseline: Baseline) -> tuple[float, float] | None:
    """The y axis without a long run's first steps, which flatten the rest; None if a run is not long."""
    shown = [np.array([] if baseline is None else [baseline])]
    for log in logs:
        steps, loss = points(log, "loss")
        if len(loss) < 200:
            return None
        for name in ("loss", "train_loss", "val_loss"):
            x, losses = points(log, name)
            shown.append(losses[x > steps[-1] / 50])
    values = np.concatenate(shown)
    margin = 0.05 * float(np.ptp(values))
    return (float(values.min()) - margin, float(values.max()) + margin) if margin else None


def temporary_name(path: Path, process: int) -> Path:
    """Where the process of this number writes a picture, until it is complete."""
    return path.with_name(f"{path.name}.{process}.tmp")


def write_figure(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write it in the format of the file's ending, without leaving half a file. Raises UserError."""
    path = Path(os.path.realpath(path))
    suffix = path.suffix[1:].lower() or "png"
    if suffix not in figure.canvas.get_supported_filetypes() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is not the name of a picture; end it in .png, .svg or .pdf")
    temporary = temporary_name(path, os.getpid())
    try:
        figure.savefig(temporary, format=suffix, dpi=dpi)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = why_not_written(error, path)
        raise UserError(f"{path} cannot be written ({reason}); name another file") from None


def show(out_dir: str | Path, by: str = "steps", **baselines: float) -> None:
    """In a notebook, draw the log of a run as it is now, in place of its last picture. Raises UserError."""
    out_dir = os.path.expanduser(out_dir)
    try:
        from IPython import get_ipython
        from IPython.display import Image, display
    except ImportError:
        raise UserError(f"show is for notebooks; elsewhere: {command('plot.py', out_dir)}") from None
    png = io.BytesIO()
    draw({str(out_dir): read_log(Path(out_dir) / LOG)}, by, **baselines).savefig(png, format="png")
    picture, cell = Image(data=png.getvalue()), getattr(get_ipython(), "execution_count", None)
    displayed_in, handle = DISPLAYED.get(str(out_dir), (None, None))
    if handle and displayed_in == cell:
        handle.update(picture)
    else:  # a cell that is run again has lost its picture
        DISPLAYED[str(out_dir)] = cell, display(picture, display_id=True)
