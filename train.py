"""Train a GPT: python train.py config/train_shakespeare_char.py --batch_size=32

`train`, at the end, tells the story; the functions above it are its parts, in the order of their first use.
One process trains on one device; under torchrun, one process per GPU trains the same model together.
"""

from configurator import configure
from distrogpt.settings import TrainConfig

if __name__ == "__main__":
    CONFIG = configure(TrainConfig)  # before torch is loaded, so that --help and mistakes answer at once

import math
import secrets
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from distrogpt.checkpoint import BEST, NEWEST, diverged_error, restore_optimizers, training_state
from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.errors import UserError, cli_errors, exit_process
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.evaluation.loss import evaluation_line
from distrogpt.hardware import peak_flops
from distrogpt.kernels.compile import maybe_compile
from distrogpt.kernels.cpu import to_device, use_cpu_kernels
from distrogpt.openmp import WAITS
from distrogpt.runtime import (
    Runtime,
    enable_onednn_float32,
    progress_bar,
    signals_caught,
    start_runtime,
    stop_runtime,
)
from distrogpt.training.batches import MicroBatch, step_batches
from distrogpt.training.distributed import local, wrap_distributed
from distrogpt.training.guards import crowd_watch, early_stop_reason, spike_watch
from distrogpt.training.logger import TrainLogger
from distrogpt.training.optim import clip_gradients, get_lr, make_optimizers, set_learning_rates
from distrogpt.training.run_directory import RunDirectory
from distrogpt.training.startup import (
    describe_resumption,
    describe_run,
    earlier_run,
    fingerprint,
    initial_model,
    resolve_max_iters,
)
from model import GPT


class TrainResult(NamedTuple):
    """What `train` returns; `losses` has a dict with step, train and val for each evaluation, or with what
    eval_splits says; best_val_loss is train's where that alone is measured.

    Where they are known: bits_per_byte, and val/NAME of each part of a mixture.
    """

    model: GPT
    iter_num: int
    best_val_loss: float
    losses: list[dict[str, float]]
    stopped_by: int | None  # the signal that ended the run early


class Step(NamedTuple):
    """What a training step was: its loss, the norm of its gradient, whether the weights changed."""

    loss: float
    norm: float
    taken: bool
    following: Any  # what was read meanwhile


def training_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    batches: list[MicroBatch],
    grad_clip: float,
    runtime: Runtime,
    meanwhile: Callable[[], Any] = lambda: None,
) -> Step:
    """One optimizer step on the micro-batches of all ranks; none where loss or gradient is not finite.

    `meanwhile` is called while a GPU still computes.
    """
    total = torch.zeros((), device=runtime.device)
    for number, (x, y, dropout_seed, weight) in enumerate(batches, 1):
        torch.manual_seed(dropout_seed)  # dropout, too, depends on nothing drawn before
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = number == len(batches)  # exchange the sum, once
        with runtime.autocast():
            _, loss = model(x, y, return_logits=False)
        scaler.scale(loss / (len(batches) / weight)).backward()
        total.add_(loss.detach(), alpha=weight)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip_gradients(model, grad_clip)
    following = meanwhile()
    mean = runtime.all_reduce_sum(total.item() / len(batches))[0] / runtime.world_size  # waits for the device
    taken = math.isfinite(mean) and math.isfinite(norm.item())
    for optimizer in optimizers:
        if taken:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()  # fp16: lowers the scale after an overflow
    return Step(mean, norm.item(), taken, following)


def train(
    config: TrainConfig, on_evaluation: Callable[[list[dict[str, float]]], object] | None = None
) -> TrainResult:
    """Train as the settings say; returns the model and its losses. Raises UserError and MachineError.

    `on_evaluation` is called with the losses so far after each evaluation, in rank 0.
    """
    runtime = start_runtime(config.device, config.dtype, config.backend)
    if config.gradient_accumulation_steps % runtime.world_size:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared among "
            f"{runtime.world_size} ranks; make it a multiple"
        )
    settings = zlib.crc32(repr(config).encode())
    runtime.check_equal_on_all_ranks(
        settings, "the ranks have not all the same settings; start them with the same command"
    )
    data = open_dataset(config)
    config = resolve_max_iters(config, data)
    evaluator = Evaluator(config, data, runtime)
    earlier = earlier_run(config, runtime)  # before the lock is signed anew
    folder = None
    if runtime.is_main and not config.eval_only:
        folder = RunDirectory(Path(config.out_dir), runtime.say, config.keep_checkpoints)
    with folder or nullcontext():
        runtime.barrier()  # all wait until nobody else writes to out_dir
        model, contents = initial_model(config, data.meta, earlier)
        describe_run(config, runtime, data, model, runtime.say)
        return train_model(config, runtime, data, model, contents, folder, earlier, evaluator, on_evaluation)


