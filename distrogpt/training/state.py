"""The progress of a run: the entries of a checkpoint besides the weights and the optimizers."""

import logging
import math
import time
from typing import Any, NamedTuple

import torch

from distrogpt.data.dataset import measured_splits
from distrogpt.evaluation.loss import Losses, evaluation_line
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig

log = logging.getLogger("distrogpt")


class Fit(NamedTuple):
    """How a schedule that is limited by time continues from a step on: see schedule.py."""

    step: int
    progress: float  # the share of the schedule that is over at this step
    total_steps: int  # the step at which all of it will be

    def progress_at(self, step: int) -> float:
        if step >= self.total_steps:
            return 1.0
        return self.progress + (1 - self.progress) * (step - self.step) / (self.total_steps - self.step)


class TrainState:
    """The progress of a run, the same on all ranks except for `elapsed()`."""

    def __init__(self, checkpoint: dict[str, Any] | None = None, started: float = 0.0) -> None:
        """Resumes at a checkpoint's step; with None or {}, starts at step 0. The seconds of this process
        count from `started`, by time.perf_counter(); 0.0: from now on."""
        checkpoint = checkpoint or {}
        self.step = self.first_step = checkpoint.get("iter_num", 0)
        self.lowest_loss = float(checkpoint.get("best_val_loss", math.inf))  # even if it could not be saved
        self.evals_since_best = checkpoint.get("no_lower", 0)
        self.skipped_steps = checkpoint.get("skipped", 0)  # loss or gradient was not finite
        self.consecutive_skips = 0
        self.seconds = checkpoint.get("seconds", 0.0)  # by rank 0's clock, when the last step ended
        self.start_time = (started or time.perf_counter()) - self.seconds
        self.evaluation_seconds = checkpoint.get("evaluation_seconds", 0.0)  # of the last one
        self.fits = [Fit(*fit) for fit in checkpoint.get("fits", ())]  # with max_minutes
        self.evaluated = bool(checkpoint) and checkpoint.get("evaluated", True)  # at this step
        self.val_loss: float | None = None  # the monitored loss, if this process has evaluated this step
        self.stop_requested = False

    def elapsed(self) -> float:
        """Seconds since the run began, those before it was resumed included."""
        return time.perf_counter() - self.start_time

    def early_stop_reason(self, config: TrainConfig) -> str:
        """Why the run ends before max_iters, "" if it continues."""
        if self.step >= config.max_iters:
            return ""
        if config.patience is not None and self.evals_since_best >= config.patience:
            evaluations = "evaluation" if self.evals_since_best == 1 else "evaluations"
            return f"no lower {measured_splits(config)[-1]} loss in {self.evals_since_best} {evaluations}"
        if config.max_minutes is not None and self.time_is_over(config.max_minutes):
            return f"max_minutes={config.max_minutes:g} is reached"
        return ""

    def time_is_over(self, max_minutes: float) -> bool:
        return self.fits[-1].total_steps <= self.step if self.fits else self.seconds >= 60 * max_minutes

    def finished(self, config: TrainConfig) -> bool:
        """Depends on this state and the settings alone: resumed with a larger patience, a run continues."""
        return self.step >= config.max_iters or self.early_stop_reason(config) != ""

    def evaluation_due(self, config: TrainConfig) -> bool:
        if config.eval_only:
            return True
        is_due = self.step % config.eval_interval == 0 or self.finished(config)
        return is_due and not (self.evaluated or self.stop_requested)

    def save_due(self, config: TrainConfig) -> bool:
        """After an evaluation, every save_interval steps, and before the run stops."""
        if config.eval_only:
            return False
        if self.val_loss is not None:
            return self.step > 0 or config.max_iters == 0
        at_interval = config.save_interval is not None and self.step % config.save_interval == 0
        return self.step > self.first_step and (self.stop_requested or at_interval)

    def diverged(self, config: TrainConfig) -> bool:
        finite = self.val_loss is None or math.isfinite(self.val_loss)
        return not finite or self.consecutive_skips >= config.skip_limit

    def record_evaluation(self, losses: Losses | None, monitor: str) -> None:
        """Count the evaluation of this step; its losses are None if a stop was requested during it."""
        if losses is None:
            self.stop_requested = True
            return
        log.info(evaluation_line(self.step, losses))
        self.evaluated, self.val_loss = True, losses[monitor]
        if self.val_loss < self.lowest_loss and self.step > 0:
            self.lowest_loss, self.evals_since_best = self.val_loss, 0
        elif self.step > 0:
            self.evals_since_best += 1

    def record_step(self, applied: bool, scaler: torch.amp.GradScaler) -> None:
        self.step += 1
        self.evaluated, self.val_loss = False, None
        if applied:
            self.consecutive_skips = 0
        elif scaler.get_scale() <= 1:  # above, fp16 still lowers its scale
            self.skipped_steps += 1
            self.consecutive_skips += 1
            count = f"{self.skipped_steps} skipped so far"
            log.info(f"note     step {self.step} is skipped: loss or gradient is not finite ({count})")

    def sync(self, runtime: Runtime, stop_requested: bool) -> None:
        """A request on any rank stops all ranks, and rank 0's clock counts."""
        seconds = self.elapsed() if runtime.is_main else 0.0
        requests, self.seconds = runtime.all_reduce_sum(stop_requested, seconds)
        self.stop_requested = requests > 0

    def to_checkpoint(self) -> dict[str, Any]:
        """The entries of a checkpoint, by the keys that older versions use too."""
        entries = {
            "iter_num": self.step,
            "evaluated": self.evaluated,
            "skipped": self.skipped_steps,
            "no_lower": self.evals_since_best,
            "seconds": self.elapsed(),
            "evaluation_seconds": self.evaluation_seconds,
            "fits": [list(fit) for fit in self.fits],
        }
        return entries if self.val_loss is None else {**entries, "val_loss": self.val_loss}
