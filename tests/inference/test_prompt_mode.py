"""sample.py --interactive=True, on a terminal and from a pipe."""

import io
import os
import re
import select
import subprocess
import sys
import time

import pytest
from conftest import ENVIRONMENT, REPO, assert_user_error, sample_here

from sample import Sampler

SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def answered(trained, monkeypatch, typed: str, *flags: str) -> subprocess.CompletedProcess:
    """What the prompt mode makes of lines in a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    flags = (f"--out_dir={trained}", "--device=cpu", "--interactive=True", "--max_new_tokens=12", *flags)
    done = sample_here(*flags)
    assert done.returncode == 0, done.stderr
    return done


def text_of(trained, prompt: str, seed: int, *flags: str) -> str:
    """The same as sample.py writes it, in one call of its own."""
    flags = (f"--start={prompt}", f"--seed={seed}", "--num_samples=1", "--max_new_tokens=12", *flags)
    return sample_here(f"--out_dir={trained}", "--device=cpu", *flags).stdout


def test_lines_of_a_pipe_are_prompts(trained, monkeypatch):
    done = answered(trained, monkeypatch, "def \nclass", "--seed=3")
    assert done.stdout == text_of(trained, "def ", 3) + text_of(trained, "class", 4)
    assert len(done.stderr.splitlines()) == 1  # where they come from
    new = answered(trained, monkeypatch, "def \n", "--seed=3", "--echo=False").stdout
    assert "def " + new == text_of(trained, "def ", 3)


def test_prompts_of_several_lines(trained, monkeypatch):
    for typed, prompt in (
        ("a\\\nb\\\n\nx", "a\nb\n"),
        ('"""\n/x\n\n y\n"""\nx', "/x\n\n y"),
        ('"""\n"""\nx', ""),
        ("a\\", "a"),  # the input's end
        ('"""\na\n', "a"),
        ("a\\b", "a\\b"),
    ):
        rest = text_of(trained, "x", 6) if typed.endswith("x") else ""
        assert answered(trained, monkeypatch, typed, "--seed=5").stdout == text_of(trained, prompt, 5) + rest


def test_an_empty_line_goes_on_with_the_text_so_far(trained, monkeypatch):
    """Also where it is longer than the block of 16: with the last 16 tokens, which the model reads."""
    shown = answered(trained, monkeypatch, "def \n\n\n/seed 1338\n\n", "--max_new_tokens=6", "--echo=False")
    pieces = [shown.stdout[n : n + 6] for n in (0, 7, 14, 21)]
    sampler, text = Sampler(str(trained), device="cpu"), "def "
    for piece, seed in zip(pieces, (1337, 1338, 1339, 1338), strict=True):
        assert piece == sampler.generate(text[-16:], 1, 6, seed=seed, echo=False)[0]
        text += piece
    assert len(text) > 16
    fresh = answered(trained, monkeypatch, "\n", "--seed=2").stdout
    assert fresh == text_of(trained, "", 2)


def test_commands(trained, monkeypatch):
    typed = "/seed 7\n/temperature 0\n/stop )\n/top_k None\ndef f(\n/stop\n/seed 7\ndef f(\n/quit\nx"
    done = answered(trained, monkeypatch, typed)
    flags = ("--temperature=0", "--top_k=None")
    assert done.stdout == text_of(trained, "def f(", 7, *flags, "--stop=)") + text_of(
        trained, "def f(", 7, *flags
    )
    shown = answered(trained, monkeypatch, "/seed 7\n/stop \\n\n/settings\n/help\n/quit").stderr
    assert "seed=7\n" in shown and r"stop=('\n',)" in shown and "top_p=1.0\n" in shown
    assert all(word in shown for word in ("/NAME VALUE", "/quit", "repetition_penalty", "Ctrl-C"))
    lines = answered(trained, monkeypatch, "/show_probs True\na", "--max_new_tokens=4").stdout.splitlines()
    assert len(lines) == 4 and all(len(line.split(maxsplit=2)) == 3 for line in lines)


