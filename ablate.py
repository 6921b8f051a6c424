"""An ablation study of a recipe: python ablate.py config/train_shakespeare_cpu_modern.py

Trains the recipe, the recipe without each ingredient, GPT-2, and GPT-2 with each ingredient. All other
settings (steps, seeds, learning rates, weight decay, batch) are the recipe's. Prints a table and plots it.

python ablate.py --scaling=True --dataset=NAME trains sizes instead: see distrogpt/benchmark/scaling_study.py.
"""

from configurator import configure
from distrogpt.settings import AblateConfig

if __name__ == "__main__":
    CONFIG = configure(AblateConfig)  # before torch is loaded, so that --help and mistakes answer at once

import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from distrogpt.benchmark.scaling_study import scaling_study
from distrogpt.checkpoint import atomic_write
from distrogpt.errors import Diverged, UserError, cli_errors, writable
from distrogpt.files import locked
from distrogpt.plotting import COLORS, new_figure, style_axes, write_figure
from distrogpt.settings import TrainConfig
from train import TrainResult, train, training_step

INGREDIENTS = """norm rotary qk_norm activation n_kv_head tied logit_softcap embedding_skip key_offset
    zero_init optimizer lr_schedule sampling dropout""".split()
# the same in every study, whatever the recipe sets
FIXED = {
    "init_from": "scratch", "eval_iters": 0, "eval_splits": "val", "eval_only": False, "seed": 0,
    "out_dir": "-", "log_interval": 1000, "wandb_log": False, "wandb_project": "-", "wandb_run_name": "-",
    "tensorboard_log": False, "loss_plot": False, "eval_hellaswag": False, "eval_accuracy": False,
    "eval_samples": 0, "minutes": None, "max_minutes": None,
}  # fmt: skip
Run = dict[str, float]  # seed, val (inf if it diverged), seconds


def variants(config: AblateConfig) -> dict[str, dict[str, Any]]:
    """Variants to train, by name: the settings in which each differs from the recipe. Raises UserError."""
    if config.max_minutes is not None and config.max_iters == TrainConfig.max_iters and not config.max_epochs:
        advice = "variants are compared after the same number of steps; set it, such as --max_iters=700"
        raise UserError(f"the recipe is limited by max_minutes; {advice}")
    gpt2 = {name: getattr(TrainConfig, name) for name in INGREDIENTS}  # a dataclass keeps its defaults there
    recipe = {name: getattr(config, name) for name in INGREDIENTS if getattr(config, name) != gpt2[name]}
    if not recipe:
        advice = f"use config/train_shakespeare_cpu_modern.py, or set one of {', '.join(INGREDIENTS)}"
        raise UserError(f"the recipe is GPT-2's, so there is nothing to ablate; {advice}")
    without = {f"recipe without {name}={recipe[name]}": {name: gpt2[name]} for name in recipe}
    added = {f"GPT-2 with {name}={value}": {**gpt2, name: value} for name, value in recipe.items()}
    return {"recipe": {}, **without, "GPT-2": gpt2, **added}


