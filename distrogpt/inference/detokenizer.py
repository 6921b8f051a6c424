"""Incremental detokenization: from token ids to whole characters, up to a stop string."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from distrogpt.data.tokenizer import Tokenizer


class Token(NamedTuple):
    """A token and the text that it added. A character of several tokens counts as text of the last one."""

    text: str
    id: int
    logprob: float  # of the model's own distribution, at temperature 1


class Detokenizer:
    """The text of one sample, up to the token `end_token` or the first of the `stop` strings.

    The text ends before the stop string that is complete first, whatever its tokens are. Text that may be the
    beginning of a stop string is held back in `pending`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), end_token: int | None = None) -> None:
        self.tokenizer, self.stop, self.end_token = tokenizer, stop, end_token
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[Token] = []
        self.logprobs: list[float] = []  # including that of end_token
        self.text = ""  # without the pending text
        self.pending = ""
        self.finished = False
        self.n_text = self.n_tokens = self.n_token_chars = 0  # returned by pop_text and pop_tokens so far

    def add(self, id: int, logprob: float = 0.0) -> None:
        """Add the next token. Tokens after the end have no effect."""
        if self.finished:
            return
        self.logprobs.append(logprob)
        if id == self.end_token:
            self.finish()
        else:
            text = self.decoder.decode(self.tokenizer.decode_bytes([id]))
            self.tokens.append(Token(text, id, logprob))
            self.push(text)

    def finish(self) -> None:
        """Call after the last token: pending text becomes part of the text."""
        if self.finished:
            return
        text = self.decoder.decode(b"", final=True)
        if text:  # of a character that was never complete
            self.tokens[-1] = self.tokens[-1]._replace(text=self.tokens[-1].text + text)
        self.push(text, last=True)

    def push(self, text: str, last: bool = False) -> None:
        """Add text, and move pending text that cannot be part of a stop string to self.text."""
        self.pending += text
        n_stable, self.finished = len(self.pending), last
        if self.stop:
            matches = [(at + len(stop), at) for stop in self.stop if (at := self.pending.find(stop)) >= 0]
            if matches:
                n_stable, self.finished = min(matches)[1], True
            elif not last:
                n_stable -= max(overlap(self.pending, stop) for stop in self.stop)
        self.text += self.pending[:n_stable]
        self.pending = self.pending[n_stable:]

    @property
    def score(self) -> float:
        """Mean log-likelihood of the tokens, including those of the stop string or end token."""
        return sum(self.logprobs) / len(self.logprobs)

    def pop_text(self) -> str:
        """The text since the last call."""
        text, self.n_text = self.text[self.n_text :], len(self.text)
        return text

    def pop_tokens(self) -> list[Token]:
        """The tokens of the text since the last call. A token in which a stop string begins is cut there."""
        popped, waiting = [], []
        tokens = self.tokens[self.n_tokens :]
        if self.decoder.getstate()[0] and not self.finished:
            tokens.pop()  # the next token may complete its last character
        for token in tokens:
            waiting.append(token)
            if self.n_token_chars + len(token.text) > len(self.text):
                break
            if token.text:
                popped += waiting
                waiting = []
                self.n_token_chars += len(token.text)
        self.n_tokens += len(popped)
        rest = self.text[self.n_token_chars :]
        if self.finished and rest:
            popped += [*waiting[:-1], waiting[-1]._replace(text=rest)]
            self.n_token_chars = len(self.text)
        return popped


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` with which `text` ends."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
