"""A line on the terminal about work that has no bar, so that nothing is silent for long."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_wait(what: str, state: Callable[[], str] = str, after: float = 2.0) -> Iterator[None]:
    """Shows on stderr, if it is a terminal, from `after` seconds on, what the block does, how far it is by
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
