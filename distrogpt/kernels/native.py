"""Compiles a C++ file of this folder for this CPU at its first use, keeps the result on disk and loads it."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401  loads its OpenMP, which the compiled functions use

log = logging.getLogger("distrogpt")

# -ffast-math would also change how the whole process rounds; these leave infinities and NaN as they are
FLAGS = "-std=gnu++17 -O3 -march=native -mprefer-vector-width=512 -ffp-contract=fast -fno-math-errno".split()
FLAGS += ["-fopenmp", "-fPIC"]


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The functions of `name`.cpp; None if they cannot be compiled here, which is logged."""
    source, compiler = Path(__file__).with_name(f"{name}.cpp"), os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or not hasattr(ctypes.CDLL(None), "GOMP_parallel"):  # Windows, macOS
        return None
    library = cache_folder() / f"{name}-{fingerprint(source, compiler)}.so"
    try:
        if not library.is_file():
            compile_to(library, source, compiler)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.info(f"note     training is slower, as {source.name} cannot be compiled ({reason[0][:200]})")
        return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distrogpt"


def fingerprint(source: Path, compiler: str) -> str:
    """Of all that the compiled file depends on: the same home folder may be used on several machines."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = set(Path("/proc/cpuinfo").read_text().splitlines())
        cpu += "".join(sorted(line for line in lines if line.startswith(("flags", "Features", "model name"))))
    what = [source.read_text(), compiler, *FLAGS, cpu, platform.libc_ver()[1]]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]


def compile_to(library: Path, source: Path, compiler: str) -> None:
    """Raises OSError or SubprocessError."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # ranks may compile at the same time
        objects, linked = Path(folder) / "block.o", Path(folder) / library.name
        options = {"check": True, "capture_output": True, "text": True, "timeout": 120}
        subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(objects)], **options)
        # without -fopenmp: torch's OpenMP is already loaded, and a second one would have threads of its own
        subprocess.run([compiler, "-shared", str(objects), "-o", str(linked)], **options)
        os.replace(linked, library)
