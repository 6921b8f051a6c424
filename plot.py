"""Draw runs beside each other by their log.csv: python plot.py out-a out-b --by=tokens

The picture of one run is its loss.png: python plot.py OUT_DIR --output=OUT_DIR/loss.png
"""

import os
import sys

from configurator import configure
from distrogpt.settings import PlotConfig

if __name__ == "__main__":
    FOLDERS = [os.path.expanduser(word) for word in sys.argv[1:] if not word.startswith("-")]
    CONFIG = configure(PlotConfig, [word for word in sys.argv[1:] if word.startswith("-")])

from pathlib import Path

import numpy as np

from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors
from distrogpt.plotting import LOG, draw, points, read_log, show, write_figure

__all__ = ["plot", "read_log", "show"]


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


if __name__ == "__main__":
    with cli_errors(CLOSE_OTHERS):
        plot(FOLDERS, CONFIG)
