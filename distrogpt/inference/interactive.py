"""sample.py --interactive=True: prompts from the keyboard or from a pipe, one after another."""

import atexit
import os
import signal
import sys
import textwrap
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
NAMES = textwrap.fill(", ".join(SAMPLING_FIELDS), 78).replace("\n", f"\n{32 * ' '}")
HELP = f"""\
Type a prompt and press Enter. An empty line continues the last text. Ctrl-C stops generating, Ctrl-D quits.
For a prompt of several lines, end each line but the last with \\, or put the prompt between two lines of
{QUOTES}. Put a prompt that begins with / between two such lines, too.

/NAME VALUE   change a setting: {NAMES}
              (seed increases by 1 after each text)
/stop TEXT    stop before TEXT (\\n is a newline); /stop without TEXT removes the stop string
/settings     show the settings
/help         show this help
/quit         quit"""


def prompt_loop(sampler: Sampler, config: SampleConfig) -> None:
    """Read prompts and continue them until the input ends. Only the texts go to stdout."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command's Ctrl-C would end the process
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
        if not sys.stdin.isatty():
            encoding = encoding_of(sys.stdin.buffer.peek(4), sys.stdin.encoding)
            sys.stdin.reconfigure(encoding=encoding, newline=None)
    if sys.stdin.isatty():
        warn("type a prompt and press Enter; /help lists the commands")
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
            # without the note about a long prompt each time that the text so far is continued
            (ids,) = sampler.prompt_ids({"the prompt": prompt}) if line else [sampler.ids_of(prompt)]
            on_screen = sys.stdin.isatty()  # as typed, or as printed before
            echoed = prompt if config.echo and not on_screen else ""
            updates = sampler.stream_sample(ids, config)
            text = prompt + print_stream(updates, echoed, output_style(config.show_probs))
            config = replace(config, seed=(config.seed + 1) % 2**63)
        except UserError as error:
            warn(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            warn("\npress Ctrl-D or type /quit to quit")
        except EOFError:
            if sys.stdin.isatty():
                warn("")
            return


def run_command(command: str, config: SampleConfig) -> SampleConfig:
    """Run a command such as "temperature 0.9"; the new settings. Raises UserError."""
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
        hint = f"did you mean /{near}?" if near else "/help lists the commands"
        raise UserError(f"unknown command /{shorten(name)}; {hint}")
    return config


def read_prompt_lines(line: str) -> str:
    """The prompt that begins with this line. The end of the input also ends a prompt."""
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
    """A line of stdin. `prompt` is shown only if stdin is a terminal, and never written into a redirected
    stdout."""
    if sys.stdin.isatty() and not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt if sys.stdin.isatty() else "")


def load_history() -> None:
    """Enable arrow keys and the history of earlier sessions, on a terminal if Python has readline."""
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
