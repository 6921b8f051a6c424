"""Documents of any kind as a dataset; `main` is the command of data/text/prepare.py."""

import argparse
import math
import os
import re
import shutil
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path

from distrogpt.data.meta import DATA, read_meta
from distrogpt.data.preparation import writer
from distrogpt.data.preparation.documents import Corpus, Piece
from distrogpt.data.preparation.sources import named_tokenizer, open_corpus, text_parser
from distrogpt.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, tokenizer_json, train_bpe
from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors, command
from distrogpt.files import TEMPORARY, write_text
from distrogpt.progress import show_wait

BPE_SAMPLE = 50_000_000  # characters that train a tokenizer: its memory grows with the number of words
KINDS = ("char", "byte", "gpt2", "bpe:4096")  # values of --tokenizer other than a dataset
MINUTES = 10  # of the training command that is printed


def scan(corpus: Corpus, enough: int, want_chars: bool) -> tuple[list[int], str]:
    """The lengths of the first `enough` documents, and if wanted all characters of the corpus, sorted. Raises
    UserError if there are none."""
    chars, sizes, size = set(), [], 0
    for piece in corpus.pieces():
        if want_chars:
            chars.update(piece.text)
        size += len(piece.text)
        if piece.ends:
            sizes.append(size)
            size = 0
            if len(sizes) == enough and not want_chars:
                break
    if not sizes:
        others = f" and {len(corpus) - 1} other files" if len(corpus) > 1 else ""
        raise UserError(f"there is no text in {corpus.files[0]}{others}; give another --input")
    return sizes[:enough], "".join(sorted(chars))


def hash_to_unit(number: int) -> float:
    """A hash of a number, from 0 to 1: splitmix64 (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    x = (number + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) / 2**64


def choose_validation(sizes: list[int], val_fraction: float, enough: int) -> tuple[Callable, int]:
    """Whether a document is val, as a function of its number; and the character at which the text is cut in
    two, or 0.

    Many documents: each is val at random. Fewer: documents at random up to the wanted size, unless they are
    too large; else the document nearest to that size. If that is under half of it, over four times as much,
    or over a third of the text, such as a single document: the end of the text.
    """
    if len(sizes) == enough:
        return lambda number: hash_to_unit(number) < val_fraction, 0
    total = sum(sizes)
    wanted = total * val_fraction
    chosen, size = set(), 0
    for number in sorted(range(len(sizes)), key=hash_to_unit):
        if size < wanted and size + sizes[number] <= min(1.5 * wanted, total - 1):
            chosen.add(number)
            size += sizes[number]
    nearest = min(range(len(sizes)), key=lambda number: abs(sizes[number] - wanted))
    if size < wanted / 2 <= sizes[nearest] <= min(4 * wanted, total / 3):
        chosen, size = {nearest}, sizes[nearest]
    if size >= wanted / 2:
        return chosen.__contains__, 0
    ends = list(accumulate(sizes))
    position = int(total * (1 - val_fraction))
    position -= position in ends  # so that there is a document to cut
    cut = bisect(ends, position)
    return lambda number: number > cut, position


def split_at(pieces: Iterable[Piece], position: int) -> Iterator[Piece]:
    """The pieces, with the document that has the character `position` cut in two before it."""
    for piece in pieces:
        if 0 < position <= len(piece.text):
            yield piece._replace(text=piece.text[:position], ends=True)
            piece, position = piece._replace(text=piece.text[position:]), 0
        yield piece
        position -= len(piece.text)


def known_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer of that name; None for char and bpe:SIZE, which the text determines. Raises UserError."""
    kind, _, size = name.partition(":")
    if kind == "bpe" and (not re.fullmatch("[0-9]{3,7}", size) or int(size) < 258):
        raise UserError(f"--tokenizer {name} needs a size from 258 to 9999999; write bpe:4096")
    return None if kind == "bpe" or name == "char" else named_tokenizer(name, KINDS)


def make_tokenizer(name: str, chars: str, documents: int, train: Iterable[str]) -> Tokenizer:
    """char, bpe:SIZE, or a known one; a byte-pair encoding is trained on `train`. Raises UserError."""
    tokenizer = known_tokenizer(name)
    if name == "char":
        tokenizer = CharTokenizer(chars, ends=documents > 1)
    elif tokenizer is None:
        size = int(name.removeprefix("bpe:"))
        tokenizer = train_bpe(train, size)
        if tokenizer.vocab_size < size:
            count = f"only {tokenizer.vocab_size:,} tokens, as the text is too short for {size:,}"
            print(f"note: the tokenizer has {count}")
    if tokenizer.vocab_size > 1 << 16:
        print(f"note: a vocabulary of {tokenizer.vocab_size:,} takes 4 bytes per token on disk (uint32)")
    if tokenizer.end_of_text is None and documents > 1:
        print(f"note: --tokenizer {name} has no end-of-text token; documents follow each other without one")
    return tokenizer


