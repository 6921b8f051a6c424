"""Text to speech in wav files, by a Piper voice (piper-tts) or by the system's own (pyttsx3)."""

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
from itertools import chain, groupby
from pathlib import Path
from typing import IO, NamedTuple

from distrogpt.checkpoint import atomic_write
from distrogpt.errors import UserError, first_line, is_out_of_memory, path_from_here
from distrogpt.files import locked

MAX_CHARS = 400  # that a voice gets at once: its memory grows with them
SENTENCE_PAUSE, PARAGRAPH_PAUSE, TEXT_PAUSE = 0.3, 1.2, 2.0  # seconds of silence between them
MAX_BYTES = (1 << 32) - 1024  # of sound, which the header of a wav file can count
INSTALL = f"run: pip install -r {path_from_here('requirements-audio.txt')}"
# In a process of its own: on some systems it needs the main thread, hangs, or takes the process with it.
SYSTEM_VOICE = """
import sys, pyttsx3
engine = pyttsx3.init()
engine.save_to_file(sys.stdin.buffer.read().decode(), sys.argv[1])
engine.runAndWait()
"""


class Voice(NamedTuple):
    """A loaded voice, for any thread."""

    name: str
    sample_rate: int
    synthesize: Callable[[str], Iterable[bytes]]  # a short text to 16-bit mono samples, by sentences


def load_voice(path: str | None = None) -> Voice:
    """The Piper voice of an .onnx file, or for None and `system` the system's voice. Raises UserError."""
    if path not in (None, "system"):
        return piper_voice(path)
    if find_spec("pyttsx3") is None:
        raise UserError(f"without --voice=NAME.onnx for piper-tts, speaking needs pyttsx3; {INSTALL}")
    sample_rate, _ = system_speech("a")
    return Voice("the system's voice", sample_rate, lambda text: [system_speech(text)[1]])


def piper_voice(path: str) -> Voice:
    """The voice of NAME.onnx and NAME.onnx.json. Raises UserError."""
    for file in (path, f"{path}.json"):
        if not os.path.isfile(file):
            raise UserError(f"the voice {file} is not a file; give NAME.onnx, with NAME.onnx.json beside it")
    try:
        from piper import AudioChunk, PiperVoice  # noqa: F401  before 1.3, there was no AudioChunk
    except ImportError as error:
        raise UserError(f"a Piper voice needs piper-tts 1.3 or newer ({error}); {INSTALL}") from None
    try:
        voice = PiperVoice.load(path)
    except Exception as error:  # any file can be given, and fail in any way
        raise UserError(f"{path} is not a Piper voice ({first_line(error)}); give its .onnx file") from None

    def synthesize(text: str) -> Iterator[bytes]:
        try:
            yield from (chunk.audio_int16_bytes for chunk in voice.synthesize(text))
        except Exception as error:  # of onnxruntime, or of a language's phonemes
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            raise UserError(f"{path} cannot speak {text[:40]!r} ({reason}); try another voice") from None

    return Voice(Path(path).name, voice.config.sample_rate, synthesize)


