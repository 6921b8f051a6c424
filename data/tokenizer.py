"""Text to token ids and back: characters, or GPT-2's byte-pair encoding.

A tokenizer has vocab_size, encode(text) -> ids, decode(ids) -> text, and describe() -> what meta.json and
checkpoints hold of it, and `from_description` rebuilds it from.
"""

from collections.abc import Iterable
from hashlib import sha1
from typing import Any

import numpy as np

from errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_CACHED = tuple(
    sha1(f"{GPT2_FILES}{name}".encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")
)


class CharTokenizer:
    """One id for each character of a fixed list, in its order."""

    def __init__(self, chars: str) -> None:
        self.chars = chars
        self.vocab_size = len(chars)
        self.codes = code_points(chars)  # (V,)
        self.sorter = np.argsort(self.codes)

    def encode(self, text: str) -> np.ndarray:
        """ids (N,). Raises UserError that names the first character outside of the vocabulary."""
        codes = code_points(text)
        ranks = np.searchsorted(self.codes, codes, sorter=self.sorter).clip(max=self.vocab_size - 1)
        ids = self.sorter[ranks]
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if len(unknown):
            char, place = text[unknown[0]], unknown[0]
            raise UserError(
                f"character {char!r} at position {place} is not in the vocabulary of {self.vocab_size}; "
                "leave it out, or replace it"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, 50,257 tokens, through tiktoken."""

    vocab_size = 50257

    def __init__(self) -> None:
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever its downloader meets: no network, a proxy, a broken copy
            raise UserError(
                f"no download of GPT-2's vocabulary ({type(error).__name__}); fetch vocab.bpe, encoder.json"
                f" of {GPT2_FILES} elsewhere, name them {' and '.join(GPT2_CACHED)}, and set "
                "TIKTOKEN_CACHE_DIR to their folder"
            ) from None

    def encode(self, text: str) -> np.ndarray:
        """ids (N,); <|endoftext|> in a text is that one token."""
        return np.array(self.bpe.encode(text, allowed_special={END_OF_TEXT}), dtype=np.int64)

    def encode_document(self, text: str) -> list[int]:
        """ids of a text that is read as nothing but text, with the token that ends a document after them."""
        return [*self.bpe.encode_ordinary(text), self.bpe.eot_token]

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode(list(ids))

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


Tokenizer = CharTokenizer | GPT2Tokenizer


def code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character, (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def from_description(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described. Raises UserError."""
    kind, chars = description.get("kind"), description.get("chars")
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "char" and isinstance(chars, str) and chars and len(set(chars)) == len(chars):
        return CharTokenizer(chars)
    shown = kind[:60] if isinstance(kind, str) else type(kind).__name__  # all of it could fill a disk
    raise UserError(f"tokenizer {shown} is not known, or not whole; run the dataset's prepare.py again")
