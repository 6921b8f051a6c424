"""Train a GPT: python train.py config/train_shakespeare_char.py --batch_size=32

`train`, at the end, tells the story; the functions above it are its parts, in the order of their first use.
One process trains on one device; under torchrun, one process per GPU trains the same model together.
"""

import sys

from configurator import configure
from settings import TrainConfig

if __name__ == "__main__":
    CONFIG = configure(TrainConfig)  # before torch is loaded, so that --help and mistakes answer at once

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    BEST,
    NEWEST,
    load_checkpoint,
    load_pretrained,
    lost,
    newest_checkpoint,
    open_out_dir,
    restore_model,
    restore_optimizers,
    save_checkpoint,
    set_aside,
    training_state,
)
from data.tokens import TokenStream, epoch_starts, find_dataset, random_starts, read_meta
from errors import UserError, one_line_errors
from model import GPT, GPTConfig
from optim import get_lr, make_optimizers, set_learning_rates
from runtime import (
    Runtime,
    crowd_watch,
    maybe_compile,
    peak_flops,
    progress_bar,
    signals_caught,
    speak,
    start_runtime,
    stop_runtime,
    take_fast_float32,
)

Batch = tuple[torch.Tensor, torch.Tensor, int]  # x (B, T), y (B, T), the seed of its dropout


class TrainResult(NamedTuple):
    """What `train` returns; `losses` has a dict with step, train and val for each evaluation."""

    model: GPT
    iter_num: int
    best_val_loss: float
    losses: list[dict[str, float]]
    stopped_by: int | None  # the signal that ended the run early


def initial_model(config: TrainConfig, meta: dict[str, Any]) -> tuple[GPT, dict[str, Any]]:
    """The network to train, on the CPU, and the checkpoint that it goes on from, {} if none. UserError."""
    newest = newest_checkpoint(Path(config.out_dir))
    resumes = config.init_from == "resume" or (config.init_from == "auto" and newest is not None)
    contents: dict[str, Any] = {}
    origin: dict[str, Any] = {}  # the checkpoint that the weights come from, gone on from or not
    if resumes:
        path = newest or Path(config.out_dir) / NEWEST
        contents = origin = load_checkpoint(path)
        model = restore_model(contents, path, config.dropout)
        its_optimizer = contents.get("config", {}).get("optimizer", "adamw")
        if its_optimizer != config.optimizer and not config.eval_only:
            raise UserError(
                f"{config.out_dir} was trained with optimizer={its_optimizer}; resume with that, or begin "
                f"from its weights: --init_from={config.out_dir} and another --out_dir"
            )
    elif config.init_from in ("scratch", "auto"):
        torch.manual_seed(config.seed)
        shape = {name: value for name, value in asdict(config).items() if name in asdict(GPTConfig())}
        # GPT-2's vocabulary is padded to GPTConfig's, which GPUs multiply faster
        vocab_size = GPTConfig.vocab_size if meta["vocab_size"] == 50257 else meta["vocab_size"]
        model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    else:
        model, origin = load_pretrained(config.init_from, config.dropout)
    trained_on = origin.get("meta", meta)["tokenizer"]
    if None not in (trained_on, meta["tokenizer"]) and trained_on != meta["tokenizer"]:
        raise UserError(
            f"{config.out_dir if resumes else config.init_from} was trained with another tokenizer than "
            f"{config.dataset} has; choose the dataset that it was trained on, or --init_from=scratch"
        )
    if meta["vocab_size"] > model.config.vocab_size:
        raise UserError(
            f"the dataset has {meta['vocab_size']} tokens, the model of init_from={config.init_from} only "
            f"{model.config.vocab_size}; choose the dataset that it was trained on, or --init_from=scratch"
        )
    if config.block_size > model.config.block_size:
        raise UserError(
            f"block_size={config.block_size} is longer than the model of init_from={config.init_from} reads; "
            f"set --block_size={model.config.block_size} or less"
        )
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
        if not model.config.rotary:
            contents.pop("optimizer", None)  # its averages have the shape of the longer table
    return model, contents


