"""The files of a run in out_dir.

ckpt.pt              the best checkpoint so far; with always_save_checkpoint, that of the last evaluation
last.pt              the newest one, from which training resumes
step-00002000.pt     with keep_checkpoints, the newest of some steps
log.csv              a row for each step that is logged or evaluated
loss.png             the plot of log.csv
schedule.csv         with max_minutes, how the schedule was fitted to the time that was left
config.py            the settings with which the run began, as a config file
tensorboard          a folder with the same values, with tensorboard_log
run.lock             locked as long as a process writes here
run.owner            that process, and the run that has written here
"""

import errno
import logging
import math
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import torch
from torch.amp import GradScaler
from torch.optim import Optimizer

from distrogpt.checkpoint import (
    BEST,
    HISTORY,
    NEWEST,
    atomic_write,
    bytes_of,
    newest_checkpoint,
    training_state,
)
from distrogpt.errors import Diverged, MachineError, UserError, quote, why_not_written
from distrogpt.plotting import LOG, PICTURE
from distrogpt.runtime import Runtime, activity
from distrogpt.settings import TrainConfig
from distrogpt.training.distributed import weights_are_finite
from distrogpt.training.state import Fit, TrainState
from model import GPT

log = logging.getLogger("distrogpt")

TENSORBOARD, LOCK, OWNER, SCHEDULE = "tensorboard", "run.lock", "run.owner", "schedule.csv"
SETTINGS = "config.py"
FILES = (BEST, NEWEST, LOG, SCHEDULE, SETTINGS, TENSORBOARD, PICTURE, HISTORY)  # of a run
COLUMNS = (
    "step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "train_loss", "val_loss",
    "val_bits_per_byte", "hellaswag", "accuracy",
)  # fmt: skip
HEADER = ",".join(COLUMNS) + "\n"


