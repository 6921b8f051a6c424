"""Checkpoints: written atomically, and read without running code.

The keys are nanoGPT's and those of SCHEMA; nanoGPT's own files are read, too.
"""

import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, get_type_hints

import torch

from distrogpt.data.meta import GPT2_META, checked_meta
from distrogpt.errors import MachineError, UserError, first_line, quote, why_not_written
from distrogpt.training.distributed import gather_to_cpu, shard_like
from model import GPT, GPTConfig

BEST, NEWEST, HISTORY = "ckpt.pt", "last.pt", "step-????????.pt"
# in the names of weights: torch.compile, DDP and DataParallel, FSDP1, its checkpointing, Lightning
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model")
OPTIMIZER_KEYS = ("optimizer", "muon")  # AdamW's or SGD's state, as in nanoGPT; Muon's beside AdamW's


class NotFinite(ValueError):
    """A weight, or an optimizer's average, is infinite or not a number."""


def atomic_write(write: Callable[[IO[bytes]], object], *paths: Path, needed: int = 0) -> None:
    """Write one file, flush it to disk, and rename it to each of `paths`: each is complete, old or new.
    Raises MachineError if it cannot be written; the old files are then unchanged. The message has the bytes
    `needed` if the disk is full."""
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        with open(temporaries[0], "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for temporary in temporaries[1:]:
            temporary.unlink(missing_ok=True)
            try:
                os.link(temporaries[0], temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(temporaries[0], temporary)
                with open(temporary, "rb+") as copy:
                    os.fsync(copy.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError, MemoryError)):  # torch raises RuntimeError
            raise
        reason = why_not_written(error, paths[-1], needed)
        raise MachineError(f"{paths[-1]} cannot be written ({reason}) and is unchanged") from None
    with suppress(OSError):  # some systems cannot flush folders
        folder = os.open(paths[0].parent, os.O_RDONLY)
        os.fsync(folder)  # the renames reach the disk, too
        os.close(folder)


def load_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint, on the CPU. Raises UserError if it is missing, damaged or hostile. With
    `mmap`, tensors stay on disk until they are read, as long as the file is not replaced."""
    if not os.path.isfile(path):  # Path.is_file raises OSError for 5,000 characters
        if os.path.isfile(path.parent):
            raise UserError(f"{path.parent} is a file; give the folder that contains it")
        runs = sorted(str(run.parent) for run in Path().glob(f"out*/{BEST}"))[:5]
        here = f" (here: {', '.join(runs)})" if runs else ""
        raise UserError(f"{path} is missing; train first, or set --out_dir to the folder of a run{here}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch guesses what is wrong; the error below is enough
            mmap = mmap and zipfile.is_zipfile(path)  # torch's format before 1.6 cannot be mapped
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged, foreign and hostile files raise errors of any type
        raise UserError(f"{path} is damaged or not a checkpoint ({first_line(error)}); use another") from None
    for key, (default, is_valid) in SCHEMA.items():
        with suppress(Exception):  # contents and values can be of any type
            if is_valid(contents.get(key, default)):
                continue
        reason = f"{key} is missing or invalid"
        raise UserError(f"{path} is not a checkpoint of distroGPT or nanoGPT ({reason}); use another")
    if math.isnan(float(contents.get("best_val_loss", math.inf))):
        contents["best_val_loss"] = math.inf  # no loss would be below nan
    return contents


def has_str_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value.keys())


def is_config(value: Any) -> bool:
    """A dict of settings; those that are used must be strings."""
    used = [value.get(key) or "" for key in ("dataset", "optimizer", "eval_splits", "loss_after")]
    return has_str_keys(value) and all(isinstance(setting, str) for setting in used)


def is_number(value: Any) -> bool:
    """A float, or a tensor with one element, as nanoGPT's best_val_loss is."""
    return (isinstance(value, (int, float)) or is_dense(value)) and isinstance(float(value), float)


def is_scaler_state(value: Any) -> bool:
    """The state of a torch.amp.GradScaler; empty or None if it was disabled."""
    if not value:
        return True
    numbers_fit = all(type(n) in (int, float) and 0 <= n < math.inf for n in value.values())
    return numbers_fit and set(value) == set(torch.amp.GradScaler("cpu").state_dict())


def is_fits(value: Any) -> bool:
    """Steps, progress and total steps of each fit."""
    types_fit = all([type(n) for n in fit] == [int, float, int] for fit in value)
    return types_fit and all(0 <= fit[0] <= fit[2] and 0 <= fit[1] <= 1 for fit in value)


def is_dense(value: Any) -> bool:
    """A floating-point tensor on the CPU, each of its elements in memory."""
    if not torch.is_tensor(value) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.is_floating_point() and value.is_contiguous()


# The keys of a checkpoint: the default of a missing one, and whether a value is valid.
SCHEMA: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "model": (None, has_str_keys),
    "model_args": (None, has_str_keys),
    "iter_num": (None, lambda value: type(value) is int and 0 <= value < 2**63),
    "best_val_loss": (math.inf, is_number),
    "val_loss": (math.inf, is_number),
    "config": ({}, is_config),
    "scaler": ({}, is_scaler_state),  # of fp16
    "meta": (GPT2_META, lambda value: bool(checked_meta(value))),  # the dataset's, with its tokenizer
    "evaluated": (True, lambda value: type(value) is bool),  # False: stopped before this step's evaluation
    "run_id": ("0", lambda value: isinstance(value, str) and value.isalnum()),
    "seconds": (0.0, lambda value: type(value) is float and math.isfinite(value)),
    "evaluation_seconds": (0.0, lambda value: type(value) is float and 0 <= value < math.inf),
    "fits": ([], is_fits),  # of the schedule to the time that is left, with max_minutes
    "skipped": (0, lambda value: type(value) is int),  # steps
    "no_lower": (0, lambda value: type(value) is int),  # evaluations since the best one
    "data": ({}, lambda value: all(type(n) is int for n in chain(*value.values()))),  # fingerprints by split
}


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint to resume from: last.pt, or ckpt.pt, the only one that nanoGPT writes."""
    return next((out_dir / name for name in (NEWEST, BEST) if os.path.isfile(out_dir / name)), None)


def best_checkpoint(out_dir: Path) -> Path:
    """The checkpoint to sample from: ckpt.pt, or last.pt if the run stopped before its first evaluation."""
    return next((out_dir / name for name in (BEST, NEWEST) if os.path.isfile(out_dir / name)), out_dir / BEST)


def restore_model(contents: dict[str, Any], path: Path, dropout: float = 0.0) -> GPT:
    """The network of a checkpoint, on the CPU. Raises UserError if weights and model_args do not fit."""
    args = {"activation": "gelu", **contents["model_args"], "dropout": dropout}  # nanoGPT's is the exact GELU
    try:
        config = make_config(args)
    except ValueError as error:
        reason = str(error).partition(";")[0]  # without advice for new models
        raise UserError(f"{path}: {reason}; use another checkpoint, or update distroGPT") from None
    try:
        weights = without_wrappers(contents["model"])
        weights = {  # without the causal mask, which nanoGPT saves with torch before 2.0
            name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")
        }
        return build_model(tie_weights(config, weights), weights)
    except NotFinite as error:
        raise not_finite_error(path, error) from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its model_args ({reason}); use another") from None


def run_settings(contents: dict[str, Any]) -> dict[str, Any]:
    """The settings with which a checkpoint was trained, including the shape of its network; unchecked."""
    shape = {"activation": "gelu", **contents["model_args"]}
    dropout = shape.pop("dropout", 0.0)  # replaced by the config's, as the model is built with that
    settings = {"dropout": dropout, **contents.get("config", {}), **shape}
    if "meta" not in contents:  # nanoGPT names the dtype of its GPU, even if it was not set
        settings.pop("dtype", None)
    return settings


def make_config(args: dict[str, Any]) -> GPTConfig:
    """GPTConfig(**args), of any origin. Raises ValueError for unknown settings and values of a wrong type."""
    types = get_type_hints(GPTConfig)
    for name, value in args.items():
        is_wrong_bool = type(value) is bool and types.get(name) is not bool  # a bool is an instance of int
        if name not in types or is_wrong_bool or not isinstance(value, types[name]):
            shown = str(value)[:40] if isinstance(value, (int, float, str)) else type(value).__name__
            raise ValueError(f"{name[:40]}={shown} is unknown or has a wrong type")
    return GPTConfig(**args)


def without_wrappers(weights: Mapping[str, Any], wrappers: tuple[str, ...] = WRAPPERS) -> dict[str, Any]:
    """The weights without the parts of their names that wrappers of the network or its layers have added.
    Raises ValueError if two of the names become the same."""
    unwrapped: dict[str, Any] = {}
    for name, tensor in weights.items():
        own = ".".join(part for part in name.split(".") if part not in wrappers)
        if own in unwrapped:
            raise ValueError(f"two weights are named {own[:60]}")
        unwrapped[own] = tensor
    return unwrapped


def tie_weights(config: GPTConfig, weights: dict[str, Any], wte: str = "transformer.wte.weight") -> GPTConfig:
    """Add to `weights` one of the two tied ones if it is missing. If both are there and differ, they are not
    tied: the returned config says so, as in transformers."""
    tied = [name for name in (wte, "lm_head.weight") if name in weights]
    if not config.tied or not tied:
        return config
    first, last = weights[tied[0]], weights[tied[-1]]
    if first is not last and is_dense(first) and is_dense(last) and not torch.equal(first, last):
        return replace(config, tied=False)
    weights |= dict.fromkeys((wte, "lm_head.weight"), first)
    return config


def meta_model(config: GPTConfig, n_weights: int) -> GPT:
    """A network whose weights take no memory. Raises ValueError if n_weights are too few for its layers."""
    if config.n_layer > n_weights:
        raise ValueError(f"n_layer={config.n_layer}, but there are only {n_weights} weights")
    with torch.device("meta"):
        return GPT(config)


def check_weights(weights: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless names and shapes are those of `expected`."""
    missing, unknown = set(expected) - set(weights), set(weights) - set(expected)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)}")
    if unknown:
        raise ValueError(f"unexpected weight {min(unknown)[:60]}")
    for name, tensor in expected.items():
        if not is_dense(weights[name]) or weights[name].shape != tensor.shape:
            raise ValueError(f"{name} is not a dense floating-point tensor of shape {tuple(tensor.shape)}")


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises NotFinite with the first name whose tensor has an element that is infinite or not a number."""
    for name, tensor in tensors.items():
        # takes a tenth of the time of isfinite().all(); if there is a nan, both extremes are nan
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.detach().aminmax()):
            raise NotFinite(f"{name} has NaN or infinite values")


def check_range(model: GPT, dtype: torch.dtype) -> None:
    """Raises UserError if a weight is too large for the dtype in which the network is to compute."""
    for name, p in model.named_parameters() if dtype != torch.float32 else ():
        largest = max(p.detach().aminmax(), key=abs)
        if not largest.to(dtype).isfinite():
            kind = str(dtype).removeprefix("torch.")
            advice = "set --dtype=bfloat16 or float32" if dtype == torch.float16 else "set --dtype=float32"
            raise UserError(f"{name} has a value of {largest:.3g}, too large for {kind}; {advice}")


def not_finite_error(path: Path, error: NotFinite, otherwise: str = "use another checkpoint") -> UserError:
    """The error of an unusable checkpoint; it names the newest good one of the run, or says `otherwise`."""
    good = last_good_checkpoint(path.parent)
    if good:
        flag = f"--init_from={quote(good)}"
        otherwise = f"{good} is the last good checkpoint: copy it to {path.name}, or use {flag}"
    return UserError(f"{path}: {error}; {otherwise}")


def last_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run whose weights and averages are finite; None if there is none."""
    paths = [folder / BEST, folder / NEWEST, *folder.glob(HISTORY)]
    for path in sorted(filter(os.path.isfile, paths), key=os.path.getmtime, reverse=True):
        with suppress(Exception):  # an optimizer's state can be of any structure
            contents = load_checkpoint(path, mmap=True)
            check_finite({name: weight.float() for name, weight in contents["model"].items()})
            for key in OPTIMIZER_KEYS:
                for averages in contents.get(key, {"state": {}})["state"].values():
                    check_finite({name: torch.as_tensor(value) for name, value in averages.items()})
            return path
    return None


