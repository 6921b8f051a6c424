"""Draw runs by their log.csv, beside each other: python plot.py out-a out-b --by=tokens

The same picture of one run is out_dir/loss.png, which a child process redraws at each evaluation (`Picture`
is train.py's end of it, `follow` the child's), so that no step waits for it; and `show` in a notebook.
"""

import sys

from configurator import configure
from distrogpt.settings import PlotConfig, TrainConfig

if __name__ == "__main__":
    FOLDERS = [word for word in sys.argv[1:] if not word.startswith("-")]
    CONFIG = configure(PlotConfig, [word for word in sys.argv[1:] if word.startswith("-")])

import io
import os
import queue
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.errors import UserError, cli_errors

LOG, PICTURE = "log.csv", "loss.png"
MOST = 2000  # points of a line: more than a picture has columns
SHARE = 0.002  # of the machine's time, which drawing may take from a run's steps
WAIT = 4.0  # seconds, at the end of a run, for its last picture
COLORS = ("#4477aa", "#cc6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#777777", "#ee7733")
Log = dict[str, np.ndarray]  # columns by name, nan where a line has none
SHOWN: dict[str, tuple[Any, Any]] = {}  # by out_dir: the notebook's cell, and what it displays


def read_log(path: Path) -> Log:
    """The columns of a log.csv, of this version or an older one, by name; lines that are not whole are left
    out. Raises UserError where it is no log, or has no loss."""
    try:
        head, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    except OSError as error:
        wrong = error.strerror if path.parent.is_dir() else "there is no such folder"
        raise UserError(f"{path} cannot be read ({wrong}); name the out_dir of a run") from None
    names = head.split(",")
    if "step" not in names:
        raise UserError(f"{path} is no log of train.py; name the out_dir of a run")
    table = numbers([line for line in lines if line.count(",") == len(names) - 1], len(names))
    log = dict(zip(names, table.T, strict=True))
    losses = [log[name] for name in ("loss", "train_loss", "val_loss") if name in log]
    if not any(np.isfinite(column).any() for column in losses):
        raise UserError(f"{path} has no line with a loss yet; let the run go on")
    return log


def numbers(lines: list[str], width: int) -> np.ndarray:
    """Lines of `width` numbers each, nan where there is none; lines with anything else are left out."""
    text = "," + ",".join(lines) + ","
    for _ in range(2):  # of three commas, the first time finds the first two
        text = text.replace(",,", ",nan,")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns of what it cannot read
            table = np.fromstring(text[1:], sep=",") if lines else np.empty(0)  # 600,000 lines in a second
        return table.reshape(len(lines), width)
    except (ValueError, DeprecationWarning):
        if len(lines) == 1:
            return np.empty((0, width))
        half = len(lines) // 2
        return np.concatenate([numbers(lines[:half], width), numbers(lines[half:], width)])


