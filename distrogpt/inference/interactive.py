"""sample.py --interactive=True: prompts from the keyboard, one after another, or from a pipe."""

import difflib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from configurator import check_value, shorten
from distrogpt.errors import UserError
from distrogpt.inference.detokenizer import form_of, legend, shown
from distrogpt.settings import SAMPLING_FIELDS, SampleConfig

BLOCK = '"""'
HELP = f"""\
A line is a prompt. One that ends with \\ goes on in the next; a line of {BLOCK} begins a prompt of several
lines, up to the next {BLOCK}. An empty line goes on with the text so far. Ctrl-C stops the text, Ctrl-D
leaves.

/NAME VALUE   sets {", ".join(SAMPLING_FIELDS[:-1])}
              or {SAMPLING_FIELDS[-1]}, which grows by 1 with each text
/stop END     the text ends before END, in which \\n is a newline; /stop alone: nowhere
/settings     shows them
/help         shows this
/quit         leaves

A prompt that begins with / stands between two lines of {BLOCK}."""


def prompt_mode(sampler: Any, config: SampleConfig) -> None:
    """Go on from each prompt that is read, until the input ends. `sampler` is a sample.Sampler."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        say("a line is a prompt; /help says more")
    if form_of(config.show_probs) == "colours":
        say(legend())
    text = ""  # so far
    with ctrl_c_raises(), history():
        while True:
            try:
                line = read_line("> ")
                if line.strip() == "/quit":
                    return
                if line.startswith("/"):
                    config = obey(line[1:], config)
                    continue
                prompt = whole_prompt(line) if line else text
                ids = sampler.ids_of(prompt, whole=bool(line))  # a text that goes on may be longer
                text = prompt + write_on(sampler, ids, prompt, config)
                config = replace(config, seed=(config.seed + 1) % 2**63)
            except UserError as error:
                say(f"error: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                say("\nCtrl-D or /quit leaves")
            except EOFError:
                if sys.stdin.isatty():
                    say("")
                return


def write_on(sampler: Any, ids: list[int], prompt: str, config: SampleConfig) -> str:
    """Print what follows, as it is made, up to its end or Ctrl-C; it is returned too."""
    form, writer = form_of(config.show_probs), None
    if config.echo and form != "lines" and not sys.stdin.isatty():  # on a terminal it stands there already
        print(prompt, end="")
    with suppress(KeyboardInterrupt):
        for writer in sampler.live(ids, config):
            print(shown(writer, form), end="", flush=True)
    print(end="" if form == "lines" else "\n", flush=True)
    return writer.text if writer else ""


def obey(command: str, config: SampleConfig) -> SampleConfig:
    """The settings after a command such as "temperature 0.9". Raises UserError."""
    name, _, value = command.partition(" ")
    if name == "help":
        say(HELP)
    elif name == "settings":
        say("\n".join(f"{name}={getattr(config, name)!r}" for name in SAMPLING_FIELDS))
    elif name in SAMPLING_FIELDS:
        config = replace(config, **{name: check_value(SampleConfig, name, value, is_text=True)})
        if name == "show_probs" and form_of(config.show_probs) == "colours":
            say(legend())
    else:
        near = difflib.get_close_matches(name, ("help", "settings", "quit", *SAMPLING_FIELDS), n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists all"
        raise UserError(f"unknown command /{shorten(name)}; {hint}")
    return config


def whole_prompt(line: str) -> str:
    """The prompt that begins with this line. What the input's end cuts off counts as whole."""
    lines = []
    with suppress(EOFError):
        if line.strip() == BLOCK:
            while (more := read_line("... ")).strip() != BLOCK:
                lines.append(more)
            return "\n".join(lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = read_line("... ")
        lines.append(line)
    return "\n".join(lines)


def read_line(ask: str) -> str:
    """A line of stdin. Raises EOFError. It is asked for on a terminal alone, and not in the output's file."""
    if not sys.stdin.isatty():
        return input()
    if not sys.stdout.isatty():
        print(ask, end="", file=sys.stderr, flush=True)
        return input()
    return input(ask)


def say(line: str) -> None:
    """stdout has the texts alone."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """KeyboardInterrupt, where it would end the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def history() -> Iterator[None]:
    """Arrow keys, and the lines of earlier sessions, on a terminal whose Python has readline."""
    readline = None
    if sys.stdin.isatty() and sys.stdout.isatty():
        with suppress(ImportError):  # Windows
            import readline
    if readline is None:
        yield
        return
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "distrogpt", "history")
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that takes no files
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(f".{os.getpid()}.tmp")
            readline.write_history_file(new)
            os.replace(new, path)
