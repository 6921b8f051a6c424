"""Samples on stdout: as text, or with the probability of each token, in colours or in lines."""

import math
import os
import sys
from collections.abc import Iterable
from contextlib import suppress

from distrogpt.inference.detokenizer import Detokenizer

RED_TO_GREEN = (196, 202, 208, 214, 220, 226, 190, 154, 118, 82, 46)  # of a terminal's 256 colours


def output_style(show_probs: bool) -> str:
    """How samples are printed: "text"; with probabilities, "colours" on a terminal, otherwise "lines"."""
    if not show_probs:
        return "text"
    return "colours" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "lines"


def format_new(sample: Detokenizer, style: str) -> str:
    """The text or tokens added to the sample since the last call, as printed."""
    if style == "text":
        return sample.pop_text()
    tokens = sample.pop_tokens()
    if style == "colours":
        return "".join(colour(token.text, math.exp(token.logprob)) for token in tokens)
    return "".join(f"{math.exp(lp):.6f} {lp:10.4f} {text!r}\n" for text, _, lp in tokens)


def format_sample(sample: Detokenizer, prompt: str, style: str) -> str:
    """A finished sample, with a newline at its end."""
    text = format_new(sample, style)
    return text if style == "lines" else f"{prompt}{text}\n"


def print_stream(updates: Iterable[Detokenizer], prompt: str, style: str) -> str:
    """Print one sample while it is generated, until it is finished or Ctrl-C; returns its text."""
    sample = None
    if style != "lines":
        print(prompt, end="", flush=True)
    with suppress(KeyboardInterrupt):
        for sample in updates:
            print(format_new(sample, style), end="", flush=True)
    print(end="" if style == "lines" else "\n", flush=True)
    return sample.text if sample else ""


def colour(text: str, prob: float) -> str:
    """The text in a colour from red for probability 0 to green for 1."""
    index = min(int(prob * len(RED_TO_GREEN)), len(RED_TO_GREEN) - 1)
    return f"\x1b[38;5;{RED_TO_GREEN[index]}m{text}\x1b[0m"


def colour_legend() -> str:
    """The meaning of the colours, in one line."""
    return "probability of each token: " + " ".join(colour(f"{n}%", n / 100) for n in range(0, 101, 10))