def train_quietly(config: TrainConfig) -> TrainResult | None:
    """Train in a temporary folder, without output; None if it diverged."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # or it would stop compiling after a few variants
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None), suppress(Diverged):
        result = train(replace(config, out_dir=folder))
        if result.stopped_by:
            sys.exit(128 + result.stopped_by)
        return result
    return None


def train_once(settings: dict[str, Any], seed: int) -> Run:
    """The best loss on the whole val split, and the seconds in total."""
    begin = time.perf_counter()
    result = train_quietly(TrainConfig(**settings | {"seed": seed}))
    val = result.best_val_loss if result else math.inf
    return {"seed": seed, "val": val, "seconds": time.perf_counter() - begin}


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, list[Run]]:
    """The finished runs of an interrupted study, or {}. Raises UserError if the file is of another study."""
    if not path.stat().st_size:
        return {}
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if study["settings"].get(name) != value]
        runs = study["runs"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a study of ablate.py; choose another --json") from None
    if changed:
        raise UserError(f"{path} is of a study with different {', '.join(changed)}; choose another --json")
    return runs


def table(runs: dict[str, list[Run]]) -> list[str]:
    """A line per variant: its median loss and seconds, and how they differ from the recipe's or GPT-2's."""
    lines = [f"{'':44} {'val loss':>8} {'(min to max)':>20} {'change':>8} {'seconds':>8} {'ratio':>6}"]
    for name, variant in runs.items():
        baseline = runs["recipe" if name.startswith("recipe") else "GPT-2"]
        vals = [run["val"] for run in variant]
        val, seconds = statistics.median(vals), statistics.median(run["seconds"] for run in variant)
        change = val - statistics.median(run["val"] for run in baseline)
        ratio = seconds / statistics.median(run["seconds"] for run in baseline)
        spread = f"({min(vals):.4f} to {max(vals):.4f})"
        lines.append(f"{name:44} {val:8.4f} {spread:>20} {change:+8.4f} {seconds:8.1f} {ratio:6.2f}")
    return lines


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """A row for each variant, with a dot for the loss of each run. Raises UserError."""
    if find_spec("matplotlib") is None:
        print(f"note     {path} is not drawn without matplotlib; run: pip install matplotlib")
        return
    figure = new_figure(9, 0.32 * len(runs) + 1.6, "What each ingredient of the recipe gains")
    axes = figure.subplots()
    for row, (name, variant) in enumerate(runs.items()):
        color, marker = (COLORS[0], "o") if name.startswith("recipe") else (COLORS[1], "s")
        vals = [run["val"] for run in variant if math.isfinite(run["val"])]
        axes.plot(vals, [row] * len(vals), marker, color=color, alpha=0.7)
        if vals:
            axes.plot(statistics.median(vals), row, "|", color=color, markersize=16)
        if vals and name in ("recipe", "GPT-2"):
            axes.axvline(statistics.median(vals), color=color, linewidth=0.6)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    subtitle = "a marker for each seed, a bar at the median; lower is better"
    style_axes(axes, "best val loss (nats per token)", subtitle=subtitle, grid="x")
    write_figure(figure, path, dpi=150)
    print(f"plot     {path.resolve()}")


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Train all variants with all seeds, or sizes with scaling=True; print the results, save them in
    config.results, and return the runs. Raises UserError if that file has another study."""
    todo = {} if config.scaling else variants(config)
    path, advice = config.results, "wait until it ends, or choose another --json"
    with writable(str(path)):  # before hours of training
        pass
    with locked(Path(f"{path}.lock"), f"another ablate.py is writing to {path}; {advice}"):
        if config.scaling:
            return scaling_study(config, train_quietly, training_step)
        return run_study(config, todo)


def run_study(config: AblateConfig, todo: dict[str, dict[str, Any]]) -> dict[str, list[Run]]:
    """Run the study, with its file locked by ablate."""
    path, seeds = config.results, config.seeds_of_runs
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)} | FIXED
    runs = read_results(path, settings)
    length = f"{config.max_epochs:g} epochs" if config.max_epochs else f"{config.max_iters} steps"
    print(f"study    {len(todo)} variants x {len(seeds)} seeds, {length} each; results in {path}")
    for seed in seeds:  # in turns, so that a busy hour slows all variants alike
        for name, changes in todo.items():
            if seed in [run["seed"] for run in runs.setdefault(name, [])]:
                continue
            run = train_once(settings | changes, seed)
            runs[name].append(run)
            print(f"{name}, seed {seed}: val loss {run['val']:.4f}, {run['seconds']:.1f} s", flush=True)
            study = json.dumps({"settings": settings, "runs": runs}, indent=1)
            atomic_write(lambda file, study=study: file.write(study.encode()), path)
    runs = {name: [run for run in runs[name] if run["seed"] in seeds] for name in todo}
    print("\n".join(table(runs)))
    plot(runs, config.picture)
    return runs


if __name__ == "__main__":
    with cli_errors():
        ablate(CONFIG)
