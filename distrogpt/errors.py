"""How a command ends after an error: one line on stderr and an exit status. Helpers for messages."""

import difflib
import errno
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

REPO = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A setting, path, prompt or file is wrong; the message says what to do. Exit status 2."""


class Diverged(UserError):
    """The loss is not finite: a learning rate is too high."""


class MachineError(Exception):
    """The machine failed (disk full, out of memory); the last good checkpoint is intact. Exit status 1."""


# failures of the disk, not of the chosen path: full, over quota, file too large, read-only, input/output
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
DISK_FAILURES = (*FULL, errno.EROFS, errno.EIO)
# what to do if memory runs out: in training, and in commands that have no sizes to lower
OOM_HINT = "lower --batch_size (and raise --gradient_accumulation_steps), --block_size or --n_embd"
CLOSE_OTHERS = "close other programs"


@contextmanager
def cli_errors(out_of_memory: str = OOM_HINT) -> Iterator[None]:
    """Turn errors that are not bugs into one line and an exit status; bugs keep their traceback."""
    try:
        yield
    except (UserError, MachineError) as error:
        exit_with_error(2 if isinstance(error, UserError) else 1, error)
    except KeyboardInterrupt:
        exit_process(130)  # 128 + SIGINT, as shells expect
    except BrokenPipeError:  # the reader of our output has exited (`| head`)
        sys.stderr.close()
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that buffered output does not fail again
        path = error.filename or "the output"
        reason = why_not_written(error, path) if error.filename else error.strerror
        exit_with_error(1, f"{path} cannot be written ({reason}); free some space or use another disk")
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if "gloo" in text or "nccl" in text or type(error).__name__ == "DistBackendError":
            advice = "start again (train.py --init_from=auto resumes)"
            exit_with_error(1, f"lost the connection to another rank ({text[:60]}); {advice}")
        if not is_out_of_memory(error):
            raise
        exit_with_error(1, f"out of memory; {out_of_memory}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's or Python's error for running out of memory, on a GPU or the machine."""
    messages = ("out of memory", "t allocate memory", "not enough memory")
    matches = any(message in str(error).lower() for message in messages)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and matches)


def exit_with_error(status: int, error: object) -> NoReturn:
    """Print `error` as one line and exit with `status`."""
    if status == 2 and int(os.environ.get("RANK", 0)):
        time.sleep(3)  # if all ranks have this error, rank 0 reports it, and torchrun ends the others
    sys.stdout.flush()
    lines = filter(None, map(str.strip, str(error).splitlines()))
    sys.stderr.write(f"error: {' '.join(lines)}\n")  # in one piece, as ranks share a terminal
    exit_process(status)


def exit_process(status: int) -> NoReturn:
    """Exit. A rank exits at once, as torch's communication threads could abort it otherwise."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def leave_to_rank_0(command: str) -> None:
    """For commands that run as one process: under torchrun, all ranks but rank 0 exit, and rank 0 continues
    alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if int(os.environ.get("RANK", 0)):
        exit_process(0)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    warn(f"note     {command} runs as a single process and needs no torchrun; the other ranks exit")


@contextmanager
def writable(path: str) -> Iterator[str]:
    """Raises UserError if the file cannot be written."""
    try:
        with open(path, "a"):  # torch's profiler would not report the failure
            pass
        yield path
    except OSError as error:
        reason = why_not_written(error, path)
        raise UserError(f"{path} cannot be written ({reason}); choose another path") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 100 characters; its type if the message is empty. That of
    a KeyError is only the key."""
    text = repr(error) if isinstance(error, KeyError) else str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)[:100]


def why_not_written(error: BaseException, path: str | Path, needed: int = 0) -> str:
    """Why a file was not written; if the disk is full, with the bytes `needed`, if known, and those free."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):  # torch raises another error on top of it
        cause = cause.__context__
    in_rust = re.search(r"os error (\d+)", str(error))  # safetensors'
    number = cause.errno if cause else int(in_rust[1]) if in_rust else None
    if number is None:
        return str(cause or "") or first_line(error)
    sizes = [f"{needed / 1e6:,.1f} MB needed"] if needed else []
    words = os.strerror(number)
    if number == errno.ENOSPC:
        with suppress(OSError):
            sizes.append(f"{shutil.disk_usage(Path(path).parent).free / 1e6:,.1f} MB free")
    elif number not in FULL:
        sizes = []
    return f"{words}: {', '.join(sizes)}" if sizes else words


def near_name(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` is probably a misspelling of; None if there is none, or if `word` is a name."""
    plain = word.casefold().replace("-", "_").strip("_")
    by_plain = {name.casefold().replace("-", "_"): name for name in names}
    possible = [name for name in by_plain if name[:1] == plain[:1] or name.endswith(f"_{plain}")]
    near = difflib.get_close_matches(plain, possible, n=1, cutoff=0.75)
    return by_plain[near[0]] if near and by_plain[near[0]] != word else None


def command(script: str, *words: str, **settings: object) -> str:
    """A command line for the user's shell that runs a script of the repository from the current folder."""
    flags = [f"--{name}={quote(value) if str(value) else ''}" for name, value in settings.items()]
    return " ".join(["python", path_from_here(script), *map(quote, words), *flags])


def path_from_here(name: str | Path) -> str:
    """A file of the repository as a word for the user's shell: relative if it is in the current folder."""
    try:
        path = os.path.relpath(REPO / name)
    except ValueError:  # another drive of Windows
        path = ".."
    return quote(REPO / name if path.startswith("..") else path)


def quote(value: object) -> str:
    """The value as one word for the user's shell."""
    word = str(value)
    if os.name != "nt":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w@+=:,./\\-]+", word) else f'"{word}"'  # cmd.exe and PowerShell


def warn(line: str) -> None:
    """Print a note to stderr, so that stdout has only the samples; of several ranks, only rank 0 does."""
    if not int(os.environ.get("RANK", 0)):
        print(line, file=sys.stderr)
