"""Datasets of the Hugging Face hub, streamed, or local files of any size, as shards."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrogpt.data.meta import DATA
from distrogpt.data.preparation.documents import Corpus, Piece, row_pieces, skip_blank
from distrogpt.data.preparation.shards import Part, ShardSettings, write_shards
from distrogpt.data.preparation.sources import named_tokenizer, open_corpus, strip_patterns, text_parser
from distrogpt.errors import CLOSE_OTHERS, MachineError, UserError, cli_errors
from distrogpt.progress import show_wait


class HubText:
    """The documents in a column of a dataset of the hub, or of a folder of files that `datasets` reads."""

    def __init__(self, name: str, config: str | None, split: str, rows: Corpus) -> None:
        """`rows` says how to read them. Raises UserError if there is no such dataset or no connection."""
        with show_wait("loading the datasets package"):
            from datasets import load_dataset

        self.reading, field = rows, rows.field
        self.settings = {"dataset": name, "config": config, "split": split, "field": field}
        if rows.strip:
            self.settings["strip"] = [pattern.pattern for pattern in rows.strip]
        try:
            with show_wait(f"looking for {name}"):
                self.rows = load_dataset(name, config, split=split, streaming=True)
        except Exception as error:  # the hub's client raises many kinds
            url, reason = f"https://huggingface.co/datasets/{name}", " ".join(str(error).split())[:200]
            advice = f"check the name, --config and --split, or fetch {url} and give --input PATH"
            reason = f"{type(error).__name__}: {reason}"
            raise UserError(f"dataset {name} cannot be read ({reason}); {advice}") from None
        if self.rows.column_names and field in self.rows.column_names:
            self.rows = self.rows.select_columns([field])
        known = (self.rows.info.splits or {}).get(split)
        self.documents, self.documents_read = known.num_examples if known else 0, 0
        self.size = known.num_bytes if known else None  # bytes of the text or its files
        if os.path.isdir(name):
            self.size = sum(path.stat().st_size for path in Path(name).rglob("*"))

    def __len__(self) -> int:
        return self.rows.num_shards

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[Piece]:
        """As Corpus.pieces. Raises UserError, and MachineError if the connection is lost."""
        for number in range(first, len(self) if end is None else end):
            where = f"{self.settings['dataset']}, file {number}"
            self.documents_read = int(self.documents * number / len(self))
            for row in self.rows_of(number, where):
                self.documents_read += 1
                for piece in skip_blank(row_pieces(row, where, self.reading)):
                    yield piece._replace(file=number)

    def rows_of(self, number: int, where: str) -> Iterator[dict[str, Any]]:
        """The rows of a file. Raises MachineError."""
        try:
            yield from self.rows.shard(num_shards=len(self), index=number)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:150]}"
            raise MachineError(f"{where} cannot be read ({reason}); the same command resumes") from None

    def done(self) -> float:
        """The fraction of the documents that has been read; 0 if their number is not known."""
        return min(1.0, self.documents_read / self.documents) if self.documents else 0.0

    def describe(self) -> dict[str, Any]:
        return self.settings


@cli_errors(CLOSE_OTHERS)
def prepare_shards(about: str, dataset: str | None = None, config: str | None = None) -> None:
    """The command of a prepare.py that writes shards; without `dataset`, its options name the dataset."""
    parser = text_parser(sys.argv[0], about, "local files, folders or globs, instead of the hub")
    add = parser.add_argument
    if dataset is None:
        about_dataset = "dataset of the Hugging Face hub, such as Salesforce/wikitext, or a folder"
        add("--dataset", type=os.path.expanduser, metavar="NAME", help=about_dataset)
    parser.set_defaults(dataset=dataset)
    about_config = f"configuration of the dataset (default: {config or 'its default one'})"
    add("--config", default=config, metavar="NAME", help=about_config)
    add("--split", default="train", metavar="NAME", help="split of the dataset to read (default: train)")
    about_tokenizer = "gpt2, byte, or the name of a dataset whose tokenizer to use (default: gpt2)"
    add("--tokenizer", type=os.path.expanduser, default="gpt2", help=about_tokenizer)
    stop_help = "stop after N tokens, such as 1e9 (default: all)"
    add("--max_tokens", type=whole_number, metavar="N", help=stop_help)
    add(
        "--shard_tokens", type=whole_number, default=10**8, metavar="N", help="tokens per file (default: 1e8)"
    )
    val_help = "tokens of the val split (default: one file; a tenth of a small text)"
    add("--val_tokens", type=whole_number, metavar="N", help=val_help)
    shard_help = "prepare only part I of N, such as 3/16: one part per machine"
    add("--shard", type=part, default=Part(), metavar="I/N", help=shard_help)
    args = parser.parse_args()
    refuse_unused(parser, args, fixed=dataset is not None)
    if not args.input and not args.dataset:
        parser.error("neither --dataset nor --input is given")
    tokenizer = named_tokenizer(args.tokenizer)
    if args.input:
        text: Corpus | HubText = open_corpus(args, args.input)
        source = ", ".join(args.input)
    else:
        rows = Corpus([], args.field, strip=strip_patterns(args))
        text = HubText(args.dataset, args.config, args.split, rows)
        source = " ".join(filter(None, (args.dataset, args.config, args.split)))
    folder = args.output
    if dataset is None and folder == Path(sys.argv[0]).resolve().parent:
        words = (args.dataset or Path(args.input[0]).stem, args.config or "")
        name = re.sub(r"\W+", "_", "_".join(words)).strip("_").lower()
        folder = DATA / name
        if not name or (folder / "prepare.py").exists():
            raise UserError("no folder name can be made from the input; choose one with --output data/NAME")
    limits = (args.shard_tokens, args.max_tokens, args.val_tokens)
    settings = ShardSettings(*limits, max(1, args.workers), args.shard, args.overwrite, source)
    try:
        write_shards(folder, text, tokenizer, settings)
    except KeyboardInterrupt:
        print(f"\nstopped; run the same command again to resume {folder}", file=sys.stderr)
        raise


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, fixed: bool) -> None:
    """Raises UserError for options of the hub with --input, and for options of files without it."""
    names = (
        ["config", "split", *([] if fixed else ["dataset"])]
        if args.input
        else ["format", "encoding", "errors"]
    )
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            why = "with --input; leave one of them out" if args.input else "without --input; leave it out"
            raise UserError(f"--{name} has no effect {why}")


def whole_number(text: str) -> int:
    """A positive whole number, also written 1e9. Raises ValueError."""
    number = float(text)
    if number < 1 or not number.is_integer():
        raise ValueError(text)
    return int(number)


def part(text: str) -> Part:
    """I/N. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9]{1,5}/[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a part; write I/N, such as 3/16")
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; give 1/{of} to {of}/{of}")
    return Part(number, of)
