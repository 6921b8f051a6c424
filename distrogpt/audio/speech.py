"""Text to speech: into a wav file, by a Piper voice (piper-tts) or by the system's own (pyttsx3).

`voice = load_voice("voice.onnx")` once, then `speak(texts, voice, "out.wav")` and `wav_bytes(text, voice)` as
often as needed, from any thread.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
import wave
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from distrogpt.checkpoint import atomic_write, first_line
from distrogpt.errors import UserError, is_out_of_memory, writable

LONGEST = 400  # characters that a voice gets at once: its memory grows with them
AFTER_SENTENCE, AFTER_PARAGRAPH, BETWEEN_TEXTS = 0.3, 1.2, 2.0  # seconds of silence
LARGEST = (1 << 32) - 1024  # bytes of sound, which the header of a wav file can count
INSTALL = "run: pip install -r requirements-audio.txt"
# In a process of its own: on each system it wants the main thread, and may hang or take the process with it.
SYSTEM_VOICE = """
import sys, pyttsx3
engine = pyttsx3.init()
engine.save_to_file(sys.stdin.buffer.read().decode(), sys.argv[1])
engine.runAndWait()
"""


class Voice(NamedTuple):
    """A voice that is ready to speak."""

    name: str
    rate: int  # samples a second
    say: Callable[[str], Iterable[bytes]]  # a short text as 16-bit samples of one channel, by sentences


def load_voice(path: str | None = None) -> Voice:
    """The Piper voice of an .onnx file; without one, or where it is `system`, the system's. UserError."""
    return system_voice() if path in (None, "system") else piper_voice(path)


def piper_voice(path: str) -> Voice:
    """The voice of NAME.onnx and NAME.onnx.json. Raises UserError."""
    if os.path.isdir(path):
        found = ", ".join(sorted(str(file) for file in Path(path).rglob("*.onnx"))[:5]) or "has none"
        raise UserError(f"the voice {path} is a folder; give an .onnx file of it ({found})")
    for file in (path, f"{path}.json"):
        if not os.path.isfile(file):
            raise UserError(f"the voice {file} is not there; give NAME.onnx, with NAME.onnx.json beside it")
    try:
        from piper import AudioChunk, PiperVoice  # noqa: F401  before 1.3, there was no AudioChunk
    except ImportError as error:
        raise UserError(f"a Piper voice needs piper-tts 1.3 or newer ({error}); {INSTALL}") from None
    try:
        voice = PiperVoice.load(path)
    except Exception as error:  # bytes from anywhere can fail in any way
        raise UserError(
            f"{path} is no Piper voice ({first_line(error)}); give the .onnx file of one"
        ) from None

    def say(text: str) -> Iterator[bytes]:
        try:
            yield from (chunk.audio_int16_bytes for chunk in voice.synthesize(text))
        except Exception as error:  # of onnxruntime, or of the phonemes of a language
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"{path} cannot say {text[:40]!r} ({first_line(error)}); try another voice"
            ) from None

    return Voice(Path(path).name, voice.config.sample_rate, say)


def system_voice() -> Voice:
    """The voice that the system has. Raises UserError where it has none."""
    if find_spec("pyttsx3") is None:
        raise UserError(f"without --voice=NAME.onnx for piper-tts, speaking needs pyttsx3; {INSTALL}")
    rate, _ = system_says("a")
    return Voice("the system's voice", rate, lambda text: [system_says(text)[1]])