def test_mistakes_are_told_and_end_nothing(trained, monkeypatch):
    mistakes = {
        "/temprature 3": "unknown command /temprature; did you mean /temperature?",
        "/xyzzy": "unknown command /xyzzy; /help lists all",
        "/device cuda": "unknown command /device",
        "/temperature warm": "temperature='warm' does not fit; give it a number",
        "/temperature": "does not fit",
        "/top_p 2": "at most 1",
        "é": "character 'é' at position 0",
        "x" * 17: "17 tokens, the model reads 16; shorten it",
    }
    done = answered(trained, monkeypatch, "\n".join([*mistakes, "def "]))
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == len(mistakes)
    for line, says in zip(told, mistakes.values(), strict=True):
        assert says in line and ";" in line
    assert done.stdout == text_of(trained, "def ", 1337)  # a mistake takes no seed
    out = sample_here(f"--out_dir={trained}", "--interactive=True", "--prompts=x")
    assert_user_error(out, "give one of them")


class Keyboard:
    """A terminal of its own with sample.py in it: what it shows, and keys to press."""

    def __init__(self, *flags: object, **environment: str) -> None:
        command = [sys.executable, "-c", SPAWN, sys.executable, str(REPO / "sample.py"), *map(str, flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        env = {**ENVIRONMENT, "TERM": "dumb", **environment}
        self.process = subprocess.Popen(command, cwd=REPO, env=env, bufsize=0, **pipes)
        self.shown = ""

    def press(self, keys: str, again: float | None = None) -> None:
        """Where nothing is shown within `again` seconds, once more."""
        self.shown = ""
        self.process.stdin.write(keys.encode())
        if again and not select.select([self.process.stdout], [], [], again)[0]:
            self.process.stdin.write(keys.encode())

    def wait_for(self, pattern: str) -> str:
        """What was shown since the last keys, up to the pattern."""
        last = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown, re.S)):
            assert select.select([self.process.stdout], [], [], last - time.monotonic())[0], self.shown
            new = os.read(self.process.stdout.fileno(), 4096)
            assert new, f"it ended: {self.shown}"
            self.shown += new.decode(errors="replace").replace("\r\n", "\n")
        return self.shown[: found.end()]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal(trained, tmp_path):
    flags = (f"--out_dir={trained}", "--device=cpu", "--interactive=True", "--max_new_tokens=12", "--seed=3")
    keyboard = Keyboard(*flags, XDG_CACHE_HOME=str(tmp_path), NO_COLOR="")
    keyboard.wait_for("a line is a prompt.*> ")
    keyboard.press("def \n")
    expected = text_of(trained, "def ", 3)
    shown = keyboard.wait_for(f"{re.escape(expected[4:])}> ")
    assert shown.count("def ") == 1  # what was typed

    keyboard.press("/max_new_tokens 100000\n")
    keyboard.wait_for("\n> ")
    keyboard.press("class\n")
    keyboard.wait_for(".{400}")  # it streams
    keyboard.press("\x03")
    keyboard.wait_for("\n> ")
    keyboard.press("half")
    keyboard.wait_for("half")
    keyboard.press("\x03", again=1)  # readline forgets one that comes while it draws a key
    keyboard.wait_for("Ctrl-D or /quit leaves\n> ")

    keyboard.press("/max_new_tokens 12\n")
    keyboard.wait_for("\n> ")
    keyboard.press("/temperature 0\n")
    keyboard.wait_for("\n> ")
    keyboard.press("a\\\n")
    keyboard.wait_for(r"\.\.\. ")
    keyboard.press("b\n")
    greedy = text_of(trained, "a\nb", 9, "--temperature=0")
    keyboard.wait_for(f"{re.escape(greedy[3:])}> ")
    keyboard.press("/show_probs True\n")
    keyboard.wait_for("chance of each token.*> ")
    keyboard.press("a\n")
    keyboard.wait_for("\x1b\\[38;5;\\d+m.*\n> ")
    keyboard.press("/quit\n")
    assert keyboard.process.wait(timeout=60) == 0

    again = Keyboard(*flags, XDG_CACHE_HOME=str(tmp_path))
    again.wait_for("> ")
    pytest.importorskip("readline")
    assert (tmp_path / "distrogpt" / "history").read_text().count("\n") >= 10
    again.press("\x1b[A\x1b[A\n")  # the line before the last
    again.wait_for(f"{re.escape(text_of(trained, 'a', 3)[1:])}> ")
    again.press("\x04")
    assert again.process.wait(timeout=60) == 0
