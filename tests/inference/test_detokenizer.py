"""From tokens to text: stop strings, and characters of several tokens."""

import random

import pytest

from distrogpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, train_bpe
from distrogpt.inference.detokenizer import Detokenizer

TEXT = "def f(x):\n    return x\n\nclass A: # 日本 😀\n    pass\n\nEND of it"
STOPS = ["\n\n", "END", "class", "s", "本 😀", "😀\n", ")", "d", "return x\n\nclas", "never"]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_text_ends_before_a_stop_string_and_only_the_beginning_of_one_is_pending(kind, text):
    chars = CharTokenizer("".join(sorted(set(TEXT))))
    tokenizer = {"char": chars, "byte": ByteTokenizer(), "bpe": train_bpe([text], 400)}[kind]
    ids = tokenizer.encode(TEXT).tolist()
    n_chars = [len(tokenizer.decode_bytes(ids[:n]).decode("utf-8", "ignore")) for n in range(len(ids) + 1)]
    cases = [("return", "ur"), *((stop,) for stop in STOPS)]
    cases += [tuple(random.Random(n).sample(STOPS, 3)) for n in range(20)]
    for stops in cases:
        ends = [(TEXT.index(stop) + len(stop), TEXT.index(stop)) for stop in stops if stop in TEXT]
        expected = TEXT[: min(ends)[1]] if ends else TEXT
        detokenizer, out, tokens = Detokenizer(tokenizer, stops), "", []
        for number, id in enumerate(ids, 1):
            detokenizer.add(id, -float(number))
            out += detokenizer.pop_text()
            tokens += detokenizer.pop_tokens()
            if not detokenizer.finished:
                pending = TEXT[len(out) : n_chars[number]]
                assert out + pending == TEXT[: n_chars[number]]
                assert not pending or any(stop.startswith(pending) for stop in stops), (stops, pending)
        detokenizer.finish()
        tokens += detokenizer.pop_tokens()
        assert out + detokenizer.pop_text() == detokenizer.text == expected
        assert "".join(token.text for token in tokens) == expected
        assert [token.id for token in tokens] == ids[: len(tokens)]
        assert not tokens or tokens[-1].text  # the text has all of its last character
        assert [token.logprob for token in tokens] == [-float(n + 1) for n in range(len(tokens))]


def pieces_of(ids, tokenizer):
    """The text that each token adds."""
    detokenizer = Detokenizer(tokenizer)
    for id in ids:
        detokenizer.add(id)
        yield detokenizer.pop_text()
    detokenizer.finish()
    yield detokenizer.pop_text()


def test_text_is_whole_characters(gpt2_bpe):
    tokenizer = GPT2Tokenizer()
    text = "a 😀 日本語 🤷🏽‍♀️ z"
    pieces = list(pieces_of(tokenizer.encode(text).tolist(), tokenizer))
    assert "".join(pieces) == text and len(pieces) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    broken = tokenizer.encode("😀").tolist()[:1]
    assert "".join(pieces_of(broken * 20, tokenizer)).count("\N{REPLACEMENT CHARACTER}") >= 20