def points(log: Log, name: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Where `name` has values, and these. Evaluations beside no logged step have tokens and seconds between
    those of the steps around them."""
    steps, values = log["step"], log.get(name, np.empty(0))
    there = np.isfinite(values) & np.isfinite(steps) if len(values) else np.zeros(len(steps), bool)
    x = steps[there]
    if by != "steps":
        other = log.get(by, np.full(len(steps), np.nan))
        known = np.isfinite(other) & np.isfinite(steps)
        x = np.interp(x, [0, *steps[known]], [0, *other[known]]) if known.any() else np.full(len(x), np.nan)
    return x, values[there] if len(values) else values


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means of a hundredth of all values around each; fewer at the ends, so that it begins where they do."""
    reach = len(values) // 200
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reach = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about MOST of the points, the last one included."""
    every = -(-len(x) // MOST) or 1
    first = (len(x) - 1) % every if len(x) else 0
    return x[first::every], y[first::every]


def draw(
    runs: dict[str, Log],
    by: str = "steps",
    baseline_loss: float | None = None,
    baseline_hellaswag: float | None = None,
) -> Any:
    """A matplotlib figure of the runs by their names: losses, and HellaSwag and accuracy where any has them.
    Raises UserError where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which would change a notebook's settings
    except ImportError:
        raise UserError("a picture needs matplotlib; pip install matplotlib") from None
    panels = {"loss": baseline_loss, "hellaswag": baseline_hellaswag, "accuracy": None}
    for name in ("hellaswag", "accuracy"):
        if not any(len(points(log, name, by)[0]) for log in runs.values()):
            del panels[name]
    figure = Figure(figsize=(8 if len(panels) == 1 else 5.5 * len(panels), 5), layout="constrained")
    for axes, (panel, level) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, (name, log) in enumerate(runs.items()):
            color = COLORS[number % len(COLORS)]
            if panel == "loss":
                draw_losses(axes, log, by, color, "" if len(runs) == 1 else name)
            else:
                axes.plot(*points(log, panel, by), "o-", color=color, markersize=4, label=name)
        if level is not None:
            axes.axhline(level, color="black", linestyle="--", linewidth=0.8)
            where = axes.get_yaxis_transform()
            axes.text(1, level, f"published {level:g} ", transform=where, ha="right", va="bottom", fontsize=8)
        titles = {"loss": "loss (nats per token)", "hellaswag": "HellaSwag (accuracy)"}
        axes.set(xlabel=by, ylabel=titles.get(panel, panel))
        axes.grid(alpha=0.25)
        if panel == "loss" or len(runs) > 1:
            axes.legend(fontsize=8)
    axes = figure.axes[0]
    axes.set_ylim(range_of_losses(runs.values(), baseline_loss))
    if len(runs) > 1:
        axes.set_title("dots: val; dashed: train; pale: each step", fontsize=8)
    return figure


def draw_losses(axes: Any, log: Log, by: str, color: str, name: str) -> None:
    """A run's losses: of the steps, as they are and smoothed, and of the evaluations. Of several runs, each
    has one line in the legend, with its name."""
    x, loss = points(log, "loss", by)
    val, train = points(log, "val_loss", by), points(log, "train_loss", by)
    named = {"loss": "step", "val": "val", "train": "train"}
    if name:
        first = "val" if len(val[0]) else "train" if len(train[0]) else "loss"
        named = dict.fromkeys(named, "_") | {first: name}
    axes.plot(*thinned(x, loss), color=color, linewidth=0.5, alpha=0.25, label="_each step")
    dark = bool(name) and named["loss"] == name
    axes.plot(
        *thinned(x, smoothed(loss)), color=color, linewidth=1, alpha=1 if dark else 0.55, label=named["loss"]
    )
    axes.plot(*train, "o--", color=color, markersize=3, alpha=0.6, label=named["train"])
    axes.plot(*val, "o-", color=color, markersize=4, label=named["val"])


def range_of_losses(logs: Iterable[Log], level: float | None) -> tuple[float, float] | None:
    """Where the axis of losses begins and ends: a long run's first steps are left above it, for what follows
    would be a flat line at its foot. None where a run is not long."""
    shown = [] if level is None else [np.array([level])]
    for log in logs:
        steps, loss = points(log, "loss", "steps")
        if len(loss) < 200:
            return None
        shown.append(loss[steps > steps[-1] / 50])
        for name in ("train_loss", "val_loss"):
            at, losses = points(log, name, "steps")
            shown.append(losses[at > steps[-1] / 50])
    values = np.concatenate(shown)
    margin = 0.05 * float(np.ptp(values))
    return (float(values.min()) - margin, float(values.max()) + margin) if margin else None


def write_figure(figure: Any, path: Path) -> None:
    """Write it as the file's ending says; the whole file, or the old one. Raises UserError."""
    path = Path(os.path.realpath(path))
    kinds, kind = figure.canvas.get_supported_filetypes(), path.suffix[1:].lower() or "png"
    if kind not in kinds or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is no picture's name; end it in .png, .svg or .pdf")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=110)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(drawn.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror}); name another --output") from None


def compare(folders: list[str], config: PlotConfig) -> None:
    """Draw the runs in these folders, and tell the best of each. Raises UserError."""
    if not folders:
        raise UserError("no run is named; write python plot.py OUT_DIR [OUT_DIR ...]")
    runs = {folder: read_log(Path(folder) / LOG) for folder in folders}
    write_figure(draw(runs, config.by, config.baseline_loss, config.baseline_hellaswag), Path(config.output))
    for folder, log in runs.items():
        steps, val = points(log, "val_loss", "steps")
        best = f", best val loss {val.min():.4f} at step {steps[val.argmin()]:.0f}" if len(val) else ""
        print(f"run      {folder}: step {np.nanmax(log['step']):.0f}{best}")
    print(f"plot     {Path(config.output).resolve()}")


def follow(out_dir: str, config: PlotConfig) -> None:
    """train.py's child: redraw out_dir/loss.png at each line on stdin, and answer with the seconds of
    arithmetic that it took; ends with stdin."""
    with suppress(OSError, AttributeError):
        os.nice(19)
    with suppress(ImportError):
        import matplotlib.figure  # noqa: F401 - once, and so not counted
    began = time.process_time()
    for _ in sys.stdin:
        with suppress(Exception):  # a full disk, a log that was moved: perhaps not the next time
            log = {Path(out_dir).name: read_log(Path(out_dir) / LOG)}
            figure = draw(log, config.by, config.baseline_loss, config.baseline_hellaswag)
            write_figure(figure, Path(out_dir) / PICTURE)
        print(time.process_time() - began, flush=True)
        began = time.process_time()


class Picture:
    """A run's loss.png, which a child process draws at each `redraw`, but not so often that it takes more
    than SHARE of the machine. Whatever becomes of the child, nothing is raised, and nothing waits but
    `finish`, some seconds."""

    def __init__(self, out_dir: Path, baseline_loss: float | None, baseline_hellaswag: float | None) -> None:
        levels = [f"--baseline_loss={baseline_loss}", f"--baseline_hellaswag={baseline_hellaswag}"]
        self.command = [
            sys.executable,
            os.path.abspath(__file__),
            str(out_dir.resolve()),
            "--follow=True",
            *levels,
        ]
        self.requests: queue.Queue[bool] = queue.Queue(1)  # one more while one is drawn
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.child: subprocess.Popen | None = None
        self.share, self.cost = SHARE, 0.0  # seconds of the whole machine, of the newest picture
        self.ended = threading.Event()

    def redraw(self) -> None:
        """Ask for a picture of the log as it is now."""
        with suppress(queue.Full, RuntimeError):  # the system may have no thread left
            if not self.thread.ident:
                self.thread.start()
            self.requests.put_nowait(True)

    def drawing(self) -> bool:
        """Whether a picture is still to come."""
        return self.thread.is_alive() and self.requests.unfinished_tasks > 0

    def serve(self) -> None:
        """Pass on each request, and wait until it is drawn: in the thread."""
        how: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in the terminal is not for it
        if sys.version_info >= (3, 11):  # a session of its own may get as much of the machine as the run
            how = {"process_group": 0}
        if os.name == "nt":
            how = {
                "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS
            }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with suppress(OSError, ValueError):
            with subprocess.Popen(self.command, bufsize=0, env=alone, **pipes, **how) as self.child:
                while self.requests.get():
                    self.ended.wait(self.cost / self.share)
                    self.child.stdin.write(b"\n")
                    answer = self.child.stdout.readline()
                    if not answer:
                        break
                    self.cost = float(answer) / (os.cpu_count() or 1)
                    self.requests.task_done()

    def finish(self, wait: bool = True) -> None:
        """Let the child end; `wait` some seconds for the last picture, which it draws anyway."""
        if not self.thread.is_alive():
            return
        self.ended.set()
        seconds = WAIT if wait else 0
        try:
            self.requests.put(False, timeout=seconds)
        except queue.Full:  # in the place of a picture that is asked for and not begun
            with suppress(queue.Empty):
                self.requests.get_nowait()
            with suppress(queue.Full):
                self.requests.put_nowait(False)
        self.thread.join(seconds)


def picture_of(config: TrainConfig, say: Callable[[str], None]) -> Picture | None:
    """The picture of a run with these settings; None where it cannot or shall not be."""
    if not config.loss_plot:
        return None
    if find_spec("matplotlib") is None:
        say(f"note     no {config.out_dir}/{PICTURE}: pip install matplotlib")
        return None
    return Picture(Path(config.out_dir), config.baseline_loss, config.baseline_hellaswag)


def show(out_dir: str | Path, by: str = "steps", **baselines: float) -> None:
    """In a notebook: draw the run's log as it is now, in place of its last picture. Raises UserError."""
    try:
        from IPython import get_ipython
        from IPython.display import Image, display
    except ImportError:
        raise UserError(f"show is for notebooks; elsewhere: python plot.py {out_dir}") from None
    drawn = io.BytesIO()
    draw({str(out_dir): read_log(Path(out_dir) / LOG)}, by, **baselines).savefig(drawn, format="png")
    picture, cell = Image(data=drawn.getvalue()), getattr(get_ipython(), "execution_count", None)
    shown_in, handle = SHOWN.get(str(out_dir), (None, None))
    if handle and shown_in == cell:
        handle.update(picture)
    else:  # a cell that is run again has forgotten what it displayed
        SHOWN[str(out_dir)] = cell, display(picture, display_id=True)


if __name__ == "__main__":
    with cli_errors():
        if CONFIG.follow and FOLDERS:
            follow(FOLDERS[0], CONFIG)
        else:
            compare(FOLDERS, CONFIG)
