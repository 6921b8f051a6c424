"""Text to token ids and back: characters, bytes, GPT-2's byte-pair encoding, or one's own.

`describe` says what meta.json and checkpoints hold of a tokenizer; `from_description` rebuilds it from that.
"""

import copy
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha1
from itertools import pairwise
from typing import Any

import numpy as np

from distrogpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_CACHED = tuple(
    sha1(f"{GPT2_FILES}{name}".encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")
)
# GPT-2's words: an ending as in 's, or letters, digits or signs with a space before them, or white space
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
BYTE_ORDER = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
BYTE_CHARS = {b: chr(b) for b in BYTE_ORDER}  # a visible character for each byte, as in GPT-2's files
BYTE_CHARS |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTE_CHARS)}


class Tokenizer:
    """vocab_size ids; end_of_text is the one that ends a document, None where there is none."""

    vocab_size: int
    end_of_text: int | None

    def encode_text(self, text: str) -> np.ndarray:
        """ids (N,) of a text that is read as nothing but text."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 that the ids stand for, which may begin or end within a character."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """encode_text of each."""
        return [self.encode_text(text) for text in texts]

    def for_thread(self) -> "Tokenizer":
        """The same tokenizer for another thread to use at the same time."""
        return self

    def encode(self, text: str) -> np.ndarray:
        """ids (N,); <|endoftext|> in a text is the token that ends a document, where there is one."""
        parts = text.split(END_OF_TEXT) if self.end_of_text is not None else [text]
        ids = [self.encode_text(parts[0])]
        for part in parts[1:]:
            ids += [np.array([self.end_of_text]), self.encode_text(part)]
        return np.concatenate(ids).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One id for each character of a fixed list, in its order; the last one ends documents, if any does."""

    def __init__(self, chars: str, ends: bool = False) -> None:
        self.chars = chars
        self.end_of_text = len(chars) if ends else None
        self.named = [*chars, END_OF_TEXT]
        self.vocab_size = len(chars) + ends
        codes = code_points(chars)  # (V,)
        self.ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # by code point; the last is unknown
        self.ids[codes] = np.arange(len(chars))
        by_ascii = self.ids[np.arange(128).clip(max=len(self.ids) - 1)]
        self.of_ascii = by_ascii.astype(np.uint8).tobytes() + bytes(128) if by_ascii.max() < 255 else None

    def encode_text(self, text: str) -> np.ndarray:
        """ids (N,). Raises UserError that names the first character outside of the vocabulary."""
        if self.of_ascii and text.isascii():  # twice as fast
            ids = np.frombuffer(text.encode().translate(self.of_ascii), dtype=np.uint8)
            unknown = ids == 255
        else:
            ids = self.ids.take(code_points(text), mode="clip")
            unknown = ids < 0
        if unknown.any():
            place = int(np.argmax(unknown))
            raise UserError(
                f"character {text[place]!r} at position {place} is not in the vocabulary of "
                f"{self.vocab_size}; leave it out, or replace it"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.named[i] for i in ids).encode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars} | ({"ends": True} if self.end_of_text else {})


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8, and one that ends documents."""

    vocab_size, end_of_text = 257, 256

    def encode_text(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken computes, `bpe`."""

    bpe: Any

    def encode_text(self, text: str) -> np.ndarray:
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # halves of characters, which UTF-8 cannot write
            return self.bpe.encode_to_numpy(text.encode("utf-8", "replace").decode(), disallowed_special=())

    def encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """encode_text of each; in one call, as long as they have no <|endoftext|> of their own, since between
        calls threads wait for each other."""
        joined = END_OF_TEXT.join(texts)
        if joined.count(END_OF_TEXT) >= len(texts):
            return super().encode_texts(texts)
        ids = self.bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        ends = [*np.flatnonzero(ids == self.end_of_text).tolist(), len(ids)]
        return [ids[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(list(ids))

    def for_thread(self) -> "TiktokenTokenizer":
        """One with an Encoding of its own: the first thread that uses one is a third faster than others,
        which wait for the scratch memory of its regular expressions."""
        import tiktoken

        made, bpe = copy.copy(self), self.bpe
        parts = {"mergeable_ranks": bpe._mergeable_ranks, "special_tokens": bpe._special_tokens}
        made.bpe = tiktoken.Encoding(bpe.name, pat_str=bpe._pat_str, **parts)
        return made


class BPETokenizer(TiktokenTokenizer):
    """A byte-pair encoding of bytes (Sennrich et al., arXiv 1508.07909), merged by tiktoken.

    Made from merges, pairs of tokens in the order of their joining, in the letters of GPT-2's vocab.bpe:
    ids are the 256 bytes, then what each merge makes, then <|endoftext|>.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        """Raises ValueError where a merge joins what is not there yet, or makes what is there already."""
        import tiktoken

        tokens = {BYTE_CHARS[b]: b for b in range(256)}
        for left, right in merges:
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f"merge {len(tokens) - 256} does not join two tokens to a new one")
            tokens[left + right] = len(tokens)
        self.merges = list(merges)
        self.end_of_text = len(tokens)
        self.vocab_size = len(tokens) + 1
        byte_of = {char: b for b, char in BYTE_CHARS.items()}
        ranks = {bytes(byte_of[char] for char in token): number for token, number in tokens.items()}
        special = {END_OF_TEXT: self.end_of_text}
        self.bpe = tiktoken.Encoding("own", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)

    def describe(self) -> dict[str, Any]:
        return {"kind": "bpe", "merges": "\n".join(" ".join(pair) for pair in self.merges)}


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding, 50,257 tokens, through tiktoken."""

    vocab_size, end_of_text = 50257, 50256

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

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character, (N,)."""
    if text.isascii():  # a quarter of the memory
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: a library that computes for minutes would not see it otherwise."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-pair encoding of vocab_size ids or, where the texts do not bear as many, fewer."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    bpe = HuggingFaceTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [BYTE_CHARS[b] for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    with interruptible():
        bpe.train_from_iterator(texts, trainer)
    known, merges = set(alphabet), []
    for left, right in json.loads(bpe.to_str())["model"]["merges"]:
        if left + right not in known:  # a token that two merges make is made by the first
            known.add(left + right)
            merges.append((left, right))
    return BPETokenizer(merges)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json, which Hugging Face's libraries read as the same tokenizer.

    A character that a list of characters lacks is an error there, too. Raises UserError where JSON cannot
    write the characters.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    if isinstance(tokenizer, CharTokenizer):
        try:
            tokenizer.chars.encode()
        except UnicodeEncodeError:
            raise UserError("the vocabulary has halves of characters, which no file can name") from None
        made = HuggingFaceTokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    else:
        made = HuggingFaceTokenizer(models.BPE(*bpe_vocabulary(tokenizer)))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    if tokenizer.end_of_text is not None:
        made.add_special_tokens([END_OF_TEXT])
    return made.to_str()


def bpe_vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of each token in the letters of GPT-2's files, without <|endoftext|>, and the merges in their
    order: none where ids are bytes."""
    if isinstance(tokenizer, GPT2Tokenizer):
        ranks = tokenizer.bpe._mergeable_ranks
        merges = [merged_pair(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        return {bytes_to_unicode(token): rank for token, rank in ranks.items()}, [
            (bytes_to_unicode(left), bytes_to_unicode(right)) for left, right in merges
        ]
    merges = tokenizer.merges if isinstance(tokenizer, BPETokenizer) else []
    tokens = [*(BYTE_CHARS[b] for b in range(256)), *map("".join, merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def bytes_to_unicode(token: bytes) -> str:
    """A visible character for each byte."""
    return "".join(BYTE_CHARS[byte] for byte in token)


def merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that are joined to this one: what the merges before it make of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def start_token(tokenizer: Tokenizer) -> int:
    """The id that an empty prompt stands for: a new line, or the end of the text before."""
    if tokenizer.end_of_text is None:
        return max(tokenizer.chars.find("\n"), 0)
    return tokenizer.end_of_text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, one at least: an empty one begins a document. Raises UserError."""
    return tokenizer.encode(prompt).tolist() or [start_token(tokenizer)]


def from_description(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described. Raises UserError."""
    kind, chars, merges = (description.get(key) for key in ("kind", "chars", "merges"))
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char" and isinstance(chars, str) and chars and len(set(chars)) == len(chars):
        return CharTokenizer(chars, bool(description.get("ends")))
    if kind == "bpe" and isinstance(merges, str):
        with suppress(ValueError):
            return BPETokenizer([tuple(line.split(" ")) for line in merges.splitlines()])
    shown = kind[:60] if isinstance(kind, str) else type(kind).__name__  # all of it could fill a disk
    raise UserError(f"tokenizer {shown} is not known, or not whole; run the dataset's prepare.py again")
