"""How a run begins: the network, and what it goes on from; and what is told before the first step."""

import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrogpt.checkpoint import BEST, NEWEST, load_checkpoint, newest_checkpoint, restore_model
from distrogpt.data.dataset import Dataset, samples_per_epoch
from distrogpt.data.meta import tokenizers_differ
from distrogpt.errors import UserError
from distrogpt.loading import load_pretrained
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.guards import early_stop_reason
from distrogpt.training.run_directory import LOG, is_restart, run_before_restart
from model import GPT, GPTConfig

Say = Callable[[str], None]


def resolve_max_iters(config: TrainConfig, data: Dataset) -> TrainConfig:
    """The settings with the max_iters that max_epochs asks for on this data. Raises UserError."""
    if config.max_epochs is None or "train" not in data.parts[0].streams:
        return config
    samples = Fraction(str(config.max_epochs)) * samples_per_epoch(data, config)  # of floats, 0.1 is too much
    try:
        return replace(config, max_iters=math.ceil(samples / samples_of(config)))
    except ValueError as error:
        raise UserError(f"max_epochs={config.max_epochs:g}: {error}; lower it") from None


def samples_of(config: TrainConfig) -> int:
    """Samples of a step, over all ranks."""
    return config.gradient_accumulation_steps * config.batch_size


