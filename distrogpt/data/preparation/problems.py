"""Datasets of generated lines, a problem and its answer each: what is held out, and how they are written."""

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

FEW = 100_000  # problems: so many are written where more are possible


def line_parser(script: str, about: str) -> argparse.ArgumentParser:
    """The options that the prepare.py of each line task has."""
    parser = argument_parser(script, about)
    whole = f"problems to draw; all, or {FEW:,} of more"
    parser.add_argument("--lines", type=int, metavar="N", help=whole)
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, metavar="F", help="held out, by default 0.1"
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="of their order, by default 1337")
    return parser


def at_least(least: int, most: int, **options: int) -> None:
    """Raises UserError where an option is not within these bounds."""
    for name, value in options.items():
        if not least <= value <= most:
            raise UserError(f"--{name} {value} is out of range; give {least:,} to {most:,}")


def write_problems(args: argparse.Namespace, total: int, lines_of: Callable[[int], list[str]]) -> None:
    """Write train and val from the problems 0 to total - 1, of which `lines_of` makes lines.

    --lines of them are drawn, each at most once. Of these, --val_fraction are held out: none of their lines
    stands in train. In both splits the lines are shuffled, so that those of a problem are not neighbours.
    Raises UserError.
    """
    count = min(total, FEW) if args.lines is None else args.lines
    at_least(2, total, lines=count)
    at_least(0, 2**63 - 1, seed=args.seed)
    held_out = round(count * args.val_fraction) if 0 < args.val_fraction < 1 else 0
    if not 0 < held_out < count:
        raise UserError(
            f"--val_fraction {args.val_fraction} of {count:,} leaves nothing for train or val; give 0.1"
        )
    keys = np.random.SeedSequence(args.seed).generate_state(18, np.uint64)
    drawn = feistel_permutation(np.arange(count), total, keys[:6]).tolist()
    splits = {"val": drawn[:held_out], "train": drawn[held_out:]}
    lines = {
        split: [line for number in numbers for line in lines_of(number)] for split, numbers in splits.items()
    }
    tokenizer = CharTokenizer("".join(sorted(set("\n".join(lines["val"] + lines["train"]) + "\n"))))
    words = (word for word in sys.argv[1:] if word != "--overwrite")
    command = " ".join([Path(sys.argv[0]).parent.name, *words])
    with write_dataset(args.output, tokenizer, args.overwrite, source=f"generated: {command}") as add:
        for split, order in (("train", keys[6:12]), ("val", keys[12:])):
            of_split = lines[split]
            places = feistel_permutation(np.arange(len(of_split)), len(of_split), order)
            text = "".join(of_split[place] + "\n" for place in places.tolist())
            add(split, tokenizer.encode(text), len(text))
