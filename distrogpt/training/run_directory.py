"""What a run writes into out_dir: checkpoints, in the background; log.csv; a lock that keeps others out.

ckpt.pt              the best so far, or each evaluation's with always_save_checkpoint
last.pt              the newest, from which training resumes
step-00002000.pt     with keep_checkpoints, the newest of some steps
log.csv              a line for each step that is logged or evaluated
tensorboard          a folder with the same, where asked for
run.lock             who writes here; locked as long as that process lives
"""

import errno
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from distrogpt.checkpoint import BEST, NEWEST, atomic_write
from distrogpt.errors import MachineError, UserError
from distrogpt.plotting import LOG, PICTURE

LOCK, HISTORY, TENSORBOARD = "run.lock", "step-????????.pt", "tensorboard"
COLUMNS = (
    "step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "train_loss", "val_loss",
    "val_bits_per_byte", "hellaswag", "accuracy",
)  # fmt: skip
MADE = (BEST, NEWEST, LOG, TENSORBOARD, PICTURE)
HELD: set[str] = set()  # locks of this process: the system's do not keep it from itself
PATIENCE = 5.0  # seconds: a killed run takes a moment to let go of its lock


class RunDirectory:
    """out_dir, held by this process alone. `report` tells what the background did; `finish` waits for it."""

    def __init__(self, path: Path, say: Callable[[str], None], keep: int = 0) -> None:
        """Make the folder and lock it, before anything is read from it. Raises UserError."""
        self.path, self.say, self.keep = path, say, keep
        self.run_id = "0"
        self.best = math.inf  # the loss of the ckpt.pt in it
        self.own = False  # what lies here is this run's
        self.resumed: dict[str, str] = {}  # the line of log.csv that the run goes on from
        self.writer: threading.Thread | None = None
        self.failure: MachineError | None = None  # of the newest save
        self.result = ""
        self.log_full = False  # the disk did not take the newest line
        self.made = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = locked(path / LOCK)
            for name in (BEST, NEWEST, LOG, HISTORY):  # by a run that was killed while it wrote
                for left in path.glob(name + ".tmp"):
                    left.unlink()
        except OSError as error:
            raise UserError(f"out_dir={path} cannot be written ({error.strerror}); choose another") from None

    def take_over(self) -> None:
        """Rename another run's files before the first of this one: a start too many loses nothing."""
        if not self.own:
            self.own = True
            self.set_aside([*(self.path / name for name in MADE), *self.path.glob(HISTORY)])
            self.sign()

    def sign(self) -> None:
        """Write into the lock that what lies here is this run's, for where torchrun starts it again."""
        write_owner(self.lock, f"run {self.run_id}, job {job()}")

    def set_aside(self, files: list[Path]) -> None:
        """Rename them to *.previous-1.* or the next number. Raises MachineError."""
        number = 1
        while list(self.path.glob(f"*.previous-{number}*")):
            number += 1
        for old in sorted(path for path in files if path.exists()):
            new = f"{old.stem}.previous-{number}{old.suffix}"
            try:
                os.rename(old, self.path / new)
            except OSError as error:
                raise MachineError(f"{old} cannot be renamed ({error.strerror}); see {self.path}") from None
            self.say(f"note     {old} is not what this run goes on from, and is {new} now")

    def go_on(self, step: int, best: float) -> None:
        """What lies here is this run's, up to `step`: the rest of log.csv is cut, for it is made again, and
        later files of the history are renamed. `best` is the loss of ckpt.pt."""
        self.own, self.best = True, best
        self.sign()
        self.set_aside([path for path in self.path.glob(HISTORY) if int(path.stem[5:]) > step])
        path = self.path / LOG
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = [line.split(",") for line in text.split("\n")[:-1]]  # without a line cut off
        names = lines[0] if lines and lines[0][0] == COLUMNS[0] else COLUMNS  # an older run's are fewer
        whole = [dict(zip(names, row, strict=True)) for row in lines if len(row) == len(names)]
        rows = {
            int(row["step"]): [row.get(name, "") for name in COLUMNS]
            for row in whole
            if row["step"].isdecimal()
        }
        self.kept = [row for number, row in sorted(rows.items()) if number < step]
        self.resumed = dict(zip(COLUMNS, rows.get(step, []), strict=False))
        if lines:
            self.rewrite_log()

    def rewrite_log(self) -> None:
        """log.csv up to the step that the run goes on from."""
        rows = [list(COLUMNS), *self.kept, *([list(self.resumed.values())] if self.resumed else [])]
        text = "".join(",".join(row) + "\n" for row in rows)
        atomic_write(lambda file: file.write(text.encode()), self.path / LOG)

    def log(self, *rows: dict[str, Any]) -> None:
        """Add lines to log.csv. Where the disk does not take them, that is told once, and the run goes on."""
        self.take_over()
        path = self.path / LOG
        if rows and str(rows[0]["step"]) == self.resumed.get("step"):  # was stopped before it was evaluated
            self.resumed |= {name: str(value) for name, value in rows[0].items()}
            self.rewrite_log()
            rows = rows[1:]
        text = "".join(",".join(str(row.get(name, "")) for name in COLUMNS) + "\n" for row in rows).encode()
        try:
            with open(path, "ab", buffering=0) as file:
                end = file.tell()
                text = text if end else ",".join(COLUMNS).encode() + b"\n" + text
                written = file.write(text)
                if written != len(text):
                    file.truncate(end + text.rfind(b"\n", 0, written) + 1)  # what it took of whole lines
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
            atomic_write(lambda file: torch.save(contents, file), *paths)
            self.failure = None
            if BEST in names:
                self.best = contents["best_val_loss"]
            for old in sorted(self.path.glob(HISTORY))[: -self.keep] if self.keep else ():
                old.unlink()
        except BaseException as error:  # none may end the thread unheard
            self.failure = error if isinstance(error, MachineError) else MachineError(repr(error))
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

    def __enter__(self) -> "RunDirectory":
        return self

    def finish(self) -> None:
        """Wait for the last save. Raises MachineError where the newest state is not on disk."""
        self.report(wait=True, goes_on=False)
        if self.failure:
            raise MachineError(f"{self.failure}; make room, and resume from it")

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not KeyboardInterrupt:
            self.report(wait=True, goes_on=False)
        if self.made and kind and [path.name for path in self.path.glob("*")] == [LOCK]:
            (self.path / LOCK).unlink()  # a start that came to nothing leaves nothing
            self.path.rmdir()
        HELD.discard(os.path.realpath(self.path / LOCK))
        self.lock.close()


