"""sample.py --interactive=True: prompts from the keyboard or from a pipe, one after another."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from configurator import check_value, shorten
from distrogpt.errors import UserError, near_name, warn
from distrogpt.files import encoding_of
from distrogpt.inference.display import colour_legend, output_style, print_stream
from distrogpt.inference.sampler import Sampler
from distrogpt.settings import SAMPLING_FIELDS, SampleConfig

QUOTES = '"""'
HELP = f"""\
Each line is a prompt. A line that ends with \\ continues in the next one; a line of {QUOTES} begins a prompt
of several lines, up to the next {QUOTES}. An empty line continues the text so far. Ctrl-C stops the text,
Ctrl-D quits.

/NAME VALUE   sets {", ".join(SAMPLING_FIELDS[:-1])}
              or {SAMPLING_FIELDS[-1]}, which grows by 1 with each text
/stop TEXT    a text ends before TEXT, in which \\n is a newline; /stop alone: no stop string
/settings     shows the settings
/help         shows this help
/quit         quits

Put a prompt that begins with / between two lines of {QUOTES}."""


def prompt_loop(sampler: Sampler, config: SampleConfig) -> None:
    """Continue each prompt that is read, until the input ends. stdout has the texts alone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command's Ctrl-C would end the process
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
        if not sys.stdin.isatty():
            encoding = encoding_of(sys.stdin.buffer.peek(4), sys.stdin.encoding)
            sys.stdin.reconfigure(encoding=encoding, newline=None)
    if sys.stdin.isatty():
        warn("a line is a prompt; /help shows more")
    if output_style(config.show_probs) == "colours":
        warn(colour_legend())
    load_history()
    text = ""  # so far
    while True:
        try:
            line = read_line("> ")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                config = run_command(line[1:], config)
                continue
            prompt = read_prompt_lines(line) if line else text
            # of the text so far, the decoder reads the end, without a note each time
            (ids,) = sampler.prompt_ids({"the prompt": prompt}) if line else [sampler.ids_of(prompt)]
            on_screen = sys.stdin.isatty()  # as typed, or as printed before
            echoed = prompt if config.echo and not on_screen else ""
            updates = sampler.stream_sample(ids, config)
            text = prompt + print_stream(updates, echoed, output_style(config.show_probs))
            config = replace(config, seed=(config.seed + 1) % 2**63)
        except UserError as error:
            warn(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            warn("\nCtrl-D or /quit quits")
        except EOFError:
            if sys.stdin.isatty():
                warn("")
            return


def run_command(command: str, config: SampleConfig) -> SampleConfig:
    """The settings after a command such as "temperature 0.9". Raises UserError."""
    name, _, value = command.partition(" ")
    if name == "help":
        warn(HELP)
    elif name == "settings":
        warn("\n".join(f"{name}={getattr(config, name)!r}" for name in SAMPLING_FIELDS))
    elif name in SAMPLING_FIELDS:
        config = replace(config, **{name: check_value(SampleConfig, name, value, is_text=True)})
        if name == "show_probs" and output_style(config.show_probs) == "colours":
            warn(colour_legend())
    else:
        near = near_name(name, ("help", "settings", "quit", *SAMPLING_FIELDS))
        hint = f"did you mean /{near}?" if near else "/help lists all"
        raise UserError(f"unknown command /{shorten(name)}; {hint}")
    return config


def read_prompt_lines(line: str) -> str:
    """The prompt whose first line was read. At the end of the input, an unfinished prompt is complete."""
    lines = []
    with suppress(EOFError):
        if line.strip() == QUOTES:
            while (line := read_line("... ")).strip() != QUOTES:
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = read_line("... ")
        lines.append(line)
    return "\n".join(lines)


def read_line(prompt: str) -> str:
    """A line of stdin. `prompt` is shown on a terminal only, and never in a file that stdout goes to."""
    if sys.stdin.isatty() and not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt if sys.stdin.isatty() else "")


def load_history() -> None:
    """Enable arrow keys and the lines of earlier sessions, on a terminal whose Python has readline."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        import readline
    except ImportError:  # Windows
        return
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "distrogpt", "history")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(1000)

    @atexit.register
    def save() -> None:
        with suppress(OSError):  # a folder without write permission
            readline.write_history_file(path)
