"""Where a run's numbers go: lines on the screen and in log.csv, Weights & Biases, TensorBoard, loss.png."""

import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distrogpt.errors import UserError
from distrogpt.evaluation.loss import Losses
from distrogpt.runtime import Runtime
from distrogpt.settings import TrainConfig
from distrogpt.training.run_directory import TENSORBOARD, RunDirectory
from plot import picture_of

COLUMN_OF = {  # in log.csv, by the name in an evaluation
    "train": "train_loss",
    "val": "val_loss",
    "bits_per_byte": "val_bits_per_byte",
    "hellaswag": "hellaswag",
    "accuracy": "accuracy",
}
CURVES = ("loss", "lr", "grad_norm", "mfu", "tokens_per_second")  # of the steps
TOGETHER = 1.0  # seconds whose lines are written at once: one at a time takes five times as long


class TrainLogger:
    """The logs of a run, which rank 0 writes; other ranks', and an evaluation's without a folder, write none.

    Entered before the first step, left after the last.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        folder: RunDirectory | None,
        run_id: str,
        again: int,
        began: float,
    ) -> None:
        """`again` is the first step whose evaluation is still to be made, `began` when the run did, by
        time.perf_counter. Raises UserError where a package is missing."""
        self.config, self.folder, self.again, self.began = config, folder, again, began
        self.say = runtime.say
        self.row: dict[str, Any] = {}  # the line of log.csv that is not written yet
        self.curves: dict[str, float] = {}  # the same for the others
        self.waiting: list[tuple[float, dict[str, Any], dict[str, float]]] = []  # lines, and when they came
        self.wandb = start_wandb(config, run_id) if config.wandb_log and runtime.is_main else None
        self.writer_class = find_tensorboard() if config.tensorboard_log and folder else None
        self.writer: Any = None  # opened when an older run's files are out of its way
        self.picture = picture_of(config, self.say) if folder else None

    def step(self, step: int, loss: float, norm: float, lr: float, seconds: float, mfu: float) -> None:
        """Tell a step, and keep its numbers for `write`. `seconds` are those of one step."""
        sequences = self.config.gradient_accumulation_steps * self.config.batch_size
        tokens = sequences * self.config.block_size
        speed = f"{seconds * 1000:.2f} ms, {tokens / seconds:,.0f} tokens/s, mfu {mfu:.1%}"
        self.say(f"step {step}: loss {loss:.4f}, {speed}")
        self.row = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": round(tokens / seconds)}
        self.curves = {**self.row, "mfu": mfu}
        self.row |= {"tokens": step * tokens, "seconds": round(time.perf_counter() - self.began, 3)}

    def write(self, step: int, found: Losses | None) -> None:
        """Write the line of a step: its own numbers, where it was told, and those of its evaluation, if there
        was one. After an evaluation it is in log.csv, else at the next `flush`, within a second."""
        if found:
            self.row |= {column: found[name] for name, column in COLUMN_OF.items() if name in found}
            self.curves |= curve_names(found)
            for line in beside_published(self.config, found):
                self.say(f"step {step}: {line}")
        if self.row and self.wandb:
            self.wandb.log(self.curves, step=step)
        if self.row and self.folder:
            self.waiting.append((time.time(), {"step": step, **self.row}, self.curves))
        self.row, self.curves = {}, {}
        if found or (self.waiting and time.time() - self.waiting[0][0] > TOGETHER):
            self.flush()
        if found and self.picture:
            self.picture.redraw()

    def flush(self) -> None:
        """Write the lines that wait: before a checkpoint, which a run goes on from with all lines before."""
        if self.waiting:
            self.folder.log(*(row for _, row, _ in self.waiting))
            if self.writer_class:
                self.add_to_tensorboard()
            self.waiting = []

    def add_to_tensorboard(self) -> None:
        """The lines that wait. Where the disk takes none, that is told, and the run goes on without."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        def add(step: int, curves: dict[str, float], when: float) -> None:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in curves.items()]
            self.writer.file_writer.add_summary(Summary(value=values), step, when)  # add_scalar: four times

        try:
            if self.writer is None:
                kept, where = self.folder.resumed, str(self.folder.path / TENSORBOARD)
                self.writer = self.writer_class(where, purge_step=self.again, max_queue=1000)
                if kept.get("step") == str(self.again):  # the line stays, but the purge has no regard for it
                    curves = {name: float(kept[name]) for name in CURVES if kept.get(name)}
                    add(self.again, curves, self.waiting[0][0])
            for when, row, curves in self.waiting:
                add(row["step"], curves, when)
            self.writer.flush()
        except Exception as error:
            self.say(f"note     {TENSORBOARD} takes no more ({error}); the run goes on without")
            self.writer_class = None

    def __enter__(self) -> "TrainLogger":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.flush()
        if self.writer and self.writer_class:
            with suppress(Exception):
                self.writer.close()
        if self.picture:
            self.picture.finish(wait=kind is None)
        if self.wandb and kind is None:
            self.wandb.finish()


def start_wandb(config: TrainConfig, run_id: str) -> Any:
    """A Weights & Biases run, or that of this id gone on with. Raises UserError where it cannot be."""
    try:
        import wandb

        where = {"project": config.wandb_project, "name": config.wandb_run_name}
        return wandb.init(**where, config=asdict(config), id=run_id, resume="allow")
    except Exception as error:
        raise UserError(
            f"wandb does not start ({error}); pip install wandb and log in, or --wandb_log=False"
        ) from None


def find_tensorboard() -> Any:
    """The class that writes for it. Raises UserError where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:
        raise UserError(
            f"TensorBoard does not start ({error}); pip install tensorboard, or --tensorboard_log=False"
        ) from None
    return SummaryWriter


def curve_names(found: Losses) -> dict[str, float]:
    """The values of an evaluation by the names that Weights & Biases and TensorBoard show: train/loss,
    val/bits_per_byte."""
    scores = {name: f"val/{name}" for name in ("bits_per_byte", "hellaswag", "accuracy")}
    return {scores.get(name, f"{name}/loss"): value for name, value in found.items()}


def beside_published(config: TrainConfig, found: Losses) -> list[str]:
    """How an evaluation compares with the published levels, in words."""
    levels = {
        "train": ("train loss", config.baseline_train_loss),
        "val": ("val loss", config.baseline_loss),
        "hellaswag": ("HellaSwag", config.baseline_hellaswag),
    }
    return [
        f"{what} {found[name]:.4f}, published {level:g} ({found[name] - level:+.4f})"
        for name, (what, level) in levels.items()
        if level is not None and name in found
    ]