def checkpoint_to_resume(config: TrainConfig, earlier: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file that this run goes on from, and what is in it; None and {} where it begins. Raises UserError.

    Where torchrun starts its ranks again, a run goes on from the file of the `earlier` one, which was this
    one, whatever init_from says.
    """
    newest = newest_checkpoint(Path(config.out_dir))
    auto = config.init_from.partition(":")[0] == "auto"
    if config.init_from == "resume" or (auto and newest):
        path = newest or Path(config.out_dir) / NEWEST
        return path, load_checkpoint(path)
    if earlier and newest:
        contents = load_checkpoint(newest)
        if contents.get("run_id") == earlier:
            return newest, contents
    return None, {}


def new_model_config(config: TrainConfig, meta: dict[str, Any]) -> GPTConfig:
    """The shape of a new network; GPT-2's vocabulary is padded to GPTConfig's, which GPUs multiply faster."""
    shape = {name: value for name, value in asdict(config).items() if name in asdict(GPTConfig())}
    vocab_size = GPTConfig.vocab_size if meta["vocab_size"] == 50257 else meta["vocab_size"]
    return GPTConfig(vocab_size=vocab_size, **shape)


def initial_model(
    config: TrainConfig, meta: dict[str, Any], earlier: str | None = None
) -> tuple[GPT, dict[str, Any]]:
    """The network to train, on the CPU, and the checkpoint that it goes on from, {} if none. UserError."""
    path, contents = checkpoint_to_resume(config, earlier)
    origin = contents  # the checkpoint that the weights come from, gone on from or not
    source = "scratch" if config.init_from == "auto" else config.init_from.removeprefix("auto:") or "scratch"
    if path:
        model, source = restore_model(contents, path, config.dropout), config.out_dir
        its_optimizer = contents.get("config", {}).get("optimizer", "adamw")
        if its_optimizer != config.optimizer and not config.eval_only:
            raise UserError(
                f"{config.out_dir} was trained with optimizer={its_optimizer}; resume with that, or begin "
                f"from its weights: --init_from={config.out_dir} and another --out_dir"
            )
    elif source == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(new_model_config(config, meta))
    else:
        model, origin = load_pretrained(source, config.dropout)
    if tokenizers_differ(origin.get("meta", meta)["tokenizer"], meta["tokenizer"]):
        raise UserError(
            f"{source} was trained with another tokenizer than {config.dataset} has; choose the dataset that "
            "it was trained on, or --init_from=scratch"
        )
    measured = contents.get("config", {}).get("eval_splits", "both")
    if contents and (measured == "train") != (config.eval_splits == "train"):
        contents |= {"best_val_loss": math.inf, "no_lower": 0}  # of another split, not to be compared
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


def earlier_run(config: TrainConfig, runtime: Runtime) -> str | None:
    """The id of this run where torchrun has started its ranks again, as rank 0 finds it; else None."""
    found = run_before_restart(Path(config.out_dir)) if runtime.is_main else None
    number = int(runtime.all_reduce_sum(int(found or "0", 16))[0])
    return f"{number:08x}" if number else None


def fingerprint(data: Dataset) -> dict[str, list[int]]:
    """Of each split its length and a checksum of some ids from all over it: whether the data is the same. Of
    a mixture, that of each part by its number, and its share in millionths."""
    sums = {}
    for number, part in enumerate(data.parts):
        of_mixture = [] if len(data.parts) == 1 else [round(part.weight * 1e6)]
        for split, stream in part.streams.items():
            ids = stream.windows(np.linspace(0, len(stream) - 1, 256).astype(np.int64), 1)
            name = f"{split} {number}" if of_mixture else split
            sums[name] = [len(stream), zlib.crc32(ids.tobytes()), *of_mixture]
    return sums


def same_data(one: dict[str, list[int]], other: dict[str, list[int]]) -> bool:
    """Whether two fingerprints are of the same data, as far as both have read it."""
    split_of = {name: name.partition(" ")[0] for name in (*one, *other)}
    read = {split_of[name] for name in one} & {split_of[name] for name in other}
    return all(one.get(name) == other.get(name) for name, split in split_of.items() if split in read)


def describe_run(config: TrainConfig, runtime: Runtime, data: Dataset, model: GPT, say: Say) -> None:
    """Tell before the first step what is trained, on what, where, and what will be written."""
    shape, micro_steps = model.config, config.gradient_accumulation_steps
    tokens = micro_steps * config.batch_size * config.block_size
    # beside the weights; Muon's AdamW has few of them
    averages = {"adamw": 2, "muon": 1, "sgd": int(config.momentum > 0)}[config.optimizer]
    megabytes = 4 * (1 + averages) * model.get_num_params(non_embedding=False) / 1e6
    for part in data.parts:
        sizes = ", ".join(f"{len(stream):,} {split}" for split, stream in part.streams.items())
        share = "" if len(data.parts) == 1 else f"{part.weight:.1%} "
        say(f"data     {share}{part.folder}: {sizes} tokens, vocabulary {data.meta['vocab_size']:,}")
    say(
        f"model    {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
        f"block {shape.block_size}: {model.get_num_params(non_embedding=False):,} parameters"
    )
    say(f"machine  {runtime.describe()}")
    say(f"step     {tokens:,} tokens: {micro_steps} x {config.batch_size} sequences of {config.block_size}")
    if config.max_epochs is not None and not config.eval_only:
        steps = f"{samples_per_epoch(data, config) / samples_of(config):,.1f}".removesuffix(".0")
        epochs = f"{config.max_epochs:g} epoch{'s' * (config.max_epochs != 1)}"
        say(f"length   {epochs} of {steps} steps, {config.max_iters:,} in all")
    if not config.eval_only:
        often = min(config.eval_interval, config.save_interval or config.eval_interval)
        say(
            f"writes   {config.out_dir}/{BEST} (best), {NEWEST} (newest) and {LOG}, "
            f"every {often} steps up to {config.max_iters}, {megabytes:,.0f} MB each"
        )


def describe_resumption(
    config: TrainConfig, model: GPT, contents: dict[str, Any], data: dict[str, list[int]], say: Say
) -> None:
    """Tell where a run goes on, and what of it is not as the settings or the unbroken run would have it."""
    step = contents.get("iter_num", 0)
    if contents:
        ended = early_stop_reason(config, step, contents.get("seconds", 0.0), contents.get("no_lower", 0))
        finished = (ended or step >= config.max_iters) and not config.eval_only
        why = f" ({ended})" if ended else ""
        say(f"resumes  after step {step}" + (f": nothing left to do{why}" if finished else ""))
        if "optimizer" not in contents:
            say("note     without the optimizer's averages, which start anew")
        if not same_data(contents.get("data", data), data):
            if is_restart():
                raise UserError("the data changed under the run; put back what it was, and resume")
            say("note     the data changed since: the run goes on, but not as it would have")
    for name, value in asdict(model.config).items():
        wanted = getattr(config, name, value)
        meant = bool(contents) or wanted != getattr(TrainConfig, name, wanted)  # what a new run would have
        if wanted != value and meant and name not in ("block_size", "dropout", "zero_init"):
            say(f"note     the model's {name}={value} holds, not {wanted}")
