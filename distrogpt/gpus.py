"""Data sheets of GPUs, read without torch: by the settings, for MFU, and by bench.py --plan=True."""

from typing import NamedTuple


class GPU(NamedTuple):
    """A GPU by its vendor's data sheet, with the network of the vendor's own systems, or of rented ones."""

    words: str  # in the name that nvidia-smi prints
    peak_flops: float  # dense FLOP/s of the tensor cores in bf16 (V100, T4: fp16)
    memory: float  # GiB, as nvidia-smi reports it
    memory_bandwidth: float | None  # GB/s
    link: float  # GB/s of NVLink, or PCIe x16, in one direction
    network: float  # Gbit/s to other nodes


GPUS = {
    "b200": GPU("B200", 2250e12, 179, 8000, 900, 400),
    "h200": GPU("H200", 989e12, 140, 4800, 450, 400),
    "h100": GPU("H100", 989e12, 79, 3350, 450, 400),
    "h100-pcie": GPU("H100 PCIe", 756e12, 79, 2000, 64, 200),
    "a100-80gb": GPU("A100", 312e12, 79, 2039, 300, 200),
    "a100-40gb": GPU("A100", 312e12, 39, 1555, 300, 200),
    "l40s": GPU("L40S", 362e12, 45, 864, 32, 100),
    "a40": GPU("A40", 150e12, 45, 696, 32, 50),
    "a10": GPU("A10", 125e12, 22, 600, 32, 25),
    "v100": GPU("V100", 125e12, 32, 900, 150, 50),
    "t4": GPU("T4", 65e12, 15, 300, 16, 12.5),
    "rtx4090": GPU("RTX 4090", 165e12, 24, 1008, 32, 12.5),
    "rtx3090": GPU("RTX 3090", 71e12, 24, 936, 32, 12.5),
}


def find_gpu(device_name: str) -> GPU | None:
    """The data sheet for a name such as "NVIDIA H100 PCIe"; None if it is not in the table."""
    device_words = f" {device_name.replace('-', ' ')} "
    matches = [gpu for gpu in GPUS.values() if f" {gpu.words} " in device_words]
    return max(matches, key=lambda gpu: len(gpu.words), default=None)  # "H100 PCIe" before "H100"
