"""The start of a run: settings, model, the checkpoint to resume from, and the log lines about them."""

import logging
import math
import zlib
from dataclasses import asdict, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import check_value
from distrogpt.checkpoint import (
    BEST,
    NEWEST,
    load_checkpoint,
    newest_checkpoint,
    restore_model,
    run_settings,
)
from distrogpt.data.dataset import Dataset, parse_mixture, samples_per_epoch
from distrogpt.data.meta import GPT2_META, tokenizers_differ
from distrogpt.errors import UserError, quote
from distrogpt.loading import is_here, load_pretrained
from distrogpt.runtime import Runtime, activity
from distrogpt.settings import OF_THIS_CALL, TrainConfig
from distrogpt.training.pitfalls import pitfalls
from distrogpt.training.run_directory import LOG, is_restart
from distrogpt.training.state import TrainState
from model import GPT, GPTConfig

log = logging.getLogger("distrogpt")

OTHER_DATA = "use the dataset that it was trained on, or --init_from=scratch"


def path_to_resume(config: TrainConfig) -> Path | None:
    """The newest checkpoint if init_from is resume or auto; None if it is not, or without a checkpoint."""
    if config.init_from.partition(":")[0] not in ("resume", "auto"):
        return None
    return newest_checkpoint(Path(config.out_dir))


def inherits(config: TrainConfig) -> bool:
    """Whether settings that are not given come from the checkpoint. A command with init_from=auto and a
    dataset, which may also start the run, gives all of its settings, unless minutes chooses them."""
    if config.given is None:
        return False
    return "minutes" in config.given or "dataset" not in config.given or config.init_from == "resume"


