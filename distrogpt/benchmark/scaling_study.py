"""ablate.py --scaling=True: train a grid of sizes and minutes on a dataset, and fit the law of scaling.py.

The speed of each size is measured first. Minutes are then a fixed number of steps, so that the losses do not
depend on what else the machine does. The results of several datasets share a file, and the fit uses them all.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distrogpt.checkpoint import atomic_write
from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.errors import UserError, writable
from distrogpt.plotting import INK, RING, add_line, label_ends, new_figure, style_axes, write_figure
from distrogpt.runtime import start_runtime
from distrogpt.scaling import (
    LAW,
    SIZES,
    WEB_DIFFICULTY,
    Size,
    Text,
    loss_by_law,
    parse_size,
    relative_loss,
)
from distrogpt.settings import AblateConfig, TrainConfig
from distrogpt.training.minutes import Chooser, read_text, size_of
from distrogpt.training.startup import tokens_per_step, with_changes

TRAINING = 0.9  # of the minutes; train.py --minutes needs the rest to start, measure and evaluate
EVALUATIONS = 4  # of each run, at equal distances, beside that of the first step
EVALUATED = 256_000  # tokens of val, if it has more than twice as many
RECORDED = """block_size batch_size gradient_accumulation_steps weight_decay muon_lr learning_rate
    dropout""".split()  # settings of each run, in the results
QUIET = {"eval_splits": "val", "log_interval": 1000, "loss_plot": False, "always_save_checkpoint": False}
CONSTANTS = ("size", "size_power", "data", "data_power", "power", "passes")  # of the law, which are fitted
PRIOR = 0.01  # error of a loss that weighs as much as a constant that is e times that of LAW
SLOPE = 0.02  # error of a loss that weighs as much as a text whose losses fall twice as fast as others'
ODD = 0.01  # error of a loss, beyond which a run counts less: with its error, and not with the square of it

# Published runs of nanochat on FineWeb-EDU: millions of parameters without embeddings, millions of tokens,
# bytes per token, bits per byte. The first four sizes were the best for their FLOPs. Sources: its dev/LOG.md
# (January 27, 2026), dev/LEADERBOARD.md (depths 24 and 26) and the model card of nanochat-d34.
PUBLISHED = np.array([
    (110.7, 1_241.5, 4.7, 0.8972), (167.8, 1_785, 4.7, 0.8616), (250.7, 2_642, 4.7, 0.8293),
    (381.8, 3_807, 4.7, 0.7999), (730, 8_760, 4.7, 0.7483), (918, 7_577, 4.7, 0.7465),
    (2_074, 88_683, 4.86, 0.7045),
])  # fmt: skip
PUBLISHED_WEIGHT = 0.1  # of a published run; one of the study has 1


class Run(NamedTuple):
    """A model that was trained."""

    text: str  # name of its dataset
    size: str
    minutes: float
    tokens: int
    steps: int
    batch: int  # tokens per step
    seed: int
    bits_per_byte: float  # the lowest; inf if the run diverged
    seconds: float
    settings: dict[str, Any]


class Study(NamedTuple):
    """The contents of the file of results."""

    texts: dict[str, Text]
    seconds_per_token: dict[str, dict[Size, float]]  # by the name of the text
    given: dict[str, dict[str, Any]]  # settings that the user gave, by the name of the text
    runs: list[Run]

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all."""
        texts = {
            name: {
                "text": text._asdict(),
                "seconds_per_token": {str(s): value for s, value in self.seconds_per_token[name].items()},
                "given": self.given[name],
            }
            for name, text in self.texts.items()
        }
        contents = {"texts": texts, "runs": [run._asdict() for run in self.runs]}
        atomic_write(lambda file: file.write(json.dumps(contents, indent=1).encode()), path)


