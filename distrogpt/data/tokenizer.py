"""Text to token ids and back: characters, bytes, GPT-2's byte-pair encoding, or one trained here."""

import copy
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha1
from itertools import pairwise
from typing import Any

import numpy as np

from distrogpt.errors import UserError, warn
from distrogpt.progress import show_wait

END_OF_TEXT = "<|endoftext|>"
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_CACHED = [sha1(f"{GPT2_FILES}{name}".encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]
# GPT-2's words: an ending such as 's; letters, digits or signs with a space before them; or white space
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # \s in GPT2_WORDS; not Python's
# A word of white space, all but the last before something else, that \s+(?!\S) could have no stack for
ENDLESS_SPACE = re.compile(rf"(?<!{WHITE}){WHITE}{{100000,}}(?={WHITE}(?!{WHITE}|\Z))")
SAFE_CUT = re.compile(r"(?s).*\S(?=[ \n\t])")  # up to the last white space that follows something else
SIGN_CUT = re.compile(r"(?s).*[^\W_](?=[^\w\s'])")  # up to the last sign that follows a letter or digit
LONGEST_WORD = 1000  # characters that train a byte-pair encoding as one: the time grows with the square
BYTE_CHARS = {b: chr(b) for b in range(256) if chr(b).isprintable() and not chr(b).isspace()}
BYTE_CHARS |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTE_CHARS)}
# BYTE_CHARS: a visible character for each byte, in the order of GPT-2's ids


class Tokenizer:
    """vocab_size ids; end_of_text is the one that ends a document, None if there is none.

    Subclasses have `encode_text(text)`, to which <|endoftext|> is plain text, `decode_bytes(ids)`, since ids
    may begin or end within a character, and `describe()`, from which `from_description` rebuilds them.
    """

    vocab_size: int
    end_of_text: int | None
    byte_order, merges = range(256), ()  # of BPE: the bytes of ids 0..255, and the merges of the others

    def for_thread(self) -> "Tokenizer":
        """The same tokenizer, for use in another thread."""
        return self

    def encode(self, text: str) -> np.ndarray:
        """ids (N,); <|endoftext|> becomes the token that ends a document, if there is one."""
        first, *others = text.split(END_OF_TEXT) if self.end_of_text is not None else [text]
        ids = [self.encode_text(first)]
        for part in others:
            ids += [np.array([self.end_of_text]), self.encode_text(part)]
        return np.concatenate(ids).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One id for each of `chars`, in their order; with `ends`, one more that ends documents."""

    def __init__(self, chars: str, ends: bool = False) -> None:
        self.chars = chars
        self.end_of_text = len(chars) if ends else None
        self.tokens = [*chars, END_OF_TEXT]
        self.vocab_size = len(chars) + ends
        codes = code_points(chars)  # (V,)
        self.ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # by code point; the last is unknown
        self.ids[codes] = np.arange(len(chars))

    def encode_text(self, text: str) -> np.ndarray:
        """ids (N,). Raises UserError that names the first character outside of the vocabulary."""
        ids = self.ids.take(code_points(text), mode="clip")
        unknown = ids < 0
        if unknown.any():
            position = int(np.argmax(unknown))
            unknown_char = f"character {text[position]!r} at position {position}"
            count = f"{len(self.chars)} characters"
            raise UserError(f"{unknown_char} is not in the vocabulary of {count}; replace it")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.tokens[i] for i in ids).encode("utf-8", "replace")

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


class IdTokenizer(Tokenizer):
    """Ids written as numbers, for a vocabulary without a tokenizer."""

    end_of_text, chars = None, ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_text(self, text: str) -> np.ndarray:
        """ids (N,) of numbers with spaces or commas between them. Raises UserError with the first word
        that is not an id."""
        ids = []
        for word in text.replace(",", " ").split():
            if not (word.isascii() and word.isdecimal() and len(word) < 20 and int(word) < self.vocab_size):
                advice = f"give numbers from 0 to {self.vocab_size - 1}, such as '0 1 2'"
                raise UserError(f"{word[:40]!r} is not a token id, and no tokenizer is known; {advice}")
            ids.append(int(word))
        return np.array(ids, np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(f" {i}" for i in ids).encode()

    def describe(self) -> None:
        return None


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding that tiktoken computes, `bpe`."""

    bpe: Any

    def encode_text(self, text: str) -> np.ndarray:
        cuts = [at for found in ENDLESS_SPACE.finditer(text) for at in found.span()]
        parts = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
        try:
            ids = [self.bpe.encode_to_numpy(part, disallowed_special=()) for part in parts]
        except UnicodeEncodeError:  # unpaired surrogates, which UTF-8 cannot write
            return self.encode_text(text.encode("utf-8", "replace").decode())
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(list(ids))

    def for_thread(self) -> "TiktokenTokenizer":
        """With its own Encoding: threads that share one wait for each other."""
        import tiktoken

        copied, bpe = copy.copy(self), self.bpe
        tables = {"mergeable_ranks": bpe._mergeable_ranks, "special_tokens": bpe._special_tokens}
        copied.bpe = tiktoken.Encoding(bpe.name, pat_str=bpe._pat_str, **tables)
        return copied


