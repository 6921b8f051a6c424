"""One file on disk to and from (model, optimizer, step): written whole or not, read without running code.

nanoGPT's keys: model, optimizer, model_args, iter_num, best_val_loss, config. Beside them stand scaler (of
fp16 training) and meta (the dataset's, with its tokenizer). nanoGPT's own files are read too.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, get_type_hints

import torch
from torch.overrides import TorchFunctionMode

from distrogpt.data.meta import GPT2_META, checked_meta
from distrogpt.errors import Diverged, MachineError, UserError
from distrogpt.training.distributed import gather_to_cpu, shard_like
from model import GPT, GPTConfig

BEST, NEWEST = "ckpt.pt", "last.pt"
OPTIMIZER_KEYS = ("optimizer", "muon")  # AdamW's or SGD's state, as in nanoGPT; Muon's beside AdamW's


def atomic_write(write: Callable[[IO[bytes]], object], *paths: Path) -> None:
    """Write a file beside `paths`, flush it to disk, and let each of them in turn be it, without a copy.

    At each moment each path is a whole file, the old or the new. Raises MachineError where the disk does not
    take it; then they are the old ones.
    """
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        with open(temporaries[0], "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for temporary in temporaries[1:]:
            same_file(temporaries[0], temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError, MemoryError)):  # torch: RuntimeError
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise MachineError(f"{paths[-1]} cannot be written ({reason}), and is what it was before") from None
    with suppress(OSError):  # the new names, too, where folders can be flushed
        folder = os.open(paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def same_file(path: Path, other: Path) -> None:
    """Make `other` a second name of the file, or a copy where the disk has no second names."""
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
        with open(other, "rb+") as file:
            os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What is in the file, on the CPU. Raises UserError where it is no whole, harmless checkpoint."""
    if not os.path.isfile(path):  # Path.is_file raises OSError for 5,000 characters
        if os.path.isfile(path.parent):
            raise UserError(f"{path.parent} is a file; give the folder that it is in")
        runs = sorted(str(run.parent) for run in Path().glob(f"out*/{BEST}"))[:5]
        here = f" ({', '.join(runs)})" if runs else ""
        raise UserError(f"{path} is missing; train first, or point --out_dir at a run's folder{here}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what is wrong; the line below says it
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # cut off, foreign or hostile bytes can fail in any way
        raise UserError(f"{path} is damaged or not a checkpoint ({first_line(error)}); use another") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} is no checkpoint of this project or nanoGPT; use another one")
    for key, (default, is_sound) in PARTS.items():
        try:
            sound = is_sound(contents.get(key, default))
        except Exception:  # what is looked at can be of any type
            sound = False
        if not sound:
            raise UserError(
                f"{path} is no checkpoint of this project or nanoGPT (see {key}); use another one"
            )
    return contents


def has_text_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value.keys())


def is_config(value: Any) -> bool:
    """Plain values, as in nanoGPT; those that are used are text."""
    texts = [value.get(key) or "" for key in ("dataset", "optimizer", "eval_splits", "loss_after")]
    return has_text_keys(value) and all(isinstance(text, str) for text in texts)


def is_fingerprint(value: Any) -> bool:
    """As start.py makes them: some whole numbers for each name."""
    return has_text_keys(value) and all(type(n) is int for numbers in value.values() for n in numbers)


def is_number(value: Any) -> bool:
    """One number, be it a tensor, as nanoGPT's best_val_loss."""
    return (isinstance(value, (int, float)) or is_plain(value)) and isinstance(float(value), float)


def is_scaler(value: Any) -> bool:
    """The state of a torch.amp.GradScaler; {} or None of one that is off."""
    known = torch.amp.GradScaler("cpu").state_dict()
    numbers = value.values() if value else ()
    return (not value or set(value) == set(known)) and all(
        type(number) in (int, float) and 0 <= number < math.inf for number in numbers
    )


def is_plain(value: Any) -> bool:
    """Whether it is a tensor as networks and optimizers have them: fractions, each in memory of its own."""
    return (
        torch.is_tensor(value)
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_contiguous()
    )


