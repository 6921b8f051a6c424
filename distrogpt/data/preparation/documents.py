"""Documents from files: .txt and .md, .jsonl, .csv and .parquet; all but the last also as .gz and .zst.

A document comes in pieces of some ten thousand characters, so that no file is in memory as a whole. It is cut
only before white space that follows something else, where no tokenizer joins the two sides.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from distrogpt.data.token_stream import open_file
from distrogpt.data.tokenizer import END_OF_TEXT
from distrogpt.errors import UserError

BLOCK = 1 << 16  # bytes read at once, and characters of a piece: small, as one wide character widens them all
ROWS = 64  # of a parquet file at once: they can be long
PACKED = (".gz", ".zst")
SAFE_CUT = re.compile(r"(?s).*\S(?=[ \n\t])")  # up to the last white space that follows something else


class Piece(NamedTuple):
    """Some text of a document, whether the document ends with it, and the number of its file."""

    text: str
    ends: bool
    file: int = 0


@dataclass
class Corpus:
    """Files and how to read them. Raises UserError if one cannot be read."""

    files: list[Path]
    field: str = "text"  # of JSON lines, and the column of tables
    encoding: str = "utf-8"
    errors: str = "strict"  # replace: what is not in the encoding becomes U+FFFD
    strip: tuple[re.Pattern[str], ...] = ()  # lines that match one of them are left out
    format: str | None = None  # of all files, such as jsonl; by default what their names say

    def __post_init__(self) -> None:
        self.bytes_read = 0
        try:
            self.sizes = [os.stat(path).st_size for path in self.files]
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); leave it out") from None
        self.size = sum(self.sizes)  # in bytes, on disk

    def __len__(self) -> int:
        return len(self.files)

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[Piece]:
        """All documents of the files first..end-1 that are not blank. Raises UserError."""
        for number, path in enumerate(self.files[first:end], first):
            self.bytes_read = sum(self.sizes[:number])
            kind = f".{self.format}" if self.format else kind_of(path)
            try:
                for piece in skip_blank(READERS.get(kind, text_pieces)(path, self)):
                    yield piece._replace(file=number)
            except (OSError, EOFError, zlib.error, csv.Error) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
                raise UserError(f"{path} cannot be read ({reason}); mend it or leave it out") from None
        self.bytes_read = sum(self.sizes[:end])

    def done(self) -> float:
        """The fraction of the files that has been read."""
        return self.bytes_read / max(1, self.size)

    def describe(self) -> dict[str, Any]:
        """What identifies the text, as JSON."""
        reading = {"field": self.field, "encoding": self.encoding, "errors": self.errors}
        reading |= {"strip": [pattern.pattern for pattern in self.strip], "format": self.format}
        return {"files": [checksum(path) for path in self.files], **reading}


def checksum(path: Path) -> int:
    """Of a file's name, size, and its first and last bytes. Raises UserError."""
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        end = file.read()
        file.seek(0)
        return zlib.crc32(b"%d" % size + file.read(4096) + end, zlib.crc32(os.fsencode(path.name)))


def find_files(
    inputs: Iterable[str], kinds: Collection[str] = (), order: Callable[[str], Any] = str
) -> list[Path]:
    """The files of paths, folders and globs, each once; those of a folder or glob sorted by `order`.

    Of a folder, the files of these kinds, by default those that READERS reads. Raises UserError.
    """
    wanted = set(kinds or READERS) - {".json"}
    files_by_path: dict[str, Path] = {}
    for word in inputs:
        path = Path(word)
        if os.path.isdir(path):
            names = (p.relative_to(path).as_posix() for p in path.rglob("*") if kind_of(p) in wanted)
            files = [path / name for name in sorted(names, key=order) if "/." not in f"/{name}"]
        elif os.path.exists(path):
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(word, recursive=True), key=order)]
        files = [file for file in files if file == path or file.is_file()]
        if not files:
            what = "has none of these files" if os.path.isdir(path) else "is not there"
            these = ", ".join(kinds or (*READERS, f"also with {' or '.join(PACKED)}"))
            raise UserError(f"--input {word[:200]} {what}; give a file, folder or glob with {these}")
        for file in files:
            files_by_path.setdefault(os.path.realpath(file), file)
    return list(files_by_path.values())


def kind_of(path: Path) -> str:
    """The suffix that names the kind of a file, whether it is packed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
    return suffixes[-1] if suffixes else ""


def read_blocks(path: Path, corpus: Corpus) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a block at a time."""
    suffix, before = path.suffix.lower(), corpus.bytes_read
    with open(path, "rb") as file:
        unpacked: Any = file
        if suffix == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        elif suffix == ".zst":
            import pyarrow

            unpacked = pyarrow.CompressedInputStream(file, "zstd")
        while block := unpacked.read(BLOCK):
            corpus.bytes_read = before + file.tell()
            yield block


