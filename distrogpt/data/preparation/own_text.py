"""Documents of any kind to a dataset folder; data/text/prepare.py calls `main`."""

import argparse
import math
import os
import re
import shlex
import shutil
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

import numpy as np

from distrogpt.data.meta import DATA, read_meta
from distrogpt.data.preparation.documents import Corpus, Piece
from distrogpt.data.preparation.sources import named_tokenizer, open_corpus, text_parser
from distrogpt.data.preparation.writer import (
    claim_folder,
    encode_in_order,
    report_full_disk,
    text_bytes,
    token_progress,
    write_dataset,
)
from distrogpt.data.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    code_points,
    tokenizer_json,
    train_bpe,
)
from distrogpt.errors import UserError

BPE_SAMPLE = 50_000_000  # characters from which a tokenizer learns: its memory grows with different words
# below so many bytes of train: layers, heads, width, block, sequences and micro-steps of a step, epochs
SIZES = (
    (100_000, 2, 2, 64, 128, 4, 1, 8),
    (5_000_000, 4, 4, 128, 256, 4, 1, 4),
    (50_000_000, 6, 6, 384, 256, 16, 1, 3),
    (1_000_000_000, 8, 8, 512, 512, 16, 4, 2),
)  # and more is for train_gpt2_modern


class Scan(NamedTuple):
    """What a first reading finds: enough to choose what is val, and the vocabulary of characters."""

    sizes: list[int]  # characters of each document; of the first ones, where there are many
    chars: str  # all characters, sorted; "" where nobody asked


def scan(corpus: Corpus, enough: int, want_chars: bool) -> Scan:
    """Read the corpus, or so many documents where only their number matters. Raises UserError."""
    seen, known = np.zeros(0x110000, bool), b""
    sizes, size = [], 0
    for piece in corpus.pieces():
        if want_chars and piece.text.isascii():  # most often there is nothing new
            new = piece.text.encode().translate(None, delete=known)
            seen[list(new)] = True
            known += bytes(set(new))
        elif want_chars:
            seen[code_points(piece.text)] = True
        size += len(piece.text)
        if piece.ends:
            if len(sizes) < enough:
                sizes.append(size)
            size = 0
            if len(sizes) == enough and not want_chars:
                break
    if not sizes:
        others = " and the others" if len(corpus) > 1 else ""
        raise UserError(f"there is no text in {corpus.files[0]}{others}; give --input with some")
    return Scan(sizes, "".join(map(chr, np.flatnonzero(seen))))