# What a checkpoint holds: what stands for a missing key, and whether its readers can use a value.
PARTS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "model": (None, has_text_keys),
    "model_args": (None, has_text_keys),
    "iter_num": (None, lambda value: type(value) is int and 0 <= value < 2**63),
    "best_val_loss": (math.inf, is_number),
    "val_loss": (math.inf, is_number),
    "config": ({}, is_config),
    "scaler": ({}, is_scaler),
    "meta": (GPT2_META, lambda value: bool(checked_meta(value))),
    "evaluated": (True, lambda value: type(value) is bool),  # False: stopped before the evaluation was done
    "run_id": ("0", lambda value: isinstance(value, str) and value.isalnum()),
    "seconds": (0.0, lambda value: type(value) is float and math.isfinite(value)),
    "skipped": (0, lambda value: type(value) is int),
    "no_lower": (0, lambda value: type(value) is int),  # evaluations since that of best_val_loss
    "data": ({}, is_fingerprint),
}


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The file to resume from: last.pt, or else ckpt.pt, which is all that nanoGPT writes."""
    return next((out_dir / name for name in (NEWEST, BEST) if os.path.isfile(out_dir / name)), None)


def best_checkpoint(out_dir: Path) -> Path:
    """The file to sample from: ckpt.pt, or last.pt where a run was stopped before its first evaluation."""
    return next((out_dir / name for name in (BEST, NEWEST) if os.path.isfile(out_dir / name)), out_dir / BEST)


def restore_model(contents: dict[str, Any], path: Path, dropout: float = 0.0) -> GPT:
    """The network of a checkpoint, with its weights, on the CPU. Raises UserError where they do not fit."""
    args = {"activation": "gelu", **contents["model_args"], "dropout": dropout}  # nanoGPT's is the exact one
    try:
        config = config_of(args)
    except ValueError as error:
        raise UserError(f"{path} has {error}; use another, or update") from None
    weights = {
        name.removeprefix("_orig_mod."): tensor
        for name, tensor in contents["model"].items()
        if not name.endswith(".attn.bias")  # the causal mask, in files from nanoGPT on torch before 2.0
    }
    try:
        return build_model(config, weights)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: weights and model_args do not fit ({reason}); use another one") from None


def build_model(config: GPTConfig, weights: dict[str, Any]) -> GPT:
    """A network of this shape with these weights. Raises ValueError where they are not its own."""
    check_weights(weights, config)
    with Unset():
        model = GPT(config)
    model.load_state_dict(weights)
    return model


def config_of(args: dict[str, Any]) -> GPTConfig:
    """The shape of these settings, of any origin. Raises ValueError."""
    known = get_type_hints(GPTConfig)
    for name, value in args.items():
        odd_bool = type(value) is bool and known.get(name) is not bool  # which is an int to isinstance
        if name not in known or odd_bool or not isinstance(value, known[name]):
            shown = str(value)[:40] if isinstance(value, (int, float, str)) else type(value).__name__
            raise ValueError(f"{name[:40]}={shown}, not known here")
    return GPTConfig(**args)


class Unset(TorchFunctionMode):
    """Networks made under it have no random weights: a checkpoint's come. To draw what has no memory, torch
    would load its compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.normal_ or getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def check_weights(weights: dict[str, Any], config: GPTConfig) -> None:
    """Raises ValueError where they are not a network's of this shape, before memory is taken for it."""
    if config.n_layer > len(weights):
        raise ValueError(f"n_layer={config.n_layer}, but there are {len(weights)} weights")
    with torch.device("meta"), Unset():  # shapes without memory
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    missing, strange = set(shapes) - set(weights), set(weights) - set(shapes)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)}")
    if strange:
        raise ValueError(f"{min(strange)[:60]} has no place in it")
    for name, shape in shapes.items():
        if not is_plain(weights[name]) or weights[name].shape != shape:
            raise ValueError(f"{name} is no plain tensor of shape {tuple(shape)}")


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], contents: dict[str, Any], out_dir: Path
) -> None:
    """Load the averages; the settings stay those of this run. Raises UserError where they do not fit."""
    try:
        for key, optimizer in zip(OPTIMIZER_KEYS, optimizers, strict=False):
            groups = contents[key]["param_groups"]
            for saved, ours in zip(groups, optimizer.param_groups, strict=True):
                saved.update({key: value for key, value in ours.items() if key != "params"})
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            check_averages(contents[key], optimizer)
            state = {  # of each, the part that this rank has
                number: {name: shard_like(value, parameters[number]) for name, value in averages.items()}
                for number, averages in contents[key]["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    except Exception as error:  # a state of any structure can fail in any way
        raise UserError(
            f"{out_dir}: the optimizer state does not fit ({first_line(error)}); set optimizer, embedding_lr "
            "and head_lr as they were, or use another one"
        ) from None


def check_averages(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError where they are not of this optimizer's parameters: its first step would fail."""
    kind = type(optimizer).__name__
    names = {"step", "exp_avg", "exp_avg_sq"} if kind == "AdamW" else {"momentum_buffer"}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        averages = state["state"].get(number, {})  # {}: none as yet
        if averages != {} and (set(averages) != names or not is_number(averages.get("step", 0))):
            raise ValueError(f"{kind} keeps {', '.join(sorted(names))} of each parameter")
        for name in set(averages) - {"step"}:
            if not is_plain(averages[name]) or averages[name].shape != p.shape:
                raise ValueError(f"{name} is no plain tensor of shape {tuple(p.shape)}")


def training_state(
    model: GPT, optimizers: list[torch.optim.Optimizer], keep: bool = True, **more: Any
) -> dict[str, Any]:
    """The contents of a checkpoint, copied to the CPU. `model` is the plain GPT, not DDP's face of it.

    Of a model in parts, all ranks have to call it; those that do not keep it get nothing of use.
    """
    weights = dict(model.state_dict())
    if model.config.tied:
        weights.pop("lm_head.weight")  # copied once
    weights = gather_to_cpu(weights, keep)
    if model.config.tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    states = [gather_to_cpu(optimizer.state_dict(), keep) for optimizer in optimizers]
    return {
        "model": weights,
        **dict(zip(OPTIMIZER_KEYS, states, strict=False)),
        "model_args": asdict(model.config),
        **more,
    }


def diverged_error(step: int, out_dir: Path | None) -> Diverged:
    """The error of a loss that is no number any more; out_dir is None where the run has saved nothing."""
    path = newest_checkpoint(out_dir) if out_dir else None
    kept = f"{path} is the last good state" if path else "nothing was saved yet"
    what_to_do = "lower --learning_rate or set --grad_clip=1.0"
    return Diverged(f"the loss is not finite any more at step {step}; {what_to_do} ({kept})")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut to 100 characters; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:100]
