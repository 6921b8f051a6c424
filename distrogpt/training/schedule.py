"""The learning rate over the steps of a run; with max_minutes, a schedule that ends when the time is over.

A run of some minutes does not know how many steps it will have. It measures its steps and evaluations, and
fits the schedule to the time that is left: after 2, 4, 8, ... steps, and each hundredth of the run. A fit has
the share of the schedule that is over at a step (its progress), and the step at which all of it will be. From
there on, progress grows by the same amount with each step. So the learning rate does not jump: if steps get
slower, the rest of the schedule takes fewer of them.

Fits are part of the checkpoints and of schedule.csv. A resumed run repeats those which were made after its
checkpoint, so that it repeats the same steps.
"""

import math
import time
from collections import deque
from dataclasses import replace

from torch.optim import Optimizer

from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.state import Fit, TrainState

FITS = 100  # of a run, besides the first ones
RECENT = 5  # fits: how long a step takes is the mean since the fifth last
END_SECONDS, PLOT_SECONDS = 0.3, 1.2  # after the last evaluation: the last checkpoint and the end of the
# process; the last loss.png


def get_lr(step: float, config: TrainConfig) -> float:
    """Learning rate of a step: linear warm-up over warmup_iters, then lr_schedule's decay to min_lr: half a
    cosine, or for 'wsd' (arXiv 2405.18392) a line in the last `cooldown` of the steps, constant before."""
    peak = config.learning_rate
    if not config.decay_lr:
        return peak
    min_lr = peak / 10 if config.min_lr is None else config.min_lr
    decay_iters = config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
    if step < config.warmup_iters:
        return peak * (step + 1) / (config.warmup_iters + 1)
    if step >= decay_iters:
        return min_lr
    if config.lr_schedule == "cosine":
        progress = (step - config.warmup_iters) / (decay_iters - config.warmup_iters)
        return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    remaining = (decay_iters - step) / (config.cooldown * decay_iters)  # of the cooldown; above 1 before it
    return min_lr + (peak - min_lr) * min(1.0, remaining)


def set_learning_rates(optimizers: list[Optimizer], step: float, config: TrainConfig) -> float:
    """Scale each group's own peak as the schedule does; returns the learning rate of the step."""
    lr = get_lr(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr / config.learning_rate * group["initial_lr"]
    return lr


def shortened(config: TrainConfig, total_steps: int) -> TrainConfig:
    """The settings with a schedule of total_steps; its warm-up takes at most a tenth of them."""
    decay_iters = config.lr_decay_iters
    if decay_iters is not None and config.max_iters != TrainConfig.max_iters:  # else there is no share of it
        decay_iters = math.ceil(total_steps * decay_iters / max(1, config.max_iters))
    if decay_iters is not None:
        decay_iters = min(decay_iters, total_steps)
    warmup_iters = min(config.warmup_iters, total_steps // 10)
    return replace(config, max_iters=total_steps, lr_decay_iters=decay_iters, warmup_iters=warmup_iters)


def end_seconds(config: TrainConfig) -> float:
    """How long a run takes after its last evaluation."""
    return END_SECONDS + (PLOT_SECONDS if config.loss_plot else 0.0)


def steps_until(
    seconds: float, step: int, seconds_per_step: float, evaluation_seconds: float, eval_interval: int
) -> int:
    """How many steps after `step` fit into some seconds, with the evaluations that are due before the last of
    these steps: one now, if `step` is a multiple of eval_interval."""
    if step % eval_interval == 0:
        seconds -= evaluation_seconds
    seconds = max(0.0, seconds)
    first = min(seconds / seconds_per_step, eval_interval - step % eval_interval)  # up to an evaluation
    seconds -= first * seconds_per_step
    seconds_per_interval = evaluation_seconds + eval_interval * seconds_per_step
    intervals, seconds = divmod(seconds, seconds_per_interval)
    last = max(0.0, seconds - evaluation_seconds) / seconds_per_step
    return round(first + intervals * eval_interval + last)


class Schedule:
    """The learning rates of a run. With max_minutes, rank 0's clock decides when it ends."""

    def __init__(self, config: TrainConfig, state: TrainState, run: RunDirectory, runtime: Runtime) -> None:
        self.config, self.state, self.run, self.runtime = config, state, run, runtime
        self.repeated = {fit.step: fit for fit in run.later_fits}
        self.last_repeated = max(self.repeated, default=-1)
        self.step_seconds = 0.0  # of all steps of this process
        self.recent = deque([(state.first_step + 1, 0.0)], RECENT)  # steps, and step_seconds after them
        self.clock = time.perf_counter()  # when the last step began or ended
        self.after_training = end_seconds(config)
        self.reserve = self.after_training + state.evaluation_seconds  # for what comes after the last step
        self.use_newest_fit()

    def use_newest_fit(self) -> None:
        fits = self.state.fits
        self.fitted = shortened(self.config, max(1, fits[-1].total_steps)) if fits else self.config

    def start_step(self, optimizers: list[Optimizer]) -> float:
        """Set the learning rates of the step; returns learning_rate's."""
        state, now = self.state, time.perf_counter()
        if state.val_loss is not None:
            state.evaluation_seconds = now - self.clock
        elif state.step > state.first_step + 1:  # for logs and checkpoints
            self.step_seconds += now - self.clock
        self.clock = now
        step = state.fits[-1].progress_at(state.step) * self.fitted.max_iters if state.fits else state.step
        return set_learning_rates(optimizers, step, self.fitted)

    def end_step(self, stop_requested: bool) -> None:
        """Share with all ranks whether one is to stop, and the time; fit the schedule, if that is due."""
        self.state.sync(self.runtime, stop_requested)
        state, now = self.state, time.perf_counter()
        if self.config.max_minutes is None:
            return
        if state.step > state.first_step + 1:  # the first one compiles
            self.step_seconds += now - self.clock
        self.clock = now
        if state.step <= self.last_repeated:
            fit = self.repeated.get(state.step)
        elif fit := self.new_fit():
            self.run.record_fit(fit)
        if fit:
            state.fits.append(fit)
            self.use_newest_fit()

    def new_fit(self) -> Fit | None:
        """A fit to the time that is left, if one is due; the same on all ranks."""
        state, step, limit = self.state, self.state.step, 60 * self.config.max_minutes
        if state.seconds + self.reserve >= limit:
            return Fit(step, 1.0, step)
        steps = step - state.first_step  # of this process
        interval = max(1, self.fitted.max_iters // FITS) if state.fits else 1
        if steps < 2 or (steps & (steps - 1) and step % interval):
            return None
        earlier_step, earlier_seconds = self.recent[0]
        self.recent.append((step, self.step_seconds))
        seconds_per_step = (self.step_seconds - earlier_seconds) / (step - earlier_step)
        rank_0 = self.runtime.is_main
        figures = (seconds_per_step, state.evaluation_seconds) if rank_0 else (0.0, 0.0)
        seconds_per_step, evaluation_seconds = self.runtime.all_reduce_sum(*figures)
        self.reserve = evaluation_seconds + self.after_training
        left = limit - state.seconds - self.reserve
        more = steps_until(left, step, seconds_per_step, evaluation_seconds, self.config.eval_interval)
        total_steps = min(self.config.max_iters, step + more)
        progress = state.fits[-1].progress_at(step) if state.fits else step / total_steps
        return Fit(step, progress, total_steps)