def make_dataset(args: argparse.Namespace, corpus: Corpus) -> None:
    """Write the dataset of parse_options, and print the next commands. Raises UserError and MachineError."""
    enough = math.ceil(10 / args.val_fraction)
    with show_wait("reading the text,", lambda: f"{corpus.done():.0%}"):
        sizes, chars = scan(corpus, enough, want_chars=args.tokenizer == "char")
    is_val, position = choose_validation(sizes, args.val_fraction, enough)

    def sample() -> Iterator[str]:
        """The text of train, up to BPE_SAMPLE characters."""
        document, left = 0, BPE_SAMPLE
        for piece in split_at(corpus.pieces(), position):
            if not is_val(document) and left > 0:
                yield piece.text[:left]
                left -= len(piece.text)
            document += piece.ends

    tokenizer = make_tokenizer(args.tokenizer, chars, len(sizes), sample())
    source = ", ".join(map(str, corpus.files[:20]))
    pieces, document = split_at(corpus.pieces(), position), 0
    with (
        writer.write_splits(args.output, tokenizer, source=source) as add,
        writer.token_progress(corpus.done, delay=2) as advance,
    ):
        for piece, ids in writer.encode_in_order(pieces, tokenizer, max(1, args.workers)):
            add("val" if is_val(document) else "train", ids, writer.text_bytes(piece.text))
            advance(len(ids))
            document += piece.ends
    if isinstance(tokenizer, BPETokenizer):  # for other programs; ours read meta.json
        write_text(args.output / "tokenizer.json", tokenizer_json(tokenizer))
    text = read_meta(args.output)["bytes"]
    fraction = text["val"] / max(1, sum(text.values()))
    if fraction > max(0.2, 1.5 * args.val_fraction):
        print(
            f"note: val is {fraction:.0%} of the text, as documents are not split; for more to train on, "
            f"give more or shorter documents, or try --val_fraction={min(0.05, args.val_fraction / 2):g}"
        )
    name = args.name if args.output == DATA / str(args.name) else os.path.relpath(args.output)
    print("next:", *next_commands(args.output, name, tokenizer), sep="\n  ")


def next_commands(folder: Path, name: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """The commands to train on the dataset and to sample."""
    out_dir = f"out-{Path(name).name}"
    train = command("train.py", dataset=name, minutes=MINUTES)  # which writes to the same folder
    if tokenizer.describe()["kind"] == "gpt2":
        out_dir += "-gpt2"
        longest = 1 << max(0, (min(read_meta(folder)["tokens"].values()) - 1).bit_length() - 1)
        flags = {"dataset": name, "out_dir": out_dir, "block_size": min(1024, longest)}
        train = command("train.py", "config/finetune_own_text.py", **flags)
    prompt = {}
    if tokenizer.end_of_text is not None:
        prompt["start"] = ""  # a new document
    elif "\n" not in tokenizer.chars:
        prompt["start"] = tokenizer.chars[-1]
    return train, command("sample.py", out_dir=out_dir, **prompt)


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with a dataset's name, tokenizer and val added to the parser. Raises UserError."""
    add = parser.add_argument
    add("--name", metavar="NAME", help="name of the dataset, which is written to data/NAME")
    about_tokenizer = (
        "char, byte, gpt2, bpe:4096 (BPE with 4096 tokens, learned from the text), or the name of "
    )
    about_tokenizer += "a dataset whose tokenizer to use (default: char)"
    add("--tokenizer", type=os.path.expanduser, default="char", help=about_tokenizer)
    val_help = "fraction of the documents for validation; of a single one, its end (default: 0.1)"
    add("--val_fraction", type=float, default=0.1, metavar="F", help=val_help)
    args = parser.parse_args()
    if not args.input:
        parser.error("--input is missing")
    if args.output == Path(sys.argv[0]).resolve().parent:
        if not args.name:
            parser.error("--name is missing")
        if not re.fullmatch(r"[\w.-]+", args.name) or args.name.startswith("."):
            raise UserError(f"--name {args.name!r} is not a valid folder name; use letters, digits, _ and -")
        args.output = DATA / args.name
    elif args.name and args.output != DATA / args.name:
        raise UserError(f"--name {args.name} has no effect with --output {args.output}; give one of them")
    if (args.output / "prepare.py").exists():
        raise UserError(f"{args.output} is the folder of another dataset; choose another --name")
    if not 0 < args.val_fraction < 1:
        advice = "give one above 0 and below 1"
        raise UserError(f"--val_fraction {args.val_fraction} leaves a split empty; {advice}")
    return args


@contextmanager
def new_folder(args: argparse.Namespace) -> Iterator[None]:
    """Claim the folder of the new dataset during the block. Raises UserError if it already has one."""
    try:
        with writer.claim_folder(args.output, args.overwrite, "choose another --name or --output"):
            yield
    finally:
        with suppress(OSError):  # removes an empty folder
            args.output.rmdir()


@contextmanager
def copy_pipes(inputs: list[str], folder: Path) -> Iterator[list[str]]:
    """The inputs, with files in place of stdin (-) and other pipes, which cannot be read twice."""
    if "-" in inputs and sys.stdin is None:
        raise UserError("--input - reads standard input, which is closed; pipe text into it")
    pipes = [word for word in inputs if word == "-" or Path(word).is_fifo()]
    copies = {word: folder / f"{TEMPORARY}pipe{number}" for number, word in enumerate(pipes)}
    try:
        with writer.report_full_disk(folder, writer.UNCHANGED):
            for word, path in copies.items():
                with (
                    sys.stdin.buffer if word == "-" else open(word, "rb") as pipe,
                    open(path, "wb") as copy,
                    show_wait(f"reading {word},", lambda copy=copy: f"{copy.tell() >> 20} MB"),
                ):
                    shutil.copyfileobj(pipe, copy, 1 << 20)
        yield [str(copies.get(word, word)) for word in inputs]
    finally:
        for path in copies.values():
            path.unlink(missing_ok=True)


@cli_errors(CLOSE_OTHERS)
def main(description: str) -> None:
    """The command of data/text/prepare.py."""
    args = parse_options(text_parser(sys.argv[0], description, "files, folders or globs; - is stdin"))
    known_tokenizer(args.tokenizer)  # a mistake in it is reported before the text is read
    with new_folder(args), copy_pipes(args.input, args.output) as inputs:
        make_dataset(args, open_corpus(args, inputs))
