"""Text files of users, in the encodings in which editors save them; files that several commands may write."""

import codecs
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distrogpt.errors import UserError

MARKS = {  # byte order marks, which Windows programs write; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}

TEMPORARY = ".distrogpt-"  # prefix of the names of incomplete files


def encoding_of(begin: bytes, default: str = "utf-8") -> str:
    """The encoding that a byte order mark at the beginning of a file names, else the default."""
    return next((name for mark, name in MARKS.items() if begin.startswith(mark)), default)


def likely_encoding(data: bytes) -> str | None:
    """The probable encoding of a text without a byte order mark, from its first bytes: UTF-16 if every second
    byte is often null; None if other bytes are null; UTF-8 if it is valid; else Windows' cp1252."""
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if max(even, odd) > len(data) // 8 and min(even, odd) <= len(data) // 64:
        return "utf-16-be" if even > odd else "utf-16-le"
    if even or odd:
        return None
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def fault_of(error: UnicodeDecodeError, before: int | None = 0) -> str:
    """The byte that is invalid in the encoding, and its offset, if `before` bytes of the file came first."""
    where = "" if before is None else f" at offset {before + error.start}"
    return f"invalid byte 0x{error.object[error.start]:02x}{where}"


def read_text(name: str | Path, what: str = "") -> str:
    r"""The text of a user's file, or of stdin if the name is -, with \n for each end of line. It is UTF-8,
    or what its byte order mark says. Raises UserError, whose message calls the file `what`."""
    what = what or str(name)
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        encoding = encoding_of(data)
        if encoding == "utf-8" and str(likely_encoding(data[:4096])).startswith("utf-16"):
            raise UserError(f"{what} is binary, or UTF-16 without a byte order mark; save it as UTF-8")
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        kind = "UTF-8" if encoding.startswith("utf-8") else encoding
        raise UserError(f"{what} is not {kind} text ({fault_of(error)}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} cannot be read ({reason}); give the path of a text file") from None


def write_text(path: str | Path, text: str) -> None:
    """Write a file completely or not at all, even if other processes write it too. Raises OSError."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # Python sets it only if open() fails
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(lock: Path, busy: str, timeout: float = 0.5) -> Iterator[None]:
    """Keep other processes out of the block, by a file that is locked until the block or the process ends.
    Raises UserError(busy) if another process still has the lock after `timeout` seconds; OSError."""
    from filelock import FileLock, Timeout  # comes with torch

    lock = Path(os.path.realpath(lock))
    try:
        holder = FileLock(lock)
        holder.acquire(timeout=timeout)
    except Timeout:
        raise UserError(busy) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file; filelock does it later
            lock.unlink()
        holder.release()
