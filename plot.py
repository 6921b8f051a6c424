"""Draw the losses of runs from their log.csv: python plot.py out-a out-b --by=tokens

A run is an out_dir or a .csv file, and can be given a name: python plot.py small=out-a large=logs/b.csv
The picture of one run is its loss.png: python plot.py OUT_DIR --output=OUT_DIR/loss.png
"""

import os
import sys

from configurator import configure
from distrogpt.settings import PlotConfig

if __name__ == "__main__":
    RUNS = [word for word in sys.argv[1:] if not word.startswith("-")]
    CONFIG = configure(PlotConfig, [word for word in sys.argv[1:] if word.startswith("-")])

from pathlib import Path

import numpy as np

from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors
from distrogpt.plotting import LOG, draw, points, read_log, show, write_figure

__all__ = ["plot", "read_log", "show"]


def find_log(word: str) -> tuple[str, Path]:
    """The name of a run and its log.csv, from an out_dir, a .csv file, or NAME= and one of these."""
    name, equals, path = word.partition("=")
    if not equals or os.path.exists(os.path.expanduser(word)):
        name, path = "", word
    path = Path(os.path.expanduser(path))
    if path.suffix == ".csv" and not path.is_dir():
        return name or (str(path.parent) if path.name == LOG else path.stem), path
    return name or str(path), path / LOG


def plot(runs: list[str], config: PlotConfig) -> None:
    """Draw these runs, and print the best loss of each. Raises UserError."""
    if not runs:
        raise UserError("no run is named; write python plot.py OUT_DIR [OUT_DIR ...]")
    paths: dict[str, Path] = {}
    for name, path in map(find_log, runs):
        if paths.setdefault(name, path) != path:
            raise UserError(f"two runs are named {name}; write NAME={path} with another name")
    logs = {name: read_log(path) for name, path in paths.items()}
    for name, log in logs.items():
        if config.by != "steps" and not len(points(log, config.by)[0]):
            raise UserError(f"{paths[name]} has no {config.by}; leave out --by, or that run")
    write_figure(draw(logs, config.by, config.baseline_loss, config.baseline_hellaswag), Path(config.output))
    for name, log in logs.items():
        steps, losses = points(log, "val_loss")
        best = ""
        if len(losses):
            best = f", best val loss {losses.min():.4f} at step {steps[losses.argmin()]:.0f}"
        print(f"run      {name}: step {np.nanmax(log['step']):.0f}{best}")
    print(f"plot     {Path(config.output).resolve()}")


if __name__ == "__main__":
    with cli_errors(CLOSE_OTHERS):
        plot(RUNS, CONFIG)
