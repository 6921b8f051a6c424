"""Train a GPT: python train.py config/train_shakespeare_char.py --batch_size=32

One process trains on one device. Under torchrun, one process per GPU trains the same model.
"""

import time

STARTED = time.perf_counter()  # max_minutes include loading torch

from configurator import configure
from distrogpt.settings import TrainConfig

if __name__ == "__main__":
    CONFIG = configure(TrainConfig)  # before torch is imported, so that --help and mistakes answer at once

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from distrogpt.checkpoint import check_range
from distrogpt.data.dataset import open_dataset
from distrogpt.errors import cli_errors, exit_process
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.runtime import Runtime, collect_signals, start_runtime, stop_runtime
from distrogpt.training import startup
from distrogpt.training.batches import BatchLoader, MicroBatch
from distrogpt.training.distributed import distribute
from distrogpt.training.logger import TrainLogger
from distrogpt.training.minutes import choose_settings
from distrogpt.training.optim import clip_gradients, training_optimizers
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.schedule import Schedule
from distrogpt.training.state import TrainState
from model import GPT


class TrainResult(NamedTuple):
    """`losses` has a dict for each evaluation: step, the losses of the eval_splits, bits_per_byte if known,
    and val/NAME of each part of a mixture. best_val_loss is the train loss if only train is evaluated."""

    model: GPT
    iter_num: int
    best_val_loss: float
    losses: list[dict[str, float]]
    stopped_by: int | None  # the signal that ended the run early


class Step(NamedTuple):
    loss: float
    grad_norm: float
    applied: bool  # False if loss or gradient was not finite


def training_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    batches: BatchLoader | list[MicroBatch],
    grad_clip: float,
    runtime: Runtime,
) -> Step:
    """One optimizer step on the micro-batches of all ranks, or none if loss or gradient is not finite."""
    loss_sum = torch.zeros((), device=runtime.device)
    for number, (x, y, dropout_seed, weight) in enumerate(batches, 1):
        torch.manual_seed(dropout_seed)  # so that dropout does not depend on earlier random numbers
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = number == len(batches)  # all-reduce the gradients once
        with runtime.autocast():
            _, loss = model(x, y, return_logits=False)
        scaler.scale(loss / (len(batches) / weight)).backward()
        loss_sum.add_(loss.detach(), alpha=weight)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(optimizers, grad_clip)
    mean_loss = loss_sum.item() / len(batches)  # waits for the device
    mean_loss = runtime.all_reduce_sum(mean_loss)[0] / runtime.world_size
    applied = math.isfinite(mean_loss) and math.isfinite(grad_norm.item())
    for optimizer in optimizers:
        if applied:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # fp16: lowers the scale after an overflow
    return Step(mean_loss, grad_norm.item(), applied)


def train(config: TrainConfig, on_evaluation: Callable | None = None, started: float = 0.0) -> TrainResult:
    """Train as the settings say; returns the model and its losses. Raises UserError and MachineError.

    `on_evaluation` is called on rank 0 after each evaluation, with the losses of all evaluations so far.
    The seconds of the run count from `started`, by time.perf_counter(); 0.0: from now on.
    """
    config, started = startup.inherit_settings(config), started or time.perf_counter()
    runtime = start_runtime(config.device, config.dtype, config.backend)
    config = choose_settings(config, runtime, training_step, started)
    startup.check_ranks(config, runtime)
    data = open_dataset(config)
    config = startup.resolve_max_iters(config, data)
    evaluator = Evaluator(config, data, runtime)
    with RunDirectory(config, runtime) as run:
        model, checkpoint = startup.initial_model(config, data.meta, run.restarted_id)
        check_range(model, runtime.dtype)
        startup.describe_run(config, runtime, data, model)
        state = TrainState(checkpoint, started)
        run.resume(checkpoint, config=asdict(config), meta=data.meta, data=startup.fingerprint(data))
        replica = distribute(model, config, runtime)
        optimizers, scaler = training_optimizers(model, config, runtime, checkpoint)
        startup.describe_resumption(config, model, checkpoint, data)
        del checkpoint  # frees the copy on the CPU
        batches = BatchLoader(data, config, runtime, state.step)
        schedule = Schedule(config, state, run, runtime)
        logger = TrainLogger(run, state, model, on_evaluation)
        with logger, collect_signals(run.abandon_save, enabled=not config.eval_only) as signals:
            while True:
                # evaluate at intervals, and at the end of the run
                losses = None
                if state.evaluation_due(config):
                    losses = evaluator.evaluate(model, lambda: bool(signals))
                    state.record_evaluation(losses, evaluator.monitor)
                    if state.diverged(config):
                        raise run.diverged_error(state.step)
                logger.write(losses)

                # save after an evaluation, at intervals, and before the run stops
                if state.save_due(config):
                    run.save(model, optimizers, scaler, state)
                if config.eval_only or state.stop_requested or state.finished(config):
                    break

                # one optimizer step
                lr = schedule.start_step(optimizers)
                step = training_step(replica, optimizers, scaler, batches, config.grad_clip, runtime)
                state.record_step(step.applied, scaler)
                if state.diverged(config):
                    raise run.diverged_error(state.step)
                schedule.end_step(stop_requested=bool(signals) or batches.error is not None)
                logger.log_step(step.loss, step.grad_norm, lr, step.applied)
                run.report_save()
            run.finish()  # while signals are still collected: none may interrupt the last save
    del replica  # DDP may hang, with Python locked, if it is the last to release the process group
    stop_runtime()
    if batches.error or evaluator.error:
        raise batches.error or evaluator.error
    logger.log_result()
    stopped_by = signals[0] if signals and state.stop_requested else None
    return TrainResult(model, state.step, run.best_val_loss, logger.history, stopped_by)


if __name__ == "__main__":
    with cli_errors():
        result = train(CONFIG, started=STARTED)
        exit_process(128 + result.stopped_by if result.stopped_by else 0)
