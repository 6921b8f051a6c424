"""Datasets of generated lines, each a problem and its answer."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distrogpt.data.preparation.sources import argument_parser
from distrogpt.data.preparation.writer import write_dataset
from distrogpt.data.sampling import feistel_permutation
from distrogpt.data.tokenizer import CharTokenizer
from distrogpt.errors import UserError
from distrogpt.progress import show_wait

MAX_LINES = 100_000  # problems, by default at most


def line_parser(script: str, about: str) -> argparse.ArgumentParser:
    """The options of the prepare.py of each line task."""
    parser = argument_parser(script, about)
    add = parser.add_argument
    lines_help = f"number of problems, drawn at random (default: all, at most {MAX_LINES:,})"
    val_help = "fraction of the problems held out for validation (default: 0.1)"
    add("--lines", type=int, metavar="N", help=lines_help)
    add("--val_fraction", type=float, default=0.1, metavar="F", help=val_help)
    add("--seed", type=int, default=1337, metavar="N", help="random seed of their order (default: 1337)")
    return parser


def check_range(least: int, most: int, **options: int) -> None:
    """Raises UserError if an option is out of range."""
    for name, value in options.items():
        if not least <= value <= most:
            raise UserError(f"--{name} {value} is out of range; give {least:,} to {most:,}")


def write_problems(args: argparse.Namespace, total: int, lines_of: Callable[[int], list[str]]) -> None:
    """Write train and val from problems 0..total-1, whose lines are `lines_of(number)`; a held-out one has
    no line in train. Lines are shuffled, also those of one problem. Raises UserError."""
    count = min(total, MAX_LINES) if args.lines is None else args.lines
    check_range(2, total, lines=count)
    check_range(0, 2**63 - 1, seed=args.seed)
    held_out = round(count * args.val_fraction) if 0 < args.val_fraction < 1 else 0
    if not 0 < held_out < count:
        fault = f"--val_fraction {args.val_fraction} of {count:,} leaves a split empty"
        raise UserError(f"{fault}; change it or --lines")
    keys = np.random.SeedSequence(args.seed).generate_state(18, np.uint64)
    with show_wait("making the lines"):
        drawn = feistel_permutation(np.arange(count), total, keys[:6]).tolist()
        texts = {
            "train": shuffled_lines(drawn[held_out:], keys[6:12], lines_of),
            "val": shuffled_lines(drawn[:held_out], keys[12:], lines_of),
        }
        tokenizer = CharTokenizer("".join(sorted(set(texts["train"] + texts["val"]))))
    words = (word for word in sys.argv[1:] if word != "--overwrite")
    command = " ".join([Path(sys.argv[0]).parent.name, *words])
    with write_dataset(args.output, tokenizer, args.overwrite, source=f"generated: {command}") as add:
        for split, text in texts.items():
            with show_wait("writing the lines"):
                add(split, tokenizer.encode(text), len(text))


def shuffled_lines(numbers: list[int], keys: np.ndarray, lines_of: Callable[[int], list[str]]) -> str:
    """The lines of the problems with these numbers, shuffled by the keys."""
    lines = [line + "\n" for number in numbers for line in lines_of(number)]
    positions = feistel_permutation(np.arange(len(lines)), len(lines), keys)
    return "".join(lines[position] for position in positions.tolist())