def read_study(path: Path) -> Study:
    """The results of an interrupted study, or of other texts. Raises UserError."""
    if not path.stat().st_size:
        return Study({}, {}, {}, [])
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        runs = [Run(**run) for run in contents["runs"]]
        texts = {name: Text(**entry["text"]) for name, entry in contents["texts"].items()}
        speeds = {
            name: {parse_size(size): float(value) for size, value in entry["seconds_per_token"].items()}
            for name, entry in contents["texts"].items()
        }
        given = {name: dict(entry["given"]) for name, entry in contents["texts"].items()}
        for run in runs:
            relative_loss(parse_size(run.size), texts[run.text], run.tokens)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a study of ablate.py --scaling=True; choose another --json") from None
    return Study(texts, speeds, given, runs)


def scaling_study(
    config: AblateConfig,
    train: Callable[[TrainConfig], Any],
    training_step: Callable[..., Any],
) -> dict[str, Any]:
    """Train all sizes for all minutes with all seeds; print and draw the results, fit the law, and return its
    constants. `train` returns a TrainResult, or None if the run diverged. Raises UserError."""
    if config.constants:
        with writable(config.constants):
            pass
    path, study = config.results, read_study(config.results)
    base = settings_of_all_runs(config)
    runtime = start_runtime(base.device, base.dtype, base.backend)
    data = open_dataset(with_changes(base, block_size=1))
    name = add_text(study, config, base, data)
    sizes = config.sizes_of_runs or (SIZES[5:11] if runtime.device.type == "cuda" else SIZES[:6])
    finished = {(run.text, run.size, run.minutes, run.seed) for run in study.runs}
    grid = list(product(config.seeds_of_runs, config.minutes_of_runs, sizes))
    todo = [cell for cell in grid if (name, str(cell[2]), cell[1], cell[0]) not in finished]
    duration = f"{sum(minutes for _, minutes, _ in todo):,.6g} minutes"
    print(f"study    {name}: {len(todo)} of {len(grid)} runs to train, {duration}; results in {path}")

    deadline = time.perf_counter() + 60 * base.minutes
    chooser = Chooser(base, data.meta, study.texts[name], runtime, training_step, deadline)
    measure_speeds(chooser, study.seconds_per_token[name], sizes)
    study.write(path)
    for seed, minutes, size in todo:
        chosen = settings_of_run(chooser, size, minutes, seed)
        if chosen.max_iters:
            study.runs.append(train_once(chosen, name, minutes, train))
            study.write(path)
        else:
            print(f"{size}, {minutes:g} minutes: left out (too little time or memory)")
    return report(study, config)


def settings_of_all_runs(config: AblateConfig) -> TrainConfig:
    """The settings of the study without those that it ignores, and with minutes, which Chooser needs."""
    unused = config.unused()
    kept = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if f.name not in unused}
    base = TrainConfig(**kept | QUIET | {"minutes": config.minutes_of_runs[-1]})
    base.given = frozenset(config.given or ()) & kept.keys()
    return base


def add_text(study: Study, config: AblateConfig, base: TrainConfig, data: Dataset) -> str:
    """Add the dataset to the study; returns its name. Raises UserError if the study has other data or other
    settings for this name, or if the bits per byte of the text are not known."""
    name, text = Path(config.dataset).name, read_text(data)
    if text.difficulty is None or not all(part.tokens_per_byte() for part in data.parts):
        advice = "prepare it again with this repository"
        raise UserError(f"the bits per byte of {config.dataset} are not known from its meta.json; {advice}")
    given = {key: getattr(base, key) for key in sorted(base.given) if key not in ("dataset", "seed")}
    if name not in study.texts:
        study.texts[name], study.seconds_per_token[name], study.given[name] = text, {}, given
    before, changed = study.given[name], []
    if study.texts[name][:3] != text[:3]:
        changed = [f"tokens in {name}"]
    changed += [key for key in sorted(before | given) if before.get(key) != given.get(key)]
    if changed:
        what = f"is of a study with different {', '.join(changed)}"
        raise UserError(f"{config.results} {what}; choose another --json")
    return name


def measure_speeds(chooser: Chooser, known: dict[Size, float], sizes: list[Size]) -> None:
    """Measure the seconds per token of sizes whose speed is not known yet."""
    chooser.seconds_per_token = known
    todo = [size for size in sizes if size not in known]
    if todo:
        chooser.seconds_per_step(chooser.settings(todo[0], 0.0))  # the first steps are slower
    for size in todo:
        chooser.measure(size)
    print(f"tokens/s {', '.join(f'{size}: {1 / known[size]:,.0f}' for size in sizes)}")


