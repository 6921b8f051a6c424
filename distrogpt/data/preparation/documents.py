"""Documents out of files: .txt and .md, .jsonl, .csv and .parquet, of all but these also .gz and .zst.

A document comes in pieces of some ten thousand characters: no file is in memory whole. It is cut only before
white space that follows something else, where no tokenizer joins the two sides.
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

from distrogpt.data.tokenizer import END_OF_TEXT
from distrogpt.errors import UserError

BLOCK = 1 << 16  # bytes read at once, and characters of a piece, or so: one foreign letter widens them all
ROWS = 64  # of a parquet file at once: they can be long
PACKED = (".gz", ".zst")


class Damaged(Exception):
    """A file is not what its name says."""


class Piece(NamedTuple):
    """Some text of a document, whether the document ends with it, and the number of its file."""

    text: str
    ends: bool
    file: int = 0


@dataclass
class Corpus:
    """Files and how to read them."""

    files: list[Path]
    field: str = "text"  # of JSON lines, and the column of tables
    encoding: str = "utf-8"
    errors: str = "strict"  # replace: what is not in the encoding becomes U+FFFD
    strip: tuple[re.Pattern[str], ...] = ()  # lines in which one of them is found are left out
    format: str | None = None  # of all files, such as jsonl; None: what their names say

    def __post_init__(self) -> None:
        """Raises UserError where a file is not to be read."""
        self.at = 0  # bytes of the files read so far
        self.sizes = []
        for path in self.files:
            try:
                self.sizes.append(os.stat(path).st_size)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None
        self.size = sum(self.sizes)  # bytes of all files, as they are on disk

    def __len__(self) -> int:
        return len(self.files)

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[Piece]:
        """All documents that are not blank, in the order of the files first..end-1. Raises UserError that
        names the file and, where it is known, the place."""
        self.at = sum(self.sizes[:first])
        for number, path in enumerate(self.files[first:end], first):
            kind, before = f".{self.format}" if self.format else kind_of(path), self.at
            try:
                for piece in not_blank(READERS.get(kind, text_pieces)(path, self)):
                    yield piece._replace(file=number)
            except (OSError, EOFError, zlib.error, csv.Error, Damaged) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
                raise UserError(f"{path} cannot be read ({reason}); mend it or leave it out") from None
            self.at = before + self.sizes[number]

    def done(self) -> float:
        """The share of the files that has been read."""
        return self.at / max(1, self.size)

    def describe(self) -> dict[str, Any]:
        """What tells whether it is the same text."""
        reading = {"field": self.field, "encoding": self.encoding, "errors": self.errors}
        reading |= {"strip": [one.pattern for one in self.strip], "format": self.format}
        return {"files": [checksum(path) for path in self.files], **reading}


def checksum(path: Path) -> int:
    """Of a file's name, size, and what it begins and ends with. Raises UserError."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            end = file.read()
            file.seek(0)
            return zlib.crc32(b"%d" % size + file.read(4096) + end, zlib.crc32(os.fsencode(path.name)))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None


def find_files(
    inputs: Iterable[str], kinds: Collection[str] = (), order: Callable[[str], Any] = str
) -> list[Path]:
    """The files that paths, folders and globs name: those of a folder or glob in the order of their paths,
    those of a folder where their kind is one of `kinds`, by default what READERS reads. Raises UserError."""
    wanted = set(kinds or READERS) - {".json"}
    found: list[Path] = []
    for word in inputs:
        path = Path(word)
        if os.path.isdir(path):
            inside = (p for p in path.rglob("*") if kind_of(p) in wanted)
            files = sorted(inside, key=lambda p: order(p.relative_to(path).as_posix()))
            files = [p for p in files if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}"]
        elif os.path.exists(path):
            files = [path]
        else:
            names = sorted(glob.glob(word, recursive=True), key=order)
            files = [Path(name) for name in names if os.path.isfile(name)]
        if not files:
            what = "has none of these files" if os.path.isdir(path) else "is not there"
            these = ", ".join(kinds or (*READERS, f"also with {' or '.join(PACKED)}"))
            raise UserError(f"--input {word[:200]} {what}; give a file, folder or glob with {these}")
        found += files
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]  # each once


def kind_of(path: Path) -> str:
    """The suffix that tells what is in a file, whether it is packed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join([suffix for suffix in suffixes if suffix not in PACKED][-1:])


def blocks(path: Path, corpus: Corpus) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a block at a time."""
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        unpacked: Any = file
        if suffix == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        elif suffix == ".zst":
            import pyarrow

            unpacked = pyarrow.CompressedInputStream(file, "zstd")
        before = corpus.at
        while block := unpacked.read(BLOCK):
            corpus.at = before + file.tell()
            yield block


