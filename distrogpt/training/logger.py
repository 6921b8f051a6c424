"""Where a run's numbers go: lines and a progress bar on the screen; log.csv, loss.png, Weights & Biases and
TensorBoard."""

import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrogpt.errors import UserError
from distrogpt.evaluation.loss import Losses
from distrogpt.hardware import peak_flops
from distrogpt.openmp import WAITS
from distrogpt.plotting import PICTURE
from distrogpt.runtime import Runtime, progress_bar
from distrogpt.settings import TrainConfig
from distrogpt.training.guards import LossSpikeDetector
from distrogpt.training.run_directory import COLUMNS, TENSORBOARD, RunDirectory
from distrogpt.training.state import TrainState
from model import GPT

log = logging.getLogger("distrogpt")

COLUMN_OF = {"train": "train_loss", "val": "val_loss", "bits_per_byte": "val_bits_per_byte"}  # of log.csv
STEP_SCALARS = ("loss", "lr", "grad_norm", "mfu", "tokens_per_second")
BUSY = "note     other programs use the cores: steps take longer, and threads sleep while they wait"


class TrainLogger:
    """Logs the steps and evaluations of a run, and keeps the evaluations in `history`.

    Entered before the first step, left after the last one. Files are written by the run directory's rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        run: RunDirectory,
        state: TrainState,
        model: GPT,
        on_evaluation: Callable[[list[dict[str, float]]], object] | None = None,
    ) -> None:
        """Raises UserError if a package is missing."""
        self.config, self.run, self.state = config, run, state
        self.on_evaluation = on_evaluation if runtime.is_main else None
        self.history: list[dict[str, float]] = []
        self.row: dict[str, Any] = {}  # of log.csv, for this step
        self.scalars: dict[str, float] = {}  # the same for Weights & Biases and TensorBoard
        self.spike_detector, self.busy_reported = LossSpikeDetector(), False
        sequences = config.gradient_accumulation_steps * config.batch_size
        self.tokens_per_step = sequences * config.block_size
        peak = peak_flops(runtime.device, runtime.dtype)
        self.mfu_per_step_second = model.estimate_mfu(sequences / runtime.world_size, 1.0, peak)
        last_step = state.step if config.eval_only else config.max_iters
        self.progress_bar = progress_bar(state.step, last_step, runtime)
        self.wandb = start_wandb(config, run.run_id) if config.wandb_log and runtime.is_main else None
        self.tensorboard = TensorBoard(run, state) if config.tensorboard_log and run.writes else None
        self.plot = LossPlot(config) if config.loss_plot and run.writes and has_matplotlib(config) else None

    def __enter__(self) -> "TrainLogger":
        self.advance = self.progress_bar.__enter__()
        self.reset_clock()
        return self

    def reset_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.state.step

    def log_step(self, loss: float, grad_norm: float, lr: float, applied: bool) -> None:
        """Report a step every log_interval steps, and the last one; `write` writes its numbers."""
        step = self.state.step
        if applied:
            self.spike_detector.update(step, loss)
        self.advance(loss=loss)
        if step % self.config.log_interval and not self.state.finished(self.config):
            return
        seconds = (time.perf_counter() - self.clock) / (step - self.clock_step)
        speed, mfu = self.tokens_per_step / seconds, self.mfu_per_step_second / seconds
        log.info(
            f"step {step}: loss {loss:.4f}, {seconds * 1000:.2f} ms, {speed:,.0f} tokens/s, mfu {mfu:.1%}"
        )
        if WAITS.sleeping and not self.busy_reported:
            self.busy_reported = True
            log.info(BUSY)
        self.row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": round(speed)}
        self.scalars = {**self.row, "mfu": mfu}
        self.row |= {"tokens": step * self.tokens_per_step, "seconds": round(self.state.elapsed(), 3)}
        self.reset_clock()

    def write(self, losses: Losses | None) -> None:
        """Write the numbers of this step, if it was reported, and of its evaluation, if there was one."""
        step = self.state.step
        if losses:
            self.history.append({"step": step, **losses})
            columns = {COLUMN_OF.get(name, name): value for name, value in losses.items()}
            self.row |= {name: value for name, value in columns.items() if name in COLUMNS}
            self.scalars |= scalar_names(losses)
            log_comparison(self.config, step, losses)
        if self.row:
            self.run.append_log({"step": step, **self.row})
            if self.wandb:
                self.wandb.log(self.scalars, step=step)
            if self.tensorboard:
                self.tensorboard.add(step, self.scalars)
        self.row, self.scalars = {}, {}
        if losses:
            if self.plot:
                self.plot.redraw()
            if self.on_evaluation:
                self.on_evaluation(self.history)
            self.reset_clock()

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.progress_bar.__exit__(kind, *error)
        if self.tensorboard:
            self.tensorboard.close()
        if self.plot and kind is None:
            self.plot.finish()
        if self.wandb and kind is None:
            self.wandb.finish()


def start_wandb(config: TrainConfig, run_id: str) -> Any:
    """A Weights & Biases run, or the resumed one of this id. Raises UserError if it does not start."""
    try:
        import wandb

        names = {"project": config.wandb_project, "name": config.wandb_run_name}
        return wandb.init(**names, config=asdict(config), id=run_id, resume="allow")
    except Exception as error:
        raise UserError(
            f"wandb does not start ({error}); pip install wandb and log in, or --wandb_log=False"
        ) from None


class TensorBoard:
    """Writes scalars to out_dir/tensorboard; if that fails, it is reported, and the run continues without."""

    def __init__(self, run: RunDirectory, state: TrainState) -> None:
        """Raises UserError if it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:
            raise UserError(
                f"TensorBoard does not start ({error}); pip install tensorboard, or --tensorboard_log=False"
            ) from None
        self.run, self.writer_class, self.failed = run, SummaryWriter, False
        self.first_step = state.step + state.evaluated  # the first whose evaluation is not written yet
        self.writer: Any = None  # opened after an older run's folder has been renamed

    def add(self, step: int, scalars: dict[str, float]) -> None:
        if self.failed:
            return
        try:
            if self.writer is None:
                self.writer = self.writer_class(self.run.path / TENSORBOARD, purge_step=self.first_step)
                row = self.run.resumed_row
                if row.get("step") == str(self.first_step):  # it stays in log.csv, but is purged here
                    scalars = {name: float(row[name]) for name in STEP_SCALARS if row.get(name)} | scalars
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except Exception as error:
            log.info(f"note     {TENSORBOARD} takes no more ({error}); the run goes on without")
            self.failed = True

    def close(self) -> None:
        if self.writer and not self.failed:
            self.writer.close()


