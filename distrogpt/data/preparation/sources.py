"""The source of a dataset's text: the options of prepare.py, files on disk, a verified download."""

import argparse
import hashlib
import http.client
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from distrogpt.data.meta import dataset_folder, did_you_mean, prepared_names, read_meta
from distrogpt.data.preparation.documents import READERS, Corpus, find_files
from distrogpt.data.preparation.writer import text_bytes, write_dataset
from distrogpt.data.tokenizer import Tokenizer, from_description
from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors, exit_with_error, leave_to_rank_0, quote
from distrogpt.files import read_text
from distrogpt.progress import show_wait

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def argument_parser(script: str, about: str, input_help: str | None = None) -> argparse.ArgumentParser:
    """The options of every prepare.py, with --input if it reads a file; a mistake ends with one line."""
    leave_to_rank_0(script)
    parser = argparse.ArgumentParser(prog=f"python {quote(script)}", description=about)
    add, folder = parser.add_argument, Path(script).resolve().parent
    output_help = "folder of the dataset (default: a folder in data/)"
    if input_help:
        add("--input", type=home_path, metavar="PATH", help=input_help)
    add("--output", type=home_path, default=folder, metavar="FOLDER", help=output_help)
    add("--overwrite", action="store_true", help="replace an existing dataset")
    parser.error = lambda message: exit_with_error(2, f"{message}; --help lists the options")
    return parser


def home_path(text: str) -> Path:
    """The path with ~ expanded, which shells do not do in --output=~/x."""
    return Path(text).expanduser()


def text_parser(script: str, about: str, input_help: str) -> argparse.ArgumentParser:
    """The options of a prepare.py that reads text of any kind."""
    parser = argument_parser(script, about)
    add = parser.add_argument
    add("--input", nargs="+", type=os.path.expanduser, metavar="PATH", help=input_help)
    field_help = "field of JSON lines or column of tables with the text (default: text)"
    add("--field", default="text", metavar="NAME", help=field_help)
    format_help = "read all files in this format (default: by their names)"
    add("--format", choices=sorted(kind[1:] for kind in READERS), help=format_help)
    add("--encoding", default="utf-8", help="encoding of the files (default: utf-8)")
    errors_help = "bytes that are invalid in the encoding: stop, or replace by U+FFFD (default: strict)"
    add("--errors", default="strict", choices=("strict", "replace"), help=errors_help)
    add_text_options(parser)
    return parser


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options of a prepare.py that reads or transcribes text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    strip_help = "remove lines that match this regular expression; can be repeated"
    add("--strip_lines", action="append", metavar="REGEX", help=strip_help)
    add("--workers", type=int, default=cores, metavar="N", help="number of threads (default: all cores)")


def open_corpus(args: argparse.Namespace, inputs: list[str]) -> Corpus:
    """The named files, to be read as the options of text_parser say. Raises UserError."""
    try:
        "".encode(args.encoding)
    except (LookupError, UnicodeError):
        raise UserError(f"--encoding {args.encoding} is not known; try utf-8, latin-1 or utf-16") from None
    strip = strip_patterns(args)
    with show_wait("looking for the files"):
        files = find_files(inputs)
        return Corpus(files, args.field, args.encoding, args.errors, strip, args.format)


def strip_patterns(args: argparse.Namespace) -> tuple[re.Pattern[str], ...]:
    """The patterns of --strip_lines. Raises UserError."""
    try:
        return tuple(map(re.compile, args.strip_lines or ()))
    except re.error as error:
        raise UserError(f"--strip_lines {error.pattern!r}: {error}; fix the regular expression") from None


def named_tokenizer(name: str, kinds: Sequence[str] = ("gpt2", "byte")) -> Tokenizer:
    """gpt2, byte, or the tokenizer of a dataset, by its name or folder. `kinds` are the values of a command's
    --tokenizer that are not datasets. Raises UserError."""
    if name in ("gpt2", "byte"):
        return from_description({"kind": name})
    if not (folder := dataset_folder(name)):
        hint = f"{did_you_mean(name, kinds)} use {', '.join(kinds)}, or a prepared dataset".strip()
        raise UserError(f"unknown --tokenizer {name[:200] or repr(name)}; {hint} ({prepared_names(name)})")
    meta = read_meta(folder)
    if not meta["tokenizer"]:
        raise UserError(f"the dataset {name} has no tokenizer in its meta.json; choose another --tokenizer")
    return from_description(meta["tokenizer"])


@cli_errors(CLOSE_OTHERS)
def prepare_shakespeare(about: str, make_tokenizer: Callable[[str], Tokenizer]) -> None:
    """The command of a prepare.py of tiny Shakespeare: the first nine tenths are train, the rest is val."""
    args = argument_parser(
        sys.argv[0], about, "local copy of the text, instead of downloading it"
    ).parse_args()
    path = args.input or download(SHAKESPEARE, SHAKESPEARE_SHA256, args.output / "input.txt")
    with show_wait("reading the text"):
        text, actual = read_text(path), hash_of(path)
    if actual != SHAKESPEARE_SHA256:
        print(f"note: {path} is not the published tiny Shakespeare; it is used as it is")
    tokenizer, split, source = make_tokenizer(text), int(len(text) * 0.9), str(args.input or SHAKESPEARE)
    with write_dataset(args.output, tokenizer, args.overwrite, source=source, sha256=actual) as add:
        for name, part in (("train", text[:split]), ("val", text[split:])):
            with show_wait("tokenizing the text"):
                add(name, tokenizer.encode(part), text_bytes(part))


def download(url: str, sha256: str, path: Path, flag: str = "--input PATH") -> Path:
    """Download `url` to `path`, unless the file is there; verify its sha256. Raises UserError, with the flag
    that takes a copy."""
    if not path.is_file():
        from torch.hub import download_url_to_file

        print(f"downloading {url}")
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(30)  # seconds without an answer; torch's downloader has none of its own
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            reason = getattr(error, "reason", error)
            raise UserError(f"download failed ({reason}); fetch {url} elsewhere and give {flag}") from None
        finally:
            socket.setdefaulttimeout(timeout)
    if hash_of(path) != sha256:
        advice = f"delete it to download it again, or give {flag}"
        raise UserError(f"{path} is damaged or another file (its sha256 is not {sha256}); {advice}")
    return path


def hash_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