def settings_of_run(chooser: Chooser, size: Size, minutes: float, seed: int) -> TrainConfig:
    """Those of train.py --minutes for this size, with the number of steps in max_iters."""
    tokens = chooser.tokens_in(TRAINING * 60 * minutes, chooser.seconds_per_token[size])
    chosen, val_tokens = chooser.settings(size, tokens), chooser.text.val_tokens
    steps = round(tokens / tokens_per_step(chosen))
    batches = max(1, EVALUATED // (chosen.batch_size * chosen.block_size))
    return with_changes(
        chosen,
        minutes=None,
        seed=seed,
        max_iters=steps,
        eval_interval=max(1, math.ceil(steps / EVALUATIONS)),
        eval_iters=batches if val_tokens > 2 * EVALUATED else 0,
    )


def train_once(config: TrainConfig, name: str, minutes: float, train: Callable[[TrainConfig], Any]) -> Run:
    """Train, and print the lowest loss."""
    begin, result = time.perf_counter(), train(config)
    seconds = time.perf_counter() - begin
    bits = min(losses["bits_per_byte"] for losses in result.losses) if result else math.inf
    size, batch = size_of(config), tokens_per_step(config)
    steps, settings = config.max_iters, {key: getattr(config, key) for key in RECORDED}
    run = f"{size}, {minutes:g} minutes ({steps:,} steps), seed {config.seed}"
    print(f"{run}: {bits:.4f} bits per byte, {seconds:.1f} s", flush=True)
    tokens = steps * batch
    return Run(name, str(size), minutes, tokens, steps, batch, config.seed, bits, seconds, settings)


class Fit(NamedTuple):
    """A law that was fitted to runs."""

    law: dict[str, float]
    scales: dict[str, float]  # of each text: its losses, relative to what the law says; 1 on average
    errors: dict[str, np.ndarray]  # relative, of the runs of each text beside its scale and slope


def fit_law(texts: dict[str, Text], runs: list[Run]) -> Fit:
    """The constants of the law with the least squares of relative errors, all but the floor, of which runs of
    minutes say nothing. Each text may be easier or harder than its compression says, by a factor that is 1 on
    average, and its losses may fall faster or more slowly, which does not change its best sizes. Odd runs
    count less (Huber's loss). Published runs, which are far larger, count a little. Constants that these do
    not determine stay near those of LAW: passes, for example, if no run repeats its text."""
    names = list(dict.fromkeys(run.text for run in runs))
    of_text = np.array([names.index(run.text) for run in runs])
    measured = np.log([run.bits_per_byte / (texts[run.text].difficulty or 1.0) for run in runs])
    todo = [(parse_size(run.size), texts[run.text], run.tokens) for run in runs]
    logs = present = np.log([LAW[name] for name in CONSTANTS])
    weights = np.ones(len(runs))

    def of_texts(values: np.ndarray) -> np.ndarray:
        return np.bincount(of_text, weights * values) / np.bincount(of_text, weights)

    def law_of(logs: np.ndarray) -> dict[str, float]:
        return LAW | dict(zip(CONSTANTS, np.exp(logs).tolist(), strict=True))

    def parts_of(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the texts, the logarithms of their factors, and how much faster than the law their losses fall;
        of the runs, how far they are from the law times the factor, without and with this slope."""
        expected = np.log([relative_loss(*run, law_of(logs)) for run in todo])
        below = expected - of_texts(expected)[of_text]
        scales = of_texts(measured - expected)
        apart = measured - expected - scales[of_text]
        covariance = np.bincount(of_text, weights * below * apart)
        variance = np.bincount(of_text, weights * below**2)
        slopes = covariance / (variance + SLOPE**2) - covariance.sum() / (variance.sum() + SLOPE**2)
        level = scales.mean()
        return scales - level, slopes, apart + level, apart + level - slopes[of_text] * below

    def residuals(logs: np.ndarray) -> np.ndarray:
        _, slopes, _, errors = parts_of(logs)
        published = PUBLISHED_WEIGHT * published_errors(law_of(logs))
        return np.concatenate([weights**0.5 * errors, SLOPE * slopes, published, PRIOR * (logs - present)])

    for _ in range(10):
        logs = least_squares(residuals, logs)
        weights = 1 / np.maximum(1.0, np.abs(parts_of(logs)[3]) / ODD)
    (scales, _, apart, errors), law = parts_of(logs), law_of(logs)
    if len(names) > 1:  # 90 % of a normal distribution
        law["error"] = 1.645 * math.sqrt(np.var(np.exp(scales), ddof=1) + np.mean(apart**2))
    law = {name: float(f"{value:.4g}") for name, value in law.items()}
    factors = dict(zip(names, np.exp(scales).tolist(), strict=True))
    return Fit(law, factors, {name: errors[of_text == i] for i, name in enumerate(names)})


def published_errors(law: dict[str, float]) -> np.ndarray:
    """Relative errors of published runs: of their losses beside a factor for web text, of this factor, and of
    the gain from more parameters beside that from more data, which are equal at the best sizes."""
    millions, tokens, bytes_per_token, bits = PUBLISHED.T
    megabytes = tokens * bytes_per_token
    ratios = np.log(bits / WEB_DIFFICULTY / loss_by_law(millions, megabytes, law))
    by_size = law["size_power"] * law["size"] * millions ** -law["size_power"]
    by_data = law["data_power"] * law["data"] * megabytes ** -law["data_power"]
    balance = np.log(by_size / by_data)[:4]
    return np.concatenate([ratios - ratios.mean(), [ratios.mean()], balance / 2])


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The x near which the sum of squared residuals is lowest, by the Levenberg-Marquardt method."""
    now, damping = residuals(x), 1e-2
    for _ in range(200):
        slopes = np.stack([(residuals(x + h) - now) / 1e-5 for h in 1e-5 * np.eye(len(x))], axis=1)
        squares = slopes.T @ slopes
        step = np.linalg.solve(squares + damping * np.diag(np.diag(squares)), -slopes.T @ now)
        new = residuals(x + step.clip(-0.5, 0.5))
        if new @ new < now @ now:
            x, now, damping = x + step.clip(-0.5, 0.5), new, damping / 3
        else:
            damping *= 4
    return x


def cells_of(runs: list[Run]) -> dict[float, dict[str, float]]:
    """The median loss of each size, by minutes; smaller sizes first."""
    cells: dict[float, dict[str, float]] = {}
    for run in sorted(runs, key=lambda run: (run.minutes, parse_size(run.size).parameters(0))):
        same = [other for other in runs if (other.minutes, other.size) == (run.minutes, run.size)]
        median = statistics.median(other.bits_per_byte for other in same)
        cells.setdefault(run.minutes, {})[run.size] = median
    return cells


def choices_of(law: dict[str, float], text: Text, runs: list[Run]) -> dict[float, str]:
    """The size that a law chooses among the runs of a text, by minutes."""
    losses = {
        (run.minutes, relative_loss(parse_size(run.size), text, run.tokens, law)): run.size for run in runs
    }
    return {minutes: size for (minutes, _), size in sorted(losses.items(), reverse=True)}


def table(name: str, text: Text, runs: list[Run], laws: dict[str, dict[str, float]]) -> list[str]:
    """Lines with the bits per byte of each size and minutes, * at the best; and the choices of laws."""
    cells, choices = cells_of(runs), {title: choices_of(law, text, runs) for title, law in laws.items()}
    sizes = sorted({run.size for run in runs}, key=lambda size: parse_size(size).parameters(0))
    best = {minutes: min(column, key=column.__getitem__) for minutes, column in cells.items()}
    lines = ["".join([f"{name:22}", *(f"{f'{minutes:g} min':>18}" for minutes in cells)])]
    for size in sizes:
        marked = {m: "*" if size == best[m] else " " for m in cells}
        values = [f"{cells[m][size]:17.4f}{marked[m]}" if size in cells[m] else " " * 18 for m in cells]
        lines.append("".join([f"{size:22}", *values]))
    for title, chosen in choices.items():
        loss = {m: 100 * (cells[m][chosen[m]] / cells[m][best[m]] - 1) for m in cells}
        lines.append("".join([f"{title:22}", *(f"{f'{chosen[m]} +{loss[m]:.1f} %':>18}" for m in cells)]))
    return lines


def report(study: Study, config: AblateConfig) -> dict[str, float]:
    """Print the tables and the fitted law, draw the plot, write the constants, and return them."""
    runs = [run for run in study.runs if math.isfinite(run.bits_per_byte)]
    if not runs:
        advice = "give more --scaling_minutes; if runs diverged, lower --learning_rate and --muon_lr"
        raise UserError(f"no run has a loss, so there is nothing to fit; {advice}")
    fit, texts = fit_law(study.texts, runs), list(dict.fromkeys(run.text for run in runs))
    legend = "* marks the best size; last lines: the size that a rule chooses and how far it is from the best"
    print(f"\nbits per byte; {legend}")
    for name in texts:
        own = [run for run in runs if run.text == name]
        laws = {"rule of train.py": LAW, "rule with this fit": fit.law}
        print("\n".join(["", *table(name, study.texts[name], own, laws)]))
    print(f"\nfit      of {len(runs)} runs")
    for name in texts:
        error, most = np.sqrt(np.mean(fit.errors[name] ** 2)), np.abs(fit.errors[name]).max()
        errors = f"errors {100 * error:.1f} %, at most {100 * most:.1f} %"
        print(f"         {name}: {errors}; losses {fit.scales[name]:.3f} times those of an average text")
    constants = json.dumps({"law": fit.law})
    print(f"law      {constants}")
    if config.constants:
        atomic_write(lambda file: file.write(f"{constants}\n".encode()), Path(config.constants))
        print(f"written  {Path(config.constants).resolve()}")
    plot(study, texts, runs, config.picture)
    return fit.law


def plot(study: Study, texts: list[str], runs: list[Run], path: Path) -> None:
    """A panel for each text: loss against minutes, with a curve for each size. Raises UserError."""
    if find_spec("matplotlib") is None:
        print(f"note     {path} is not drawn without matplotlib; run: pip install matplotlib")
        return
    write_figure(draw(study, texts, runs), path, dpi=150)
    print(f"plot     {path.resolve()}")


def draw(study: Study, texts: list[str], runs: list[Run]) -> Any:
    """The figure of plot."""
    columns = math.ceil(math.sqrt(len(texts)))
    rows = math.ceil(len(texts) / columns)
    figure = new_figure(5.5 * columns, 4.2 * rows, "Loss by size and training time")
    sizes = sorted({run.size for run in runs}, key=lambda size: parse_size(size).parameters(0))
    for name, axes in zip(texts, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        own = [run for run in runs if run.text == name]
        plot_text(axes, sizes, own, choices_of(LAW, study.texts[name], own))
        subtitle = f"{name}; grey: the best size, rings: the choice of train.py"
        style_axes(axes, "minutes", "val loss (bits per byte)", subtitle)
    for axes in list(figure.axes)[len(texts) :]:
        axes.set_axis_off()
    return figure


def plot_text(axes: Any, sizes: list[str], runs: list[Run], chosen: dict[float, str]) -> None:
    """The curves of sizes, the best of them, and the chosen sizes."""
    cells = cells_of(runs)
    best = [min(column.values()) for column in cells.values()]
    axes.plot(list(cells), best, color=INK, alpha=0.15, linewidth=9, solid_capstyle="round")
    for number, size in enumerate(sizes):
        points = [(minutes, column[size]) for minutes, column in cells.items() if size in column]
        if points:
            x, y = np.array(points).T
            add_line(axes, x, y, number, size)
    rings = [cells[minutes][size] for minutes, size in chosen.items()]
    axes.plot(list(chosen), rings, "o", color=INK, **RING)
    axes.set_xscale("log")
    axes.set_xticks(list(cells), [f"{minutes:g}" for minutes in cells])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.08)
    label_ends(axes)
