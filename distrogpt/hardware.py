"""The hardware of a machine: its devices, their compute dtypes, peak FLOP/s and memory bandwidth."""

import time
from functools import cache

import torch

from distrogpt.errors import UserError
from distrogpt.gpus import find_gpu


def find_device(name: str) -> torch.device:
    """The device of that name; 'auto' is cuda, else mps, else cpu. Raises UserError if it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name} is not a known device; use auto, cpu, cuda, cuda:1 or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but this machine has no Apple GPU; use --device=cpu")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device={name}, but torch {torch.__version__} finds no CUDA GPU; use --device=cpu")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        gpus = ", ".join(f"cuda:{number}" for number in range(count))
        raise UserError(f"device={name}, but this machine has {gpus}; use one of these")
    return torch.device("cuda", index)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; 'auto' is bfloat16 if the chip has it, else float32, on a GPU float16."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


@cache  # measured once for many short runs in one process, as in a study
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of the device: from its data sheet if that is known, else measured once."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu and dtype != torch.float32:
        return gpu.peak_flops
    return measured_flops(device, dtype)


@torch.no_grad()
def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of many square matrix products: small ones, which a busy machine interrupts less,
    and larger ones, which fill a larger machine."""
    best = 0.0
    for n in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        a = torch.randn(n, n, device=device, dtype=dtype)  # random, as GPUs multiply constant matrices faster
        end = time.perf_counter() + seconds / 3
        now = 0.0
        while now < end:
            begin = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the result
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - begin))
        if now - begin > seconds / 8:  # a slow dtype (fp16 on CPUs): the next size would take 8 times as long
            break
    return best


@torch.no_grad()
def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of several reads: of a quarter gigabyte, on GPUs of two gigabytes."""
    data = torch.ones(2**28 if device.type == "cuda" else 2**25, dtype=torch.int64, device=device)
    best = 0.0
    for _ in range(6):
        begin = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best