def hash_to_unit(number: int) -> float:
    """A number from 0 to 1 that looks random: splitmix64 (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    x = (number + 1) * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return (x ^ x >> 31) / 2**64


def choose_validation(
    sizes: list[int], val_fraction: float, enough: int
) -> tuple[Callable[[int], bool], int]:
    """Whether a document is val, by its number; and how many characters into the text a document is cut in
    two, or 0.

    Of many documents, each by lot. Of fewer, by lot up to the wanted size, without those that are too large
    for it; or else the one nearest to it. Where this is under half of it, over four times as much, or over a
    third of the text, as where there is one document: the end of the text.
    """
    if len(sizes) == enough:
        return lambda number: hash_to_unit(number) < val_fraction, 0
    wanted, total = sum(sizes) * val_fraction, sum(sizes)
    chosen: set[int] = set()
    so_far = 0
    for number in sorted(range(len(sizes)), key=hash_to_unit):
        if so_far < wanted and so_far + sizes[number] <= min(1.5 * wanted, total - 1):
            chosen.add(number)
            so_far += sizes[number]
    nearest = min(range(len(sizes)), key=lambda number: abs(sizes[number] - wanted))
    if so_far < wanted / 2 <= sizes[nearest] <= min(4 * wanted, total / 3):
        chosen, so_far = {nearest}, sizes[nearest]
    if so_far >= wanted / 2:
        return chosen.__contains__, 0
    ends = list(accumulate(sizes))
    place = int(total * (1 - val_fraction))
    place -= place in ends  # so that there is a document to cut
    cut = bisect(ends, place)
    return lambda number: number > cut, place


def split_at(pieces: Iterable[Piece], place: int) -> Iterator[Piece]:
    """The pieces with the document in two that has the character `place` in it, which begins the second."""
    for piece in pieces:
        if 0 < place <= len(piece.text):
            yield piece._replace(text=piece.text[:place], ends=True)
            piece, place = piece._replace(text=piece.text[place:]), 0
        yield piece
        place -= len(piece.text)


def make_tokenizer(name: str, found: Scan, train: Iterable[str]) -> Tokenizer:
    """char, bpe:SIZE, or what named_tokenizer knows; `train` is what a byte-pair encoding learns from."""
    if (known := known_tokenizer(name)) is not None:
        return known
    if name == "char":
        return CharTokenizer(found.chars, ends=len(found.sizes) > 1)
    size = int(name.removeprefix("bpe:"))
    tokenizer = train_bpe(train, size)
    if tokenizer.vocab_size < size:
        print(f"note: the text has no more than {tokenizer.vocab_size:,} tokens to join")
    return tokenizer


def known_tokenizer(name: str) -> Tokenizer | None:
    """What named_tokenizer knows; None for char and bpe:SIZE, which the text makes. Raises UserError."""
    kind, _, size = name.partition(":")
    if kind == "bpe" and (not re.fullmatch("[0-9]{3,7}", size) or int(size) < 258):
        raise UserError(f"--tokenizer {name} has no size from 258 to 9999999; write bpe:4096")
    return None if kind == "bpe" or name == "char" else named_tokenizer(name)


def prepare(corpus: Corpus, folder: Path, tokenizer: str, val_fraction: float, workers: int) -> Tokenizer:
    """Write the dataset of a corpus; returns its tokenizer. Raises UserError, and MachineError where the disk
    takes no more."""
    enough = math.ceil(10 / val_fraction)
    found = scan(corpus, enough, want_chars=tokenizer == "char")
    is_val, place = choose_validation(found.sizes, val_fraction, enough)

    def sample() -> Iterator[str]:
        """Text of train, all or the first BPE_SAMPLE characters."""
        document, left = 0, BPE_SAMPLE
        for piece in split_at(corpus.pieces(), place):
            if not is_val(document) and left > 0:
                yield piece.text[:left]
                left -= len(piece.text)
            document += piece.ends

    made = make_tokenizer(tokenizer, found, sample())
    if made.vocab_size > 1 << 16:
        print(f"note: {made.vocab_size:,} ids are too many for 2 bytes; each takes 4 on disk (uint32)")
    if made.end_of_text is None and len(found.sizes) > 1:
        print(f"note: {tokenizer} has no token that ends documents; they follow each other without one")
    about = ", ".join(map(str, corpus.files[:20]))
    document, val = 0, is_val(0)
    with (
        write_dataset(folder, made, overwrite=True, source=about) as add,
        token_progress(corpus.done, 2) as advance,
    ):
        for piece, ids in encode_in_order(split_at(corpus.pieces(), place), made, workers):
            add("val" if val else "train", ids, text_bytes(piece.text))
            advance(len(ids))
            if piece.ends:
                document += 1
                val = is_val(document)
    if isinstance(made, BPETokenizer):  # for other programs; ours read meta.json
        (folder / "tokenizer.json").write_text(tokenizer_json(made), encoding="utf-8")
    return made


def validation_note(texts: dict[str, int], val_fraction: float) -> str:
    """What to tell where val is much more of the text than was asked for; "" elsewhere."""
    share = texts["val"] / max(1, sum(texts.values()))
    if share <= max(0.2, 1.5 * val_fraction):
        return ""
    return (
        f"note: val is {share:.0%} of the text, as documents are kept aside whole; more or shorter documents "
        "leave more to learn from, or try "
        f"--val_fraction={min(0.05, val_fraction / 2):g}"
    )


def next_commands(folder: Path, name: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """How to train on the dataset, with settings that fit its size, and to sample."""
    meta = read_meta(folder)
    tokens, text = meta["tokens"], meta["bytes"]["train"]
    longest = 1 << max(0, (min(tokens.values()) - 1).bit_length() - 1)  # a power of two, below both splits
    flags: dict[str, Any] = {"dataset": name, "out_dir": f"out-{Path(name).name}"}
    if isinstance(tokenizer, GPT2Tokenizer) and text < SIZES[-1][0]:
        config = "finetune_own_text"
        flags |= {"block_size": min(1024, longest)}
    elif text < SIZES[-1][0]:
        config = "train_own_text"
        *shape, block_size, batch_size, micro_steps, epochs = next(row[1:] for row in SIZES if text < row[0])
        flags |= dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True))
        flags |= {"block_size": min(block_size, longest), "batch_size": batch_size}
        flags |= {"gradient_accumulation_steps": micro_steps}
        steps = epochs * tokens["train"] / (flags["block_size"] * batch_size * micro_steps)
        flags |= {
            "max_iters": max(100, round(steps / 100) * 100),
            "eval_interval": max(50, round(steps / 100) * 10),
        }
    else:
        config = "train_gpt2_modern"
    usual = run_path(str(DATA.parent / "config" / f"{config}.py"))
    words = [f"--{key}={shlex.quote(str(value))}" for key, value in flags.items() if value != usual.get(key)]
    sample = f"python sample.py --out_dir={shlex.quote(flags['out_dir'])}"
    if tokenizer.end_of_text is not None:
        sample += " --start="  # a new document
    elif "\n" not in tokenizer.chars:
        sample += f" --start={shlex.quote(tokenizer.chars[-1])}"
    return " ".join([f"python train.py config/{config}.py", *words]), sample


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of the parser's script, with the options of a dataset's name, tokenizer and val, which
    are added here; checked. Raises UserError."""
    add = parser.add_argument
    add("--name", metavar="NAME", help="the dataset becomes data/NAME")
    add("--tokenizer", default="char", help="char (default), byte, gpt2, bpe:4096, or another dataset's name")
    add("--val_fraction", type=float, default=0.1, help="of documents, or the end of one (default: 0.1)")
    args = parser.parse_args()
    if not args.input:
        parser.error("--input is missing")
    if args.output == Path(sys.argv[0]).resolve().parent:
        if not args.name:
            parser.error("--name is missing")
        if not re.fullmatch(r"[\w.-]+", args.name) or args.name.startswith("."):
            raise UserError(f"--name {args.name!r} is no name of a folder; use letters, digits, _ and -")
        args.output = DATA / args.name
    if (args.output / "prepare.py").exists():
        raise UserError(f"{args.output} is a dataset of its own; choose another --name")
    if not 0 < args.val_fraction < 1:
        raise UserError(
            f"--val_fraction {args.val_fraction} leaves nothing for train or val, which every run measures "
            "itself on; give one above 0 and below 1, such as 0.1"
        )
    return args


