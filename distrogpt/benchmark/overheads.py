"""Time what training pays besides its steps: checkpoints, logs and plots."""

import functools
import io
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distrogpt.benchmark.timing import alternate, open_data, seconds_of, spread, synchronize
from distrogpt.benchmark.training import Trainer, TrainingStep
from distrogpt.checkpoint import BEST, NEWEST, atomic_write, training_state
from distrogpt.hardware import peak_flops
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.logger import TrainLogger
from distrogpt.training.optim import get_lr
from distrogpt.training.run_directory import RunDirectory
from plot import SHARE

ALL_LOGS = {"log_interval": 1, "tensorboard_log": True, "loss_plot": True}


def temporary_out_dir() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(dir=".", prefix="out-bench-")


def bench_checkpoint(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """What a checkpoint costs: the step that waits for the copy, and slower steps while it is written."""
    trainer = Trainer(training_step, config, open_data(config), runtime)
    times = alternate({"ours": trainer}, config.warmup_steps, config.bench_steps, runtime)["ours"]
    step, number = statistics.median(times), config.bench_steps
    costs: dict[str, list[float]] = {"wait": [], "lost": [], "write": []}
    print(f"step     {step * 1000:,.1f} ms median, {trainer.model.get_num_params(False):,} parameters")

    def snapshot() -> dict[str, Any]:
        return training_state(trainer.model, trainer.optimizers, iter_num=0, best_val_loss=math.inf)

    def write_alone(path: Path) -> None:
        atomic_write(functools.partial(torch.save, snapshot()), path)

    with temporary_out_dir() as out_dir, RunDirectory(Path(out_dir), lambda line: None) as run:
        for _ in range(config.rounds):
            begin, first = time.perf_counter(), number
            run.save(snapshot(), BEST, NEWEST)
            costs["wait"].append(time.perf_counter() - begin)
            while run.writing():
                trainer(number)
                synchronize(runtime)
                number += 1
            costs["lost"].append(time.perf_counter() - begin - (number - first) * step)
            costs["write"].append(seconds_of(write_alone, Path(out_dir) / "alone.pt", runtime=runtime))
        size = (Path(out_dir) / NEWEST).stat().st_size
    result: dict[str, Any] = {name: spread(values) for name, values in costs.items()}
    wait, lost, write = (result[name]["median"] for name in costs)
    print(f"writes   {size / 1e6:,.0f} MB; the step waits {wait:.2f} s for the copy")
    print(
        f"lost     {lost:.2f} s a checkpoint, slower steps included: {lost / (250 * step):.2%} of 250 steps"
    )
    print(f"         {write:.2f} s, or {write / (250 * step):.2%}, if steps waited for the disk")
    return {**result, "bytes": size, "step": step}


def bench_logs(config: BenchConfig, runtime: Runtime, training_step: TrainingStep) -> dict[str, Any]:
    """What all logs cost: a line at each step, and loss.png as often as it is redrawn."""
    trainer = Trainer(training_step, config, open_data(config), runtime)
    sequences = config.gradient_accumulation_steps * config.batch_size
    peak = peak_flops(runtime.device, runtime.dtype)
    mfu_per_step_second = trainer.model.estimate_mfu(sequences, 1.0, peak)
    steps, lines, screen = [], [], io.StringIO()
    config = replace(config, **ALL_LOGS)

    def log(number: int, seconds: float, losses: dict[str, float] | None) -> None:
        logger.step(number, 3.0, 1.0, get_lr(number, config), seconds, mfu_per_step_second / seconds)
        logger.write(number, losses)

    with (
        temporary_out_dir() as out_dir,
        RunDirectory(Path(out_dir), print) as run,
        TrainLogger(replace(config, out_dir=out_dir), runtime, run, "0", 0, 0.0) as logger,
    ):
        logger.say = functools.partial(print, file=screen, flush=True)
        for number in range(config.warmup_steps):
            trainer(number)
        for number in range(config.bench_steps):
            steps.append(seconds_of(trainer, number, runtime=runtime))
            lines.append(seconds_of(log, number, steps[-1], None, runtime=runtime))
        lines.append(seconds_of(logger.flush, runtime=runtime))
        log(number, 1.0, {"train": 3.0, "val": 3.0})
        while logger.picture and logger.picture.drawing():
            time.sleep(0.1)
        picture = (
            logger.picture.cost if logger.picture else 0.0
        )  # by the child's own clock: steps vary by more
    step, line = statistics.median(steps), sum(lines) / config.bench_steps
    interval = max(config.eval_interval * step, picture / SHARE)  # seconds between two pictures
    cost = line + picture * step / interval
    print(f"step     {step * 1000:,.2f} ms median, {trainer.model.get_num_params(False):,} parameters")
    print(f"lines    {line * 1000:.3f} ms a step, {line / step:.2%}: screen, log.csv, TensorBoard")
    print(f"picture  {picture * 1000:,.0f} ms of the whole machine, at most every {interval:,.0f} s")
    print(f"cost     {cost * 1000:.3f} ms a step, {cost / step:.2%}")
    return {"step": step, "lines": line, "picture": picture, "cost": cost, "share": cost / step}