class RunDirectory:
    """out_dir. Rank 0 writes to it, unless the run only evaluates; all ranks make the same calls. Entering it
    locks it against other runs; leaving it waits for the last checkpoint."""

    def __init__(self, config: TrainConfig, runtime: Runtime, lock_timeout: float = 5.0) -> None:
        self.config, self.runtime, self.path = config, runtime, Path(config.out_dir)
        self.writes = runtime.is_main and not config.eval_only
        self.lock_timeout = lock_timeout  # seconds: a killed run takes a moment to release its lock
        self.header: dict[str, Any] = {}  # entries that all checkpoints of the run share
        self.run_id = "0"
        self.owned = False  # whether the files here are this run's
        self.best_val_loss = math.inf  # that of ckpt.pt
        self.rows: list[dict[str, str]] = []  # of log.csv, up to the step at which the run resumes
        self.later_fits: list[Fit] = []  # of schedule.csv, after that step
        self.log_failed = False
        self.save_thread: threading.Thread | None = None
        self.save_error: MachineError | None = None  # of the newest save
        self.save_abandoned = threading.Event()

    def __enter__(self) -> "RunDirectory":
        """Raises UserError if the folder cannot be written or another process holds its lock."""
        self.restarted_id = self.find_restarted_id()  # before the owner is overwritten
        if self.writes:
            self.lock()
        self.runtime.barrier()  # all ranks wait until nobody else writes here
        return self

    def lock(self) -> None:
        from filelock import FileLock, Timeout  # comes with torch

        self.created = not self.path.exists()
        self.file_lock = FileLock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.file_lock.acquire(timeout=0)
            except Timeout:
                log.info(f"note     waiting for {read_owner(self.path)[0]}, which is writing to {self.path}")
                self.file_lock.acquire(timeout=self.lock_timeout)
            self.write_owner(read_owner(self.path)[1] if is_restart() else "")
            for name in (BEST, NEWEST, LOG, SCHEDULE, SETTINGS, HISTORY, f"{PICTURE}.*"):
                for unfinished in self.path.glob(name + ".tmp"):  # of a run that was killed while writing
                    unfinished.unlink()
        except Timeout:
            advice = "stop it, or choose another --out_dir"
            raise UserError(
                f"{read_owner(self.path)[0]} is writing to out_dir={self.path}; {advice}"
            ) from None
        except OSError as error:
            reason = f"out_dir={self.path} cannot be written ({why_not_written(error, self.path / LOCK)})"
            self.remove_if_empty()
            raise UserError(f"{reason}; choose another --out_dir") from None

    def write_owner(self, run: str) -> None:
        text = f"process {os.getpid()} on {socket.gethostname()}\n{run}\n"
        (self.path / OWNER).write_text(text, encoding="utf-8")

    def find_restarted_id(self) -> str | None:
        """The id of this run if torchrun has restarted its ranks after rank 0 had written here, else None."""
        run = restarted_run(self.path) if self.runtime.is_main else None
        number = int(self.runtime.all_reduce_sum(int(run, 16) if run else 0)[0])
        return f"{number:08x}" if number else None

    def resume(self, checkpoint: dict[str, Any], **header: Any) -> None:
        """Continue the run of a checkpoint, {} for a new run; `header` is part of all its checkpoints."""
        step = checkpoint.get("iter_num", 0)
        message = f"the ranks find different checkpoints; put out_dir={self.path} on a disk that all share"
        self.runtime.check_equal_on_all_ranks(step, message)
        self.run_id = checkpoint.get("run_id") or self.restarted_id or secrets.token_hex(4)
        self.best_val_loss = float(checkpoint.get("best_val_loss", math.inf))
        self.header = header | {"run_id": self.run_id}
        if "fits" in checkpoint:  # before rank 0 adds others
            self.later_fits = [fit for fit in self.read_fits() if fit.step > step]
        self.runtime.barrier()
        if self.writes and (checkpoint or self.restarted_id):
            self.take_ownership()
            if not checkpoint:
                self.write_settings()
            repeated = [path for path in self.find([HISTORY]) if int(path.stem[5:]) > step]
            self.move_aside(repeated, self.find([previous_name(HISTORY)]))
            self.cut_log(step)
            self.rewrite_fits([*(Fit(*fit) for fit in checkpoint.get("fits", ())), *self.later_fits])

    def cut_log(self, step: int) -> None:
        """Remove the rows after `step`, as these steps are repeated."""
        path = self.path / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line.split(",") for line in text.split("\n")[:-1]]  # without a line that was cut off
        if not lines:
            return
        names = lines[0] if lines[0][0] == "step" else COLUMNS  # those of older versions are fewer
        rows = [dict(zip(names, line, strict=True)) for line in lines if len(line) == len(names)]
        by_step = {int(row["step"]): row for row in rows if row["step"].isdecimal()}
        self.rows = [by_step[number] for number in sorted(by_step) if number <= step]
        self.rewrite_log()

    def rewrite_log(self) -> None:
        text = HEADER + "".join(map(csv_line, self.rows))
        atomic_write(lambda file: file.write(text.encode()), self.path / LOG)

    def read_fits(self) -> list[Fit]:
        """The fits of schedule.csv, without a line that was cut off."""
        path = self.path / SCHEDULE
        lines = path.read_text(encoding="utf-8").split("\n")[1:-1] if path.is_file() else []
        with suppress(ValueError):
            rows = [line.split(",") for line in lines]
            return [Fit(int(step), float(progress), int(total_steps)) for step, progress, total_steps in rows]
        return []

    def rewrite_fits(self, fits: list[Fit]) -> None:
        if fits or (self.path / SCHEDULE).exists():
            text = ",".join(Fit._fields) + "\n" + "".join(map(fit_line, fits))
            atomic_write(lambda file: file.write(text.encode()), self.path / SCHEDULE)

    def record_fit(self, fit: Fit) -> None:
        """Add a line to schedule.csv. A full disk is reported for log.csv."""
        if self.writes:
            self.claim()
            with suppress(OSError), (self.path / SCHEDULE).open("a", encoding="utf-8") as file:
                file.write(fit_line(fit) if file.tell() else ",".join(Fit._fields) + "\n" + fit_line(fit))

    def take_ownership(self) -> None:
        self.owned = True
        self.write_owner(f"run {self.run_id}, job {job_name()}")

    def claim(self) -> None:
        """Move another run's files aside before this run writes its first, so that a mistaken start loses
        nothing. If they have no checkpoint, those moved aside before are kept. Raises MachineError."""
        if self.owned:
            return
        paths, earlier = self.find(FILES), self.find(map(previous_name, FILES))
        if {".pt"} & {path.suffix for path in earlier} - {path.suffix for path in paths}:
            names = {previous_name(path.name) for path in paths}
            earlier = [path for path in earlier if path.name in names]
        self.move_aside(paths, earlier)
        self.take_ownership()
        self.write_settings()

    def write_settings(self) -> None:
        """Write config.py. A full disk is reported for log.csv."""
        text = config_file(self.config)
        with suppress(MachineError):
            atomic_write(lambda file: file.write(text.encode()), self.path / SETTINGS)

    def find(self, names: Iterable[str]) -> list[Path]:
        """The files of these names or patterns."""
        return sorted(path for name in names for path in self.path.glob(name))

    def move_aside(self, paths: list[Path], earlier: list[Path]) -> None:
        """Rename files to *.previous-1.*, if there are any, instead of the `earlier` ones that are named so.
        Raises MachineError."""
        if paths:
            self.remove(earlier)
        for path in paths:
            name = previous_name(path.name)
            try:
                path.rename(self.path / name)
            except OSError as error:
                advice = f"check the permissions of {self.path}"
                raise MachineError(f"{path} cannot be renamed ({error.strerror}); {advice}") from None
            log.info(f"note     {path} is not part of this run and was renamed to {name}")

    def remove(self, paths: list[Path]) -> None:
        """Remove files and folders of an older run, and log it. Raises MachineError."""
        for path in paths:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                advice = f"check the permissions of {self.path}"
                raise MachineError(f"{path} cannot be removed ({error.strerror}); {advice}") from None
            log.info(f"note     {path} of an older run was removed")

    def append_log(self, row: dict[str, Any]) -> None:
        """Add a row to log.csv. A full disk is reported once, and the run continues without the row."""
        if not self.writes:
            return
        self.claim()
        if self.rows and self.rows[-1]["step"] == str(row["step"]):  # stopped before it was evaluated
            self.rows[-1] |= {name: str(value) for name, value in row.items()}
            self.rewrite_log()
            return
        try:
            with open(self.path / LOG, "ab", buffering=0) as file:
                end = file.tell()
                line = (csv_line(row) if end else HEADER + csv_line(row)).encode()
                if file.write(line) != len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.log_failed = False
        except OSError as error:
            if not self.log_failed:
                reason = why_not_written(error, self.path / LOG)
                log.info(f"note     {self.path / LOG} cannot be written ({reason}); the run continues")
            self.log_failed = True

    def save(self, model: GPT, optimizers: list[Optimizer], scaler: GradScaler, state: TrainState) -> None:
        """Write a checkpoint to last.pt, and to ckpt.pt if it is the best one, in the background. If that
        fails, it is reported, and the run continues. Raises Diverged if a weight is not finite."""
        if not weights_are_finite(model, self.runtime):
            raise self.diverged_error(state.step)
        self.report_save(wait=True)  # then the previous save's copy is freed, and best_val_loss known
        names, best_val_loss = [NEWEST], self.best_val_loss
        if state.val_loss is not None:
            if state.val_loss < best_val_loss or self.config.always_save_checkpoint:
                names = [BEST, NEWEST]
            best_val_loss = min(best_val_loss, state.val_loss)
        entries = self.header | state.to_checkpoint()
        entries |= {"best_val_loss": best_val_loss, "scaler": scaler.state_dict()}
        contents = training_state(model, optimizers, keep=self.runtime.is_main, **entries)
        if self.writes:
            self.claim()
            self.save_thread = threading.Thread(target=self.write, args=(contents, names), daemon=True)
            self.save_thread.start()
        else:
            self.best_val_loss = best_val_loss

    def write(self, contents: dict[str, Any], names: list[str]) -> None:
        """Write a checkpoint to the files of these names; runs in the thread."""
        paths, keep = [self.path / name for name in names], self.config.keep_checkpoints
        if keep:
            paths.insert(0, self.path / f"step-{contents['iter_num']:08}.pt")
        self.save_result = f"step {contents['iter_num']}: wrote {' and '.join(map(str, paths))}"
        try:
            atomic_write(
                lambda file: torch.save(contents, StoppableFile(file, self.save_abandoned)),
                *paths,
                needed=bytes_of(contents),
            )
            self.save_error = None
            if BEST in names:
                self.best_val_loss = contents["best_val_loss"]
            if keep:
                for path in sorted(self.path.glob(HISTORY))[:-keep]:
                    path.unlink()
        except BaseException as error:  # none may end the thread unnoticed
            self.save_error = error if isinstance(error, MachineError) else MachineError(repr(error))

    def report_save(self, wait: bool = False) -> None:
        """Log how the save in the background ended, if it has; `wait` until it has."""
        if self.save_thread is None or (self.save_thread.is_alive() and not wait):
            return
        self.save_thread.join()
        self.save_thread = None
        if self.save_error:
            log.info(f"note     {self.save_error}; the run continues and tries again at the next save")
        else:
            log.info(self.save_result)

    @activity("writing the last checkpoint")
    def finish(self) -> None:
        """Wait for the last save. Raises MachineError if the newest checkpoint could not be written."""
        if self.save_thread:
            self.save_thread.join()
        if self.save_error:
            raise MachineError(f"{self.save_error}; free some disk space, then resume from it")
        self.report_save()

    def abandon_save(self) -> None:
        """Stop a save in the background, which keeps the old files: Python would abort at exit if its thread
        were still in torch.save."""
        self.save_abandoned.set()
        if self.save_thread:
            self.save_thread.join()

    def diverged_error(self, step: int) -> Diverged:
        """The error of a loss that is not finite."""
        if self.save_thread:
            self.save_thread.join()
        path = newest_checkpoint(self.path) if self.owned else None
        saved = f"{path} is the last good checkpoint" if path else "no checkpoint was saved yet"
        advice = "lower --learning_rate or set --grad_clip=1.0"
        return Diverged(f"the loss is no longer finite at step {step}; {advice} ({saved})")

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:
            with suppress(MachineError):  # reported before, or the run ends with another error
                self.finish()
        if not self.writes:
            return
        if kind:
            self.remove_if_empty()
        self.file_lock.release()

    def remove_if_empty(self) -> None:
        """Remove the folder after a failed start, if that start created it and nothing else is in it."""
        if self.created and {path.name for path in self.path.glob("*")} <= {LOCK, OWNER}:
            with suppress(OSError):
                shutil.rmtree(self.path)


