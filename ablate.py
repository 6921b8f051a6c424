"""What each ingredient of a recipe gains: python ablate.py config/train_shakespeare_cpu_modern.py

Trains the recipe, the recipe without each of its ingredients, GPT-2, and GPT-2 with each of them: for as many
steps, with the same seeds. What is no ingredient (learning rates, warm-up, weight decay, batch) is the
recipe's in all. It prints a table and draws ablate.png.
"""

import sys

from configurator import configure
from distrogpt.settings import AblateConfig

if __name__ == "__main__":
    CONFIG = configure(AblateConfig)  # before torch is loaded, so that --help and mistakes answer at once

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from distrogpt.errors import Diverged, UserError, cli_errors, writable
from distrogpt.runtime import find_pyplot
from distrogpt.settings import TrainConfig
from train import train

INGREDIENTS = (
    "norm", "rotary", "qk_norm", "activation", "n_kv_head", "tied", "logit_softcap", "embedding_skip",
    "zero_init", "optimizer", "lr_schedule", "sampling", "dropout",
)  # fmt: skip
# What a study decides itself, whatever the recipe says.
FIXED = {
    "init_from": "scratch", "eval_iters": 0, "eval_splits": "val", "eval_only": False, "seed": 0,
    "out_dir": "-", "log_interval": 1000, "wandb_log": False, "wandb_project": "-", "wandb_run_name": "-",
    "tensorboard_log": False, "loss_plot": False, "eval_hellaswag": False, "eval_accuracy": False,
    "eval_samples": 0,
}  # fmt: skip
Run = dict[str, float]  # seed, val (inf: it diverged), seconds


def variants(config: AblateConfig) -> dict[str, dict[str, Any]]:
    """What to train, by name: settings that differ from the recipe's. Raises UserError where it has none."""
    plain = {name: getattr(TrainConfig, name) for name in INGREDIENTS}  # a dataclass keeps its defaults there
    recipe = {name: getattr(config, name) for name in INGREDIENTS if getattr(config, name) != plain[name]}
    if not recipe:
        raise UserError(
            f"this recipe is GPT-2's; set one of {', '.join(INGREDIENTS)}, or take a config named modern"
        )
    of = {name: f"{name}={value}" for name, value in recipe.items()}
    without = {f"recipe without {of[name]}": {name: plain[name]} for name in recipe}
    added = {f"GPT-2 with {of[name]}": {**plain, name: value} for name, value in recipe.items()}
    return {"recipe": {}, **without, "GPT-2": plain, **added}


def train_once(settings: dict[str, Any], seed: int) -> Run:
    """Train in a folder that vanishes; the best loss over the whole val split, and the seconds of all."""
    torch.compiler.reset()  # it compiles a few variants of a network only, and goes on without
    begin, val = time.perf_counter(), math.inf
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(None), contextlib.suppress(Diverged):
            result = train(TrainConfig(**{**settings, "seed": seed, "out_dir": folder}))
            if result.stopped_by:
                sys.exit(128 + result.stopped_by)
            val = result.best_val_loss
    return {"seed": seed, "val": val, "seconds": time.perf_counter() - begin}


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, list[Run]]:
    """The runs of an earlier call, {} if none. Raises UserError where they are of another study."""
    if not path.stat().st_size:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, runs = found["settings"], found["runs"]
        changed = [name for name, value in settings.items() if theirs.get(name) != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no study's; name another --json, or move it away") from None
    if changed:
        raise UserError(
            f"{path} has a study with another {', '.join(changed)}; name another --json, or move it away"
        )
    return runs


def write_results(path: Path, settings: dict[str, Any], runs: dict[str, list[Run]]) -> None:
    """The whole file or the old one: a study killed while it writes loses no run that was made."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def table(runs: dict[str, list[Run]]) -> list[str]:
    """A line for each variant: median loss and time, and what they are more than the recipe's or GPT-2's."""
    lines = [f"{'':44} {'val loss':>8} {'(lowest to highest)':>20} {'change':>8} {'seconds':>8} {'ratio':>6}"]
    medians = {
        name: [statistics.median(run[key] for run in found) for key in ("val", "seconds")]
        for name, found in runs.items()
    }
    for name, (val, seconds) in medians.items():
        vals = [run["val"] for run in runs[name]]
        base_val, base_seconds = medians["recipe" if name.startswith("recipe") else "GPT-2"]
        spread = f"({min(vals):.4f} to {max(vals):.4f})"
        compared = f"{val - base_val:+8.4f} {seconds:8.1f} {seconds / base_seconds:6.2f}"
        lines.append(f"{name:44} {val:8.4f} {spread:>20} {compared}")
    return lines


def plot(runs: dict[str, list[Run]], path: str) -> None:
    """A dot for each run: its loss, a row for each variant."""
    pyplot = find_pyplot(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(runs) + 1.2), layout="constrained")
    for row, (name, found) in enumerate(runs.items()):
        color = "#4477aa" if name.startswith("recipe") else "#cc6677"
        vals = [run["val"] for run in found if math.isfinite(run["val"])]
        axes.plot(vals, [row] * len(vals), "o", color=color, alpha=0.7)
        if vals:
            axes.plot(statistics.median(vals), row, "|", color=color, markersize=16)
        if vals and name in ("recipe", "GPT-2"):
            axes.axvline(statistics.median(vals), color=color, linewidth=0.6)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(xlabel="best loss over the whole val split; a dot for each seed, a bar at the median")
    with writable(path) as file:
        figure.savefig(file, dpi=150)
    print(f"plot     {Path(path).resolve()}")


def ablate(config: AblateConfig) -> dict[str, list[Run]]:
    """Train all variants with all seeds, tell each, and return the runs. They are kept in config.json."""
    path, todo = Path(config.json), variants(config)
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)} | FIXED
    with writable(config.json):  # before hours of training
        runs = read_results(path, settings)
    seeds = [config.seed + number for number in range(config.seeds)]
    length = f"{config.max_epochs:g} epochs" if config.max_epochs else f"{config.max_iters} steps"
    print(f"study    {len(todo)} variants x {config.seeds} seeds of {length}, kept in {path}")
    for seed in seeds:  # in turns, so that a busy hour slows all variants alike
        for name, changes in todo.items():
            if seed in [run["seed"] for run in runs.setdefault(name, [])]:
                continue
            run = train_once(settings | changes, seed)
            runs[name].append(run)
            print(f"{name}, seed {seed}: val loss {run['val']:.4f}, {run['seconds']:.1f} s", flush=True)
            write_results(path, settings, runs)
    runs = {name: [run for run in runs[name] if run["seed"] in seeds] for name in todo}
    print("\n".join(table(runs)))
    plot(runs, config.plot)
    return runs


if __name__ == "__main__":
    with cli_errors():
        ablate(CONFIG)