@contextmanager
def new_folder(args: argparse.Namespace) -> Iterator[None]:
    """The folder of the new dataset is there in the block. Raises UserError where one is not to be lost."""
    claim_folder(args.output, args.overwrite)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder with nothing in it would look like a dataset
            args.output.rmdir()


@contextmanager
def copy_pipes(inputs: list[str], folder: Path) -> Iterator[list[str]]:
    """The inputs with files in place of stdin (-) and other pipes, which cannot be read twice."""
    if "-" in inputs and sys.stdin is None:
        raise UserError("--input - reads standard input, which is closed; give it some text")
    kept = {word: folder / f"pipe{n}" for n, word in enumerate(inputs) if word == "-" or Path(word).is_fifo()}
    try:
        with report_full_disk(folder, "nothing there was changed"):
            for word, path in kept.items():
                with sys.stdin.buffer if word == "-" else open(word, "rb") as pipe, open(path, "wb") as copy:
                    shutil.copyfileobj(pipe, copy, 1 << 20)
        yield [str(kept.get(word, word)) for word in inputs]
    finally:
        for path in kept.values():
            path.unlink(missing_ok=True)


def make_dataset(args: argparse.Namespace, corpus: Corpus) -> None:
    """Write the dataset that parse_options describes, and say which commands come next. Raises UserError."""
    tokenizer = prepare(corpus, args.output, args.tokenizer, args.val_fraction, max(1, args.workers))
    if note := validation_note(read_meta(args.output)["bytes"], args.val_fraction):
        print(note)
    name = args.name if args.output == DATA / str(args.name) else os.path.relpath(args.output)
    print("next:", *next_commands(args.output, name, tokenizer), sep="\n  ")


def main(description: str) -> None:
    """What data/text/prepare.py does."""
    args = parse_options(text_parser(sys.argv[0], description, "files, folders, globs; - is stdin"))
    with new_folder(args), copy_pipes(args.input, args.output) as inputs:
        make_dataset(args, open_corpus(args, inputs))
