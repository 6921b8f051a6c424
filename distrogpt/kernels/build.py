"""Compiles the C++ files of this folder at their first use, and loads them: for Linux on CPUs with bf16
instructions (AVX512_BF16)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

# these instructions and not -march=native, as machines of different kinds may share a home directory
FLAGS = "-mavx512bf16 -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512".split()
# -ffast-math would change how the whole process rounds; -fno-math-errno leaves infinities and NaN as they are
FLAGS += "-std=gnu++17 -O3 -fno-math-errno -fopenmp -shared -fPIC".split()


def has_bf16() -> bool:
    """Whether this machine may run the compiled files: Linux, on a CPU with AVX512_BF16."""
    return sys.platform == "linux" and torch.cpu._is_avx512_bf16_supported()


@cache
def build_error(name: str) -> str:
    """Why `name`.cpp cannot be used here, "" if it can. Compiles it, in a few seconds, if it has changed."""
    try:
        library(name)
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or "").strip().splitlines()
        return output[0] if output else str(error)
    return ""


@cache
def library(name: str) -> ctypes.CDLL:
    """The functions of `name`.cpp, which share the threads of torch's OpenMP. Raises OSError or
    subprocess.SubprocessError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)
    if compiler is None:
        raise OSError("g++ is missing; install it, for instance with: apt install g++")
    source = Path(__file__).with_name(f"{name}.cpp")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\n".join([source.read_bytes(), " ".join(FLAGS).encode(), version])).hexdigest()
    compiled = Path(os.path.expanduser("~/.cache/distrogpt")) / f"{name}-{key[:16]}.so"
    if not compiled.is_file():
        compiled.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:  # others may compile it as well
            command = [compiler, *FLAGS, str(source), "-o", f"{folder}/{name}.so"]
            subprocess.run(command, capture_output=True, check=True, timeout=120, errors="replace")
            os.replace(f"{folder}/{name}.so", compiled)
    return ctypes.CDLL(str(compiled))
