"""Tiny Shakespeare, 1.1 MB of plays, as characters: 1,003,854 train and 111,540 val tokens, vocabulary 65."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.sources import prepare_shakespeare
from distrogpt.data.tokenizer import CharTokenizer

if __name__ == "__main__":
    prepare_shakespeare(__doc__, lambda text: CharTokenizer("".join(sorted(set(text)))))
