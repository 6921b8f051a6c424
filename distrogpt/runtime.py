"""Where a run happens: device, arithmetic, ranks; and what the machine can do at most."""

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distrogpt.errors import UserError
from distrogpt.hardware import find_device, find_dtype
from distrogpt.openmp import adapt_waits

log = logging.getLogger("distrogpt")


class PrintHandler(logging.Handler):
    """Prints each message to sys.stdout at once."""

    def emit(self, record: logging.LogRecord) -> None:
        speak(record.getMessage())


def start_logging(is_main: bool) -> None:
    """Print the messages of the logger "distrogpt", in one process."""
    log.handlers[:] = [PrintHandler()]
    log.setLevel(logging.INFO if is_main else logging.CRITICAL)
    log.propagate = False


@dataclass(frozen=True)
class Runtime:
    """One process's place: its device, its arithmetic, and its rank among world_size processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that logs and writes."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass: matrix products in `dtype`, what needs the range in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss_scaler(self) -> torch.amp.GradScaler:
        """The scaling of the loss that fp16 needs; idle otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A numpy array as a tensor on the device, without waiting for the copy."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks."""
        if self.world_size == 1:
            return list(values)
        return self.sum_over_ranks(np.array(values, np.float64)).tolist()

    def sum_over_ranks(self, array: np.ndarray) -> np.ndarray:
        """The sum of each number of an array over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(torch.from_numpy(array))  # on the CPU, over gloo: nothing waits for a GPU
        return array

    def check_equal_on_all_ranks(self, value: float, message: str) -> None:
        """Raises UserError where the ranks have different values."""
        lowest, highest = (
            torch.tensor([value], dtype=torch.float64),
            torch.tensor([value], dtype=torch.float64),
        )
        if self.world_size > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        if lowest != highest:
            raise UserError(message)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.check_equal_on_all_ranks(0, "")

    def say(self, line: str) -> None:
        """Print it, in one process."""
        log.info(line)

    def describe(self) -> str:
        """The machine, in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        ranks = f", {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{name}{threads}{ranks}, {str(self.dtype).removeprefix('torch.')}"


def start_runtime(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> Runtime:
    """Take this process's place; under torchrun, join the other ranks. Raises UserError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # torch 2.9 warns of set_float32_matmul_precision, which later versions keep
    warnings.filterwarnings("ignore", "Please use the new API settings")
    start_logging(rank == 0)
    place = find_device(device)
    if world_size > 1 and place.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"rank {rank} has no GPU of its own; start no more processes than GPUs per node")
        place = torch.device("cuda", local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    elif place.type == "cpu":
        tune_malloc()
        adapt_waits()
    if world_size > 1 and not dist.is_initialized():
        on_gpu = "nccl" if backend == "auto" else backend
        # torchrun's own store still has the addresses of ranks that it had to start again: another page of it
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        between = f"cpu:gloo,cuda:{on_gpu}" if place.type == "cuda" else "gloo"
        dist.init_process_group(between, store=store, rank=rank, world_size=world_size)
    return Runtime(place, find_dtype(dtype, place), rank, world_size)


def stop_runtime() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tune_malloc() -> None:
    """Let glibc keep what a step frees: fetched anew by each step, it costs a tenth of its time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc, another system
        return
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2  # their numbers in malloc.h
    mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older ones take 32 MiB at most
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


@torch.no_grad()
def enable_onednn_float32(runtime: Runtime) -> None:
    """Let oneDNN multiply fp32 matrices on a CPU where it does so exactly: on AMD, twice as fast as MKL.

    "medium" allows oneDNN to round to bf16; on chips where it does (AMX), the default stays. Training gains;
    torch's attention of one query, in sampling, becomes slower by it.
    """
    if runtime.device.type != "cpu":
        return
    a = torch.linspace(-1, 1, 64 * 256).view(64, 256).sin()
    exact = a.double() @ a.double().T
    torch.set_float32_matmul_precision("medium")
    if (a @ a.T - exact).abs().max() > 1e-5 * exact.abs().max():  # fp32 is off by 1e-6, bf16 by 1e-3
        torch.set_float32_matmul_precision("highest")


def find_pyplot(path: str) -> Any:
    """matplotlib.pyplot, to draw into the file `path`; None, and a line about it, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"note     no {path}: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def speak(line: str) -> None:
    """Print at once, also into a pipe; when its reader leaves (`| head`), the run stops as by SIGTERM."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def signals_caught() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGUSR1 (a cluster's warning), so that a step is finished first; a second
    Ctrl-C ends at once.
    """
    caught: list[int] = []
    alone = "TORCHELASTIC_RUN_ID" not in os.environ
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

    def collect(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)
        if number == signal.SIGINT and alone:  # print() is not safe within a signal handler
            os.write(2, b"\nfinishes the step and saves; Ctrl-C again ends at once\n")

    try:
        before = {number: signal.signal(number, collect) for number in numbers}
    except ValueError:  # not in the main thread, where Python takes no signals
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(
    first: int, last: int, runtime: Runtime, say: Callable[[str], None], unit: str = "step"
) -> Iterator[tuple[Callable[[str], None], Callable[..., object]]]:
    """Yields say(line) and advance(units=1, loss=None): tqdm's bar with the loss and the time left under the
    lines, on a terminal.

    In a file, on other ranks and without tqdm: the given `say`, and no bar.
    """
    tqdm = None
    if runtime.is_main and sys.stderr.isatty() and first < last:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
    if tqdm is None:
        yield say, lambda units=1, loss=None: None
        return
    with tqdm(total=last, initial=first, unit=unit, dynamic_ncols=True) as bar:

        def advance(units: int = 1, loss: float | None = None) -> None:
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)  # shown when the bar next is
            bar.update(units)

        yield bar.write, advance
