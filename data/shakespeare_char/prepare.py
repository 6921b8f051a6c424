"""Tiny Shakespeare, 1.1 MB of plays, as characters: 1,003,854 train and 111,540 val tokens, vocabulary 65."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.source import argument_parser, tiny_shakespeare
from data.tokenizer import CharTokenizer
from data.tokens import write_dataset
from errors import one_line_errors


def main() -> None:
    args = argument_parser(sys.argv[0], __doc__, "a copy of the text, instead of the download").parse_args()
    text, about = tiny_shakespeare(args.input, args.output)
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    split = int(len(text) * 0.9)
    with write_dataset(args.output, tokenizer, **about) as add:
        add("train", tokenizer.encode(text[:split]))
        add("val", tokenizer.encode(text[split:]))


if __name__ == "__main__":
    with one_line_errors():
        main()
