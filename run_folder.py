"""What a run writes into out_dir: checkpoints, in the background; log.csv; a lock that keeps others out.

ckpt.pt              the best so far, or each evaluation's with always_save_checkpoint
last.pt              the newest, from which training resumes
step-00002000.pt     with keep_checkpoints, the newest of some steps
log.csv              a line for each step that is logged or evaluated
run.lock             who writes here; locked as long as that process lives
"""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from checkpoint import BEST, NEWEST, write_whole
from errors import MachineError, UserError

LOG, LOCK, HISTORY = "log.csv", "run.lock", "step-????????.pt"
COLUMNS = (
    "step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "train_loss", "val_loss",
)  # fmt: skip
PATIENCE = 5.0  # seconds: a killed run takes a moment to let go of its lock


class RunFolder:
    """out_dir, held by this process alone until it ends. `report` tells what the background did."""

    def __init__(self, path: Path, run_id: str, say: Callable[[str], None], keep: int, best: float) -> None:
        """Make the folder and lock it; `best` is the loss of the ckpt.pt in it. Raises UserError."""
        self.path, self.say, self.keep, self.best = path, say, keep, best
        self.own = False  # what lies here is this run's
        self.writer: threading.Thread | None = None
        self.failure: MachineError | None = None  # of the newest save
        self.log_full = False  # the disk did not take the newest line
        try:
            path.mkdir(parents=True, exist_ok=True)
            owner = f"process {os.getpid()} on {socket.gethostname()}, run {run_id}, job {job()}"
            self.lock = locked(path / LOCK, owner)
            for left in path.glob("*.tmp"):  # by a run that was killed while it wrote
                left.unlink()
        except OSError as error:
            raise UserError(f"out_dir={path} cannot be written ({error.strerror}); choose another") from None

    def take_over(self) -> None:
        """Rename another run's files before the first of this one: a start too many loses nothing."""
        if self.own:
            return
        self.own = True
        theirs = [self.path / name for name in (BEST, NEWEST, LOG)] + sorted(self.path.glob(HISTORY))
        number = 1
        while list(self.path.glob(f"*.previous-{number}.*")):
            number += 1
        for old in theirs:
            if old.is_file():
                new = f"{old.stem}.previous-{number}{old.suffix}"
                os.rename(old, self.path / new)
                self.say(f"note     {old} was another run's, and is {new} now")

    def go_on(self, step: int) -> dict[str, str]:
        """What lies here is this run's, up to `step`: cut what comes after it from log.csv, for it is made
        again. Returns the line of `step` itself, {} if there is none, which is cut too."""
        self.own = True
        path = self.path / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [
            line.split(",") for line in text.split("\n")[:-1]
        ]  # after the last newline is a line cut off
        rows = {int(row[0]): row for row in lines if len(row) == len(COLUMNS) and row[0].isdecimal()}
        last = rows.pop(step, [])
        kept = [list(COLUMNS), *(row for number, row in sorted(rows.items()) if number < step)]
        text = "".join(",".join(row) + "\n" for row in kept)
        if lines:
            write_whole(lambda file: file.write(text.encode()), path)
        return {name: value for name, value in zip(COLUMNS, last, strict=False) if value}

    def log(self, row: dict[str, Any]) -> None:
        """Add a line to log.csv. Where the disk does not take it, that is told once, and the run goes on."""
        self.take_over()
        path = self.path / LOG
        line = ",".join(str(row.get(name, "")) for name in COLUMNS) + "\n"
        try:
            with open(path, "ab", buffering=0) as file:
                end = file.tell()
                line = line if end else ",".join(COLUMNS) + "\n" + line
                if file.write(line.encode()) != len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.log_full = False
        except OSError as error:
            if not self.log_full:
                self.say(f"note     {path} takes no more ({error.strerror}); the run goes on without")
            self.log_full = True

    def save(self, contents: dict[str, Any], *names: str) -> None:
        """Write `contents`, which nobody changes any more, to ckpt.pt, last.pt or both, in the background.

        A save that fails is told, the files stay what they were, and the run goes on.
        """
        self.report(wait=True)
        self.take_over()
        self.writer = threading.Thread(target=self.write, args=(contents, names), daemon=True)
        self.writer.start()

    def write(self, contents: dict[str, Any], names: tuple[str, ...]) -> None:
        """Write to the files: in the thread."""
        paths = [self.path / name for name in names]
        if self.keep:
            paths.insert(0, self.path / HISTORY.replace("????????", f"{contents['iter_num']:08}"))
        try:
            write_whole(lambda file: torch.save(contents, file), *paths)
            self.failure = None
            if BEST in names:
                self.best = contents["best_val_loss"]
            for old in sorted(self.path.glob(HISTORY))[: -self.keep] if self.keep else ():
                old.unlink()
        except (MachineError, OSError) as error:
            self.failure = MachineError(error)
        self.result = f"step {contents['iter_num']}: wrote {' and '.join(map(str, paths))}"

    def writing(self) -> bool:
        """Whether a save is under way in the background."""
        return self.writer is not None and self.writer.is_alive()

    def report(self, wait: bool = False, goes_on: bool = True) -> None:
        """Tell how the save in the background ended, where it has; `wait` until it has."""
        if self.writer is None or (self.writing() and not wait):
            return
        self.writer.join()
        self.writer = None
        if not self.failure:
            self.say(self.result)
        elif goes_on:
            self.say(f"note     {self.failure}; the run goes on and tries again")

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        """Wait for the last save. Raises MachineError where the newest state is not on disk."""
        if kind is not KeyboardInterrupt:
            self.report(wait=True, goes_on=False)
        self.lock.close()
        if kind is None and self.failure:
            raise MachineError(f"{self.failure}; make room, and resume from it")


def locked(path: Path, owner: str) -> IO[str]:
    """The file, open and locked for as long as this process lives, with its owner in it. Raises UserError
    where another process holds it, OSError where it cannot be written."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
    end = time.monotonic() + PATIENCE
    while not try_lock(file):
        if time.monotonic() > end:
            file.seek(0)
            who = file.readline().strip() or "another process"
            raise UserError(f"{who} writes to out_dir={path.parent}; stop it, or choose another --out_dir")
        time.sleep(0.2)
    file.seek(0)
    file.write(owner + "\n")  # over the old line: other ranks may read it
    file.flush()
    file.truncate()
    return file


def try_lock(file: IO[str]) -> bool:
    """Lock it, unless another process has; the system unlocks it when this process ends, however it ends."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**30)  # others can read what is before
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by children, works over NFS
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
            return True
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def run_before_restart(path: Path) -> str | None:
    """The id of the run that held the folder's lock before torchrun started its ranks again; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    try:
        owner = (path / LOCK).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    found = re.search(r", run (\w+), job (.*)$", owner)
    return found[1] if found and found[2] == job() else None


def job() -> str:
    """What torchrun calls the processes that it starts together, again and again."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none")
