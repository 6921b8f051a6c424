"""Recordings to text with Whisper, then to a dataset folder. data/audio/prepare.py calls `main`."""

import argparse
import difflib
import errno
import hashlib
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distrogpt.data.preparation.documents import Corpus, checksum, find_files
from distrogpt.data.preparation.own_text import known_tokenizer, make_dataset, new_folder, parse_options
from distrogpt.data.preparation.sources import add_text_options, argument_parser, strip_patterns
from distrogpt.data.preparation.writer import write_text
from distrogpt.data.tokenizer import END_OF_TEXT, interruptible
from distrogpt.errors import UserError, is_out_of_memory

KINDS = (
    *(".mp3", ".m4a", ".m4b", ".wav", ".flac", ".ogg", ".oga", ".opus", ".aac", ".wma", ".aif", ".aiff"),
    *(".mp4", ".mkv", ".mka", ".webm", ".mov", ".caf", ".amr", ".3gp"),
)
MODELS = (  # those of faster-whisper 1.2, here for --help, which is to wait for no import
    "tiny, tiny.en, base, base.en, small, small.en, medium, medium.en, large-v1, large-v2, large-v3, "
    "large, distil-small.en, distil-medium.en, distil-large-v2, distil-large-v3, distil-large-v3.5, "
    "large-v3-turbo, turbo"
)
COMPUTE_TYPES = ("auto", "int8", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
RATE = 16_000  # samples a second, which Whisper wants
PART = 600  # seconds that are in memory at once (about 1 GB), and are lost by a kill at most
CUT_WITHIN = 60  # seconds at the end of a part in which the quietest place is sought
PAUSE = 1.0  # seconds after the end of a sentence that begin a new line
WHISPER = {
    "word_timestamps": True,  # the segments' own times hide the pauses
    # silence makes Whisper invent words; shorter pauses are left, as each place that is cut may cost some
    "vad_filter": True,
    "vad_parameters": {"min_silence_duration_ms": 3000},
    # what it wrote before makes it repeat itself for minutes, which a network would learn first of all
    "condition_on_previous_text": False,
}


class Broken(Exception):
    """A recording cannot be decoded."""


class Recording(NamedTuple):
    """A file of sound and where its transcript is, or is to be."""

    path: Path
    text: Path


def natural(name: str) -> list[tuple[int, str]]:
    """What sorts chapter2 before chapter10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if number % 2 else (-1, part.casefold()) for number, part in enumerate(parts)]


def find_recordings(inputs: Iterable[str], folder: Path, model: str, language: str | None) -> list[Recording]:
    """The files that are named, in natural order, with their transcripts in the folder. Raises UserError.

    A transcript's name ends with a checksum of the recording, the model and the language: whatever else its
    name or place, it is that of this recording.
    """
    there = ((re.search(r"\.[0-9a-f]{12}(?=\.txt$)", path.name), path) for path in folder.glob("[!.]*.txt"))
    known = {key[0]: path for key, path in there if key}
    mark, found = f"{mark_of(model)} {language}", []
    for path in find_files(inputs, KINDS, natural):
        key = f".{checksum_of_all(path, mark)}"
        stem = os.fsencode(path.stem)[:100].decode("utf-8", "replace")
        found.append(Recording(path, known.get(key, folder / f"{stem}{key}.txt")))
    return found


def mark_of(model: str) -> str:
    """What tells a model from others, wherever it lies. Raises UserError where a folder has none."""
    if not os.path.isdir(model):
        return model
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not os.path.isfile(os.path.join(model, name)):
            raise UserError(
                f"--model {model} has no {name}; give a folder in CTranslate2's format (made by "
                "ct2-transformers-converter --copy_files tokenizer.json preprocessor_config.json)"
            )
    return str(checksum(Path(model, "model.bin")))


def checksum_of_all(path: Path, mark: str) -> str:
    """Of all bytes of a file and the mark, in hexadecimal. Raises UserError."""
    digest = hashlib.blake2b(mark.encode(errors="surrogateescape"), digest_size=6)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see its permissions") from None
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The recording as PyAV opens it, and no other file. Raises Broken, for errors in the block, too."""
    import av

    alone = {"protocol_whitelist": "none"}  # playlists, ffconcat, SDP name other files, and addresses
    try:
        # as a file: a name could stand for an address, too
        with open(path, "rb") as file, av.open(file, options=alone, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise Broken("there is no sound in it")
            yield container
    except (av.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # what FFmpeg says of a name that it may not open
            raise Broken("it is damaged, or a list of other files: give those") from None
        raise Broken(getattr(error, "strerror", None) or str(error)) from None


def seconds_of(path: Path) -> float:
    """How long it is, as it says itself; 0 where it does not, or is broken."""
    try:
        with opened(path) as container:
            return (container.duration or 0) / 1e6
    except Broken:
        return 0.0


def samples_of(path: Path) -> Iterator[np.ndarray]:
    """The sound, (N,) int16 at a time. What is damaged within is left out. Raises Broken."""
    import av

    resampler = av.AudioResampler("s16", "mono", RATE)
    with opened(path) as container:
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            for frame in frames:
                frame.pts = None  # gaps between frames are no concern of the resampler
                yield from (made.to_ndarray()[0] for made in resampler.resample(frame))
        yield from (made.to_ndarray()[0] for made in resampler.resample(None))


def parts_of(path: Path) -> Iterator[np.ndarray]:
    """The sound from -1 to 1, (N,) float32, in parts of PART seconds or less. Raises Broken."""
    waiting: list[np.ndarray] = []
    size, heard = 0, False
    for samples in chain(samples_of(path), [None]):
        if samples is not None:
            waiting.append(samples)
            size += len(samples)
        if samples is None or size >= PART * RATE:
            sound = np.concatenate(waiting) if waiting else np.empty(0, np.int16)
            place = len(sound) if samples is None else quietest(sound)
            if place:
                heard = True
                yield sound[:place].astype(np.float32) / 32768
            waiting, size = [sound[place:]], len(sound) - place
    if not heard:
        raise Broken("there is no sound in it")


def quietest(sound: np.ndarray) -> int:
    """Where to cut a sound, (N,): in the middle of the quietest half second of its last minute."""
    first, half = max(0, len(sound) - CUT_WITHIN * RATE), RATE // 2
    sums = np.cumsum(np.square(sound[first:], dtype=np.float64))  # (n,)
    return first + int((sums[half:] - sums[:-half]).argmin()) + half // 2


def load_model(args: argparse.Namespace) -> Any:
    """The Whisper model, from its folder, the hub's cache or the hub. Raises UserError."""
    try:
        import av  # noqa: F401  the recordings' decoder, which comes with faster-whisper
        import onnxruntime  # noqa: F401  for its detector of silence
        from faster_whisper import WhisperModel, available_models
    except ImportError as error:
        raise UserError(
            f"transcribing needs faster-whisper ({error}); run: pip install -r requirements-audio.txt"
        ) from None
    folder = args.model
    if not os.path.isdir(folder):
        if folder not in available_models() and not re.fullmatch(r"[\w-]+/[\w.-]+", folder):
            sizes = available_models()
            near = difflib.get_close_matches(folder, sizes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give a folder or one of {', '.join(sizes)}"
            raise UserError(f"--model {folder} is no folder that is there, and no size; {hint}")
        folder = fetched(folder)
    asked = {"device": args.device, "compute_type": args.compute_type, "cpu_threads": max(1, args.workers)}
    try:
        model = WhisperModel(folder, local_files_only=True, **asked)
    except Exception as error:  # a damaged file, a device that is not there: of any kind
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"--model {args.model} cannot be loaded for --device {args.device} ({error}); "
            "try --device cpu, or another --model"
        ) from None
    if args.language not in (None, *model.supported_languages):
        known = ", ".join(sorted(model.supported_languages))
        raise UserError(f"--language {args.language} is not known to {args.model}; give one of {known}")
    return model


def fetched(name: str) -> str:
    """The folder of a model of the hub, downloaded where the cache has it not. Raises UserError."""
    from faster_whisper import download_model
    from huggingface_hub import constants

    try:
        folder = download_model(name, local_files_only=True)
        if os.path.isfile(os.path.join(folder, "model.bin")):
            return folder
    except Exception:  # it is not there, which the hub's client says in several ways
        pass
    try:
        if not constants.HF_HUB_OFFLINE:
            try:  # the hub's client would try for long
                urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
            except urllib.error.HTTPError:
                pass  # it answers
            print(f"downloads the Whisper model {name}", flush=True)
        return download_model(name)
    except Exception as error:
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else str(getattr(error, "reason", error))[:100]
        raise UserError(
            f"the Whisper model {name} is not in the cache, and there is no download ({reason}); "
            "fetch it elsewhere and give its folder: --model FOLDER"
        ) from None


def transcribe(recording: Recording, model: Any, language: str | None, tell: Callable[[float], None]) -> str:
    """The text of a recording, which is written where it belongs; `tell` hears the seconds done.

    Each part's text waits in a file of its own until all are there. Raises Broken and UserError.
    """
    texts, begin = [], 0.0
    recording.text.parent.mkdir(exist_ok=True)
    for number, sound in enumerate(parts_of(recording.path)):
        part = recording.text.with_suffix(f".{number}.part")
        if not part.exists():
            write_text(part, text_of(model, sound, language, lambda seconds, b=begin: tell(b + seconds)))
        texts.append(part.read_text(encoding="utf-8"))
        begin += len(sound) / RATE
        tell(begin)
    text = joined(texts)
    write_text(recording.text, text + "\n" if text else "")
    for number in range(len(texts)):
        recording.text.with_suffix(f".{number}.part").unlink()
    return text


def text_of(model: Any, sound: np.ndarray, language: str | None, tell: Callable[[float], None]) -> str:
    """What is said in a sound, (N,). Raises UserError."""
    words = []
    try:
        segments, _ = model.transcribe(sound, language=language, **WHISPER)
        for segment in segments:
            words += segment.words
            tell(segment.end)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the model cannot run ({error}); try --device cpu or another --compute_type"
        ) from None
    return in_lines(words)


def in_lines(words: Iterable[Any]) -> str:
    """The words as text: after the end of a sentence and a pause, a new line."""
    lines, end = [""], 0.0
    for word in words:
        if word.start - end >= PAUSE and ends_sentence(lines[-1]):
            lines.append("")
        lines[-1] += word.word
        end = word.end
    return "\n".join(line.strip() for line in lines)


def ends_sentence(text: str) -> bool:
    """Whether a sentence ends here."""
    return bool(re.search(r"[.?!…\u3002\uff1f\uff01][\"'\u2019”») ]*\Z", text))


def joined(texts: Iterable[str]) -> str:
    """The texts of a recording's parts as one: a sentence that was cut goes on in its line."""
    whole = ""
    for text in filter(None, texts):
        whole += ("\n" if ends_sentence(whole) else " " if whole else "") + text
    return whole


@contextmanager
def hours_bar(recordings: list[Recording]) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """Yields say(line) and at(recording, seconds): what is done, how much faster than speech, time left.

    There is no bar for less than a minute of sound, or where nobody sees it.
    """
    from tqdm import tqdm

    lengths = {recording.path: seconds_of(recording.path) for recording in recordings}
    total, before = sum(lengths.values()), dict.fromkeys(lengths, 0.0)
    form = "{percentage:3.0f}%|{bar}| {desc}, {remaining} left"
    unseen = total < 60 or not sys.stderr.isatty()
    with tqdm(
        total=total, desc=share_of(0, total), bar_format=form, disable=unseen, dynamic_ncols=True
    ) as bar:

        def at(recording: Recording, seconds: float) -> None:
            if unseen:
                return
            before[recording.path] = min(seconds, lengths[recording.path])
            bar.n = sum(before.values())
            speed = bar.n / max(1e-9, bar.format_dict["elapsed"])
            about = f"{share_of(bar.n, total)}, {speed:.1f} times as fast as speech"
            bar.set_description_str(about, refresh=False)
            bar.update(0)

        yield lambda line: bar.write(line, file=sys.stderr), at


def share_of(seconds: float, total: float) -> str:
    """How much of the sound is done, in hours, or below one in minutes and seconds."""
    if total >= 3600:
        return f"{seconds / 3600:.2f} of {total / 3600:.2f} h"
    return " of ".join(f"{int(time) // 60:02}:{int(time) % 60:02}" for time in (seconds, total))


def transcribe_all(recordings: list[Recording], args: argparse.Namespace) -> None:
    """Make the transcripts that are not there yet. Raises UserError; with broken recordings at the end."""
    todo = [recording for recording in recordings if not recording.text.exists()]
    if not todo:
        return
    model, broken = load_model(args), []
    if len(todo) < len(recordings):
        there = len(recordings) - len(todo)
        print(f"{there} of {len(recordings)} recordings have their transcripts", flush=True)
    with hours_bar(todo) as (say, at):
        for recording in todo:
            name = printable(recording.path.name)
            try:
                text = transcribe(recording, model, args.language, lambda s, r=recording: at(r, s))
                say(f"{name}: {len(text.split()):,} words" if text else f"note: {name}: no speech was found")
            except Broken as error:
                broken.append(name)
                say(f"note: {name} cannot be decoded ({error})")
    if broken and not args.skip_broken:
        raise UserError(
            f"{len(broken)} of {len(recordings)} recordings cannot be decoded: {', '.join(broken)[:300]}; "
            "mend them, or go without by --skip_broken (the transcripts of the others are kept)"
        )


def printable(name: str) -> str:
    """A file's name without what UTF-8 cannot write."""
    return os.fsencode(name).decode("utf-8", "replace")


def gather(recordings: list[Recording], path: Path) -> None:
    """Write all transcripts into one file, in their order. Raises UserError where there is none."""
    paths = [recording.text for recording in recordings if recording.text.exists()]
    texts = [text for path in paths if (text := path.read_text(encoding="utf-8")).strip()]
    if not texts:
        raise UserError("no speech was found in any recording; listen to them, or try a larger --model")
    write_text(path, END_OF_TEXT.join(texts))
    for left in paths[0].parent.glob("*.part"):  # by calls that were killed
        left.unlink()
    print(f"{path}: {sum(len(text.split()) for text in texts):,} words of {len(texts):,} recordings")


def options(description: str) -> argparse.Namespace:
    """The command line, checked before hours of work. Raises UserError."""
    parser = argument_parser(sys.argv[0], description)
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATH", help=f"recordings: files, folders, globs ({', '.join(KINDS)})")
    add("--model", default="small", help=f"a folder in CTranslate2's format, or (default: small) {MODELS}")
    add("--language", metavar="CODE", help="en, de, ...; by default what is heard first")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    add("--compute_type", default="auto", choices=COMPUTE_TYPES, help="default: auto, the fastest")
    add("--skip_broken", action="store_true", help="go without recordings that cannot be decoded")
    add_text_options(parser)
    args = parse_options(parser)
    strip_patterns(args)
    known_tokenizer(args.tokenizer)
    return args


def main(description: str) -> None:
    """What data/audio/prepare.py does."""
    args = options(description)
    with new_folder(args):
        folder = args.output / "transcripts"
        recordings = find_recordings(args.input, folder, args.model, args.language)
        with interruptible():  # Whisper is minutes in one call where it is large; what is written is whole
            transcribe_all(recordings, args)
        gather(recordings, args.output / "transcripts.txt")
        make_dataset(args, Corpus([args.output / "transcripts.txt"], strip=strip_patterns(args)))
