"""Transcribe recordings with Whisper and make a dataset of the text. data/audio/prepare.py calls `main`."""

import argparse
import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from distrogpt.audio.speech import INSTALL
from distrogpt.data.preparation.documents import Corpus, checksum, find_files
from distrogpt.data.preparation.own_text import known_tokenizer, make_dataset, new_folder, parse_options
from distrogpt.data.preparation.sources import add_text_options, argument_parser, strip_patterns
from distrogpt.data.tokenizer import END_OF_TEXT, interruptible
from distrogpt.errors import UserError, is_out_of_memory, near_name
from distrogpt.files import read_text, write_text
from distrogpt.progress import bar_size, show_wait

KINDS = (".mp3 .m4a .m4b .wav .flac .ogg .oga .opus .aac .wma .aif .aiff .mp4 .mkv .mka .webm .mov .caf .amr "
         ".3gp").split()  # fmt: skip
MODELS = (  # of faster-whisper 1.2; listed here so that --help need not import it
    "tiny, tiny.en, base, base.en, small, small.en, medium, medium.en, large-v1, large-v2, large-v3, "
    "large, distil-small.en, distil-medium.en, distil-large-v2, distil-large-v3, distil-large-v3.5, "
    "large-v3-turbo, turbo"
)
COMPUTE_TYPES = ("auto", "int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
SAMPLE_RATE = 16_000  # of Whisper's input
PAUSE = 1.0  # seconds of silence after a sentence that start a new line
ENDS_SENTENCE = re.compile(r"[.?!…\u3002\uff1f\uff01][\"'\u2019”») ]*\Z")
WHISPER = {
    "word_timestamps": True,  # segment timestamps hide the pauses
    # Whisper invents words in silence; shorter pauses are kept, as each cut may lose some words
    "vad_filter": True,
    "vad_parameters": {"min_silence_duration_ms": 3000},
    # conditioned on its previous text, Whisper can repeat itself for minutes, and a model learns that first
    "condition_on_previous_text": False,
}


class BrokenRecording(Exception):
    """A recording cannot be decoded."""


def natural_key(name: str) -> list[str | int]:
    """Sorts chapter2 before chapter10."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a number
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)]


def find_recordings(args: argparse.Namespace, folder: Path) -> dict[Path, Path]:
    """The audio files of --input in natural order, and the paths of their transcripts. The name of a
    transcript ends with a checksum of recording, model and language, so that renamed recordings are found
    again. Raises UserError."""
    known = {path.suffixes[-2]: path for path in folder.glob("[!.]*.*.txt")}
    settings, recordings = f"{model_id(args.model)} {args.language}", {}
    for path in find_files(args.input, KINDS, natural_key):
        key = f".{file_checksum(path, settings)}"
        stem = os.fsencode(path.stem)[:100].decode("utf-8", "replace")
        recordings[path] = known.get(key, folder / f"{stem}{key}.txt")
    return recordings


def model_id(model: str) -> str:
    """The name of a model; for a folder, the checksum of its model. Raises UserError if files are missing."""
    if not os.path.isdir(model):
        return model
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not os.path.isfile(os.path.join(model, name)):
            hint = (
                "convert it: ct2-transformers-converter --copy_files tokenizer.json preprocessor_config.json"
            )
            raise UserError(f"--model {model} has no {name}; {hint}")
    return str(checksum(Path(model, "model.bin")))


def file_checksum(path: Path, settings: str) -> str:
    """The checksum of a file's bytes and the settings, in hexadecimal. Raises UserError."""
    digest = hashlib.blake2b(settings.encode(errors="surrogateescape"), digest_size=6)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()


@contextmanager
def open_audio(path: Path) -> Iterator[Any]:
    """PyAV's container of a recording. Raises BrokenRecording, also for errors inside the block."""
    import av

    alone = {"protocol_whitelist": "none"}  # playlists, ffconcat and SDP would open other files and addresses
    try:
        # an open file, as FFmpeg would take some names for addresses
        with open(path, "rb") as file, av.open(file, options=alone, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise BrokenRecording("it has no audio")
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # FFmpeg's error for a protocol that is not allowed
            raise BrokenRecording("it is damaged, or a list of other files: give these files") from None
        raise BrokenRecording(getattr(error, "strerror", None) or str(error)) from None


def audio_seconds(path: Path) -> float:
    """The duration in the file's header; 0 if there is none or the file is broken."""
    with suppress(BrokenRecording), open_audio(path) as container:
        return (container.duration or 0) / 1e6
    return 0.0


def read_samples(path: Path) -> Iterator[np.ndarray]:
    """The audio in pieces (N,) of int16. Damaged packets are skipped. Raises BrokenRecording."""
    import av

    resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
    with open_audio(path) as container:
        for packet in container.demux(container.streams.audio[0]):
            with suppress(av.InvalidDataError):
                for frame in packet.decode():
                    frame.pts = None  # or the resampler would stop at gaps between frames
                    yield from (piece.to_ndarray()[0] for piece in resampler.resample(frame))
        yield from (piece.to_ndarray()[0] for piece in resampler.resample(None))


def read_parts(path: Path, part_seconds: float = 600, cut_seconds: float = 60) -> Iterator[np.ndarray]:
    """The audio in parts (N,) of float32 from -1 to 1. Each is cut at the quietest place near its end. A part
    of the default length needs about 1 GB; if the process is killed, at most one is lost. Raises
    BrokenRecording."""
    pieces, size = [np.empty(0, np.int16)], 0
    for piece in chain(read_samples(path), [None]):
        if piece is not None:
            pieces.append(piece)
            size += len(piece)
        if piece is None or size >= part_seconds * SAMPLE_RATE:
            part = np.concatenate(pieces)
            end = len(part) if piece is None else quietest_position(part, cut_seconds)
            if not end:
                raise BrokenRecording("it has no audio")
            yield part[:end].astype(np.float32) / 32768
            pieces, size = [part[end:]], len(part) - end


def quietest_position(audio: np.ndarray, cut_seconds: float) -> int:
    """The middle of the quietest half second at the end of the audio (N,)."""
    first, half = max(0, len(audio) - int(cut_seconds * SAMPLE_RATE)), SAMPLE_RATE // 2
    sums = np.cumsum(np.square(audio[first:], dtype=np.float64))  # (n,)
    return first + int((sums[half:] - sums[:-half]).argmin()) + half // 2


def load_model(args: argparse.Namespace) -> Any:
    """The Whisper model, from its folder, the hub's cache or the hub. Raises UserError."""
    try:
        with show_wait("loading faster-whisper"):
            import av  # noqa: F401  comes with it, and decodes the recordings
            import onnxruntime  # noqa: F401  for its voice activity detection
            from faster_whisper import WhisperModel, available_models
    except ImportError as error:
        raise UserError(f"transcribing needs faster-whisper ({error}); {INSTALL}") from None
    folder = args.model
    if not os.path.isdir(folder):
        sizes = available_models()
        if folder not in sizes and not re.fullmatch(r"[\w-]+/[\w.-]+", folder):
            near = near_name(folder, sizes)
            hint = f"did you mean {near}?" if near else f"give a folder or one of {', '.join(sizes)}"
            raise UserError(f"--model {folder} is neither a folder nor a Whisper model; {hint}")
        folder = download(folder)
    options = {"device": args.device, "compute_type": args.compute_type, "cpu_threads": max(1, args.workers)}
    try:
        with show_wait("loading the Whisper model"):
            model = WhisperModel(folder, local_files_only=True, **options)
    except Exception as error:  # of any kind: a damaged file, a missing device
        if is_out_of_memory(error):
            raise
        hint = "try --device cpu or another --model"
        raise UserError(f"--model {args.model} cannot be loaded ({error}); {hint}") from None
    if args.language not in (None, *model.supported_languages):
        known = ", ".join(sorted(model.supported_languages))
        raise UserError(f"--language {args.language} is not supported by {args.model}; give one of {known}")
    return model


def download(name: str) -> str:
    """The folder of a model in the hub's cache, downloaded if it is not there. Raises UserError."""
    from faster_whisper import download_model

    with suppress(Exception):  # the hub's client has several errors for a missing model
        folder = download_model(name, local_files_only=True)
        if os.path.isfile(os.path.join(folder, "model.bin")):
            return folder
    print(f"downloading the Whisper model {name}", flush=True)
    try:
        return download_model(name)
    except Exception as error:
        hint = "download it on another machine and give its folder: --model FOLDER"
        raise UserError(f"cannot download the Whisper model {name} ({str(error)[:100]}); {hint}") from None


def transcribe(parts: Iterable[np.ndarray], path: Path, model: Any, language: str | None) -> Iterator[float]:
    """Write the transcript of a recording's parts to `path`; yields the seconds that are done. The text of
    each part is saved in its own file, so that a killed process can be resumed."""
    paths, begin = [], 0.0
    path.parent.mkdir(exist_ok=True)
    for number, audio in enumerate(parts):
        paths.append(path.with_suffix(f".{number}.part"))
        if not paths[-1].exists():
            segments, words = model.transcribe(audio, language=language, **WHISPER)[0], []
            for segment in segments:
                words += segment.words
                yield begin + segment.end
            write_text(paths[-1], text_of_words(words))
        begin += len(audio) / SAMPLE_RATE
        yield begin
    text = "".join(part.read_text(encoding="utf-8") for part in paths).strip()
    write_text(path, text + "\n" if text else "")
    for part in paths:
        part.unlink()


def text_of_words(words: Iterable[Any]) -> str:
    """The words as text, with a new line after each sentence that a pause follows. An unfinished sentence
    ends in a space."""
    lines, end = [""], 0.0
    for word in words:
        if word.start - end >= PAUSE and ENDS_SENTENCE.search(lines[-1]):
            lines.append("")
        lines[-1] += word.word
        end = word.end
    text = "\n".join(line.strip() for line in lines)
    separator = "\n" if ENDS_SENTENCE.search(text) else " "
    return text + separator if text else ""


def progress_bar(seconds: float) -> Any:
    """A progress bar for recordings of this length; hidden below a minute, or if stderr is not a terminal."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {n:.2f} of {total:.2f} h{postfix}, {remaining} left"
    hidden = seconds < 60 or not sys.stderr.isatty()
    return tqdm(total=seconds / 3600, bar_format=form, disable=hidden, **bar_size())


def transcribe_all(recordings: dict[Path, Path], args: argparse.Namespace) -> None:
    """Write the transcripts that are missing. Raises UserError, at the end if recordings are broken."""
    missing = [path for path, transcript in recordings.items() if not transcript.exists()]
    if not missing:
        return
    model, broken, done = load_model(args), [], 0.0
    if finished := len(recordings) - len(missing):
        print(f"{finished} of {len(recordings)} recordings are already transcribed", flush=True)
    with show_wait("reading the recordings"):
        lengths = [audio_seconds(path) for path in missing]
    with progress_bar(sum(lengths)) as bar:
        for path, length in zip(missing, lengths, strict=True):
            name, transcript = os.fsencode(path.name).decode("utf-8", "replace"), recordings[path]
            waits = show_wait(f"transcribing {name}") if bar.disable else nullcontext()
            try:
                with waits:
                    for seconds in transcribe(read_parts(path), transcript, model, args.language):
                        show_progress(bar, done + min(seconds, length))
                count = len(transcript.read_text(encoding="utf-8").split())
                line = f"{name}: {count:,} words" if count else f"note: {name}: no speech was found"
            except BrokenRecording as error:
                broken.append(name)
                line = f"note: {name} cannot be decoded ({error})"
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                hint = "try --device cpu or another --compute_type"
                raise UserError(f"the model cannot run ({error}); {hint}") from None
            done += length
            bar.write(line, file=sys.stderr)
    if broken and not args.skip_broken:
        hint = f"repair them, or leave them out with --skip_broken: {', '.join(broken)[:300]}"
        raise UserError(f"{len(broken)} of {len(recordings)} recordings cannot be decoded; {hint}")


def show_progress(bar: Any, seconds: float) -> None:
    """Advance the bar to this position."""
    speed = seconds / max(1e-9, bar.format_dict["elapsed"])
    bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
    bar.update(seconds / 3600 - bar.n)


def gather(transcripts: Iterable[Path], path: Path) -> None:
    """Join all transcripts in one file, in order. Raises UserError if all are empty."""
    existing = [transcript for transcript in transcripts if transcript.exists()]
    texts = [text for transcript in existing if (text := read_text(transcript)).strip()]
    if not texts:
        raise UserError("no speech was found in any recording; listen to them, or try a larger --model")
    write_text(path, END_OF_TEXT.join(texts))
    for part in existing[0].parent.glob("*.part"):  # left by killed processes
        part.unlink()
    print(f"{path}: {sum(len(text.split()) for text in texts):,} words from {len(texts):,} recordings")


def main(description: str) -> None:
    """The command of data/audio/prepare.py."""
    parser = argument_parser(sys.argv[0], description)
    add = parser.add_argument
    about_input = f"recordings: files, folders or globs ({', '.join(KINDS)})"
    add("--input", nargs="+", type=os.path.expanduser, metavar="PATH", help=about_input)
    about_model = f"Whisper model: a folder in CTranslate2's format, or {MODELS} (default: small)"
    add("--model", type=os.path.expanduser, default="small", help=about_model)
    language_help = "language of the recordings, such as en or de (default: detected)"
    add("--language", metavar="CODE", help=language_help)
    device_help = "device that Whisper runs on (default: auto)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=device_help)
    type_help = "dtype that Whisper computes in (default: auto, the fastest)"
    add("--compute_type", default="auto", choices=COMPUTE_TYPES, help=type_help)
    add("--skip_broken", action="store_true", help="skip recordings that cannot be decoded")
    add_text_options(parser)
    args = parse_options(parser)
    patterns, text = strip_patterns(args), args.output / "transcripts.txt"
    known_tokenizer(args.tokenizer)  # raises UserError before hours of work
    with new_folder(args):
        with show_wait("reading the recordings"):
            recordings = find_recordings(args, args.output / "transcripts")
        # Ctrl-C works during a long call of Whisper; files are written atomically
        with interruptible():
            transcribe_all(recordings, args)
        gather(recordings.values(), text)
        make_dataset(args, Corpus([text], strip=patterns))
