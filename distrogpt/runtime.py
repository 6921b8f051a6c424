"""Where a run happens: device, arithmetic, ranks; and what the machine can do at most."""

import ctypes
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distrogpt.errors import UserError
from distrogpt.gpus import find_gpu
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


def find_device(name: str) -> torch.device:
    """The device of that name; 'auto' is cuda, else mps, else cpu. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is no device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device={name}, but torch {torch.__version__} finds no CUDA here; use --device=cpu"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"device={name}, but there are {torch.cuda.device_count()} GPUs; count from cuda:0"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but this is no Apple GPU; use --device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"device={name} is not supported; use auto, cpu, cuda or mps")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device  # with its number


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic of that name; 'auto' is bfloat16 where the chip has it, else float32 (GPU: float16)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    in_chip = device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if in_chip else torch.float32


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


def maybe_compile(
    model: torch.nn.Module,
    wanted: bool | str,
    device: torch.device,
    steps: int,
    say: Callable[[str], None],
    parts: Iterable[torch.nn.Module] = (),
) -> None:
    """Compile the model, or parts of it, in place where that is wanted and works here; say why where not.

    'auto' weighs the `steps` to come: compiling takes half a minute. On CPUs (and Apple's GPUs) the step of a
    model of a few million parameters and more is as fast without; a smaller one's gains some 2 ms.
    """
    if wanted == "auto":
        small = sum(p.numel() for p in model.parameters()) < 3e6
        wanted = steps >= (200 if device.type == "cuda" else 20_000 if small else math.inf)
        if not wanted:
            few = device.type == "cuda" or small
            say(
                f"compile  off: half a minute, which {steps} steps would not earn back"
                if few
                else f"compile  off: on this {device.type}, a model of this size is as fast without"
            )
    if wanted and compile_works(device, say):
        for part in parts or (model,):
            part.compile()


def compile_works(device: torch.device, say: Callable[[str], None]) -> bool:
    """Whether torch.compile does here; says why not. What it makes is kept on disk for later runs."""
    # beside other caches and not in /tmp, so that the next run, also after a restart, compiles in 2 s
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser("~/.cache/torchinductor"))
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no compiler, no triton, an unsupported Python: all end here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"note     compile is not possible here, goes on without ({reason})")
        return False
    return True


@torch.no_grad()
def cuda_graph(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`function` for inputs of these shapes as one CUDA graph: one launch, not some hundred.

    It is run on these inputs, too. Each call overwrites what the call before returned.
    """
    own = [tensor.clone() for tensor in inputs]  # where each replay finds its own
    autocast = torch.is_autocast_enabled("cuda")
    with torch.cuda.device(own[0].device), torch.autocast("cuda", enabled=autocast, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what kernels set up when first used must not be recorded
            for _ in range(3):
                function(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*own)

    def replay(*new: torch.Tensor) -> torch.Tensor:
        for tensor, value in zip(own, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        return output

    return replay


@cache  # many short runs in one process, as a study's, measure once
def peak_flops(runtime: Runtime) -> float:
    """FLOP/s of one rank's device at most: its data sheet's, or else a matrix product's, measured once."""
    if runtime.device.type == "cuda" and runtime.dtype != torch.float32:
        gpu = find_gpu(torch.cuda.get_device_name(runtime.device))
        if gpu:
            return gpu.peak_flops
    return measured_flops(runtime)


@torch.no_grad()
def measured_flops(runtime: Runtime, seconds: float = 0.3) -> float:
    """FLOP/s of the best of many square matrix products in the run's arithmetic: small ones, which a busy
    machine interrupts less, and larger ones, which fill a larger machine."""
    best = 0.0
    for n in (512, 1024, 2048) if runtime.device.type == "cpu" else (4096, 8192):
        a = torch.randn(n, n, device=runtime.device, dtype=runtime.dtype)  # GPUs are faster on equal numbers
        end = time.perf_counter() + seconds / 3
        now = 0.0
        while now < end:
            begin = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the result
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - begin))
        if (
            now - begin > seconds / 8
        ):  # slow arithmetic (fp16 on CPUs): the next size would take 8 times as long
            break
    return best


@torch.no_grad()
def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of several readings of a quarter gigabyte, on GPUs of two."""
    data = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.int64, device=device)
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


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
