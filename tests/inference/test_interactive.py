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


def sample_lines(trained, lines: str, *flags: str) -> subprocess.CompletedProcess:
    """sample.py --interactive=True with these lines in a pipe."""
    flags = (f"--out_dir={trained}", "--device=cpu", "--interactive=True", "--max_new_tokens=12", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        done = sample_here(*flags)
    assert done.returncode == 0, done.stderr
    return done


def sample_prompt(trained, prompt: str, seed: int, *flags: str) -> str:
    """The output of sample.py for one prompt."""
    flags = (f"--start={prompt}", f"--seed={seed}", "--num_samples=1", "--max_new_tokens=12", *flags)
    return sample_here(f"--out_dir={trained}", "--device=cpu", *flags).stdout


def test_lines_of_a_pipe_are_prompts(trained):
    done = sample_lines(trained, "def \nclass", "--seed=3")
    assert done.stdout == sample_prompt(trained, "def ", 3) + sample_prompt(trained, "class", 4)
    assert len(done.stderr.splitlines()) == 1  # the model's source
    without_prompt = sample_lines(trained, "def \n", "--seed=3", "--echo=False").stdout
    assert "def " + without_prompt == sample_prompt(trained, "def ", 3)


def test_prompts_of_several_lines(trained):
    for lines, prompt in (
        ("a\\\nb\\\n\nx", "a\nb\n"),
        ('"""\n/x\n\n y\n"""\nx', "/x\n\n y"),
        ('"""\n"""\nx', ""),
        ("a\\", "a"),  # the input's end
        ('"""\na\n', "a"),
        ("a\\b", "a\\b"),
    ):
        rest = sample_prompt(trained, "x", 6) if lines.endswith("x") else ""
        assert sample_lines(trained, lines, "--seed=5").stdout == sample_prompt(trained, prompt, 5) + rest


def test_an_empty_line_continues_the_text_so_far(trained):
    """Also if it is longer than block_size: the model then reads its last 16 tokens."""
    done = sample_lines(trained, "def \n\n\n/seed 1338\n\n", "--max_new_tokens=6", "--echo=False")
    pieces = [done.stdout[n : n + 6] for n in (0, 7, 14, 21)]
    sampler, text = Sampler(str(trained), device="cpu"), "def "
    for piece, seed in zip(pieces, (1337, 1338, 1339, 1338), strict=True):
        assert piece == sampler.generate(text[-16:], 1, 6, seed=seed, echo=False)[0]
        text += piece
    assert len(text) > 16
    from_nothing = sample_lines(trained, "\n", "--seed=2").stdout
    assert from_nothing == sample_prompt(trained, "", 2)


def test_commands(trained):
    lines = "/seed 7\n/temperature 0\n/stop )\n/top_k None\ndef f(\n/stop\n/seed 7\ndef f(\n/quit\nx"
    done = sample_lines(trained, lines)
    flags = ("--temperature=0", "--top_k=None")
    assert done.stdout == sample_prompt(trained, "def f(", 7, *flags, "--stop=)") + sample_prompt(
        trained, "def f(", 7, *flags
    )
    shown = sample_lines(trained, "/seed 7\n/stop \\n\n/settings\n/help\n/quit").stderr
    assert "seed=7\n" in shown and r"stop=('\n',)" in shown and "top_p=1.0\n" in shown
    assert all(word in shown for word in ("/NAME VALUE", "/quit", "repetition_penalty", "Ctrl-C"))
    lines = sample_lines(trained, "/show_probs True\na", "--max_new_tokens=4").stdout.splitlines()
    assert len(lines) == 4 and all(len(line.split(maxsplit=2)) == 3 for line in lines)


def test_mistakes_are_reported_and_the_loop_continues(trained):
    mistakes = {
        "/temprature 3": "unknown command /temprature; did you mean /temperature?",
        "/xyzzy": "unknown command /xyzzy; /help lists the commands",
        "/device cuda": "unknown command /device",
        "/temperature warm": "temperature='warm' is not valid; give a number",
        "/temperature": "is not valid",
        "/top_p 2": "at most 1",
        "é": "character 'é' at position 0",
    }
    done = sample_lines(trained, "\n".join([*mistakes, "def "]))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(mistakes)
    for line, message in zip(errors, mistakes.values(), strict=True):
        assert message in line and ";" in line
    assert done.stdout == sample_prompt(trained, "def ", 1337)  # a mistake does not change the seed
    out = sample_here(f"--out_dir={trained}", "--interactive=True", "--prompts=x")
    assert_user_error(out, "give one of them")


def test_the_end_of_a_long_prompt_is_read_and_a_note_says_so_once(trained):
    long = "def greet(self, name):"
    done = sample_lines(trained, f"{long}\n\n")
    assert done.stderr.count("note     the prompt has 22 tokens; the model reads the last 16") == 1
    assert done.stdout.startswith(sample_prompt(trained, long, 1337))


class Keyboard:
    """sample.py on a pseudo-terminal: its output, and keys to press."""

    def __init__(self, *flags: object, **environment: str) -> None:
        command = [sys.executable, "-c", SPAWN, sys.executable, str(REPO / "sample.py"), *map(str, flags)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        env = {**ENVIRONMENT, "TERM": "dumb", **environment}
        self.process = subprocess.Popen(command, cwd=REPO, env=env, bufsize=0, **pipes)
        self.output = ""

    def press(self, keys: str, retry_after: float | None = None) -> None:
        """Press keys; once more if there is no output within `retry_after` seconds."""
        self.output = ""
        self.process.stdin.write(keys.encode())
        if retry_after and not select.select([self.process.stdout], [], [], retry_after)[0]:
            self.process.stdin.write(keys.encode())

    def wait_for(self, pattern: str) -> str:
        """The output since the last keys, up to the pattern."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.output, re.S)):
            assert select.select([self.process.stdout], [], [], deadline - time.monotonic())[0], self.output
            new = os.read(self.process.stdout.fileno(), 4096)
            assert new, f"it ended: {self.output}"
            self.output += new.decode(errors="replace").replace("\r\n", "\n")
        return self.output[: match.end()]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal(trained, tmp_path):
    flags = (f"--out_dir={trained}", "--device=cpu", "--interactive=True", "--max_new_tokens=12", "--seed=3")
    keyboard = Keyboard(*flags, XDG_CACHE_HOME=str(tmp_path), NO_COLOR="")
    keyboard.wait_for("type a prompt.*> ")
    keyboard.press("def \n")
    expected = sample_prompt(trained, "def ", 3)
    shown = keyboard.wait_for(f"{re.escape(expected[4:])}> ")
    assert shown.count("def ") == 1  # as typed

    keyboard.press("/max_new_tokens 100000\n")
    keyboard.wait_for("\n> ")
    keyboard.press("class\n")
    keyboard.wait_for(".{400}")  # it streams
    keyboard.press("\x03")
    keyboard.wait_for("\n> ")
    keyboard.press("half")
    keyboard.wait_for("half")
    keyboard.press("\x03", retry_after=1)  # readline ignores it while it draws a key
    keyboard.wait_for("press Ctrl-D or type /quit to quit\n> ")

    keyboard.press("/max_new_tokens 12\n")
    keyboard.wait_for("\n> ")
    keyboard.press("/temperature 0\n")
    keyboard.wait_for("\n> ")
    keyboard.press("a\\\n")
    keyboard.wait_for(r"\.\.\. ")
    keyboard.press("b\n")
    greedy = sample_prompt(trained, "a\nb", 9, "--temperature=0")
    keyboard.wait_for(f"{re.escape(greedy[3:])}> ")
    keyboard.press("/show_probs True\n")
    keyboard.wait_for("probability of each token.*> ")
    keyboard.press("a\n")
    keyboard.wait_for("\x1b\\[38;5;\\d+m.*\n> ")
    keyboard.press("/quit\n")
    assert keyboard.process.wait(timeout=60) == 0

    second = Keyboard(*flags, XDG_CACHE_HOME=str(tmp_path))
    second.wait_for("> ")
    pytest.importorskip("readline")
    assert (tmp_path / "distrogpt" / "history").read_text().count("\n") >= 10
    second.press("\x1b[A\x1b[A\n")  # the line before the last
    second.wait_for(f"{re.escape(sample_prompt(trained, 'a', 3)[1:])}> ")
    second.press("\x04")
    assert second.process.wait(timeout=60) == 0