class StoppableFile:
    """The methods of a file that torch.save needs; a write after `stopped` raises MachineError."""

    def __init__(self, file: IO[bytes], stopped: threading.Event) -> None:
        self.file, self.stopped, self.flush = file, stopped, file.flush

    def write(self, data: bytes) -> int:
        if self.stopped.is_set():
            raise MachineError("the save was abandoned")
        return self.file.write(data)


def previous_name(name: str) -> str:
    """The new name of another run's file; only one generation is kept."""
    return f"{Path(name).stem}.previous-1{Path(name).suffix}"


def csv_line(row: dict[str, Any]) -> str:
    return ",".join(str(row.get(name, "")) for name in COLUMNS) + "\n"


def config_file(config: TrainConfig) -> str:
    """A config file with the settings that are not the defaults, for a new run."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    if config.init_from.partition(":")[0] == "auto":
        values["init_from"] = config.init_from.partition(":")[2] or "scratch"
    changed = [field.name for field in fields(config) if values[field.name] != field.default]
    path = quote(str(Path(config.out_dir) / SETTINGS))
    lines = [f"# the settings of this run; to run it again: python train.py {path}"]
    return "\n".join(lines + [f"{name} = {values[name]!r}" for name in changed]) + "\n"


def read_owner(folder: Path) -> tuple[str, str]:
    """The process that writes there or was the last to do so, and its run, "" if that has no files yet."""
    try:
        process, run = (folder / OWNER).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "another process", ""
    return process, run


def restarted_run(folder: Path) -> str | None:
    """The id of the run in a folder, if torchrun has restarted its ranks; else None."""
    match = re.fullmatch(f"run ([0-9a-f]{{8}}), job {re.escape(job_name())}", read_owner(folder)[1])
    return match[1] if match and is_restart() else None


def is_restart() -> bool:
    """Whether torchrun has restarted its ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def job_name() -> str:
    """torchrun's id of the ranks that it starts and restarts, or its process if that is "none"."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"none-{os.getppid()}" if name == "none" else name


def fit_line(fit: Fit) -> str:
    return f"{fit.step},{fit.progress!r},{fit.total_steps}\n"  # repr: exact
