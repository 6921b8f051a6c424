"""Tokenizers: any text survives, byte for byte; own byte-pair encodings are those of the library."""

import itertools
import json
import os
import pty
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, TINY, prepare_here, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

from distrogpt.data.preparation.writer import id_dtype
from distrogpt.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    from_description,
    tokenizer_json,
    train_bpe,
)
from distrogpt.errors import UserError
from sample import Sampler

WORDS = "The king's men have 12 naïve cafés; they'll go, won't they?\n\n\t日本語 😀 aaaa aaaaaaa abababab  x"


@pytest.fixture(scope="module")
def bpe(text: str) -> BPETokenizer:
    return train_bpe([text, WORDS * 50], 700)


@pytest.fixture(scope="module")
def library(bpe: BPETokenizer):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json(bpe))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_byte_for_byte(text, bpe):
    text = text.encode("utf-8", "replace").decode()  # without halves of characters, which UTF-8 cannot write
    for tokenizer in (ByteTokenizer(), bpe, CharTokenizer("".join(sorted({*text, "x"})), ends=True)):
        ids = tokenizer.encode_text(text)
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        rebuilt = from_description(json.loads(json.dumps(tokenizer.describe())))
        assert rebuilt.encode_text(text).tolist() == ids.tolist()


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="ab é'st \n1.", max_size=60), st.sampled_from([WORDS * 3])))
def test_own_bpe_is_that_of_the_library(text, bpe, library):
    text = text.encode("utf-8", "replace").decode()
    if "<|endoftext|>" not in text:
        assert bpe.encode_text(text).tolist() == library.encode(text).ids
        assert library.decode(bpe.encode_text(text).tolist()) == text


def test_own_bpe_on_real_text(bpe, library, text):
    ids = bpe.encode_text(text)
    assert ids.tolist() == library.encode(text).ids
    assert len(ids) < 0.5 * len(text) and bpe.vocab_size == 700
    assert library.token_to_id("<|endoftext|>") == bpe.end_of_text == 699


@pytest.mark.parametrize("white", [" ", "\n", "\t", "\xa0", " \n"])
def test_long_white_space_is_encoded_as_by_the_library(white, bpe, library):
    for count, after in itertools.product((99_999, 100_000, 100_001), ("", "b", " b", "\x1c")):
        text = "a" + (white * count)[:count] + after
        assert bpe.encode_text(text).tolist() == library.encode(text).ids, (count, after)


@pytest.mark.parametrize("run", [" ", "\r\n", "\u3000", "=", "a", "7"])
def test_a_million_of_the_same_and_a_letter(run, bpe):
    text = run * 1_000_000 + "b"
    ids = bpe.encode(text)
    assert bpe.decode(ids.tolist()) == text
    assert ids[-20:].tolist() == bpe.encode(run * 1024 + "b")[-20:].tolist()


def test_a_million_spaces_in_gpt2s_encoding(gpt2_bpe):
    tokenizer = GPT2Tokenizer()
    ids, (space, word) = tokenizer.encode(" " * 1_000_000 + "word"), tokenizer.encode("  word")
    assert len(ids) == 1_000_000 and (ids[:-1] == space).all() and ids[-1] == word


@pytest.mark.parametrize(
    ("signs", "count"), [("ACGT", 200_000), ("日本語", 50_000), ("=", 400_000), (" ", 1_000_000)]
)
def test_a_text_without_a_break_trains_a_tokenizer(signs, count):
    """Each took a quarter of a minute or more, when the time grew with the square of the run."""
    run = "".join(random.Random(1).choices(signs, k=count)) + "a"
    tokenizer = train_bpe(["some words before", run], 300)
    ids = tokenizer.encode_text(run).tolist()
    assert len(ids) < count and tokenizer.decode_bytes(ids) == run.encode()
    assert tokenizer.vocab_size == 300 or len(signs) == 1


@pytest.mark.parametrize("between", [" ", "\uff0c", '","'])
def test_words_are_counted_as_in_the_whole_text(text, between):
    from tokenizers import ByteLevelBPETokenizer

    text = between.join(text.split(" "))
    whole = ByteLevelBPETokenizer()
    whole.train_from_iterator([text], 700 - 1, show_progress=False)
    merges = json.loads(whole.to_str())["model"]["merges"]
    assert [*map(tuple, merges)] == train_bpe([text], 700).merges


def test_training_shows_a_bar_on_a_terminal_only():
    command = [
        sys.executable,
        "-c",
        "from distrogpt.data.tokenizer import train_bpe; train_bpe(['a bc'], 300)",
    ]
    terminal, stderr = pty.openpty()
    subprocess.run(command, cwd=REPO, stderr=stderr, check=True)
    assert b"Compute merges" in os.read(terminal, 1 << 16)
    assert subprocess.run(command, cwd=REPO, capture_output=True, check=True).stderr == b""


def test_end_of_text_is_a_token_for_people_and_text_in_documents(bpe):
    for tokenizer in (ByteTokenizer(), bpe, CharTokenizer("<>abdefnotx|", ends=True)):
        ids = tokenizer.encode("ab<|endoftext|>ba").tolist()
        assert ids.count(tokenizer.end_of_text) == 1 and tokenizer.decode(ids) == "ab<|endoftext|>ba"
        assert tokenizer.end_of_text not in tokenizer.encode_text("ab<|endoftext|>ba").tolist()
    alone = CharTokenizer("<>abdefnotx|")
    assert alone.end_of_text is None and alone.decode(alone.encode("<|endoftext|>")) == "<|endoftext|>"


def test_a_text_bears_no_more_tokens_than_it_has_pairs():
    tokenizer = train_bpe(["abcd"], 5000)
    assert tokenizer.vocab_size == 256 + 3 + 1 and tokenizer.encode("abcd").tolist() == [258]


def test_halves_of_characters_do_not_stop_it(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert "\ud800" not in tokenizer.decode(tokenizer.encode("a\ud800b")) != ""


def test_two_bytes_an_id_up_to_65536():
    class Sized(ByteTokenizer):
        def __init__(self, size):
            self.vocab_size = size

    assert (id_dtype(Sized(65_536)), id_dtype(Sized(65_537))) == (np.dtype("<u2"), np.dtype("<u4"))


@pytest.mark.parametrize("merges", ["a", "a b c", "a b\na b", "ab c", "a \u2028", "a b\n\n", " ", 5])
def test_a_damaged_description_is_refused(merges):
    with pytest.raises(UserError, match="is unknown or incomplete"):
        from_description({"kind": "bpe", "merges": merges})


def test_a_run_on_an_own_tokenizer_needs_nothing_but_its_checkpoint(tmp_path, text):
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    for kind in ("byte", "bpe:500"):
        words = ("--input", tmp_path / "book.txt", "--output", tmp_path / "data", f"--tokenizer={kind}")
        assert prepare_here("data/text/prepare.py", *words, "--overwrite").returncode == 0
        out_dir = tmp_path / kind.replace(":", "")
        train_here(*TINY, f"--dataset={tmp_path / 'data'}", f"--out_dir={out_dir}")
        for path in (tmp_path / "data").iterdir():
            path.unlink()
        sampler = Sampler(str(out_dir), device="cpu")
        whole = sampler.generate("def ", max_new_tokens=30)[0]
        assert whole == "def " + "".join(sampler.stream("def ", max_new_tokens=30))
        assert isinstance(sampler.generate("", max_new_tokens=3)[0], str)
        assert isinstance(sampler.generate(" " * 1_000_000 + "def", max_new_tokens=3)[0], str)
