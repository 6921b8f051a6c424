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
from functools import partial
from pathlib import Path
from typing import Any

from distrogpt.data.dataset import measured_splits
from distrogpt.errors import UserError, command
from distrogpt.evaluation.loss import Losses
from distrogpt.hardware import peak_flops
from distrogpt.openmp import WAITS
from distrogpt.plotting import PICTURE, temporary_name
from distrogpt.runtime import activity, progress_bar
from distrogpt.settings import TrainConfig
from distrogpt.training.run_directory import COLUMNS, TENSORBOARD, RunDirectory
from distrogpt.training.state import TrainState
from model import GPT

log = logging.getLogger("distrogpt")

DRAWING_INTERVAL = 60.0  # seconds; a drawing delays training on two cores by about one

COLUMN_OF = {"train": "train_loss", "val": "val_loss", "bits_per_byte": "val_bits_per_byte"}  # of log.csv
SCALAR_OF = {name: f"val/{name}" for name in ("bits_per_byte", "hellaswag", "accuracy")}  # others: NAME/loss


class LossSpikeDetector:
    """Reports a loss that exceeds the running mean by more than a tenth of it and by more than six times the
    mean distance from it; at most once in 50 steps."""

    def __init__(self) -> None:
        self.mean, self.distance = 0.0, 0.0
        self.count, self.silent_until = 0, 0

    def update(self, step: int, loss: float) -> None:
        above = loss - self.mean
        is_spike = self.count >= 50 and above > max(0.1 * self.mean, 6 * self.distance)
        if is_spike and step >= self.silent_until:
            self.silent_until = step + 50
            log.info(f"note     step {step}: the loss jumped to {loss:.4f} from a mean of {self.mean:.4f}")
        self.count += 1
        weight = max(1 / self.count, 0.02)  # of the newest loss; a plain mean at first
        self.mean += weight * above
        self.distance += weight * (abs(above) - self.distance)


class TrainLogger:
    """Logs the steps and evaluations of a run, and keeps the evaluations in `history`. Entered before the
    first step, left after the last one. Files are written by the run directory's rank."""

    def __init__(
        self, run: RunDirectory, state: TrainState, model: GPT, on_evaluation: Callable | None = None
    ) -> None:
        """Raises UserError if a package is missing."""
        config, runtime = run.config, run.runtime
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
        self.plot = LossPlot(config) if config.loss_plot and run.writes else None
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            log.info(f"note     {PICTURE} cannot be drawn without matplotlib; run: pip install matplotlib")
            self.plot = None

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
        self.advance(loss=loss, total=self.state.fits[-1].total_steps if self.state.fits else None)
        if step % self.config.log_interval and not self.state.finished(self.config):
            return
        seconds = (time.perf_counter() - self.clock) / (step - self.clock_step)
        speed, mfu = self.tokens_per_step / seconds, self.mfu_per_step_second / seconds
        rates = f"{seconds * 1000:.2f} ms, {speed:,.0f} tokens/s, mfu {mfu:.1%}"
        log.info(f"step {step}: loss {loss:.4f}, {rates}")
        if WAITS.sleeping and not self.busy_reported:
            self.busy_reported = True
            log.info("note     other programs use the CPU: steps are slower, and waiting threads sleep")
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
            self.scalars |= {SCALAR_OF.get(name, f"{name}/loss"): value for name, value in losses.items()}
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

    def seconds_to_draw(self) -> float:
        """How long to wait for the last drawing of loss.png; with max_minutes, it may end after the run."""
        limit = self.config.max_minutes
        return 5.0 if limit is None else max(0.0, min(5.0, 1.02 * 60 * limit - self.state.elapsed()))

    def log_result(self) -> None:
        """Log how the run ended."""
        config, state = self.config, self.state
        if state.stop_requested:
            flag = "" if config.init_from.partition(":")[0] == "auto" else " and --init_from=resume"
            log.info(f"stopped after step {state.step}; resume with the same command{flag}")
        elif not config.eval_only:
            reason, early = state.early_stop_reason(config), ""
            if reason:
                how = "" if reason.startswith("max_minutes") else "early stop "
                early = f"{how}after step {state.step}: {reason}; "
            loss = f"best {measured_splits(config)[-1]} loss {self.run.best_val_loss:.4f}"
            log.info(f"done: {early}{loss} in {state.elapsed():.0f} s; {next_command(config)}")

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.progress_bar.__exit__(kind, *error)
        if self.tensorboard:
            self.tensorboard.close()
        if self.plot:
            self.plot.finish(self.seconds_to_draw()) if kind is None else self.plot.abandon()
        if self.wandb and kind is None:
            self.wandb.finish()