def system_speech(text: str) -> tuple[int, bytes]:
    """The sample rate and the 16-bit samples. Raises UserError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path, stderr = os.path.join(folder, "speech.wav"), b""
        command = [sys.executable, "-c", SYSTEM_VOICE, path]
        try:
            stderr = subprocess.run(command, input=text.encode(), capture_output=True, timeout=120).stderr
            with wave.open(path) as wav:
                if (wav.getnchannels(), wav.getsampwidth()) != (1, 2):
                    raise wave.Error("not 16-bit mono")
                return wav.getframerate(), wav.readframes(wav.getnframes())
        except (OSError, EOFError, wave.Error, subprocess.TimeoutExpired) as error:
            reason = stderr.decode(errors="replace").strip().split("\n")[-1] or first_line(error)
            hint = "install one (Debian: apt install espeak-ng), or give --voice=NAME.onnx for piper-tts"
            raise UserError(f"pyttsx3 finds no system voice for files ({reason[:160]}); {hint}") from None


def check_wav(path: str) -> None:
    """Raises UserError if no wav file can be written there."""
    if not path.lower().endswith(".wav"):
        raise UserError(f"speak={path} does not end with .wav; write --speak=out.wav")
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise UserError(f"{path} cannot be written; name another, or go elsewhere")


def speak(texts: Iterable[str], voice: Voice, path: str) -> float:
    """Write texts as speech into a wav file; its seconds. If it raises UserError or MachineError, the file is
    as before."""
    with locked(Path(f"{path}.lock"), f"another command writes {path}; wait until it ends, or name another"):
        atomic_write(lambda file: write_wav(texts, voice, file), Path(path))
    with wave.open(path) as wav:
        return wav.getnframes() / wav.getframerate()


def wav_bytes(text: str, voice: Voice) -> bytes:
    """The bytes of a wav file, some 3 MB a minute. Raises UserError."""
    file = io.BytesIO()
    write_wav([text], voice, file)
    return file.getvalue()


def write_wav(texts: Iterable[str], voice: Voice, file: IO[bytes]) -> None:
    """Write a wav file, a sentence at a time, with silence between them. Raises UserError."""
    size, pause = 0, 0.0
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, voice.sample_rate, 0, "NONE", ""))  # mono, 2 bytes a sample
        for text in texts:
            for paragraph in split_paragraphs(text):
                for sentence in chain.from_iterable(map(voice.synthesize, split_chunks(paragraph))):
                    sound = bytes(2 * int(pause * voice.sample_rate)) + sentence
                    size += len(sound)
                    if size > MAX_BYTES:
                        raise UserError("the speech is longer than a wav file can be (4 GB); speak less")
                    wav.writeframesraw(sound)
                    pause = SENTENCE_PAUSE
                pause = PARAGRAPH_PAUSE if size else 0.0
            pause = TEXT_PAUSE if size else 0.0
        if not size:
            raise UserError("there is nothing in the text that can be spoken; give one with words")


def split_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each in one line: an empty line, a heading, an item and a line that ends with
    a sentence end them."""
    lines: list[str] = []  # with an empty one between paragraphs
    for line in text.splitlines():
        marker = re.match(r"\s*(#+|>|[-*+]) ", line)
        line = strip_markup(line[marker.end() :] if marker else line)
        lines += ["", line, ""] if marker else [line]
        if re.search(r"[.!?…:;\u3002\uff01\uff1f][\"'”\u2019)]*\Z", line):
            lines.append("")
    return (" ".join(group) for filled, group in groupby(lines, key=bool) if filled)


def split_chunks(paragraph: str) -> Iterator[str]:
    """Chunks of at most MAX_CHARS, cut after sentences or words, that have a letter or digit."""
    while paragraph:
        end = len(paragraph)
        if end > MAX_CHARS:
            head = paragraph[:MAX_CHARS]
            ends = (head.rfind(mark) + 1 for mark in (". ", "! ", "? ", "; ", ": ", *"\u3002\uff01\uff1f"))
            end = max(ends) or head.rfind(" ") + 1 or MAX_CHARS
        chunk, paragraph = paragraph[:end], paragraph[end:].lstrip()
        if any(map(str.isalnum, chunk)):
            yield chunk


def strip_markup(line: str) -> str:
    """A line without Markdown, rows of signs, control characters and broken ones."""
    line = "".join(" " if unicodedata.category(char)[0] == "C" or char == "\ufffd" else char for char in line)
    line = re.sub(r"\]\([^()\s]*\)", "]", line)  # the address of a link
    line = re.sub(r"([^\w\s.!?'\"])\1+", " ", line)  # -----, **, ``, and [[, which Piper reads as its own
    return " ".join(re.sub(r"[*_`~|\\^\[\]{}<>#]", " ", line).split())