def has_matplotlib(config: TrainConfig) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        log.info(f"note     no {config.out_dir}/{PICTURE}: pip install matplotlib")
        return False
    return True


class LossPlot:
    """out_dir/loss.png, which plot.py draws in a process of low priority. Its failures end no run."""

    def __init__(self, config: TrainConfig) -> None:
        plot = Path(__file__).resolve().parents[2] / "plot.py"
        self.command = [sys.executable, str(plot), config.out_dir, f"--output={config.out_dir}/{PICTURE}"]
        for name in ("baseline_loss", "baseline_hellaswag"):
            self.command.append(f"--{name}={getattr(config, name)}")
        self.process: subprocess.Popen | None = None
        self.outdated = False

    def drawing(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def redraw(self) -> None:
        """Draw the log as it is now, unless an earlier drawing is still under way."""
        self.outdated = self.drawing()
        if self.outdated:
            return
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if os.name == "nt":
            new_group, low = subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.BELOW_NORMAL_PRIORITY_CLASS
            options["creationflags"] = new_group | low
        elif sys.version_info >= (3, 11):  # in another group, it gets no Ctrl-C from the terminal
            options["process_group"] = 0
        with suppress(OSError):
            self.process = subprocess.Popen(self.command, **options)
            if os.name != "nt":
                os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def finish(self, seconds: float = 5.0) -> None:
        """Wait for the drawing of the whole log."""
        end = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            while self.process:
                self.process.wait(max(0.0, end - time.monotonic()))
                if not self.outdated:
                    return
                self.redraw()


def scalar_names(losses: Losses) -> dict[str, float]:
    """An evaluation by the names in Weights & Biases and TensorBoard: train/loss, val/bits_per_byte."""
    scores = {name: f"val/{name}" for name in ("bits_per_byte", "hellaswag", "accuracy")}
    return {scores.get(name, f"{name}/loss"): value for name, value in losses.items()}


def log_comparison(config: TrainConfig, step: int, losses: Losses) -> None:
    """Log how an evaluation compares with published results."""
    published = {"train": config.baseline_train_loss, "val": config.baseline_loss}
    published["hellaswag"] = config.baseline_hellaswag
    words = {"train": "train loss", "val": "val loss", "hellaswag": "HellaSwag"}
    for name, level in published.items():
        if level is not None and name in losses:
            value = losses[name]
            log.info(f"step {step}: {words[name]} {value:.4f}, published {level:g} ({value - level:+.4f})")
