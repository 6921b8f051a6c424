"""How a command ends if something is wrong: one line on stderr, and an exit status."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(Exception):
    """A setting, path, prompt or file is wrong; the message says what, and what to do. Status 2."""


class Diverged(UserError):
    """The loss is not finite: a learning rate is too high."""


class MachineError(Exception):
    """The machine failed (disk full, out of memory); the last good checkpoint is intact. Status 1."""


OOM_HINT = "lower --batch_size (and raise --gradient_accumulation_steps), --block_size or --n_embd"


@contextmanager
def cli_errors(out_of_memory: str = OOM_HINT) -> Iterator[None]:
    """Turn errors that are not bugs into one line and an exit status; bugs keep their traceback."""
    try:
        yield
    except (UserError, MachineError) as error:
        exit_with_error(2 if isinstance(error, UserError) else 1, error)
    except KeyboardInterrupt:
        exit_process(130)  # 128 + SIGINT, as shells expect
    except BrokenPipeError:  # the reader of our output left (`| head`)
        sys.stderr.close()
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that buffered output does not fail again
        exit_with_error(1, f"no space left for {error.filename or 'the output'}; free some")
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if "gloo" in text or "nccl" in text or type(error).__name__ == "DistBackendError":
            exit_with_error(1, f"another rank was lost ({text[:60]}); start again: --init_from=auto resumes")
        if not is_out_of_memory(error):
            raise
        exit_with_error(1, f"out of memory; {out_of_memory}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's or Python's error for too little memory, a GPU's or the machine's."""
    messages = ("out of memory", "t allocate memory", "not enough memory")
    matches = any(message in str(error).lower() for message in messages)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and matches)


def exit_with_error(status: int, error: object) -> NoReturn:
    """Print `error` as one line and exit with `status`."""
    if status == 2 and int(os.environ.get("RANK", 0)):
        time.sleep(3)  # rank 0 reports an error of all ranks; then torchrun ends the others
    sys.stdout.flush()
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")  # in one piece, as ranks share a terminal
    exit_process(status)


def exit_process(status: int) -> NoReturn:
    """End the process. A rank ends at once, as torch's communication threads may abort it otherwise."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def writable(path: str) -> Iterator[str]:
    """Raises UserError if the file cannot be written."""
    try:
        with open(path, "a"):  # torch's profiler does not report it
            pass
        yield path
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another path") from None


def warn(line: str) -> None:
    """Print a note to stderr, so that stdout has the samples alone; of several ranks, rank 0 does."""
    if not int(os.environ.get("RANK", 0)):
        print(line, file=sys.stderr)
