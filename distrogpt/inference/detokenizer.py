"""Text of token ids as they come: whole characters, up to a stop string, and how likely each token was."""

import codecs
import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from distrogpt.data.tokenizer import Tokenizer

UNLIKELY_TO_LIKELY = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)  # red to green of 256 colours


class Token(NamedTuple):
    """What a token added to the text; a character made of several tokens comes with the last of them."""

    text: str
    id: int
    logprob: float  # under the network's own chances, at temperature 1


class Detokenizer:
    """The text of one sample while its tokens come, up to the token `end` or the first of the `stop` strings.

    The text is the same for any cut into tokens: it ends before the stop string that is whole first. What may
    be the begin of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), end: int | None = None) -> None:
        self.tokenizer, self.stop, self.end = tokenizer, stop, end
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[Token] = []
        self.logprobs: list[float] = []  # with that of `end`
        self.held = ""
        self.fresh: list[str] = []  # what take_text has not handed out
        self.certain = self.told = 0  # characters of the text, and those whose tokens were handed out
        self.told_tokens = 0
        self.ended = False

    def add(self, id: int, logprob: float = 0.0) -> None:
        """Take the next token; after the end, nothing."""
        if self.ended:
            return
        self.logprobs.append(logprob)
        if id == self.end:
            self.close()
        else:
            text = self.decoder.decode(self.tokenizer.decode_bytes([id]))
            self.tokens.append(Token(text, id, logprob))
            self.push(text)

    def close(self) -> None:
        """No more tokens come: what was held back is text."""
        if self.ended:
            return
        text = self.decoder.decode(b"", final=True)
        if text:  # of a character that was never whole
            self.tokens[-1] = self.tokens[-1]._replace(text=self.tokens[-1].text + text)
        self.push(text, last=True)

    def push(self, text: str, last: bool = False) -> None:
        """Decide how much of the text that is held, and of this, is certain."""
        self.held += text
        free, self.ended = len(self.held), last
        if self.stop:
            found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
            if found:
                free, self.ended = min(found)[1], True
            elif not last:
                free -= max(begun(self.held, stop) for stop in self.stop)
        self.fresh.append(self.held[:free])
        self.held = self.held[free:]
        self.certain += free

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)[: self.certain]

    @property
    def score(self) -> float:
        """Mean log-likelihood of its tokens, with those that ended it."""
        return sum(self.logprobs) / len(self.logprobs)

    def take_text(self) -> str:
        """What became certain since the last call."""
        text, self.fresh = "".join(self.fresh), []
        return text

    def take_tokens(self) -> list[Token]:
        """Tokens whose text became certain since the last call; one in which a stop string begins is cut."""
        ready, waiting = [], []
        within = bool(self.decoder.getstate()[0]) and not self.ended  # a character of which the rest may come
        for token in self.tokens[self.told_tokens : len(self.tokens) - within]:
            waiting.append(token)
            if self.told + len(token.text) > self.certain:
                break
            if token.text:  # those of the same character come with it
                ready, waiting = ready + waiting, []
                self.told += len(token.text)
        self.told_tokens += len(ready)
        if self.ended and self.told < self.certain:
            ready += [*waiting[:-1], waiting[-1]._replace(text=waiting[-1].text[: self.certain - self.told])]
            self.told = self.certain
        return ready


def begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the begin of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def form_of(show_probs: bool) -> str:
    """How samples are shown on stdout: as text, or with each token's chance, in colours or as lines."""
    if not show_probs:
        return "text"
    return "colours" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "lines"


def shown(writer: Detokenizer, form: str) -> str:
    """What became certain since the last call, in a form of `form_of`."""
    if form == "text":
        return writer.take_text()
    if form == "colours":
        return "".join(coloured(text, math.exp(logprob)) for text, _, logprob in writer.take_tokens())
    lines = (f"{math.exp(lp):.6f} {lp:10.4f} {text!r}\n" for text, _, lp in writer.take_tokens())
    return "".join(lines)


def coloured(text: str, chance: float) -> str:
    """The text from red to green, as its chance goes from 0 to 1."""
    place = min(int(chance * len(UNLIKELY_TO_LIKELY)), len(UNLIKELY_TO_LIKELY) - 1)
    return f"\x1b[38;5;{UNLIKELY_TO_LIKELY[place]}m{text}\x1b[0m"


def legend() -> str:
    """What the colours mean, in one line."""
    steps = range(0, 101, 10)
    return "chance of each token: " + " ".join(coloured(f"{step}%", step / 100) for step in steps)
