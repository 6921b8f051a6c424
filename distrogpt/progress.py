"""What a terminal shows of work that takes a while, so that nothing is silent for long."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def show_wait(what: str, state: Callable[[], str] = str, after: float = 2.0) -> Iterator[None]:
    """Shows on stderr, if it is a terminal, after `after` seconds, what the block does, how far it is by
    `state`, and how long it has taken. Print nothing in the block."""
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
    """tqdm's options that fit its bar to the terminal. One that does not know its size, as in containers,
    has no rows, and tqdm would show nothing."""
    with suppress(OSError, ValueError, AttributeError):
        if 0 in os.get_terminal_size(sys.stderr.fileno()):
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}
