"""How a command ends when something is wrong: one line on stderr, and an exit status."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A setting, path, prompt or file is wrong; the message says what, and what to do. Status 2."""


class MachineError(Exception):
    """The machine failed (disk full, out of memory); the last good checkpoint is intact. Status 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that are not bugs into one line and an exit status; bugs keep their traceback."""
    try:
        yield
    except UserError as error:
        stop(2, error)
    except MachineError as error:
        stop(1, error)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells expect
    except BrokenPipeError:  # the reader of our output left (`| head`), which is no error of ours
        sys.stderr.close()
        sys.exit(0)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        stop(1, "out of memory; lower --batch_size (and raise --gradient_accumulation_steps) or --block_size")


def stop(status: int, error: object) -> None:
    """Print `error` as one line and exit with `status`."""
    sys.stdout.flush()
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(status)
