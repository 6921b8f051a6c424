"""What a terminal shows during long work, so that a command is never silent for long."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def show_wait(what: str, state: Callable[[], str] = str, after: float = 2.0) -> Iterator[None]:
    """If the block takes longer than `after` seconds, show on stderr, if it is a terminal, what the block is
    doing, its progress `state()`, and the seconds so far. The block must not print."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    terminal, begin, ended = sys.stderr, time.monotonic(), threading.Event()

    def show() -> None:
        pause, width = after, 0
        while not ended.wait(pause):
            line = f"{what} {state()}".strip() + f", {time.monotonic() - begin:.0f} s"
            terminal.write(f"\r{line:{width}}")
            terminal.flush()
            pause, width = 0.5, len(line)
        terminal.write("\r" + " " * width + "\r" if width else "")
        terminal.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def bar_size() -> dict[str, Any]:
    """tqdm's options for the size of its bar. A terminal of unknown size, as in containers, has 0 rows, and
    tqdm would show nothing."""
    with suppress(OSError, ValueError, AttributeError):
        if 0 in os.get_terminal_size(sys.stderr.fileno()):
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}
