"""Compiles the C++ files of this folder at their first use, and loads them: for Linux on CPUs with bf16
instructions (AVX512_BF16)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
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
        lines = (getattr(error, "stderr", None) or "").strip().splitlines() or [str(error)]
        return next((line for line in lines if "error" in line), lines[0])
    return ""


@cache
def library(name: str) -> ctypes.CDLL:
    """The functions of `name`.cpp, which share the threads of torch's OpenMP. Raises OSError or
    subprocess.SubprocessError."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++"))), None)
    if compiler is None:
        raise OSError("g++ is missing; install it, for instance with: apt install g++")
    source = Path(__file__).with_name(f"{name}.cpp")
    version = run([compiler, "--version"])
    key = hashlib.sha256(
        "\n".join([source.read_text(encoding="utf-8"), *FLAGS, version]).encode()
    ).hexdigest()
    compiled = Path(os.path.expanduser("~/.cache/distrogpt")) / f"{name}-{key[:16]}.so"
    if not compiled.is_absolute():
        raise OSError("there is no home folder for the compiled file; set HOME")
    with suppress(OSError):  # not compiled yet, or damaged
        return ctypes.CDLL(str(compiled))
    compiled.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:  # others may compile it as well
        run([compiler, *FLAGS, str(source), "-o", f"{folder}/{name}.so"])
        os.replace(f"{folder}/{name}.so", compiled)
    return ctypes.CDLL(str(compiled))


def run(command: list[str]) -> str:
    """The output of a command. Raises OSError or subprocess.SubprocessError."""
    options = {"capture_output": True, "check": True, "timeout": 120, "errors": "replace"}
    return subprocess.run(command, **options).stdout