def build_model(config: GPTConfig, weights: Mapping[str, Any]) -> GPT:
    """The network with a copy of these weights, in fp32. Raises ValueError if they do not fit; NotFinite."""
    model = meta_model(config, len(weights))
    check_weights(weights, model.state_dict())
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    check_finite(copies)
    model.load_state_dict(copies, assign=True)
    if config.tied:  # load_state_dict has made them two parameters
        model.transformer.wte.weight = model.lm_head.weight
    return model


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], contents: dict[str, Any], out_dir: Path
) -> None:
    """Load the states of the optimizers; their settings stay. Raises UserError if a state does not fit."""
    try:
        for key, optimizer in zip(OPTIMIZER_KEYS, optimizers, strict=False):
            saved, groups, kind = contents[key], optimizer.param_groups, type(optimizer).__name__
            numbers = [group["params"] for group in saved["param_groups"]]
            parameters = [p for group in groups for p in group["params"]]
            state = {
                number: fit_averages(saved["state"][number], p, kind)
                for number, p in zip(chain(*numbers), parameters, strict=True)
                if number in saved["state"]  # empty before the first step
            }
            param_groups = [{**ours, "params": ids} for ours, ids in zip(groups, numbers, strict=True)]
            optimizer.load_state_dict({"state": state, "param_groups": param_groups})
    except NotFinite as error:
        path = newest_checkpoint(out_dir) or out_dir / NEWEST
        otherwise = f"--init_from={quote(path)} starts a new run with its weights"
        raise not_finite_error(path, error, otherwise) from None
    except Exception as error:  # a state of any structure can fail in any way
        advice = "use the same optimizer, embedding_lr and head_lr as before, or another checkpoint"
        raise UserError(
            f"{out_dir}: the optimizer state does not fit ({first_line(error)}); {advice}"
        ) from None