def inherited_settings(config: TrainConfig, contents: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's run that the command line and config files do not give; unchecked."""
    if not inherits(config):
        return {}
    kept = {*OF_THIS_CALL, *config.given}
    if config.eval_only:
        kept.add("wandb_log")
    if "max_iters" in config.given:
        kept.add("max_epochs")  # it would override max_iters
    names = {field.name for field in fields(TrainConfig)} - kept
    return {name: value for name, value in run_settings(contents).items() if name in names}


def inherit_settings(config: TrainConfig, is_restarted: bool = False) -> TrainConfig:
    """The settings, with those that are not given from the checkpoint to resume from: also of a run with
    minutes whose ranks were restarted. Raises UserError."""
    if config.minutes is not None:
        config = name_run(config)
    path = path_to_resume(config)
    if is_restarted:
        path = newest_checkpoint(Path(config.out_dir))
    if path and config.minutes is not None:  # the checkpoint has what was chosen
        config = with_changes(config, minutes=None, max_minutes=config.minutes)
        config.given |= {"max_minutes"}
    may_start = config.minutes is None and "dataset" in (config.given or ())
    if path is None and config.init_from == "resume" and inherits(config) and not may_start:
        path = Path(config.out_dir) / NEWEST  # the error is that this is missing, not the default dataset
    if path is None or not inherits(config):
        return config
    contents = load_checkpoint(path, mmap=True)
    inherited = inherited_settings(config, contents)
    dataset, vocab_size = inherited.get("dataset"), contents["model_args"]["vocab_size"]
    if not dataset and "dataset" not in config.given and vocab_size not in (50257, GPTConfig.vocab_size):
        raise UserError(f"{path} does not name the dataset that it was trained on; give --dataset=NAME")
    if dataset and not is_here(dataset):
        raise UserError(f"{path} was trained on {dataset[:200]}, which is not here; give --dataset=FOLDER")
    values = {name: check_value(TrainConfig, name, value, f"{path}: ") for name, value in inherited.items()}
    return with_changes(config, **values)


def name_run(config: TrainConfig) -> TrainConfig:
    """Settings with minutes, of which those are given that differ from the defaults if they were made in
    Python; with a folder for each dataset."""
    if config.given is None:
        changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
        config.given = frozenset(changed)
    if "out_dir" in config.given or "dataset" not in config.given:
        return config
    return with_changes(config, out_dir=f"out-{Path(parse_mixture(config.dataset)[0][0]).name}")


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The settings with other values. Raises UserError."""
    try:
        changed = replace(config, **changes)
    except ValueError as error:
        raise UserError(error) from None
    changed.given = config.given
    return changed


def check_ranks(config: TrainConfig, runtime: Runtime) -> None:
    """Raises UserError if the ranks cannot share the micro-steps, or have different settings."""
    if config.gradient_accumulation_steps % runtime.world_size:
        setting = f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        ranks = runtime.world_size
        raise UserError(f"{setting} is not divisible by the {ranks} ranks; set it to a multiple of {ranks}")
    message = "the ranks have different settings; start all of them with the same command"
    runtime.check_equal_on_all_ranks(zlib.crc32(repr(config).encode()), message)


def resolve_max_iters(config: TrainConfig, data: Dataset) -> TrainConfig:
    """The settings with max_iters for max_epochs passes over this data. Raises UserError."""
    if config.max_epochs is None or "train" not in data.parts[0].streams:
        return config
    epochs = Fraction(str(config.max_epochs))  # exact: as a float, 0.1 is too large
    steps = math.ceil(epochs * samples_per_epoch(data, config) / samples_per_step(config))
    try:
        return with_changes(config, max_iters=steps)
    except UserError as error:
        raise UserError(f"max_epochs={config.max_epochs:g}: {error}; lower it") from None


def samples_per_step(config: TrainConfig) -> int:
    """Over all ranks."""
    return config.gradient_accumulation_steps * config.batch_size


def tokens_per_step(config: TrainConfig) -> int:
    """Over all ranks."""
    return samples_per_step(config) * config.block_size


def checkpoint_to_resume(config: TrainConfig, restarted_id: str | None) -> tuple[Path | None, dict[str, Any]]:
    """The file to resume from and its contents; None and {} for a new run. If torchrun has restarted the
    ranks of the run restarted_id, they resume for any init_from. Raises UserError."""
    path = path_to_resume(config)
    if path or config.init_from == "resume":
        path = path or Path(config.out_dir) / NEWEST
        return path, load_checkpoint(path)
    newest = newest_checkpoint(Path(config.out_dir))
    if restarted_id and newest:
        contents = load_checkpoint(newest)
        if contents.get("run_id") == restarted_id:
            return newest, contents
    return None, {}


def new_model_config(config: TrainConfig, meta: dict[str, Any]) -> GPTConfig:
    """The shape of a new model; GPT-2's vocabulary is padded to GPTConfig's, which GPUs multiply faster.
    Raises UserError if the settings do not fit together."""
    shape = {name: value for name, value in asdict(config).items() if name in asdict(GPTConfig())}
    vocab_size = GPTConfig.vocab_size if meta["vocab_size"] == 50257 else meta["vocab_size"]
    try:
        return GPTConfig(vocab_size=vocab_size, **shape)
    except ValueError as error:
        raise UserError(error) from None


@activity("loading the model")
def initial_model(config: TrainConfig, meta: dict, restarted_id: str | None = None) -> tuple[GPT, dict]:
    """The model to train, on the CPU, and the checkpoint to resume from, {} for a new run. Raises UserError
    if they do not fit the settings or the dataset."""
    path, checkpoint = checkpoint_to_resume(config, restarted_id)
    weights_from = checkpoint  # the checkpoint that has the weights, resumed or not
    source = "scratch" if config.init_from == "auto" else config.init_from.removeprefix("auto:") or "scratch"
    if path:
        check_resumable(config, checkpoint)
        model, source = restore_model(checkpoint, path, config.dropout), config.out_dir
    elif source == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(new_model_config(config, meta))
    else:
        model, weights_from = load_pretrained(source, config.dropout, ("scratch", "resume", "auto"))
    if tokenizers_differ(weights_from.get("meta", meta)["tokenizer"], meta["tokenizer"]):
        raise UserError(f"{source} was trained with another tokenizer than {config.dataset}'s; {OTHER_DATA}")
    if meta["vocab_size"] > model.config.vocab_size:
        sizes = f"the dataset has a vocabulary of {meta['vocab_size']}, {source} of {model.config.vocab_size}"
        raise UserError(f"{sizes}; {OTHER_DATA}")
    if config.block_size > model.config.block_size:
        limit = f"--block_size={model.config.block_size} or less"
        raise UserError(f"block_size={config.block_size} is larger than that of {source}; set {limit}")
    if config.block_size < model.config.block_size:
        model.crop_block_size(config.block_size)
        if not model.config.rotary:
            checkpoint.pop("optimizer", None)  # it has the shape of the longer position table
    return model, checkpoint


def check_resumable(config: TrainConfig, checkpoint: dict[str, Any]) -> None:
    """Raises UserError if it was trained with another optimizer. Drops its best loss if of another split, and
    the fits of its schedule if they are to another time."""
    optimizer = checkpoint.get("config", {}).get("optimizer", "adamw")
    if optimizer != config.optimizer and not config.eval_only:
        advice = f"resume with that, or start a new run from it: --init_from={quote(config.out_dir)}"
        raise UserError(f"{config.out_dir} was trained with optimizer={optimizer}; {advice}")
    eval_splits = checkpoint.get("config", {}).get("eval_splits", "both")
    if (eval_splits == "train") != (config.eval_splits == "train"):
        checkpoint |= {"best_val_loss": math.inf, "no_lower": 0}  # cannot be compared
    if checkpoint.get("config", {}).get("max_minutes") != config.max_minutes:
        checkpoint.pop("fits", None)


def fingerprint(data: Dataset) -> dict[str, list[int]]:
    """Length and checksum of some ids of each split, to see whether the data is the same; for a mixture, of
    each part by its number, with its weight in millionths."""
    entries = {}
    for number, part in enumerate(data.parts):
        for split, stream in part.streams.items():
            ids = stream.windows(np.linspace(0, len(stream) - 1, 256).astype(np.int64), 1)
            entries[f"{split} {number}"] = [len(stream), zlib.crc32(ids.tobytes()), round(part.weight * 1e6)]
    if len(data.parts) == 1:
        return {name.partition(" ")[0]: entry[:2] for name, entry in entries.items()}
    return entries


def same_data(one: dict[str, list[int]], other: dict[str, list[int]]) -> bool:
    """Whether two fingerprints are of the same data, in the splits that both have."""
    splits = {name.partition(" ")[0] for name in one} & {name.partition(" ")[0] for name in other}
    names = [name for name in {**one, **other} if name.partition(" ")[0] in splits]
    return all(one.get(name) == other.get(name) for name in names)


def describe_run(config: TrainConfig, runtime: Runtime, data: Dataset, model: GPT) -> None:
    """Log the data, the model, the machine, the sizes of a step and the run, and the files to be written."""
    for part in data.parts:
        sizes = ", ".join(f"{len(stream):,} {split}" for split, stream in part.streams.items())
        weight = "" if len(data.parts) == 1 else f"{part.weight:.1%} "
        log.info(f"data     {weight}{part.folder}: {sizes} tokens, vocabulary {data.meta['vocab_size']:,}")
        if part.meta is GPT2_META:
            log.info(f"note     {part.folder} has no meta.json or meta.pkl: its ids are read as GPT-2's")
    shape, parameters = model.config, model.get_num_params(non_embedding=False)
    sizes = f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}"
    log.info(f"model    {sizes}, block size {shape.block_size}: {parameters:,} parameters")
    log.info(f"machine  {runtime.describe()}")
    sizes = f"{config.gradient_accumulation_steps} x {config.batch_size} sequences of {config.block_size}"
    log.info(f"step     {tokens_per_step(config):,} tokens: {sizes} tokens")
    for pitfall in pitfalls(config, data):
        log.info(f"note     {pitfall}")
    if config.eval_only:
        return
    if config.max_epochs is not None:
        steps = f"{samples_per_epoch(data, config) / samples_per_step(config):,.1f}".removesuffix(".0")
        epochs = "1 epoch" if config.max_epochs == 1 else f"{config.max_epochs:g} epochs"
        log.info(f"length   {epochs} of {steps} steps: {config.max_iters:,} steps in total")
    # beside the weights; Muon's AdamW has few of them
    averages = {"adamw": 2, "muon": 1, "sgd": int(config.momentum > 0)}[config.optimizer]
    interval = min(config.eval_interval, config.save_interval or config.eval_interval)
    megabytes = f"{4 * (1 + averages) * parameters / 1e6:,.0f} MB each"
    files = f"{config.out_dir}/{BEST} (best) and {NEWEST} (newest), {megabytes}"
    last = config.max_iters
    when = f"every {interval} steps up to {last}" if interval < last else f"after step {last}"
    if config.max_minutes is not None:
        log.info(f"length   {config.max_minutes:g} minutes: the schedule is fitted to this machine's speed")
        when = f"every {interval} steps and at the end"
    log.info(f"writes   {files}, {when}, and {LOG}")


def describe_inheritance(config: TrainConfig, checkpoint: dict[str, Any]) -> None:
    """Log the settings from the checkpoint that are not defaults, and the given ones that differ from it."""
    taken = [
        f"{name}={quote(getattr(config, name))}"
        for name in inherited_settings(config, checkpoint)
        if getattr(config, name) != getattr(TrainConfig, name)
    ]
    kept = {*OF_THIS_CALL, *checkpoint["model_args"]} - {"block_size", "dropout"}  # a network keeps its shape
    before = {name: value for name, value in run_settings(checkpoint).items() if name in (config.given or ())}
    given = [
        f"{name}={quote(getattr(config, name))} (was {quote(value)})"
        for name, value in before.items()
        if name not in kept and getattr(config, name) != value
    ]
    lines = [f"from the checkpoint: {', '.join(taken)}"] if taken else []
    lines += [f"changed: {', '.join(given)}"] if given else []
    if lines:
        log.info(f"settings {'; '.join(lines)}")


def describe_resumption(config: TrainConfig, model: GPT, checkpoint: dict[str, Any], data: Dataset) -> None:
    """Log where a run resumes, and how it differs from the settings or from an uninterrupted run."""
    if checkpoint:
        state = TrainState(checkpoint)
        line = f"resumes  after step {state.step}"
        if state.finished(config) and not config.eval_only:
            reason = state.early_stop_reason(config) or f"max_iters={config.max_iters} is reached"
            line += f": nothing left to do ({reason})"
        log.info(line)
        describe_inheritance(config, checkpoint)
        if "optimizer" not in checkpoint:
            log.info("note     the optimizer state is not resumed; it starts from zero")
        if "data" in checkpoint and not same_data(checkpoint["data"], fingerprint(data)):
            if is_restart():
                raise UserError("the data changed during the run; restore the old files, then resume")
            log.info("note     the data has changed since the checkpoint; continuing with the new data")
    for name, value in asdict(model.config).items():
        wanted = getattr(config, name, value)
        chosen = bool(checkpoint) or wanted != getattr(TrainConfig, name, wanted)
        if wanted != value and chosen and name not in ("block_size", "dropout", "zero_init"):
            log.info(f"note     {name}={wanted} has no effect: the loaded model has {name}={value}")