def windows_to_xy(windows: np.ndarray, runtime: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) as inputs x (B, T) and their next tokens y (B, T), on the device."""
    tokens = runtime.to_device(windows)
    return tokens[:, :-1], tokens[:, 1:]


def step_batches(stream: TokenStream, config: TrainConfig, runtime: Runtime, step: int) -> list[Batch]:
    """This rank's micro-batches of one step.

    The samples of a step are drawn as one set, by seed and step alone; ranks and micro-steps share it out.
    """
    B, T, micro_steps = config.batch_size, config.block_size, config.gradient_accumulation_steps
    count = micro_steps * B
    if config.sampling == "epochs":
        starts = epoch_starts(config.seed, step * count, count, len(stream), T)  # (micro_steps·B,)
    else:
        starts = random_starts(config.seed, step, count, len(stream) - T)
    batches = []
    for micro in range(runtime.rank, micro_steps, runtime.world_size):
        x, y = windows_to_xy(stream.windows(starts[micro * B : (micro + 1) * B], T + 1), runtime)
        seed = np.random.SeedSequence((config.seed, step, micro)).generate_state(1, np.uint64)
        batches.append((x, y, int(seed[0])))
    return batches


def training_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    batches: list[Batch],
    grad_clip: float,
    runtime: Runtime,
) -> torch.Tensor:
    """One optimizer step on this rank's micro-batches; their mean loss, still on the device."""
    total = torch.zeros((), device=runtime.device)
    for number, (x, y, seed) in enumerate(batches, 1):
        torch.manual_seed(seed)  # dropout, too, depends on nothing drawn before
        if runtime.world_size > 1:
            model.require_backward_grad_sync = number == len(batches)  # exchange the sum, once
        with runtime.autocast():
            _, loss = model(x, y, only_loss=True)
        scaler.scale(loss / len(batches)).backward()
        total += loss.detach()
    fp16, overflow = scaler.is_enabled(), False
    if grad_clip or fp16:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        overflow = fp16 and not bool(norm.isfinite())  # then no optimizer steps, and the scale is lowered
    for optimizer in optimizers:
        if not overflow:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total / len(batches)


