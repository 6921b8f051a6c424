"""The process of a run: its device, dtype and rank; its log lines, progress bar and signals."""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distrogpt.errors import UserError
from distrogpt.hardware import find_device, find_dtype
from distrogpt.openmp import adapt_waits
from distrogpt.progress import bar_size

log = logging.getLogger("distrogpt")


class LineHandler(logging.Handler):
    """Prints messages to sys.stdout at once, above the progress bar if there is one. If the reader of a pipe
    exits (`| head`), a run that handles SIGTERM stops as if it had received it."""

    write = staticmethod(partial(print, flush=True))  # or the progress bar's

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(record.getMessage())
        except BrokenPipeError:
            if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):
                raise
            sys.stdout = open(os.devnull, "w")
            signal.raise_signal(signal.SIGTERM)


HANDLER = LineHandler()


def start_logging(is_main: bool) -> None:
    """Print the messages of the logger "distrogpt", only on rank 0."""
    log.handlers[:] = [HANDLER]
    log.setLevel(logging.INFO if is_main else logging.CRITICAL)
    log.propagate = False


@dataclass(frozen=True)
class Runtime:
    """Where one process runs: its device and compute dtype, and its rank among world_size processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that logs and writes."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass: matrix products in `dtype`, those that need its range in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """The loss scaling that fp16 needs; disabled for other dtypes."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A numpy array as a tensor on the device, without waiting for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks."""
        return self.sum_over_ranks(np.array(values, np.float64)).tolist()

    def sum_over_ranks(self, array: np.ndarray) -> np.ndarray:
        """The sum of each number of an array over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(torch.from_numpy(array))  # on the CPU, over gloo: nothing waits for a GPU
        return array

    def check_equal_on_all_ranks(self, value: float, message: str) -> None:
        """Raises UserError if the ranks have different values."""
        extremes = torch.tensor([value, -value], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            raise UserError(message)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.check_equal_on_all_ranks(0, "")

    def describe(self) -> str:
        """The machine, in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{name}{threads}{ranks}, {str(self.dtype).removeprefix('torch.')}"


def start_runtime(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> Runtime:
    """Set up this process; under torchrun, join the other ranks. Raises UserError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # torch 2.9 warns of set_float32_matmul_precision, which later versions keep
    warnings.filterwarnings("ignore", "Please use the new API settings")
    start_logging(rank == 0)
    torch_device = find_device(device)
    if world_size > 1 and torch_device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            advice = f"start at most one process per GPU: torchrun --nproc_per_node={count}"
            raise UserError(f"rank {rank} has no GPU of its own; {advice}")
        torch_device = torch.device("cuda", local_rank)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    elif torch_device.type == "cpu":
        tune_malloc()
        adapt_waits()
    if world_size > 1 and not dist.is_initialized():
        # after a restart, torchrun's store still has the addresses of the old ranks: use another prefix
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backends = "gloo"
        if torch_device.type == "cuda":
            backends = f"cpu:gloo,cuda:{'nccl' if backend == 'auto' else backend}"
        dist.init_process_group(backends, store=store, rank=rank, world_size=world_size)
    runtime = Runtime(torch_device, find_dtype(dtype, torch_device), rank, world_size)
    runtime.barrier()  # if a rank ended now by a mistake, others that still connect would report it as lost
    return runtime


def stop_runtime() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tune_malloc() -> None:
    """Let glibc keep the memory that a step frees: requesting it again takes a tenth of the step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc, another system
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # their numbers in malloc.h
    if not mallopt(mmap_threshold, 2**30):
        mallopt(mmap_threshold, 2**25)  # the maximum of older versions
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


@torch.no_grad()
def enable_onednn_float32(runtime: Runtime) -> None:
    """Let oneDNN multiply fp32 matrices on a CPU if it does so exactly: on AMD, twice as fast as MKL.

    "medium" allows oneDNN to round to bf16; on chips on which it does (AMX), the default stays. Training gets
    faster; torch's attention for one query, in sampling, gets slower.
    """
    if runtime.device.type != "cpu":
        return
    a = torch.linspace(-1, 1, 64 * 256).view(64, 256).sin()
    exact = a.double() @ a.double().T
    torch.set_float32_matmul_precision("medium")
    if (a @ a.T - exact).abs().max() > 1e-5 * exact.abs().max():  # fp32 is off by 1e-6, bf16 by 1e-3
        torch.set_float32_matmul_precision("highest")


@contextmanager
def collect_signals(abandon: Callable[[], None], enabled: bool = True) -> Iterator[list[int]]:
    """Yields a list to which SIGINT, SIGTERM and SIGUSR1 (a cluster's warning) are added, so that a step is
    finished first. A second Ctrl-C calls `abandon` and raises KeyboardInterrupt, further ones do nothing."""
    received: list[int] = []

    def collect(number: int, frame: object) -> None:
        received.append(number)
        if number != signal.SIGINT:
            return
        if received.count(number) == 2:
            abandon()  # here, as a third Ctrl-C could interrupt what catches the exception
            raise KeyboardInterrupt
        if received.count(number) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            with suppress(OSError):  # print() is not safe in a signal handler
                os.write(2, b"\nfinishing the step and saving; press Ctrl-C again to stop at once\n")

    previous_handlers = {}
    with suppress(ValueError):  # not in the main thread: only that can catch signals
        for name in ("SIGINT", "SIGTERM", "SIGUSR1") if enabled else ():
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                previous_handlers[number] = signal.signal(number, collect)
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(
    first: int, last: int, runtime: Runtime, unit: str = "step", what: str = ""
) -> Iterator[Callable]:
    """Yields advance(units=1, loss=None, total=None): on a terminal, it moves tqdm's bar, with the loss and
    the time left; `total` is a new `last`. In a file, on other ranks and without tqdm, there is no bar. Log
    lines are printed above it. The bar of a part of the work, named by `what`, appears after a second and is
    removed at the end."""
    options: dict[str, Any] = {"total": last, "initial": first, "unit": unit}
    if what:
        options |= {"desc": what, "delay": 1, "leave": False, "smoothing": 0}
    with terminal_bar(runtime.is_main and first < last, **options) as bar:

        def advance(units: int = 1, loss: float | None = None, total: int | None = None) -> None:
            if bar is not None and loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)  # shown at the bar's next update
            if bar is not None and total is not None:
                bar.total = total
            if bar is not None:
                bar.update(units)

        yield advance


@contextmanager
def activity(what: str) -> Iterator[None]:
    """On a terminal, shows after a second what this process is doing, and for how long."""
    options = {"desc": what, "bar_format": "{desc}, {elapsed}", "delay": 1, "leave": False}
    with terminal_bar(True, **options):
        yield


@contextmanager
def terminal_bar(wanted: bool, **options: Any) -> Iterator[Any]:
    """Yields tqdm's bar, redrawn each second, also during a long step; None if it is not wanted, if stderr is
    not a terminal, on other ranks, or if tqdm is not installed."""
    tqdm = None
    if wanted and sys.stderr.isatty() and not int(os.environ.get("RANK", 0)):
        with suppress(ImportError):
            from tqdm import tqdm
    if tqdm is None:
        yield None
        return
    write, ended = HANDLER.write, threading.Event()
    with tqdm(**bar_size(), **options) as bar:

        def redraw() -> None:
            while not ended.wait(1):
                if bar.delay:  # else close() would not remove the bar
                    bar.last_print_t = time.time()
                bar.refresh()

        thread = threading.Thread(target=redraw, daemon=True)
        thread.start()
        HANDLER.write = bar.write
        try:
            yield bar
        finally:
            HANDLER.write = write
            ended.set()
            thread.join()
