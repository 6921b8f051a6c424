"""Tiny Shakespeare in GPT-2's byte-pair encoding: 301,966 train and 36,059 val tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.sources import prepare_shakespeare
from distrogpt.data.tokenizer import GPT2Tokenizer

if __name__ == "__main__":
    prepare_shakespeare(__doc__, lambda text: GPT2Tokenizer())