def locked(path: Path) -> IO[str]:
    """The file, open and locked for as long as this process lives, with its owner in it. Raises UserError
    where another process holds it, OSError where it cannot be written."""
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
    name = os.path.realpath(path)
    end = time.monotonic() + PATIENCE
    while name in HELD or not try_lock(file):
        if time.monotonic() > end:
            file.seek(0)
            who = file.readline().strip() or "another process"
            raise UserError(f"{who} writes to out_dir={path.parent}; stop it, or choose another --out_dir")
        time.sleep(0.2)
    file.seek(0)
    run = (file.read().splitlines()[1:] or [""])[0]
    write_owner(file, run if is_restart() else "")
    HELD.add(name)
    return file


def write_owner(file: IO[str], run: str) -> None:
    """Into a lock: who holds it, and which run has written to the folder, "" if none as yet."""
    file.seek(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{run}\n")
    file.truncate()
    file.flush()


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
    """The id of the run that wrote here before torchrun started its ranks again; None if none did."""
    if not is_restart():
        return None
    try:
        found = re.search(r"^run ([0-9a-f]{8}), job (.*)$", (path / LOCK).read_text(encoding="utf-8"), re.M)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found and found[2] == job() else None


def is_restart() -> bool:
    """Whether torchrun has started its ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def job() -> str:
    """What torchrun calls the ranks that it starts, and starts again; its process where that is "none"."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"none-{os.getppid()}" if name == "none" else name