def decode_blocks(path: Path, corpus: Corpus) -> Iterator[str]:
    """The text of a file in parts, with \\n for every end of line. Raises UserError."""
    decoder: Any = codecs.getincrementaldecoder(corpus.encoding)(corpus.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    for block in chain(read_blocks(path, corpus), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = offset + error.start - (len(error.object) - len(block))
            raise UserError(
                f"{path} is not {corpus.encoding} text: byte 0x{error.object[error.start]:02x} at offset "
                f"{position}; convert it, name its --encoding, or give --errors=replace"
            ) from None
        if "\0" in text and corpus.errors == "strict":
            raise UserError(
                f"{path} is a binary file: it has a null character at offset "
                f"{offset + max(0, block.find(0))}; leave it out, or give --errors=replace"
            )
        if not offset:
            text = text.removeprefix("\ufeff")  # the mark with which Windows begins a file
        offset += len(block)
        yield newlines.decode(text, final=not block)


def text_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A file of text: one document, or several with <|endoftext|> between them."""
    return cut(strip_lines(decode_blocks(path, corpus), corpus.strip), END_OF_TEXT)


def json_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per line, in a field of its JSON object."""
    for number, line in enumerate(lines(decode_blocks(path, corpus)), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON ({error}); mend it or leave it out") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number} is no JSON object; write {{"text": ...}} on each line')
        yield from row_pieces(row, f"{path}, line {number}", corpus)


def csv_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per row, in a column that the first row names."""
    csv.field_size_limit(2**31 - 1)
    for number, row in enumerate(csv.DictReader(lines(decode_blocks(path, corpus)), strict=True), 1):
        if None in row or None in row.values():
            raise UserError(f"{path}, row {number} has not the columns of the first; quote text with commas")
        yield from row_pieces(row, f"{path}, row {number}", corpus)


def parquet_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per row, in one column."""
    import pyarrow
    import pyarrow.parquet

    size = os.path.getsize(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [corpus.field] if corpus.field in names else names
            for batch in file.iter_batches(ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield from row_pieces(row, str(path), corpus)
                corpus.bytes_read += size * len(batch) // file.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from None  # the file is not what its name says


READERS = {
    **dict.fromkeys((".txt", ".md"), text_pieces),
    **dict.fromkeys((".jsonl", ".json"), json_pieces),
    ".csv": csv_pieces,
    ".parquet": parquet_pieces,
}


def row_pieces(row: dict[str, Any], where: str, corpus: Corpus) -> Iterator[Piece]:
    """The document in a field of a row. Raises UserError."""
    if corpus.field not in row:
        names = ", ".join(map(str, row))[:200]
        raise UserError(f"{where} has no field {corpus.field!r}, but {names or 'none'}; give --field=NAME")
    text = row[corpus.field]
    if not isinstance(text, str | None):
        raise UserError(f"{where}: {corpus.field!r} is no text; give another --field, or convert it")
    text = text or ""
    if not text.isascii():  # U+FFFD replaces halves of characters, which JSON can write and UTF-8 cannot
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return cut(strip_lines([text], corpus.strip))


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines, with their newlines."""
    begun: list[str] = []  # of a line that spans texts
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        for other in others:
            yield "".join(begun) + "\n"
            begun = [other]
    if last := "".join(begun):
        yield last


def strip_lines(texts: Iterable[str], patterns: tuple[re.Pattern[str], ...]) -> Iterable[str]:
    """The texts without the lines that match a pattern."""
    if not patterns:
        return texts
    return (line for line in lines(texts) if not any(one.search(line.removesuffix("\n")) for one in patterns))


def cut(texts: Iterable[str], separator: str | None = None, block: int = BLOCK) -> Iterator[Piece]:
    """Consecutive texts as documents, which the separator separates, in pieces of some `block` characters."""
    waiting: list[str] = []
    size, enough = 0, block
    for text in chain(texts, [""]):
        waiting.append(text)
        size += len(text)
        if text and size < enough:
            continue
        *documents, rest = "".join(waiting).split(separator) if separator else ["".join(waiting)]
        yield from (Piece(document, True) for document in documents)
        position = len(rest)
        if text and (safe := SAFE_CUT.match(rest)):
            position = safe.end()
        elif text:  # wait for white space, but not for ever; the last characters may be half a separator
            position = max(0, len(rest) - len(END_OF_TEXT)) if len(rest) > 64 * block else 0
        yield Piece(rest[:position], not text)
        waiting, size = [rest[position:]], len(rest) - position
        enough = size + block


def skip_blank(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without empty ones and those of documents that have nothing but white space."""
    begun, waiting = False, ""
    for text, ends, _ in pieces:
        waiting += text
        if begun or (waiting and not waiting.isspace()):
            yield Piece(waiting, ends)
            begun, waiting = not ends, ""
        elif ends:
            waiting = ""
