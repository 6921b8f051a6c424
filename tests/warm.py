"""Scripts in processes that have torch loaded when they begin: forked from one that does nothing else.

They do what those do that Python starts, in 0.1 s instead of 2 to 4: not for tests of the start itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
POSSIBLE = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows


def become(words: list[str], cwd: str, env: dict[str, str], out: Connection, err: Connection) -> None:
    """What a new process does: what `python words...` does in this folder and environment."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [path for path in sys.path if path not in (str(REPO), str(REPO / "tests"))]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


class Started:
    """As subprocess.Popen, with text to read from stdout."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]) -> None:
        serve(env)
        self.errors = tempfile.TemporaryFile("w+b")
        read, write = os.pipe()
        self.stdout = open(read, encoding="utf-8")
        pipes = [Connection(fd, readable=False) for fd in (write, os.dup(self.errors.fileno()))]
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=become, args=(words, str(cwd), env, *pipes), daemon=True)
        self.process.start()
        for pipe in pipes:
            pipe.close()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Raises TimeoutExpired, and kills it, where it does not end in time."""
        late = threading.Timer(timeout, self.process.kill)
        late.start()
        output = self.stdout.read()
        self.process.join()
        in_time = late.is_alive()
        late.cancel()
        self.errors.seek(0)
        errors = self.errors.read().decode(errors="replace")
        self.errors.close()
        self.stdout.close()
        if not in_time:
            raise subprocess.TimeoutExpired(self.process.name, timeout, output, errors)
        return output, errors


def serve(env: dict[str, str]) -> None:
    """Start the process that others are forked from, where there is none yet."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["warmed"])
    before = dict(os.environ)
    os.environ.update(env | {"PYTHONPATH": os.pathsep.join(map(str, (REPO, REPO / "tests")))})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
