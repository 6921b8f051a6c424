"""Curves of runs: read log.csv, draw losses and scores into a file or a notebook. Needs no torch."""

import io
import os
import warnings
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.errors import UserError, command, why_not_written

LOG, PICTURE = "log.csv", "loss.png"  # files of an out_dir
MAX_POINTS = 2000  # of a line: more than a picture has columns
# One style for all pictures: opaque and light, so that they are readable on a dark page too. Okabe and Ito's
# colours, which colour-blind people can tell apart, and a marker for each.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#777777")
MARKERS, LINE_STYLES = "osD^vP*X", ("-", "--", ":")
INK, GREY, GRID = "#1f2328", "#656d76", "#e3e6ea"
RING = {"fillstyle": "none", "markersize": 11, "zorder": 4}
SCORES = {"hellaswag": "HellaSwag (accuracy)", "accuracy": "accuracy"}  # columns, and labels of their axes
TIME_UNITS = ((5 * 3600, 3600, "hours"), (600, 60, "minutes"), (-1, 1, "seconds"))  # above, size, name
Baseline = float | None  # a published value
Log = dict[str, np.ndarray]  # columns by name, nan where a line has no value
DISPLAYED: dict[str, tuple[Any, Any]] = {}  # by out_dir: the number of a notebook's cell, and its picture


def read_log(path: Path) -> Log:
    """The columns of a log.csv; incomplete lines are left out. Raises UserError if it has no loss."""
    try:
        header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")[:-1] or [""]
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
    if not any(len(points(log, name)[0]) for name in ("loss", "train_loss", "val_loss")):
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


def in_time_units(logs: dict[str, Log]) -> tuple[dict[str, Log], str]:
    """The logs, with minutes or hours in place of seconds if a run is long, and the name of the unit."""
    longest = max(points(log, "seconds")[1].max(initial=0) for log in logs.values())
    size, unit = next((size, unit) for above, size, unit in TIME_UNITS if longest > above)
    seconds = {run: log.get("seconds", np.nan * log["step"]) for run, log in logs.items()}
    return {run: {**log, "seconds": seconds[run] / size} for run, log in logs.items()}, unit