def train_model(
    config: TrainConfig,
    runtime: Runtime,
    data: Dataset,
    model: GPT,
    contents: dict[str, Any],
    folder: RunDirectory | None,
    earlier: str | None,
    evaluator: Evaluator,
    on_evaluation: Callable[[list[dict[str, float]]], object] | None = None,
) -> TrainResult:
    """Train the network of a checkpoint's contents, {} for a new run's, and write to the folder, if there is
    one. `earlier` is the id of this run where it was started again, `evaluator` measures it."""
    began = time.perf_counter() - contents.get("seconds", 0.0)
    first = step = contents.get("iter_num", 0)
    best_val_loss = lowest = float(contents.get("best_val_loss", math.inf))
    no_lower = contents.get("no_lower", 0)  # evaluations in a row whose loss was not below `lowest`
    ended = early_stop_reason(config, step, contents.get("seconds", 0.0), no_lower)
    out_dir, run_id = Path(config.out_dir), contents.get("run_id") or earlier or secrets.token_hex(4)
    runtime.check_equal_on_all_ranks(
        step, f"the ranks do not find the same checkpoint; put out_dir={out_dir} where all see it"
    )
    skipped = contents.get("skipped", 0)  # steps whose gradient was not finite
    say = runtime.say
    if folder:
        folder.run_id = run_id
        if contents or earlier:
            folder.go_on(step, best_val_loss)
    evaluated = bool(contents) and contents.get("evaluated", True) and not config.eval_only  # step `first`
    logs = TrainLogger(config, runtime, folder, run_id, first + evaluated, began)

    enable_onednn_float32(runtime)
    model.activation_checkpointing = config.activation_checkpointing
    steps = 1 if config.eval_only else config.max_iters  # of the whole run: resumed, it computes as before
    in_parts = config.shard and runtime.world_size > 1
    if not in_parts:
        to_device(model, runtime.device)
    elif runtime.device.type == "cpu":
        use_cpu_kernels(model)
    maybe_compile(model, config.compile, runtime.device, steps, model.transformer.h if in_parts else ())
    if config.shard and not in_parts:
        say("note     shard: one rank has nothing to share with")
    trained = wrap_distributed(model, config.shard, runtime)
    optimizers = make_optimizers(model, config, runtime.device.type, runtime.dtype)
    scaler = runtime.loss_scaler()
    if "optimizer" in contents and not config.eval_only:
        restore_optimizers(optimizers, contents, out_dir)
        scaler.load_state_dict(contents.get("scaler") or scaler.state_dict())
    kept = {"config": asdict(config), "meta": data.meta, "run_id": run_id}
    kept["data"] = fingerprint(data)
    describe_resumption(config, model, contents, kept["data"], say)
    contents.clear()  # frees the copy on the CPU
    sequences = config.gradient_accumulation_steps * config.batch_size
    at_peak = model.estimate_mfu(
        sequences / runtime.world_size, 1.0, peak_flops(runtime.device, runtime.dtype)
    )  # a step's seconds

    def diverged() -> UserError:
        return diverged_error(step, out_dir if folder and folder.own else None)

    def save(found: dict[str, float] | None) -> None:
        nonlocal best_val_loss, lowest, no_lower
        if runtime.all_reduce_sum(not all(bool(local(p).isfinite().all()) for p in model.parameters()))[0]:
            raise diverged()
        logs.flush()
        if folder:
            folder.report(wait=True)  # the save before this one: its copy is freed, and its loss known
            best_val_loss = folder.best
        names = [NEWEST]
        more = {**kept, "iter_num": step, "evaluated": found is not None, "skipped": skipped}
        if found:
            more["val_loss"] = loss = found[evaluator.monitor]
            names = [BEST, NEWEST] if loss < best_val_loss or config.always_save_checkpoint else names
            best_val_loss = min(best_val_loss, loss)
            lowest, no_lower = (loss, 0) if loss < lowest else (lowest, no_lower + 1)
        more |= {"best_val_loss": best_val_loss, "no_lower": no_lower, "scaler": scaler.state_dict()}
        more["seconds"] = time.perf_counter() - began
        state = training_state(model, optimizers, keep=runtime.is_main, **more)
        if folder:
            folder.save(state, *names)

    trouble: list[UserError] = []  # the data is not what it was: all ranks have to stop

    def read_on() -> list[MicroBatch]:
        try:
            return step_batches(data, config, runtime, step + 1)
        except UserError as error:
            trouble.append(error)
            return []

    losses: list[dict[str, float]] = []
    batches = [] if config.eval_only else step_batches(data, config, runtime, step)
    stopping, in_a_row = False, 0
    clock, clocked = time.perf_counter(), step
    catching = nullcontext([]) if config.eval_only else signals_caught()  # an evaluation has nothing to save
    bar = progress_bar(step, step if config.eval_only else config.max_iters, runtime, say)
    with logs, bar as (say, advance), catching as caught:
        watch_cores, watch_loss = crowd_watch(WAITS, say), spike_watch(say)
        logs.say = say
        if folder:
            folder.say = say
        while True:
            found = None
            due = config.eval_only or ended or step % config.eval_interval == 0 or step == config.max_iters
            if due and not (step == first and evaluated):
                found = evaluator.evaluate(model, lambda: bool(caught or trouble))
                stopping = stopping or found is None
                clock, clocked = time.perf_counter(), step
            if found:
                losses.append({"step": step, **found})
                say(evaluation_line(step, found))
                if not math.isfinite(found[evaluator.monitor]):
                    raise diverged()
            logs.write(step, found)
            if found and on_evaluation and runtime.is_main:
                on_evaluation(losses)
                clock = time.perf_counter()
            if found and not config.eval_only and (step > 0 or step == config.max_iters):
                save(found)
                ended = ended or early_stop_reason(config, step, 0.0, no_lower)
            elif step > first and (stopping or step % (config.save_interval or math.inf) == 0):
                save(None)
            if config.eval_only or stopping or ended or step >= config.max_iters:
                break

            set_learning_rates(optimizers, step, config)
            made = training_step(trained, optimizers, scaler, batches, config.grad_clip, runtime, read_on)
            step += 1
            batches = made.following
            spent = (time.perf_counter() - began) * runtime.is_main  # by one clock, for all ranks
            asked, spent = runtime.all_reduce_sum(len(caught) + len(trouble), spent)
            stopping, ended = asked > 0, early_stop_reason(config, step, spent, 0)
            if made.taken:
                in_a_row = 0
                watch_loss(step, made.loss)
            elif scaler.get_scale() <= 1:  # above, fp16 only looks for the right one
                skipped, in_a_row = skipped + 1, in_a_row + 1
                say(f"note     step {step} is skipped: loss or gradient is not finite ({skipped} so far)")
                if in_a_row >= config.skip_limit:
                    raise diverged()

            if step % config.log_interval == 0 or ended or step == config.max_iters:
                seconds = (time.perf_counter() - clock) / (step - clocked)
                logs.step(step, made.loss, made.norm, get_lr(step - 1, config), seconds, at_peak / seconds)
                watch_cores()
                clock, clocked = time.perf_counter(), step
            if folder:
                folder.report()
            advance(loss=made.loss)
        if folder:
            folder.finish()
    del trained  # as the last to hold the ranks' group, DDP may end it with Python locked, and wait for ever
    stop_runtime()
    if trouble or evaluator.error:
        raise trouble[0] if trouble else evaluator.error
    if stopping:
        again = "" if config.init_from.partition(":")[0] == "auto" else " and --init_from=resume"
        say(f"stopped after step {step}; go on with the same command{again}")
    elif not config.eval_only:
        early = f"early stop after step {step}: {ended}; " if ended else ""
        result = f"best {evaluator.monitor} loss {best_val_loss:.4f} in {time.perf_counter() - began:.0f} s"
        say(f"done: {early}{result}; python sample.py --out_dir={out_dir}")
    return TrainResult(model, step, best_val_loss, losses, caught[0] if caught and stopping else None)


if __name__ == "__main__":
    with cli_errors():
        result = train(CONFIG)
        exit_process(128 + result.stopped_by if result.stopped_by else 0)
