"""Documents from files: text, JSON lines, JSON, tables and parquet; all but the last also as .gz or .zst.

A document is read in pieces of some ten thousand characters, so that no file is in memory as a whole. It is
cut only between white space and a visible character before it, which no tokenizer joins.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from distrogpt.data.token_stream import open_file
from distrogpt.data.tokenizer import END_OF_TEXT, SAFE_CUT
from distrogpt.errors import UserError, warn
from distrogpt.files import encoding_of, fault_of, likely_encoding

BLOCK = 1 << 16  # bytes read at once, and characters of a piece: small, as one wide character widens them all
FORMATS = {b"%PDF": "a PDF", b"PK\3\4": "a .docx, .epub or other zip file", b"\x7fELF": "a program"}
ROWS = 64  # of a parquet file that are read at once: they can be long
PACKED = (".gz", ".zst")
BETWEEN = re.compile(r"[\s,]*")  # the values of a JSON array


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
    encoding: str = "utf-8"  # of files without a byte order mark
    errors: str = "strict"  # replace: invalid bytes become U+FFFD
    strip: tuple[re.Pattern[str], ...] = ()  # lines that match one of them are left out
    format: str | None = None  # of all files, such as jsonl; by default by the suffixes of their names

    def __post_init__(self) -> None:
        self.bytes_read = 0
        self.sizes = [os.stat(path).st_size for path in self.files]
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
            except csv.Error as error:
                advice = "write quotes within quoted text twice, and close each quoted text"
                reason = str(error).replace("\t", r"\t")[:100]
                raise UserError(f"{path} is not a valid table ({reason}); {advice}") from None
            except (OSError, EOFError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
                raise UserError(f"{path} cannot be read ({reason}); repair it or leave it out") from None
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
        begin, size = file.read(4096), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        return zlib.crc32(b"%d" % size + begin + file.read(), zlib.crc32(os.fsencode(path.name)))


def find_files(inputs: Iterable[str], kinds: Sequence[str] = (), order: Callable = str) -> list[Path]:
    """The files of paths, folders and globs, each once; those of a folder or glob sorted by `order`; of a
    folder, the files of these kinds, by default those that READERS reads. Raises UserError."""
    wanted = set(kinds or READERS) - {".json"}
    files_by_path: dict[str, Path] = {}
    for word in inputs:
        path = Path(word)
        if os.path.isdir(path):
            names = [p.relative_to(path).as_posix() for p in path.rglob("*")]
            names = sorted((name for name in names if "/." not in f"/{name}"), key=order)
            files = [path / name for name in names if kind_of(path / name) in wanted]
            if not files and not kinds:  # beside texts, .json has settings of programs
                files = [path / name for name in names if kind_of(path / name) == ".json"]
            others = {path / name for name in names if (path / name).is_file()} - set(files)
            if files and others and not kinds:
                suffixes = ", ".join(sorted({file.suffix or file.name for file in others})[:5])
                count = f"{len(others)} file{'s' if len(others) > 1 else ''} of other types"
                warn(f"note     {path}: {count} left out ({suffixes})")
        elif os.path.exists(path):
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(word, recursive=True), key=order)]
        files = [file for file in files if file == path or file.is_file()]
        if not files:
            these = ", ".join(kinds or (*READERS, f"also with {' or '.join(PACKED)}"))
            raise UserError(f"--input {word[:200]} does not exist or has no supported files; give {these}")
        for file in files:
            files_by_path.setdefault(os.path.realpath(file), file)
    return list(files_by_path.values())


def kind_of(path: Path) -> str:
    """The suffix that names the type of a file, without .gz and .zst."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in PACKED]
    return suffixes[-1] if suffixes else ""