def fit_averages(averages: dict[str, Any], p: torch.Tensor, kind: str) -> dict[str, Any]:
    """The averages of a parameter, sharded as it is. Raises ValueError if a step would fail on them, and
    NotFinite."""
    names = {"step", "exp_avg", "exp_avg_sq"} if kind == "AdamW" else {"momentum_buffer"}
    if averages != {} and (set(averages) != names or not is_number(averages.get("step", 0))):
        raise ValueError(f"{kind} needs {', '.join(sorted(names))} for each parameter")
    for name in set(averages) - {"step"}:
        if not is_dense(averages[name]) or averages[name].shape != p.shape:
            raise ValueError(f"{name} is not a dense tensor of shape {tuple(p.shape)}")
    check_finite({f"the optimizer's {name}": torch.as_tensor(value) for name, value in averages.items()})
    return {name: shard_like(value, p) for name, value in averages.items()}


def training_state(
    model: GPT, optimizers: list[torch.optim.Optimizer], keep: bool = True, **extra: Any
) -> dict[str, Any]:
    """The contents of a checkpoint, copied to the CPU. `model` is the plain GPT, not DDP's wrapper. All ranks
    must call it if the model is sharded; on ranks without `keep`, tensors are None."""
    weights = dict(model.state_dict())
    if model.config.tied:
        weights.pop("lm_head.weight")  # copied once
    weights = gather_to_cpu(weights, keep)
    if model.config.tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    states = [gather_to_cpu(optimizer.state_dict(), keep) for optimizer in optimizers]
    named_states, model_args = dict(zip(OPTIMIZER_KEYS, states, strict=False)), asdict(model.config)
    for name in ("qk_norm_weights", "key_offset"):  # unknown to older versions
        if not model_args[name]:
            del model_args[name]
    return {"model": weights, **named_states, "model_args": model_args, **extra}


def bytes_of(tree: Any) -> int:
    """The size of all tensors in nested dicts and lists, each counted once."""
    tensors: dict[int, int] = {}
    trees = [tree]
    while trees:
        tree = trees.pop()
        if torch.is_tensor(tree):
            tensors[tree.data_ptr()] = tree.nbytes
        elif isinstance(tree, (dict, list)):
            trees += tree.values() if isinstance(tree, dict) else tree
    return sum(tensors.values())
