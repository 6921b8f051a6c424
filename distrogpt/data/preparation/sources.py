"""Where the text of a dataset comes from: --input, a copy on disk, or else a download that is checked."""

import argparse
import hashlib
import http.client
import os
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

from distrogpt.data.meta import find_dataset, read_meta
from distrogpt.data.preparation.documents import READERS, Corpus, find_files
from distrogpt.data.preparation.writer import text_bytes, write_dataset
from distrogpt.data.tokenizer import Tokenizer, from_description
from distrogpt.errors import UserError, exit_with_error

TINY_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def argument_parser(script: str, about: str, input_help: str | None = None) -> argparse.ArgumentParser:
    """The options that every prepare.py has, --input where it reads one; mistakes end in one line."""
    parser = argparse.ArgumentParser(prog=f"python {script}", description=about)
    if input_help:
        parser.add_argument("--input", type=Path, metavar="PATH", help=input_help)
    folder = Path(script).resolve().parent
    parser.add_argument(
        "--output", type=Path, default=folder, metavar="FOLDER", help="default: the script's folder"
    )
    parser.add_argument("--overwrite", action="store_true", help="write anew what is there")
    parser.error = lambda message: exit_with_error(2, f"{message}; --help lists the options")
    return parser


def text_parser(script: str, about: str, input_help: str) -> argparse.ArgumentParser:
    """Those of one that takes text of any kind."""
    parser = argument_parser(script, about)
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATH", help=input_help)
    add("--field", default="text", metavar="NAME", help="of JSON lines, or column of tables (default: text)")
    add("--format", choices=sorted(kind[1:] for kind in READERS), help="of all files, whatever their names")
    add("--encoding", default="utf-8", help="of the files (default: utf-8)")
    add("--errors", default="strict", choices=("strict", "replace"), help="replace: U+FFFD for what is not")
    add_text_options(parser)
    return parser


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Those of one that reads text or makes some."""
    add = parser.add_argument
    add("--strip_lines", action="append", metavar="REGEX", help="leave out lines that have it; repeatable")
    add("--workers", type=int, default=cores(), metavar="N", help="threads (default: the cores)")


def open_corpus(args: argparse.Namespace, inputs: list[str]) -> Corpus:
    """The files that are named, to be read as the options of text_parser say. Raises UserError."""
    try:
        "".encode(args.encoding)
    except (LookupError, UnicodeError):
        raise UserError(f"--encoding {args.encoding} is not known; try utf-8, latin-1 or utf-16") from None
    strip = strip_patterns(args)
    return Corpus(find_files(inputs), args.field, args.encoding, args.errors, strip, args.format)


def strip_patterns(args: argparse.Namespace) -> tuple[re.Pattern[str], ...]:
    """What --strip_lines says. Raises UserError."""
    try:
        return tuple(map(re.compile, args.strip_lines or ()))
    except re.error as error:
        raise UserError(f"--strip_lines {args.strip_lines}: {error}; mend the regular expression") from None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def named_tokenizer(name: str) -> Tokenizer:
    """gpt2, byte, or the tokenizer of a dataset, by its name or folder. Raises UserError."""
    if name in ("gpt2", "byte"):
        return from_description({"kind": name})
    meta = read_meta(find_dataset(name))
    if not meta["tokenizer"]:
        raise UserError(f"the dataset {name} has no tokenizer in its meta.json; choose another --tokenizer")
    return from_description(meta["tokenizer"])


def prepare_shakespeare(about: str, make_tokenizer: Callable[[str], Tokenizer]) -> None:
    """The whole prepare.py of a tiny Shakespeare: the first nine tenths are train, the rest val."""
    args = argument_parser(sys.argv[0], about, "a copy of the text, instead of the download").parse_args()
    text, source = tiny_shakespeare(args.input, args.output)
    tokenizer = make_tokenizer(text)
    split = int(len(text) * 0.9)
    with write_dataset(args.output, tokenizer, args.overwrite, **source) as add:
        for name, part in (("train", text[:split]), ("val", text[split:])):
            add(name, tokenizer.encode(part), text_bytes(part))


def tiny_shakespeare(given: Path | None, folder: Path) -> tuple[str, dict[str, str]]:
    """The text, from `given` or else downloaded into `folder`, and what meta.json says of it. UserError."""
    url, sha256 = TINY_SHAKESPEARE
    path = given or download(url, sha256, folder / "input.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--input {path} cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    found = hash_of(path)
    if found != sha256:
        print(f"note: {path} is not tiny Shakespeare as published, but another text; it is used as it is")
    return text, {"source": str(given or url), "sha256": found}


def download(url: str, sha256: str, path: Path) -> Path:
    """Fetch `url` to `path`, unless the file is there; either way it has this sha256. Raises UserError."""
    if not path.is_file():
        print(f"downloads {url}")
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as answer:
                temporary.write_bytes(answer.read())
            if hash_of(temporary) == sha256:
                os.replace(temporary, path)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"no download ({reason}); fetch {url} elsewhere and give --input PATH") from None
        finally:
            temporary.unlink(missing_ok=True)
    if not path.is_file() or hash_of(path) != sha256:
        what = path if path.is_file() else url
        raise UserError(
            f"{what} is not the file expected (sha256 {sha256}); fetch {url} and give --input PATH"
        )
    return path


def hash_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