def read_text(path: Path, corpus: Corpus, by_line: bool) -> Iterator[str]:
    """The decompressed text of a file in blocks or lines, with \\n for each line end. Raises UserError."""
    suffix, before = path.suffix.lower(), corpus.bytes_read
    with open(path, "rb") as file:
        unpacked: Any = file
        mark = "\ufeff"  # the byte order mark
        if suffix == ".gz":
            unpacked = gzip.GzipFile(fileobj=file)
        elif suffix == ".zst":
            import pyarrow

            unpacked = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        if name := next((name for mark, name in FORMATS.items() if unpacked.peek(4).startswith(mark)), ""):
            raise UserError(f"{path} is {name}, not text; save its text as .txt")
        encoding = encoding_of(unpacked.peek(4), "") or unmarked_encoding(unpacked.peek(4), path, corpus)
        text = io.TextIOWrapper(unpacked, encoding, corpus.errors)
        try:
            while texts := text.readlines(BLOCK) if by_line else list(filter(None, [text.read(BLOCK)])):
                if corpus.errors == "strict" and any("\0" in one for one in texts):
                    advice = how_to_read(texts[0].encode("utf-8", "replace"), encoding, corpus)
                    raise UserError(f"{path} has a null character; {advice}")
                corpus.bytes_read = before + file.tell()
                texts[0] = texts[0].removeprefix(mark)
                mark = ""
                yield from texts
        except UnicodeDecodeError as error:
            # the position in a .zst file is not known
            fault = fault_of(error, None if suffix == ".zst" else unpacked.tell() - len(error.object))
            advice = how_to_read(error.object, encoding, corpus)
            raise UserError(f"{path} is not {encoding} text: {fault}; {advice}") from None


def unmarked_encoding(begin: bytes, path: Path, corpus: Corpus) -> str:
    """The encoding of a file without a byte order mark, by its first bytes. Raises UserError if it should be
    UTF-16 but is UTF-8, as any bytes can be read as UTF-16."""
    name, likely = codecs.lookup(corpus.encoding).name, likely_encoding(begin)
    if name[:6] in ("utf-16", "utf-32") and begin:
        if likely == "utf-8":
            raise UserError(f"{path} is not {corpus.encoding} text, but utf-8; give --encoding=utf-8")
        if name == "utf-16":
            return likely if likely and likely.startswith(name) else "utf-16-le"
    return corpus.encoding


def how_to_read(data: bytes, encoding: str, corpus: Corpus) -> str:
    """The advice for bytes that are not text in an encoding."""
    likely = likely_encoding(data)
    if encoding != corpus.encoding or likely == codecs.lookup(encoding).name:  # the mark's, or the same
        return "repair it, or give --errors=replace"
    if likely is None:
        return "it may be binary: leave it out, or give --errors=replace"
    return f"give its encoding, perhaps --encoding={likely}, or --errors=replace if it is damaged"


