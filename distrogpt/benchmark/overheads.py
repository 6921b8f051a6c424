"""Time what training pays besides its steps: checkpoints, logs and plots."""

import contextlib
import functools
import io
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distrogpt.benchmark.timing import alternate, open_data, seconds_of, spread, synchronize
from distrogpt.benchmark.training import Trainer, TrainingStep
from distrogpt.checkpoint import NEWEST, atomic_write, training_state
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.logger import TrainLogger
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.state import TrainState

OUT_DIR = {"dir": ".", "prefix": "out-bench-"}
ALL_LOGS = {"log_interval": 1, "tensorboard_log": True, "loss_plot": True}


def bench_checkpoint(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """What a checkpoint costs: the step that waits for the copy, and slower steps while it is written."""
    trainer = Trainer(training_step, config, open_data(config), runtime)
    times = alternate({"ours": trainer}, config.warmup_steps, config.bench_steps, runtime)["ours"]
    step = statistics.median(times)
    costs: dict[str, list[float]] = {"wait": [], "lost": [], "write": []}
    print(f"step     {step * 1000:,.1f} ms median, {trainer.model.get_num_params(False):,} parameters")

    def snapshot() -> dict[str, Any]:
        return training_state(trainer.model, trainer.optimizers, iter_num=0, best_val_loss=math.inf)

    def write_alone(path: Path) -> None:
        atomic_write(functools.partial(torch.save, snapshot()), path)

    state = TrainState()
    state.val_loss = 3.0  # as after an evaluation
    with (
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory(**OUT_DIR) as out_dir,
        RunDirectory(replace(config, out_dir=out_dir), runtime) as run,
    ):
        for _ in range(config.rounds):
            begin, n_steps = time.perf_counter(), 0
            run.save(trainer.model, trainer.optimizers, trainer.scaler, state)
            costs["wait"].append(time.perf_counter() - begin)
            while run.save_thread.is_alive():
                trainer()
                synchronize(runtime)
                n_steps += 1
            costs["lost"].append(time.perf_counter() - begin - n_steps * step)
            costs["write"].append(seconds_of(write_alone, Path(out_dir) / "alone.pt", runtime=runtime))
        size = (Path(out_dir) / NEWEST).stat().st_size
    result: dict[str, Any] = {name: spread(values) for name, values in costs.items()}
    wait, lost, write = (result[name]["median"] for name in costs)
    print(f"writes   {size / 1e6:,.0f} MB; the step waits {wait:.2f} s for the copy")
    share = f"{lost / (250 * step):.2%} of 250 steps"
    print(f"lost     {lost:.2f} s a checkpoint, slower steps included: {share}")
    print(f"         {write:.2f} s, or {write / (250 * step):.2%}, if steps waited for the disk")
    return {**result, "bytes": size, "step": step}


def bench_logs(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """What all logs cost: a line at each step, and loss.png as often as it is redrawn."""
    trainer = Trainer(training_step, config, open_data(config), runtime)
    config, state = replace(config, **ALL_LOGS), TrainState()
    steps, lines = [], []

    def log(losses: dict[str, float] | None) -> None:
        state.step += 1
        logger.log_step(loss=3.0, grad_norm=1.0, lr=1e-3, applied=True)
        logger.write(losses)

    with (
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory(**OUT_DIR) as out_dir,
        RunDirectory(replace(config, out_dir=out_dir), runtime) as run,
        TrainLogger(run, state, trainer.model) as logger,
    ):
        for _ in range(config.warmup_steps):
            trainer()
        for _ in range(config.bench_steps):
            steps.append(seconds_of(trainer, runtime=runtime))
            lines.append(seconds_of(log, None, runtime=runtime))
        begin = os.times()
        log({"train": 3.0, "val": 3.0})
        if logger.plot:
            logger.plot.finish(60)
        end = os.times()  # of the process that draws, by its own clock: steps vary by more
        seconds = end.children_user - begin.children_user + end.children_system - begin.children_system
        picture = seconds / (os.cpu_count() or 1)
    step, line = statistics.median(steps), sum(lines) / config.bench_steps
    interval = config.eval_interval * step  # seconds between two pictures
    cost = line + picture / config.eval_interval
    print(f"step     {step * 1000:,.2f} ms median, {trainer.model.get_num_params(False):,} parameters")
    print(f"lines    {line * 1000:.3f} ms a step, {line / step:.2%}: screen, log.csv, TensorBoard")
    print(f"picture  {picture * 1000:,.0f} ms of the whole machine, every {interval:,.0f} s")
    print(f"cost     {cost * 1000:.3f} ms a step, {cost / step:.2%}")
    return {"step": step, "lines": line, "picture": picture, "cost": cost, "share": cost / step}
