"""Draw runs beside each other by their log.csv: python plot.py out-a out-b --by=tokens

The picture of one run is its loss.png: python plot.py OUT_DIR --output=OUT_DIR/loss.png
"""

import sys

from configurator import configure
from distrogpt.settings import PlotConfig, TrainConfig

if __name__ == "__main__":
    FOLDERS = [word for word in sys.argv[1:] if not word.startswith("-")]
    CONFIG = configure(PlotConfig, [word for word in sys.argv[1:] if word.startswith("-")])

import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.errors import UserError, cli_errors
from distrogpt.plotting import LOG, PICTURE, draw, points, read_log, show, write_figure

__all__ = ["plot", "read_log", "show"]
SHARE = 0.002  # of the machine's time, which drawing may take from a run's steps
WAIT = 4.0  # seconds, at the end of a run, for its last picture


def plot(folders: list[str], config: PlotConfig) -> None:
    """Draw the runs in these folders, and print the best loss of each. Raises UserError."""
    if not folders:
        raise UserError("no run is named; write python plot.py OUT_DIR [OUT_DIR ...]")
    logs = {folder: read_log(Path(folder) / LOG) for folder in folders}
    write_figure(draw(logs, config.by, config.baseline_loss, config.baseline_hellaswag), Path(config.output))
    for folder, log in logs.items():
        steps, losses = points(log, "val_loss")
        best = ""
        if len(losses):
            best = f", best val loss {losses.min():.4f} at step {steps[losses.argmin()]:.0f}"
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


if __name__ == "__main__":
    with cli_errors():
        if CONFIG.follow and FOLDERS:
            follow(FOLDERS[0], CONFIG)
        else:
            plot(FOLDERS, CONFIG)