class BPETokenizer(TiktokenTokenizer):
    """A byte-pair encoding of bytes (Sennrich et al., arXiv 1508.07909): ids are the 256 bytes, tokens
    that merges make, and <|endoftext|>. Merges are pairs of tokens in the alphabet of GPT-2's vocab.bpe."""

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        """Raises ValueError if a merge joins unknown tokens or results in a known one."""
        import tiktoken

        tokens = {BYTE_CHARS[b]: b for b in range(256)}
        for left, right in merges:
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f"merge {len(tokens) - 256} does not join two known tokens into a new one")
            tokens[left + right] = len(tokens)
        self.merges, self.end_of_text, self.vocab_size = merges, len(tokens), len(tokens) + 1
        byte_of = {char: b for b, char in BYTE_CHARS.items()}
        ranks = {bytes(byte_of[char] for char in token): number for token, number in tokens.items()}
        special = {END_OF_TEXT: self.end_of_text}
        self.bpe = tiktoken.Encoding("own", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)

    def describe(self) -> dict[str, Any]:
        return {"kind": "bpe", "merges": "\n".join(" ".join(pair) for pair in self.merges)}


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding, 50,257 tokens."""

    vocab_size, end_of_text, byte_order = 50257, 50256, BYTE_CHARS

    def __init__(self) -> None:
        import tiktoken

        try:
            with show_wait("loading GPT-2's tokenizer"):
                self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # any error of its downloader: no network, a proxy, a damaged copy
            raise UserError(
                f"GPT-2's tokenizer cannot be downloaded ({type(error).__name__}); download vocab.bpe and "
                f"encoder.json from {GPT2_FILES}, rename them to {' and '.join(GPT2_CACHED)}, and set "
                f"TIKTOKEN_CACHE_DIR to their folder"
            ) from None

    @property
    def merges(self) -> list[tuple[str, str]]:
        from tiktoken.load import read_file_cached

        _, *lines = read_file_cached(f"{GPT2_FILES}vocab.bpe").decode().splitlines()
        return [tuple(line.split()) for line in lines]

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def code_points(text: str) -> np.ndarray:
    """The Unicode code point of each character, (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once, even in a library that computes for minutes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def trainable(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces in which a trainer counts the same words, except those over LONGEST_WORD."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = begin + LONGEST_WORD
            safe = SAFE_CUT.match(text, begin, end) or SIGN_CUT.match(text, begin, end)
            end = safe.end() if safe else end
            yield text[begin:end]
            begin = end


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-pair encoding of vocab_size ids, or fewer if the texts have too few pairs to merge."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    bpe = HuggingFaceTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [BYTE_CHARS[b] for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    with interruptible():
        bpe.train_from_iterator(trainable(texts), trainer)
    merges: dict[str, tuple[str, str]] = {}  # by the token that they make: if two do, the first
    for left, right in json.loads(bpe.to_str())["model"]["merges"]:
        merges.setdefault(left + right, (left, right))
    return BPETokenizer(list(merges.values()))


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json, which Hugging Face's libraries read as the same tokenizer. Raises
    UserError if JSON cannot write the characters."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    if isinstance(tokenizer, CharTokenizer):
        try:
            tokenizer.chars.encode()
        except UnicodeEncodeError:
            raise UserError("the vocabulary has surrogates, which JSON cannot store; remove them") from None
        exported = HuggingFaceTokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}))
        exported.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        exported.decoder = decoders.Fuse()
    else:
        alphabet = [BYTE_CHARS[b] for b in tokenizer.byte_order]
        tokens = [*alphabet, *map("".join, tokenizer.merges)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        exported = HuggingFaceTokenizer(models.BPE(vocabulary, list(tokenizer.merges)))
        exported.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        exported.decoder = decoders.ByteLevel()
    if tokenizer.end_of_text is not None:
        exported.add_special_tokens([END_OF_TEXT])
    return exported.to_str()


def described_by_json(text: str) -> dict[str, Any] | None:
    """The description of the tokenizer in a tokenizer.json, if tokenizer_json would write it so, or it is
    GPT-2's; else None. Raises errors of many types if the text is not a tokenizer.json."""
    exported = json.loads(text)
    model, before = exported["model"], exported["pre_tokenizer"] or {}
    tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token != END_OF_TEXT]
    ends = (END_OF_TEXT, len(tokens)) in [(t["content"], t["id"]) for t in exported["added_tokens"]]
    if exported["normalizer"] or [model["vocab"][token] for token in tokens] != [*range(len(tokens))]:
        return None
    if model["type"] == "WordLevel" and before.get("type") == "Split" and {*map(len, tokens)} == {1}:
        return {"kind": "char", "chars": "".join(tokens)} | ({"ends": True} if ends else {})
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merged, alphabet = ["".join(pair) for pair in pairs], [BYTE_CHARS[b] for b in range(256)]
    if model["type"] != "BPE" or before.get("type") != "ByteLevel" or not ends or tokens[256:] != merged:
        return None
    the = merged[6] if len(merged) == 50_000 else None  # in GPT-2's vocabulary, the seventh merge
    if tokens[:256] == [*BYTE_CHARS.values()] and the == BYTE_CHARS[32] + "the":
        return {"kind": "gpt2"}
    if tokens[:256] != alphabet or before["add_prefix_space"]:
        return None
    return {"kind": "bpe", "merges": "\n".join(map(" ".join, pairs))} if pairs else {"kind": "byte"}