def evaluation_windows(
    stream: TokenStream, config: TrainConfig, purpose: int, whole: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of an evaluation start, and how many first targets of each do not count: (N,), (N,).

    eval_iters batches at random places, the same at every evaluation. With eval_iters=0, all of the val split
    (purpose 2), each token once, and a quarter as many of train (purpose 1); `whole` is the length of val.
    """
    B, T = config.batch_size, config.block_size
    if config.eval_iters:
        starts = random_starts(config.seed, 0, config.eval_iters * B, len(stream) - T, purpose)
        return starts, np.zeros_like(starts)
    count = math.ceil((whole - 1) / T)
    if purpose == 1:
        count = math.ceil(count / 4)
        starts = random_starts(config.seed, 0, count, len(stream) - T, purpose)
        skip = np.zeros_like(starts)
    else:
        starts = np.minimum(np.arange(count) * T, whole - 1 - T)  # the last one overlaps the one before it
        skip = np.arange(count) * T - starts
    padding = -count % B  # every batch has B rows, which torch.compile likes; the added ones do not count
    return np.pad(starts, (0, padding)), np.pad(skip, (0, padding), constant_values=T)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, streams: dict[str, TokenStream], config: TrainConfig, runtime: Runtime
) -> dict[str, float]:
    """Mean loss per token of train and val, in nats. The ranks share the batches."""
    losses = {}
    B, T = config.batch_size, config.block_size
    model.eval()
    for purpose, split in enumerate(("train", "val"), 1):
        starts, skip = evaluation_windows(streams[split], config, purpose, len(streams["val"]))
        loss_sum = torch.zeros((), device=runtime.device, dtype=torch.float32)
        count = torch.zeros((), device=runtime.device)
        for i in range(runtime.rank * B, len(starts), runtime.world_size * B):
            x, y = windows_to_xy(streams[split].windows(starts[i : i + B], T + 1), runtime)
            y = y.masked_fill(runtime.to_device(np.arange(T) < skip[i : i + B, None]), -1)
            with runtime.autocast():
                _, loss = model(x, y, only_loss=True)
            counted = (y >= 0).sum()
            loss_sum += loss * counted
            count += counted
        all_loss, all_count = runtime.total(loss_sum.item(), count.item())
        losses[split] = all_loss / all_count
    model.train()
    return losses


def start_wandb(config: TrainConfig) -> Any:
    """A Weights & Biases run. Raises UserError where it cannot be."""
    try:
        import wandb

        return wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))
    except Exception as error:
        raise UserError(
            f"wandb does not start ({error}); pip install wandb and log in, or --wandb_log=False"
        ) from None


def describe_run(
    config: TrainConfig,
    runtime: Runtime,
    folder: Path,
    streams: dict[str, TokenStream],
    model: GPT,
    say: Callable[[str], None],
) -> None:
    """Tell before the first step what is trained, on what, where, and what will be written."""
    shape, micro_steps = model.config, config.gradient_accumulation_steps
    tokens = micro_steps * config.batch_size * config.block_size
    averages = 2 if config.optimizer == "adamw" else 1  # beside the weights; Muon's AdamW has few of them
    megabytes = 4 * (1 + averages) * model.get_num_params(non_embedding=False) / 1e6
    sizes = ", ".join(f"{len(stream):,} {split}" for split, stream in streams.items())
    say(f"data     {folder}: {sizes} tokens, vocabulary {streams['train'].vocab_size:,}")
    say(
        f"model    {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
        f"block {shape.block_size}: {model.get_num_params(non_embedding=False):,} parameters"
    )
    say(f"machine  {runtime.describe()}")
    say(f"step     {tokens:,} tokens: {micro_steps} x {config.batch_size} sequences of {config.block_size}")
    if not config.eval_only:
        say(
            f"writes   {config.out_dir}/{BEST} (best) and {NEWEST} (newest), "
            f"every {config.eval_interval} steps up to {config.max_iters}, {megabytes:,.0f} MB each"
        )


def train(config: TrainConfig) -> TrainResult:
    """Train as the settings say; returns the model and its losses. Raises UserError and MachineError."""
    began = time.perf_counter()
    runtime = start_runtime(config.device, config.dtype, config.backend)
    if config.gradient_accumulation_steps % runtime.world_size:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} cannot be shared among "
            f"{runtime.world_size} ranks; make it a multiple"
        )
    take_fast_float32(runtime)
    folder = find_dataset(config.dataset)
    meta = read_meta(folder)
    streams = {split: TokenStream(folder, split, meta, config.block_size) for split in ("train", "val")}
    model, contents = initial_model(config, meta)
    out_dir = Path(config.out_dir)
    if runtime.is_main and not config.eval_only:
        open_out_dir(out_dir)
    first = step = contents.get("iter_num", 0)
    best_val_loss = float(contents.get("best_val_loss", math.inf))

    say = speak if runtime.is_main else (lambda line: None)
    describe_run(config, runtime, folder, streams, model, say)
    wandb = start_wandb(config) if config.wandb_log and runtime.is_main else None

    optimizers = make_optimizers(model.to(runtime.device), config, runtime.device.type, runtime.dtype)
    scaler = runtime.loss_scaler()
    if "optimizer" in contents and not config.eval_only:
        restore_optimizers(optimizers, contents, out_dir)
        scaler.load_state_dict(contents.get("scaler") or scaler.state_dict())
    if contents:
        finished = step >= config.max_iters and not config.eval_only
        say(f"resumes  after step {step}" + (": nothing left to do" if finished else ""))
        if "optimizer" not in contents:
            say("note     without the optimizer's averages, which start anew")
    for name, value in asdict(model.config).items():
        wanted = getattr(config, name, value)
        meant = bool(contents) or wanted != getattr(TrainConfig, name, wanted)  # what a new run would have
        if wanted != value and meant and name not in ("block_size", "dropout"):
            say(f"note     the model's {name}={value} holds, not {wanted}")
    own = bool(contents)  # the checkpoints in out_dir are this run's
    del contents  # frees the copy on the CPU

    model.activation_checkpointing = config.activation_checkpointing
    steps = 1 if config.eval_only else max(0, config.max_iters - step)
    maybe_compile(model, config.compile, runtime.device, steps, say)
    trained: torch.nn.Module = model
    if runtime.world_size > 1:
        devices = [runtime.device] if runtime.device.type == "cuda" else None
        trained = DistributedDataParallel(model, devices)
    peak = peak_flops(runtime)

    def save(*names: str, **more: float) -> None:
        nonlocal own
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            raise lost(step, out_dir if own else None)
        for name in set_aside(out_dir) if runtime.is_main and not own else ():
            say(f"note     {out_dir} held another run's checkpoint, which is {name} now")
        own = True
        more |= {"config": asdict(config), "scaler": scaler.state_dict(), "meta": meta}
        for name in names if runtime.is_main else ():
            save_checkpoint(out_dir / name, training_state(model, optimizers, step, best_val_loss, **more))
        say(f"step {step}: wrote {' and '.join(str(out_dir / name) for name in names)}")

    losses: list[dict[str, float]] = []
    batches = step_batches(streams["train"], config, runtime, step)
    stopping, watch = False, crowd_watch(runtime, say)
    clock, clocked = time.perf_counter(), step
    catching = nullcontext([]) if config.eval_only else signals_caught()  # an evaluation has nothing to save
    last = step if config.eval_only else config.max_iters
    with progress_bar(step, last, runtime, say) as (say, advance), catching as caught:
        while True:
            due = config.eval_only or step % config.eval_interval == 0 or step == config.max_iters
            if due and (config.eval_only or step == 0 or step > first):  # else it was, before it was saved
                found = evaluate(model, streams, config, runtime)
                losses.append({"step": step, **found})
                say(f"step {step}: train loss {found['train']:.4f}, val loss {found['val']:.4f}")
                if wandb:
                    wandb.log({f"{split}/loss": loss for split, loss in found.items()}, step=step)
                if not math.isfinite(found["val"]):
                    raise lost(step, out_dir if own else None)
                if not config.eval_only and (step > 0 or step == config.max_iters):
                    improved = found["val"] < best_val_loss
                    best_val_loss = min(best_val_loss, found["val"])
                    # the best first: killed between the two, a run goes back to the newest before it
                    best = [BEST] if improved or config.always_save_checkpoint else []
                    save(*best, NEWEST, val_loss=found["val"])
                clock, clocked = time.perf_counter(), step
            elif stopping:
                save(NEWEST)
            if config.eval_only or stopping or step >= config.max_iters:
                break

            set_learning_rates(optimizers, step, config)
            loss = training_step(trained, optimizers, scaler, batches, config.grad_clip, runtime)
            step += 1
            # the next batches are read and sent while a GPU still computes on these
            batches = step_batches(streams["train"], config, runtime, step)
            stopping = runtime.total(len(caught))[0] > 0  # all ranks stop at the same step

            if step % config.log_interval == 0 or step == config.max_iters:
                mean = runtime.total(loss.item())[0] / runtime.world_size  # waits for the device: once a line
                if not math.isfinite(mean):
                    raise lost(step, out_dir if own else None)
                seconds = (time.perf_counter() - clock) / (step - clocked)
                sequences = config.gradient_accumulation_steps * config.batch_size
                mfu = model.estimate_mfu(sequences / runtime.world_size, seconds, peak)
                tokens = sequences * config.block_size
                speed = f"{seconds * 1000:.2f} ms, {tokens / seconds:,.0f} tokens/s, mfu {mfu:.1%}"
                say(f"step {step}: loss {mean:.4f}, {speed}")
                watch(seconds)
                if wandb:
                    wandb.log({"loss": mean, "lr": get_lr(step - 1, config), "mfu": mfu}, step=step)
                clock, clocked = time.perf_counter(), step
            advance()
    if wandb:
        wandb.finish()
    stop_runtime()
    if stopping:
        again = "" if config.init_from == "auto" else " and --init_from=resume"
        say(f"stopped after step {step}; go on with the same command{again}")
    elif not config.eval_only:
        result = f"best val loss {best_val_loss:.4f} in {time.perf_counter() - began:.0f} s"
        say(f"done: {result}; python sample.py --out_dir={out_dir}")
    return TrainResult(model, step, best_val_loss, losses, caught[0] if caught else None)


if __name__ == "__main__":
    with one_line_errors():
        result = train(CONFIG)
        if result.stopped_by:
            sys.exit(128 + result.stopped_by)