def text_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A file of text: one document, or several with <|endoftext|> between them."""
    return cut(strip_lines(read_text(path, corpus, by_line=bool(corpus.strip)), corpus.strip), END_OF_TEXT)


def json_line_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per line: its JSON text, or a field of its object."""
    for number, line in enumerate(read_text(path, corpus, by_line=True), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            advice = "repair it, or give --format=json if values span several lines"
            raise UserError(f"{path}, line {number} is not valid JSON ({error}); {advice}") from None
        yield from value_pieces(value, f"{path}, line {number}", corpus)


def json_pieces(path: Path, corpus: Corpus) -> Iterator[Piece]:
    """A document per value of an array, or of values that follow one another: as in json_line_pieces."""
    for number, value in json_values(read_text(path, corpus, by_line=False), str(path)):
        yield from value_pieces(value, f"{path}, line {number}", corpus)


def json_values(texts: Iterable[str], source: str) -> Iterator[tuple[int, Any]]:
    """Each value of a JSON array, or of values that follow one another, and the line in which it begins. The
    texts are consecutive; no more of them is kept than a value needs. Raises UserError."""
    decode, waiting, line, depth = json.JSONDecoder().raw_decode, [], 1, 0
    size, enough, first = 0, 1, True
    for text in chain(texts, [""]):
        waiting.append(text)
        size += len(text)
        if text and size < enough:
            continue
        rest, at = "".join(waiting), 0
        while (begin := BETWEEN.match(rest, at).end()) < len(rest):
            line, at = line + rest.count("\n", at, begin), begin
            if rest[at] == ("[" if first else "]" if depth else ""):
                first, depth, at = False, 1 - depth, at + 1
                continue
            try:
                value, end = decode(rest, at)
            except (ValueError, RecursionError) as error:
                if text and is_cut_off(error, len(rest)):
                    break
                reason = getattr(error, "msg", error)
                raise UserError(f"{source}, line {line} is not valid JSON ({reason}); repair it") from None
            yield line, value
            line, at, first = line + rest.count("\n", at, end), end, False
        waiting, size = [rest[at:]], len(rest) - at
        enough = 2 * size + 1
    if depth:
        raise UserError(f"{source} is cut off: its array does not end (line {line}); get the complete file")


def is_cut_off(error: Exception, size: int) -> bool:
    """Whether JSON of `size` characters may only be incomplete."""
    position = getattr(error, "pos", 0)
    return position > size - 16 or getattr(error, "msg", "").startswith("Unterminated string")


def csv_pieces(path: Path, corpus: Corpus, separators: str = ",;\t|") -> Iterator[Piece]:
    """A document per row, in a column that the first row names; the separator is the one that finds it."""
    csv.field_size_limit(2**31 - 1)
    lines = read_text(path, corpus, by_line=True)
    head = next(lines, "")
    if re.fullmatch("sep=.\n", head):  # Excel's line that names the separator
        separators, head = head[4], next(lines, "")
    columns = {one: next(csv.reader([head], delimiter=one), []) for one in separators}
    found = [one for one in separators if corpus.field in columns[one]]
    separator = max(found or separators, key=lambda one: len(columns[one]))
    rows = csv.DictReader(chain([head], lines), delimiter=separator, strict=True)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            advice = f"quote text that contains {separator!r}"
            raise UserError(f"{path}, row {number} has more or fewer columns than the header; {advice}")
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
        raise OSError(str(error)) from None  # the file is damaged or of another type


READERS = {".txt": text_pieces, ".md": text_pieces, ".jsonl": json_line_pieces, ".json": json_pieces}
READERS[".ndjson"] = json_line_pieces
READERS |= {".csv": csv_pieces, ".tsv": partial(csv_pieces, separators="\t"), ".parquet": parquet_pieces}


def value_pieces(value: Any, where: str, corpus: Corpus) -> Iterator[Piece]:
    """The document of a JSON value. Raises UserError."""
    if not isinstance(value, dict | str):
        advice = "give strings, or objects with a field of text"
        raise UserError(f"{where} is {json.dumps(value)[:40]}, not a string or an object; {advice}")
    return row_pieces({corpus.field: value} if isinstance(value, str) else value, where, corpus)


def row_pieces(row: dict[str, Any], where: str, corpus: Corpus) -> Iterator[Piece]:
    """The document in a field of a row. Raises UserError."""
    if corpus.field not in row:
        names = ", ".join(map(str, row))[:200] or "none"
        raise UserError(f"{where} has no field {corpus.field!r} (fields: {names}); give --field=NAME")
    text = row[corpus.field] or ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {corpus.field!r} is not text; give another --field, or convert it")
    if not text.isascii():  # U+FFFD replaces unpaired surrogates, which JSON can write and UTF-8 cannot
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return cut(strip_lines(io.StringIO(text), corpus.strip))


def strip_lines(lines: Iterable[str], patterns: tuple[re.Pattern[str], ...]) -> Iterable[str]:
    """The lines that match none of the patterns; without patterns, `lines` can be texts of any length."""
    if not patterns:
        return lines
    return (line for line in lines if not any(one.search(line.removesuffix("\n")) for one in patterns))


def cut(texts: Iterable[str], separator: str | None = None, block: int = BLOCK) -> Iterator[Piece]:
    """Consecutive texts as documents, split at the separator, in pieces of some `block` characters."""
    waiting: list[str] = []
    searched = size = 0  # waiting characters: those known to have no safe cut, and all of them
    enough = block
    for text in chain(texts, [""]):
        waiting.append(text)
        size += len(text)
        if text and size < enough:
            continue
        *documents, rest = "".join(waiting).split(separator) if separator else ["".join(waiting)]
        yield from (Piece(document, True) for document in documents)
        position = len(rest)
        if text and (safe := SAFE_CUT.match(rest, max(0, len(rest) - size + searched - 1))):
            position = safe.end()
        elif text:  # wait for white space, but not forever; the end may be part of a separator
            position = max(0, len(rest) - len(END_OF_TEXT)) if len(rest) > 64 * block else 0
        yield Piece(rest[:position], not text)
        waiting, searched = [rest[position:]], len(rest) - position
        size = searched
        enough = size + block


def skip_blank(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without empty ones, and without documents of only white space."""
    begun, waiting = False, ""
    for text, ends, _ in pieces:
        waiting += text
        if begun or (waiting and not waiting.isspace()):
            yield Piece(waiting, ends)
            begun, waiting = not ends, ""
        elif ends:
            waiting = ""