def next_command(config: TrainConfig) -> str:
    """The command to try a model: eval.py if it was trained on answers only, not on whole lines."""
    if config.loss_after is None:
        return command("sample.py", out_dir=config.out_dir)
    split = {"split": "train"} if config.eval_splits == "train" else {}  # val need not exist
    return command("eval.py", out_dir=config.out_dir, **split)


def start_wandb(config: TrainConfig, run_id: str) -> Any:
    """A Weights & Biases run, or the resumed one of this id. Raises UserError if it does not start."""
    try:
        import wandb

        names = {"project": config.wandb_project, "name": config.wandb_run_name}
        return wandb.init(**names, config=asdict(config), id=run_id, resume="allow")
    except Exception as error:
        advice = "run: pip install wandb && wandb login, or set --wandb_log=False"
        raise UserError(f"Weights & Biases cannot be started ({error}); {advice}") from None


class TensorBoard:
    """Writes scalars to out_dir/tensorboard. If that fails, it is reported, and the run continues."""

    def __init__(self, run: RunDirectory, state: TrainState) -> None:
        """Raises UserError if it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:
            advice = "run: pip install tensorboard, or set --tensorboard_log=False"
            raise UserError(f"TensorBoard cannot be started ({error}); {advice}") from None
        # steps that are repeated are written again
        self.open = partial(SummaryWriter, run.path / TENSORBOARD, purge_step=state.step + 1)
        self.writer: Any = None  # opened after an older run's folder has been renamed
        self.failed = False

    def add(self, step: int, scalars: dict[str, float]) -> None:
        if self.failed:
            return
        try:
            self.writer = self.writer or self.open()
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except Exception as error:
            log.info(f"note     {TENSORBOARD} cannot be written ({error}); the run continues without it")
            self.failed = True

    def close(self) -> None:
        if self.writer and not self.failed:
            self.writer.close()


class LossPlot:
    """out_dir/loss.png, drawn by plot.py in a process of low priority: after an evaluation if `interval`
    seconds have passed since the last drawing, and at the end. If that fails, the run continues."""

    def __init__(self, config: TrainConfig, interval: float = DRAWING_INTERVAL) -> None:
        plot = Path(__file__).resolve().parents[2] / "plot.py"
        self.picture = Path(config.out_dir) / PICTURE
        self.command = [sys.executable, str(plot), config.out_dir, f"--output={self.picture}"]
        for name in ("baseline_loss", "baseline_hellaswag"):
            self.command.append(f"--{name}={getattr(config, name)}")
        self.process: subprocess.Popen | None = None
        self.interval, self.started = interval, time.perf_counter()
        self.outdated = False

    def redraw(self) -> None:
        """Draw the log as it is now, unless the last drawing is recent or still under way."""
        is_drawing = self.process is not None and self.process.poll() is None
        self.outdated = is_drawing or time.perf_counter() - self.started < self.interval
        if not self.outdated:
            self.start()

    def start(self) -> None:
        self.started = time.perf_counter()
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if os.name == "nt":
            new_group, low = subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.BELOW_NORMAL_PRIORITY_CLASS
            options["creationflags"] = new_group | low
        with suppress(OSError):  # in its own session, it gets no Ctrl-C from the terminal
            self.process = subprocess.Popen(self.command, start_new_session=True, **options)
            if os.name != "nt":
                os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    @activity("drawing loss.png")
    def finish(self, seconds: float) -> None:
        """Wait for the drawing of the whole log, `seconds` for each process."""
        with suppress(subprocess.TimeoutExpired):
            if self.process:
                self.process.wait(seconds)
            if self.outdated:
                self.start()
            if self.process:
                self.process.wait(seconds)

    def abandon(self) -> None:
        """End the drawing that is under way."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            temporary_name(self.picture, self.process.pid).unlink(missing_ok=True)


def log_comparison(config: TrainConfig, step: int, losses: Losses) -> None:
    """Log how an evaluation compares with published results."""
    published = (
        ("train", "train loss", config.baseline_train_loss),
        ("val", "val loss", config.baseline_loss),
        ("hellaswag", "HellaSwag", config.baseline_hellaswag),
    )
    for name, words, level in published:
        if level is not None and name in losses:
            value = losses[name]
            log.info(f"step {step}: {words} {value:.4f}, published {level:g} ({value - level:+.4f})")