def window(count: int) -> int:
    """How many of `count` values `smoothed` averages: about 7%."""
    return 2 * (count // 30) + 1


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of `window` values around each: of fewer at the steep start, of those before at the end."""
    index = np.arange(len(values))
    before = np.minimum(window(len(values)) // 2, index)
    after = np.minimum(before, index[::-1])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MAX_POINTS of the points, the last one included."""
    every = max(1, -(-len(x) // MAX_POINTS))
    return x[::-every][::-1], y[::-every][::-1]


def shorten_name(name: str, length: int) -> str:
    """The end of a long name, as paths differ there."""
    return name if len(name) <= length else f"...{name[3 - length :]}"


def new_figure(width: float, height: float, title: str = "") -> Any:
    """An empty matplotlib figure of `width` x `height` inches. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which would change a notebook's settings
    except ImportError:
        raise UserError("a picture needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=110)
    if title:
        figure.suptitle(
            shorten_name(title, 70),
            x=0.01,
            ha="left",
            fontsize=13,
            fontweight="bold",
            color=INK,
            parse_math=False,
        )
    return figure


def style_axes(axes: Any, xlabel: str = "", ylabel: str = "", subtitle: str = "", grid: str = "both") -> None:
    """Set the labels, frame and grid lines ("x", "y" or "both") as in all pictures."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_title(subtitle, loc="left", fontsize=9.5, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def add_line(axes: Any, x: np.ndarray, y: np.ndarray, number: int, label: str, linestyle: str = "") -> None:
    """A line with the colour and, unless it has many points, the marker of this number."""
    linestyle = linestyle or LINE_STYLES[number // len(COLORS) % len(LINE_STYLES)]
    style = {"color": COLORS[number % len(COLORS)], "linestyle": linestyle, "linewidth": 1.8, "label": label}
    marker = MARKERS[number % len(MARKERS)] if len(x) <= 50 else ""
    axes.plot(x, y, marker=marker, markersize=4.5, zorder=3, **style)


def label_ends(axes: Any) -> None:
    """Write the label of each line beside its end, or higher if it would overlap another; many labels into a
    legend. Call it after set_ylim."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    lines = [line for line in axes.get_lines() if line.get_label()[:6] != "_child" and len(line.get_xdata())]
    if len(lines) > len(COLORS):
        texts = [line.get_label().replace("\n", ", ") for line in lines]
        place = {
            "loc": "upper left",
            "bbox_to_anchor": (1, 1),
            "frameon": False,
            "fontsize": 8,
            "handlelength": 4,
        }
        for text in axes.legend(lines, texts, **place).get_texts():
            text.set_parse_math(False)
        return
    labels: list[tuple[float, float]] = []  # x, and the upper edge
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xydata()[-1]
        end = x if line.get_transform() == axes.transData else right  # of a baseline
        half = 0.024 * (high - low) * len(line.get_label().splitlines())  # of its height
        near = [top for other, top in labels if abs(other - end) < 0.3 * (right - left)]
        height = max([low, *near, y - half]) + half
        labels.append((end, height + half))
        style = {"color": line.get_color(), "fontsize": 9, "fontweight": "bold", "va": "center"}
        style |= {"xycoords": line.get_transform(), "textcoords": "offset points", "annotation_clip": False}
        style["bbox"] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5}  # above other lines
        axes.annotate(line.get_label(), (x, height), (9, 0), parse_math=False, **style)


def draw(
    logs: dict[str, Log],
    by: str = "steps",
    baseline_loss: Baseline = None,
    baseline_hellaswag: Baseline = None,
    title: str = "",
) -> Any:
    """A figure of the runs by their names: losses, HellaSwag and accuracy if a run has them, and the learning
    rate if it is one run."""
    alone, (run, log) = len(logs) == 1, next(iter(logs.items()))
    subtitle = extent(log) if alone else "val loss; pale: training loss, running mean"
    logs, unit = in_time_units(logs) if by == "seconds" else (logs, by)
    scores = [name for name in SCORES if any(len(points(log, name)[0]) for log in logs.values())]
    rows = [["loss", *scores], ["lr", *scores]][: 2 if alone and len(points(log, "lr")[0]) else 1]
    figure = new_figure(5.5 * len(rows[0]) if scores else 8, 5, title or (run if alone else ""))
    panels = figure.subplot_mosaic(rows, sharex=True, height_ratios=[5, 1][: len(rows)])
    loss = panels["loss"]
    style_axes(loss, unit if len(rows) == 1 else "", "loss (nats per token)", subtitle)
    loss.margins(x=0.02)
    for name, value in (("loss", baseline_loss), ("hellaswag", baseline_hellaswag)):
        if value is not None and name in panels:
            panels[name].axhline(
                value, color=INK, linestyle="--", linewidth=0.9, label=f"published {value:g}"
            )
    if alone:
        draw_run(loss, logs[run], by)
    else:
        draw_runs(loss, logs, by)
    loss.set_ylim(loss_range(logs.values(), by, baseline_loss))
    label_ends(loss)
    if len(rows) == 2:
        style_axes(panels["lr"], unit, "learning\nrate", grid="x")
        x, rates = points(logs[run], "lr", by)
        panels["lr"].plot(*thinned(x, rates), color=INK, linewidth=1.2)
        panels["lr"].set_yticks([0, rates.max()], ["0", f"{rates.max():.3g}"])
    for name in scores:
        style_axes(panels[name], unit, SCORES[name])
        for number, (run, log) in enumerate(logs.items()):
            x, values = points(log, name, by)
            label = f"{values[-1]:.3g}" if alone else shorten_name(run, 30)
            add_line(panels[name], x, values, number, label)
        label_ends(panels[name])
    if by != "seconds":
        from matplotlib.ticker import MaxNLocator

        axis = loss.xaxis  # of all panels
        count = 6 if scores else "auto"  # "auto" is too many for the numbers of narrow panels
        axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        axis.set_major_formatter(lambda x, _: shorten_count(x) if by == "tokens" else f"{x:,.0f}")
    return figure


def shorten_count(count: float) -> str:
    """20M for 20,000,000."""
    size, letter = next((pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= pair[0]), (1, ""))
    return f"{count / size:g}{letter}"


def extent(log: Log) -> str:
    """How long a run is so far: its steps, tokens and time."""
    logs, unit = in_time_units({"": log})
    parts = {
        "steps": points(log, "step")[1],
        "tokens": points(log, "tokens")[1],
        unit: points(logs[""], "seconds")[1],
    }
    ends = {name: round(values[-1]) for name, values in parts.items() if len(values)}
    return ", ".join(f"{end:,} {name[:-1] if end == 1 else name}" for name, end in ends.items())


def draw_run(axes: Any, log: Log, by: str) -> None:
    """The losses of one run: of its steps, also averaged, and of evaluations, with a mark at the best."""
    x, losses = points(log, "loss", by)
    n = window(len(x))
    axes.plot(*thinned(x, losses), color=GREY, linewidth=0.5, alpha=0.3)
    label = f"mean of {n}\nlogged steps" if n > 1 else "logged steps"
    marker = "." if n == len(x) else ""  # a single point has no line
    axes.plot(*thinned(x, smoothed(losses)), marker=marker, color=GREY, linewidth=1, label=label)
    add_line(axes, *points(log, "train_loss", by), 1, "train", "--")
    steps, (x, losses) = points(log, "val_loss")[0], points(log, "val_loss", by)
    add_line(axes, x, losses, 0, "val")  # above train
    if len(x):
        best = losses.argmin()
        end, text = (x[best], losses[best]), f"best val loss {losses[best]:.4f}\nat step {steps[best]:,.0f}"
        axes.plot(*end, "o", color=INK, **RING)
        corner = 1 if best > 0.6 * len(x) else 0 if best < 0.3 * len(x) else 0.5  # of the text
        side = {0: "left", 0.5: "center", 1: "right"}[corner]
        arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 6, "relpos": (corner, 0)}
        style = {"textcoords": ("data", "axes fraction"), "ha": side, "color": INK, "arrowprops": arrow}
        axes.annotate(text, end, (x[best], 0.8), **style)


def draw_runs(axes: Any, logs: dict[str, Log], by: str) -> None:
    """The val losses of runs, or their training losses if they have no other, and pale the latter's mean."""
    for number, (run, log) in enumerate(logs.items()):
        x, losses = points(log, "loss", by)
        mean = thinned(x, smoothed(losses))
        axes.plot(*mean, color=COLORS[number % len(COLORS)], linewidth=0.8, alpha=0.4)
        curves = {"val": points(log, "val_loss", by), "train": points(log, "train_loss", by), "step": mean}
        kind, (x, losses) = next((kind, curve) for kind, curve in curves.items() if len(curve[0]))
        best, color = losses.argmin(), COLORS[number % len(COLORS)]
        add_line(axes, x, losses, number, f"{shorten_name(run, 30)}\nbest {kind} {losses[best]:.4f}")
        axes.plot(x[best], losses[best], "o", color=color, **RING)


def loss_range(logs: Iterable[Log], by: str, baseline: Baseline) -> tuple[float, float] | None:
    """The range of the y axis: that of the losses after the first twentieth, which would flatten the others,
    without outliers among steps, but with the last losses: a run may diverge. None if they are all equal."""
    curves = [(name, *points(log, name, by)) for log in logs for name in ("loss", "train_loss", "val_loss")]
    curves = [(name, x, losses) for name, x, losses in curves if len(x) and np.isfinite(x[-1])]
    start = max((x[-1] for _, x, _ in curves), default=0) / 20
    shown = [losses[-1] for _, _, losses in curves] + ([] if baseline is None else [baseline])
    for name, x, losses in curves:
        if (later := losses[x > start]).size:
            shown += [*np.quantile(later, (0.01, 0.99) if name == "loss" else (0, 1))]
    margin = 0.05 * (max(shown, default=0) - min(shown, default=0))
    return (min(shown) - margin, max(shown) + margin) if margin else None


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that the font lacks, one by one
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