def decoded(path: Path, corpus: Corpus) -> Iterator[str]:
    """The text of a file in parts, with one newline character for every end of line. Raises UserError."""
    decoder: Any = codecs.getincrementaldecoder(corpus.encoding)(corpus.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    for block in chain(blocks(path, corpus), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = offset + error.start - (len(error.object) - len(block))
            raise UserError(
                f"{path} is not {corpus.encoding} text: byte 0x{error.object[error.start]:02x} at offset "
                f"{place}; convert it, name its --encoding, or give --errors=replace"
            ) from None
        if "\0" in text and corpus.errors == "strict":
            place = offset + max(0, block.find(b"\0"))
            raise UserError(
                f"{path} is no text, but a binary file: a null character at offset {place}; leave it out, or "
                "give --errors=replace"
            )
        if not offset:
            text = text.removeprefix("\ufeff")  # the mark with which Windows begins a file
        offset += len(block)
        yield newlines.decode(text, final=not block)


def text_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A file of text: one document, or several with <|endoftext|> between them."""
    return cut(without_lines(decoded(path, corpus), corpus.strip), END_OF_TEXT)


def json_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per line, in a field of its JSON object."""
    for number, line in enumerate(lines(decoded(path, corpus)), 1):
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
    for number, row in enumerate(csv.DictReader(lines(decoded(path, corpus)), strict=True), 1):
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
                corpus.at += size * len(batch) // file.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(error) from None


READERS = {
    ".txt": text_pieces,
    ".md": text_pieces,
    ".jsonl": json_pieces,
    ".json": json_pieces,
    ".csv": csv_pieces,
    ".parquet": parquet_pieces,
}


def row_pieces(row: dict[str, Any], where: str, corpus: Corpus) -> Iterator[Piece]:
    """The document in a field of a row; none where it is empty. Raises UserError."""
    if corpus.field not in row:
        names = ", ".join(map(str, row))[:200]
        raise UserError(f"{where} has no field {corpus.field!r}, but {names or 'none'}; give --field=NAME")
    text = row[corpus.field]
    if not isinstance(text, str | None):
        raise UserError(
            f"{where}: its field {corpus.field!r} is no text; give another --field, or convert it"
        )
    return cut(without_lines([whole_characters(text or "")], corpus.strip))


def whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of characters, which JSON can write and UTF-8 cannot."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Whole lines, their newlines with them."""
    begun: list[str] = []  # of a line that spans texts
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun) + "\n"
            yield from (f"{line}\n" for line in others[:-1])
            begun = [others[-1]]
    if last := "".join(begun):
        yield last


def without_lines(texts: Iterable[str], strip: tuple[re.Pattern[str], ...]) -> Iterable[str]:
    """The texts without the lines in which one of the patterns is found."""
    if not strip:
        return texts
    return (line for line in lines(texts) if not any(one.search(line.removesuffix("\n")) for one in strip))


def cut(texts: Iterable[str], separator: str | None = None) -> Iterator[Piece]:
    """Texts, which follow each other, as documents in pieces; the separator is between documents."""
    waiting: list[str] = []
    size, enough = 0, BLOCK
    for text in chain(texts, [""]):
        waiting.append(text)
        size += len(text)
        if text and size < enough:
            continue
        *documents, rest = "".join(waiting).split(separator) if separator else ["".join(waiting)]
        yield from (Piece(document, True) for document in documents)
        place = safe_cut(rest) if text else len(rest)
        yield Piece(rest[:place], not text)
        waiting, size = [rest[place:]], len(rest) - place
        enough = size + BLOCK


def safe_cut(text: str) -> int:
    """Where to cut a text whose end is not known yet: before the last white space that follows something
    else; where there is none, before the last characters, which may be half a separator."""
    for first in (max(0, len(text) - 1000), 0):  # most often it is near the end
        before = text[first:]
        for _ in range(100):
            before = before[: max(map(before.rfind, " \n\t")) + 1].rstrip()
            if not before:
                break
            place = first + len(before)
            if text[place] in " \n\t":  # not one that only Python takes for white space
                return place
    return max(0, len(text) - len(END_OF_TEXT)) if len(text) > 64 * BLOCK else 0


def not_blank(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without those of documents that have nothing but white space, and without empty ones."""
    begun, waiting = False, ""
    for text, ends, _ in pieces:
        waiting += text
        if begun or (waiting and not waiting.isspace()):
            yield Piece(waiting, ends)
            begun, waiting = not ends, ""
        elif ends:
            waiting = ""