def start_token(tokenizer: Tokenizer) -> int:
    """The id that replaces an empty prompt: end_of_text, or else a newline."""
    if tokenizer.end_of_text is None:
        return max(tokenizer.chars.find("\n"), 0)
    return tokenizer.end_of_text


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids, at least one. Raises UserError."""
    return tokenizer.encode(prompt).tolist() or [start_token(tokenizer)]


def keep_ends(
    prompts: Mapping[str, list[int]], block_size: int, note: Callable[[str], object] = warn
) -> list[list[int]]:
    """The last block_size ids of each prompt, by its name, as in nanoGPT; a note names those that are cut."""
    longer = [name for name, ids in prompts.items() if len(ids) > block_size]
    if longer[1:]:
        names = f"{longer[0]}, and {len(longer) - 1} more,"
        note(f"note     {names} are over {block_size} tokens long; the model reads the last {block_size}")
    elif longer:
        count = len(prompts[longer[0]])
        note(f"note     {longer[0]} has {count} tokens; the model reads the last {block_size}")
    return [ids[-block_size:] for ids in prompts.values()]


def tokenizer_of(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a dataset's meta; an IdTokenizer if it names none. Raises UserError."""
    return from_description(meta["tokenizer"]) if meta["tokenizer"] else IdTokenizer(meta["vocab_size"])


def from_description(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described. Raises UserError."""
    kind, chars, merges = (description.get(key) for key in ("kind", "chars", "merges"))
    if kind in ("gpt2", "byte"):
        return GPT2Tokenizer() if kind == "gpt2" else ByteTokenizer()
    if kind == "char" and isinstance(chars, str) and chars and len(set(chars)) == len(chars):
        return CharTokenizer(chars, bool(description.get("ends")))
    if kind == "bpe" and isinstance(merges, str):
        with suppress(ValueError):
            return BPETokenizer([tuple(line.split(" ")) for line in merges.splitlines()])
    shown = kind[:60] if isinstance(kind, str) else type(kind).__name__  # all of it could fill a disk
    raise UserError(f"tokenizer {shown} is unknown or incomplete; run the dataset's prepare.py again")
