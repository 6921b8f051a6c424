"""Make the pictures of the docs: python docs/pictures.py [NAME ...]

Writes docs/pictures/NAME.png, by default all of them. Some are drawn from docs/data. The others show a small
model, which this script trains for about a minute on the source of Python's standard library.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from distrogpt.errors import UserError, cli_errors
from distrogpt.plotting import COLORS, INK, Log, draw, new_figure, points, read_log, style_axes

DATA, PICTURES = REPO / "docs" / "data", REPO / "docs" / "pictures"
DPI, NUM_COLORS = 144, 128
YLABEL = "val loss (nats per character)"
PROMPT = "class Reader:\n    def read(self, size):\n"
TEXT = "def read(self):\n    return self.data"  # for the attention map


def val_losses(name: str) -> Log:
    """The evaluations of a run, without the losses of its steps."""
    log = read_log(DATA / f"{name}.csv")
    return {column: log[column] for column in ("step", "tokens", "seconds", "val_loss")}


def loss_over_seconds() -> Any:
    """Ours beside nanoGPT on two CPU cores."""
    ours, nanogpt = val_losses("cpu-train_shakespeare_cpu_modern"), val_losses("cpu-nanogpt")
    runs = {"distroGPT": ours, "nanoGPT": nanogpt}
    logs = {f"{name}, {points(log, 'val_loss')[0][-1]:,.0f} steps": log for name, log in runs.items()}
    figure = draw(logs, "seconds", title="Tiny Shakespeare on two CPU cores")
    (axes,) = figure.axes
    subtitle = "0.8 M parameters each; nanoGPT's CPU example, distroGPT's modern recipe; lower is better"
    style_axes(axes, "seconds of training", YLABEL, subtitle)
    seconds, losses = points(nanogpt, "val_loss", "seconds")
    end, best = seconds[losses.argmin()], losses.min()
    seconds, losses = points(ours, "val_loss", "seconds")
    below = int((losses <= best).argmax())  # its first evaluation below nanoGPT's best
    crossing = np.interp(-best, -losses[below - 1 : below + 1], seconds[below - 1 : below + 1])
    arrow = {"arrowstyle": "<|-|>", "color": INK, "linewidth": 1.2, "shrinkA": 6, "shrinkB": 0}
    axes.annotate("", (crossing, best), (end, best), arrowprops=arrow)
    text = f"nanoGPT's best loss {end / crossing:.1f} times as fast:\nafter {crossing:.0f} s, not {end:.0f} s"
    axes.text(0.98, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=13, color=INK)
    return figure


def loss_h200() -> Any:
    """Two runs on a GPU."""
    logs = {"GPT-2's recipe": val_losses("h200-train_shakespeare_char")}
    logs["modern recipe"] = val_losses("h200-train_shakespeare_char_modern")
    figure = draw(logs, "tokens", title="Tiny Shakespeare on one NVIDIA H200")
    style_axes(figure.axes[0], "tokens of training", YLABEL, "11 M parameters; lower is better")
    return figure


def ladder() -> Any:
    """As bench.py --ladder=True draws it."""
    from distrogpt.benchmark.studies import draw_ladder  # loads torch

    found = json.loads((DATA / "cpu-ladder.json").read_text(encoding="utf-8"))
    size = "/".join(str(found["settings"][name]) for name in ("n_layer", "n_head", "n_embd"))
    return draw_ladder(found["rungs"], f"GPT-2 {size}, {found['device']}")


def scaling() -> Any:
    """As ablate.py --scaling=True draws it: the texts of which several sizes were trained."""
    from distrogpt.benchmark.scaling_study import draw, read_study  # loads torch

    study = read_study(DATA / "scaling.json")
    sizes = {run.text: {other.size for other in study.runs if other.text == run.text} for run in study.runs}
    texts = [text for text in sizes if len(sizes[text]) > 2]
    return draw(study, texts, [run for run in study.runs if run.text in texts])


def tokens_per_second() -> Any:
    """Decoding speed of GPT-2, a bar for each program."""
    with (DATA / "cpu-decoding.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["tokens_per_second"]))
    figure = new_figure(8, 0.5 * len(rows) + 1.6, "Decoding speed of GPT-2 124M on two CPU cores")
    axes = figure.subplots()
    colors = [COLORS[0] if row["name"].startswith("distroGPT") else "#9aa3ad" for row in rows]
    speeds = [float(row["tokens_per_second"]) for row in rows]
    bars = axes.barh([row["name"] for row in rows], speeds, color=colors)
    axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=5, color=INK, fontweight="bold")
    axes.invert_yaxis()
    style_axes(axes, "tokens per second at batch 1 (higher is better)", grid="x")
    return figure


@contextmanager
def trained_run() -> Iterator[Path]:
    """The out_dir of a small model, relative to a temporary folder that becomes the working directory."""
    started_in, dataset, out_dir = Path.cwd(), REPO / "data" / "stdlib_char", Path("out-stdlib-char")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            if not (dataset / "meta.json").is_file():
                prepare, dataset = dataset / "prepare.py", Path("stdlib_char")
                subprocess.run([sys.executable, str(prepare), f"--output={dataset}"], check=True)
            command = [sys.executable, str(REPO / "train.py"), "train_stdlib_char", f"--dataset={dataset}"]
            command += ["--max_iters=1500", "--eval_interval=150", "--log_interval=5", "--loss_plot=False"]
            subprocess.run([*command, f"--out_dir={out_dir}", "--device=cpu"], check=True)
            yield out_dir
        finally:
            os.chdir(started_in)


def loss(out_dir: Path) -> Any:
    """As a run draws it."""
    return draw({out_dir.name: read_log(out_dir / "log.csv")})


def attention(out_dir: Path) -> Any:
    """The attention weights of the head that looks most at single characters before the previous one."""
    from distrogpt.evaluation.introspection import attention_weights
    from sample import Sampler

    sampler = Sampler(str(out_dir), device="cpu", dtype="float32")
    weights = attention_weights(sampler.model, sampler.ids_of(TEXT))  # (n_layer, n_head, T, T)
    far = weights.tril(-2)[..., 1:]  # neither the character itself, nor the one before, nor the first
    scores = far.amax(dim=-1).mean(dim=-1)  # (n_layer, n_head)
    layer, head = divmod(int(scores.argmax()), weights.size(1))
    figure = new_figure(8, 7, "Attention weights of one head")
    axes = figure.subplots()
    image = axes.imshow(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
    names = [{" ": "␣", "\n": "⏎"}.get(character, character) for character in TEXT]
    subtitle = f"layer {layer + 1}, head {head + 1} of {out_dir.name}; ␣ is a space, ⏎ a newline"
    style_axes(axes, "key: the character that is attended to", "query: the character that attends", subtitle)
    axes.grid(False)
    axes.set_xticks(range(len(names)), names, family="monospace")
    axes.set_yticks(range(len(names)), names, family="monospace")
    figure.colorbar(image, label="attention weight (a row sums to 1)", shrink=0.8)
    return figure


def page(theme: str, out_dir: Path) -> bytes:
    """The page of serve.py with two samples."""
    from playwright.sync_api import sync_playwright

    from distrogpt.benchmark.serving import CHROMIUM, QUIET, running_server
    from distrogpt.settings import BenchConfig

    config = BenchConfig(out_dir=str(out_dir), device="cpu")
    with running_server(config) as (port, _), sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        shape = {"viewport": {"width": 900, "height": 640}, "device_scale_factor": 1.5}
        tab = chromium.new_page(color_scheme=theme, **shape)
        tab.set_default_timeout(60_000)  # ms
        tab.goto(f"http://127.0.0.1:{port}")
        for name, value in {"prompt": PROMPT, "max_tokens": 180, "temperature": 0.5, "seed": 12}.items():
            tab.fill(f"[name={name}]", str(value))
        tab.check("[name=tinted]")
        tab.click("summary")  # closes the settings that are seldom used
        tab.click("#go")
        tab.locator("#go", has_text="Write").wait_for()
        tab.evaluate("scrollTo(0, 0)")
        picture = tab.screenshot()
        chromium.close()
    return picture


FROM_DATA: dict[str, Callable[[], Any]] = {
    "loss-over-seconds": loss_over_seconds,
    "loss-h200": loss_h200,
    "ladder": ladder,
    "scaling": scaling,
    "tokens-per-second": tokens_per_second,
}
FROM_RUN: dict[str, Callable[[Path], Any]] = {
    "loss": loss,
    "attention": attention,
    "page-light": partial(page, "light"),
    "page-dark": partial(page, "dark"),
}


def write(name: str, picture: Any, folder: Path = PICTURES) -> None:
    """Write a figure, or the bytes of a PNG, as a PNG of few colours, which is small."""
    from PIL import Image  # is installed with matplotlib

    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.savefig(file, format="png", dpi=DPI)
        picture = file.getvalue()
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.png"
    image.save(path, optimize=True)
    print(f"picture  {path}, {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


def has_browser() -> bool:
    """Whether pictures of the page can be made; prints a note if not."""
    from distrogpt.benchmark.serving import CHROMIUM

    found = CHROMIUM is not None and find_spec("playwright") is not None
    if not found:
        print("note     no pictures of the page: they need Chromium and pip install playwright")
    return found


def main(names: list[str]) -> None:
    """Make the pictures of these names, or all. Raises UserError."""
    for name in names:
        if name not in {**FROM_DATA, **FROM_RUN}:
            raise UserError(f"no picture {name}; choose from {', '.join([*FROM_DATA, *FROM_RUN])}")
    for name, make in FROM_DATA.items():
        if name in (names or FROM_DATA):
            write(name, make())
    wanted = [name for name in FROM_RUN if name in (names or FROM_RUN)]
    if any(name.startswith("page") for name in wanted) and not has_browser():
        wanted = [name for name in wanted if not name.startswith("page")]
    if wanted:
        with trained_run() as out_dir:
            for name in wanted:
                write(name, FROM_RUN[name](out_dir))


if __name__ == "__main__":
    with cli_errors():
        main(sys.argv[1:])
