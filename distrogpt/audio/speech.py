"""Text to speech into WAV files, with a Piper voice (piper-tts) or the system's voice (pyttsx3)."""

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

MAX_CHARS = 400  # per call of a voice, whose memory grows with them
SENTENCE_PAUSE, PARAGRAPH_PAUSE, TEXT_PAUSE = 0.3, 1.2, 2.0  # seconds of silence between them
MAX_BYTES = (1 << 32) - 1024  # of audio: the header of a WAV file has 32 bits for it
INSTALL = f"run: pip install -r {path_from_here('requirements-audio.txt')}"
# Runs in a separate process: on some systems it needs the main thread, hangs, or crashes the process.
SYSTEM_VOICE = """
import sys, pyttsx3
engine = pyttsx3.init()
engine.save_to_file(sys.stdin.buffer.read().decode(), sys.argv[1])
engine.runAndWait()
"""


class Voice(NamedTuple):
    """A loaded voice, which any thread can use."""

    name: str
    sample_rate: int
    synthesize: Callable[[str], Iterable[bytes]]  # a short text to 16-bit mono samples, by sentences


def load_voice(path: str | None = None) -> Voice:
    """The Piper voice of an .onnx file; for None or `system`, the system's voice. Raises UserError."""
    if path not in (None, "system"):
        return piper_voice(path)
    if find_spec("pyttsx3") is None:
        raise UserError(
            f"the system's voice needs pyttsx3; {INSTALL}, or set --voice=NAME.onnx for piper-tts"
        )
    sample_rate, _ = system_speech("a")
    return Voice("the system's voice", sample_rate, lambda text: [system_speech(text)[1]])


def piper_voice(path: str) -> Voice:
    """The voice of NAME.onnx and NAME.onnx.json. Raises UserError."""
    for file in (path, f"{path}.json"):
        if not os.path.isfile(file):
            raise UserError(
                f"the voice {file} is not a file; give NAME.onnx, and put NAME.onnx.json beside it"
            )
    try:
        from piper import AudioChunk, PiperVoice  # noqa: F401  before 1.3, there was no AudioChunk
    except ImportError as error:
        raise UserError(f"a Piper voice needs piper-tts 1.3 or newer ({error}); {INSTALL}") from None
    try:
        voice = PiperVoice.load(path)
    except Exception as error:  # of any kind, as the file can be any
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
            hint = "install one (Debian: apt install espeak-ng), or set --voice=NAME.onnx for piper-tts"
            raise UserError(f"pyttsx3 found no usable system voice ({reason[:160]}); {hint}") from None


def check_wav(path: str) -> None:
    """Raises UserError unless a WAV file can be written there."""
    if not path.lower().endswith(".wav"):
        raise UserError(f"speak={path} does not end with .wav; write --speak=out.wav")
    if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise UserError(f"{path} cannot be written; choose another path")


def speak(texts: Iterable[str], voice: Voice, path: str) -> float:
    """Write texts as speech into a WAV file; returns its seconds. If it raises UserError or MachineError, an
    existing file is unchanged."""
    advice = "wait until it ends, or choose another path"
    with locked(Path(f"{path}.lock"), f"another command is writing {path}; {advice}"):
        atomic_write(lambda file: write_wav(texts, voice, file), Path(path))
    with wave.open(path) as wav:
        return wav.getnframes() / wav.getframerate()


def wav_bytes(text: str, voice: Voice) -> bytes:
    """The bytes of a WAV file, about 3 MB per minute. Raises UserError."""
    file = io.BytesIO()
    write_wav([text], voice, file)
    return file.getvalue()


def write_wav(texts: Iterable[str], voice: Voice, file: IO[bytes]) -> None:
    """Write a WAV file sentence by sentence, with silence between them. Raises UserError."""
    size, pause = 0, 0.0
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, voice.sample_rate, 0, "NONE", ""))  # mono, 2 bytes a sample
        for text in texts:
            for paragraph in split_paragraphs(text):
                for sentence in chain.from_iterable(map(voice.synthesize, split_chunks(paragraph))):
                    sound = bytes(2 * int(pause * voice.sample_rate)) + sentence
                    size += len(sound)
                    if size > MAX_BYTES:
                        raise UserError("the speech does not fit into a WAV file (4 GB); use shorter text")
                    wav.writeframesraw(sound)
                    pause = SENTENCE_PAUSE
                pause = PARAGRAPH_PAUSE if size else 0.0
            pause = TEXT_PAUSE if size else 0.0
        if not size:
            raise UserError("the text has nothing to speak; use text with words")


def split_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each as one line. A paragraph ends at an empty line, a heading, a list item,
    or a line that ends with a sentence."""
    lines: list[str] = []  # with an empty one between paragraphs
    for line in text.splitlines():
        marker = re.match(r"\s*(#+|>|[-*+]) ", line)
        line = strip_markup(line[marker.end() :] if marker else line)
        lines += ["", line, ""] if marker else [line]
        if re.search(r"[.!?…:;\u3002\uff01\uff1f][\"'”\u2019)]*\Z", line):
            lines.append("")
    return (" ".join(group) for filled, group in groupby(lines, key=bool) if filled)


def split_chunks(paragraph: str) -> Iterator[str]:
    """Chunks of at most MAX_CHARS, cut after sentences or words. Chunks without a letter or digit are left
    out."""
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
    """A line without Markdown, rows of punctuation, control characters and undecodable characters."""
    line = "".join(" " if unicodedata.category(char)[0] == "C" or char == "\ufffd" else char for char in line)
    line = re.sub(r"\]\([^()\s]*\)", "]", line)  # the address of a link
    line = re.sub(r"([^\w\s.!?'\"])\1+", " ", line)  # -----, **, ``, and [[, which Piper reads as its own
    return " ".join(re.sub(r"[*_`~|\\^\[\]{}<>#]", " ", line).split())
