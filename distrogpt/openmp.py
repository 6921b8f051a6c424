"""How OpenMP's threads wait at barriers. Spinning is fastest on a quiet machine: sleeping makes a small step
almost twice as slow. On a busy one, a spinning thread holds the core that the thread it waits for needs, and
a step takes 10 to 100 times as long. So a thread measures how long this process waits for cores."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

INTERVAL = 0.25  # seconds from one measurement to the next
BUSY, QUIET = 0.15, 0.05  # cores that the process waits for: sleep above, spin below
SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class ThreadWaits:
    """`sleeping` is True while the threads of this process sleep at barriers instead of spinning."""

    sleeping = False

    def watch(self, seconds_waited: Callable[[], float], sleep_at_barriers: Callable[[bool], None]) -> None:
        """Measure and switch, forever; `seconds_waited` is the total time for which threads waited."""
        waited, clock, average = seconds_waited(), time.perf_counter(), 0.0
        while True:
            time.sleep(INTERVAL)
            waited_before, clock_before = waited, clock
            waited, clock = seconds_waited(), time.perf_counter()
            average = (average + max(0.0, waited - waited_before) / (clock - clock_before)) / 2
            sleeping = average > (QUIET if self.sleeping else BUSY)
            if sleeping != self.sleeping:
                self.sleeping = sleeping
                sleep_at_barriers(sleeping)


WAITS = ThreadWaits()  # of this process


@cache
def adapt_waits() -> None:
    """Start to adapt the waits of this process, unless the user has chosen how threads wait, there is only
    one thread, or this system or its OpenMP does not support it."""
    if torch.get_num_threads() > 1 and not any(name in os.environ for name in SET_BY_USER):
        linux_counts = Path("/proc/self/schedstat").is_file()
        functions = run_delay if linux_counts else find_cores_taken(), find_switch()
        if None not in functions:
            threading.Thread(target=WAITS.watch, args=functions, daemon=True).start()


def run_delay() -> float:
    """Seconds for which threads of this process were ready to run but had no core, as Linux counts them."""
    nanoseconds = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError, IndexError):  # a thread that has just ended
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                nanoseconds += int(file.read().split()[1])
    return nanoseconds / 1e9


def find_cores_taken() -> Callable[[], float] | None:
    """By psutil: the seconds for which other programs have used the cores that our threads need, minus half
    a core, which an idle desktop uses."""
    try:
        import psutil
    except ImportError:
        return None
    spare = max(0, (os.cpu_count() or 1) - torch.get_num_threads()) + 0.5

    def cores_taken() -> float:
        used = psutil.cpu_times()
        return used.user + used.system - time.process_time() - spare * time.perf_counter()

    return cores_taken


def find_switch() -> Callable[[bool], None] | None:
    """A function that lets OpenMP's threads sleep at barriers (True) or spin (False), if there is one."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.dylib"))
    for name in ("libiomp5md",) if os.name == "nt" else (None, *bundled):
        with suppress(OSError):
            library = ctypes.CDLL(name)
            if hasattr(library, "kmp_set_blocktime"):
                return switch_of_llvm(library)
            if hasattr(library, "GOMP_parallel"):
                return switch_of_gnu(library)
    return None


def switch_of_llvm(library: ctypes.CDLL) -> Callable[[bool], None]:
    """LLVM's and Intel's OpenMP: a property of the computing thread, the main thread, which has to set it."""
    default = library.kmp_get_blocktime()  # milliseconds

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_size_t)
    def set_blocktime(milliseconds: int) -> int:
        library.kmp_set_blocktime(milliseconds)
        return 0

    def switch(sleeping: bool) -> None:
        ctypes.pythonapi.Py_AddPendingCall(set_blocktime, ctypes.c_size_t(0 if sleeping else default))

    return switch


def switch_of_gnu(library: ctypes.CDLL) -> Callable[[bool], None]:
    """GNU's OpenMP spins for some microseconds only while it has more threads than there are cores: a second
    team of threads that never compute makes up the number."""
    no_work: Any = ctypes.cast(library.free, ctypes.c_void_p)  # free(NULL)
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    size = max(2, library.omp_get_num_procs() - torch.get_num_threads() + 2)
    end = threading.Event()

    def hold_team() -> None:
        library.GOMP_parallel(no_work, None, size, 0)
        end.wait()  # the team ends with its thread

    def switch(sleeping: bool) -> None:
        if sleeping:
            end.clear()
            threading.Thread(target=hold_team, daemon=True).start()
        else:
            end.set()

    return switch