def system_says(text: str) -> tuple[int, bytes]:
    """Samples a second, and the 16-bit samples. Raises UserError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path, told = os.path.join(folder, "said.wav"), b""
        command = [sys.executable, "-c", SYSTEM_VOICE, path]
        try:
            told = subprocess.run(command, input=text.encode(), capture_output=True, timeout=120).stderr
            with wave.open(path) as wav:
                if (wav.getnchannels(), wav.getsampwidth()) != (1, 2):
                    raise wave.Error("not 16-bit samples of one channel")
                return wav.getframerate(), wav.readframes(wav.getnframes())
        except (OSError, EOFError, wave.Error, subprocess.TimeoutExpired) as error:
            reason = told.decode(errors="replace").strip().split("\n")[-1] or first_line(error)
            raise UserError(
                f"pyttsx3 finds no voice of the system that speaks into files ({reason[:160]}); install one "
                "(Debian, Ubuntu: apt install espeak-ng), or give --voice=NAME.onnx for piper-tts"
            ) from None


def check_wav(path: str) -> None:
    """Raises UserError where no wav file can be written."""
    if not path.lower().endswith(".wav"):
        raise UserError(f"speak={path} is no name of a wav file; write --speak=out.wav")
    there = os.path.lexists(path)
    if there and not os.path.isfile(path):
        raise UserError(f"{path} is there and no file; give --speak another name")
    with writable(path):
        pass
    if not there:
        os.unlink(path)


def speak(texts: Iterable[str], voice: Voice, path: str) -> float:
    """Say the texts one after another into a wav file, whole or not at all; its seconds.

    Raises UserError where there is nothing to say, and MachineError where the disk takes no more.
    """
    seconds = 0.0

    def write(file: IO[bytes]) -> None:
        nonlocal seconds
        seconds = write_wav(texts, voice, file)

    atomic_write(write, Path(path))
    return seconds


def wav_bytes(text: str, voice: Voice) -> bytes:
    """What `speak` writes, for a text that is not too long: a minute takes 3 MB. Raises UserError."""
    file = io.BytesIO()
    write_wav([text], voice, file)
    return file.getvalue()


def write_wav(texts: Iterable[str], voice: Voice, file: IO[bytes]) -> float:
    """Write a wav file, a sentence at a time, with silence between them; its seconds. Raises UserError."""
    size, pause = 0, 0.0
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(voice.rate)
        for text in texts:
            for paragraph in paragraphs(text):
                for said in (sound for piece in pieces(paragraph) for sound in voice.say(piece)):
                    sound = bytes(2 * int(pause * voice.rate)) + said
                    size += len(sound)
                    if size > LARGEST:
                        raise UserError("the speech is longer than a wav file can be (4 GB); speak less")
                    wav.writeframesraw(sound)
                    pause = AFTER_SENTENCE
                pause = AFTER_PARAGRAPH if size else 0.0
            pause = BETWEEN_TEXTS if size else 0.0
        if not size:
            raise UserError("there is nothing in the text that can be spoken; give one with words")
    return size / 2 / voice.rate


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each in one line: they end at an empty line, a heading or item of a list, and
    at a line that ends with a sentence."""
    lines: list[str] = []
    for line in text.splitlines():
        marked = re.match(r"\s*(#+|>|[-*+]) ", line)
        if marked and lines:
            yield " ".join(lines)
            lines = []
        line = for_the_ear(line[marked.end() :] if marked else line)
        if line:
            lines.append(line)
        if lines and (not line or marked or re.search(r"[.!?…:;\u3002\uff01\uff1f][\"'”\u2019)]*\Z", line)):
            yield " ".join(lines)
            lines = []
    if lines:
        yield " ".join(lines)


def pieces(paragraph: str) -> Iterator[str]:
    """A paragraph in pieces of LONGEST characters or less, cut after a sentence, else between words; those
    with a letter or digit."""
    while paragraph:
        place = len(paragraph)
        if place > LONGEST:
            head = paragraph[:LONGEST]
            ends = (head.rfind(mark) + 1 for mark in (". ", "! ", "? ", "; ", ": ", *"\u3002\uff01\uff1f"))
            place = max(ends) or head.rfind(" ") + 1 or LONGEST
        piece, paragraph = paragraph[:place], paragraph[place:].lstrip()
        if any(map(str.isalnum, piece)):
            yield piece


def for_the_ear(line: str) -> str:
    """A line without marks of layout (Markdown's, rows of signs), control characters and broken ones."""
    line = "".join(" " if unicodedata.category(char)[0] == "C" or char == "\ufffd" else char for char in line)
    line = re.sub(r"\]\([^()\s]*\)", "]", line)  # where a link leads
    line = re.sub(r"([^\w\s.!?'\"])\1+", " ", line)  # -----, **, ``, [[, with which Piper's own marks begin
    return " ".join(re.sub(r"[*_`~|\\^\[\]{}<>#]", " ", line).split())
