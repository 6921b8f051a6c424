"""Speech in and out, with fakes of the optional packages; test_audio_circle.py has the real ones."""

import sys
import types
import wave
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, assert_user_error, prepare_here, sample_here, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

from distrogpt.audio import transcription
from distrogpt.audio.speech import (
    MAX_CHARS,
    TEXT_PAUSE,
    load_voice,
    split_chunks,
    split_paragraphs,
    wav_bytes,
)
from distrogpt.data.meta import read_meta
from distrogpt.data.tokenizer import END_OF_TEXT, from_description
from distrogpt.errors import UserError

SCRIPT = "data/audio/prepare.py"
BOOK = {"chapter10.wav": 30, "Chapter2.wav": 20, "chapter1.wav": 10}  # loudness, by which the fake tells them


def write_wav(path: Path, samples: np.ndarray, rate: int = transcription.SAMPLE_RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(rate)
        wav.writeframes(samples.astype("<i2").tobytes())


def read_wav(path: Path) -> tuple[int, np.ndarray]:
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth()) == (1, 2)
        return wav.getframerate(), np.frombuffer(wav.readframes(wav.getnframes()), "<i2")


def transcript(loudness: int) -> str:
    """The text of a recording: two lines, as there is a pause between its sentences."""
    return f"Here speaks number {loudness}, and nobody else.\nThat was number {loudness}."


class Word(types.SimpleNamespace):
    """A word with its times."""


@pytest.fixture
def whisper(monkeypatch):
    """Fakes of faster_whisper and av, which read .wav alone; the loudness of each transcribed recording."""
    transcribed: list[int] = []

    class Model:
        supported_languages = ("en", "de")

        def __init__(self, folder, **options):
            self.options = options

        def transcribe(self, sound, language, **options):
            assert sound.dtype == np.float32 and options["vad_filter"] and options["word_timestamps"]
            loudness = round(float(np.abs(sound).max()) * 32768)
            transcribed.append(loudness)
            if loudness == 99:
                raise KeyboardInterrupt
            at, words = 0.5, []
            for line in transcript(loudness).split("\n") if loudness else []:
                for text in line.split():
                    words.append(Word(word=f" {text}", start=at, end=at + 0.2))
                    at += 0.7  # no pause within a sentence
                at += 1.0
            return iter([Word(words=words, end=at)] if words else []), None

    class FFmpegError(Exception):
        """As in av."""

    class InvalidDataError(FFmpegError, ValueError):
        """As in av."""

    class Frame:
        def __init__(self, samples):
            self.samples = samples

        def to_ndarray(self):
            return self.samples[None]

    class Container:
        duration = None

        def __init__(self, file, options, metadata_errors):
            try:
                with wave.open(file) as wav:
                    self.samples = np.frombuffer(wav.readframes(wav.getnframes()), "<i2")
            except (wave.Error, EOFError):
                raise InvalidDataError("Invalid data found") from None
            self.streams = types.SimpleNamespace(audio=[0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def demux(self, stream):
            for at in range(0, len(self.samples), 1000):
                yield types.SimpleNamespace(decode=lambda a=at: [Frame(self.samples[a : a + 1000])])

    resampler = types.SimpleNamespace(resample=lambda frame: [frame] if frame else [])
    fakes = {
        "faster_whisper": {"WhisperModel": Model, "available_models": lambda: ["tiny", "small"]},
        "av": {"open": Container, "FFmpegError": FFmpegError, "InvalidDataError": InvalidDataError}
        | {"AudioResampler": lambda *format: resampler},
        "onnxruntime": {},
    }
    for name, contents in fakes.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return transcribed


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that looks like a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def book(tmp_path) -> Path:
    """A folder of recordings, of a second each."""
    for name, loudness in BOOK.items():
        write_wav(tmp_path / "book" / name, np.full(transcription.SAMPLE_RATE, loudness))
    (tmp_path / "book" / "cover.jpg").write_bytes(b"no sound")
    (tmp_path / "book" / "._chapter1.wav").write_bytes(b"which macOS puts beside a file")
    return tmp_path / "book"


@pytest.fixture
def prepare(tmp_path, model):
    """prepare(*inputs_and_options): run the script with that model into one folder."""
    return lambda *words: prepare_here(
        SCRIPT, "--output", tmp_path / "out", "--model", model, "--workers=1", "--input", *words
    )


def documents(folder: Path) -> list[str]:
    return (folder / "transcripts.txt").read_text(encoding="utf-8").split(END_OF_TEXT)


def test_recordings_become_a_dataset_in_their_natural_order(whisper, book, prepare, tmp_path):
    write_wav(book / "interval.wav", np.zeros(1000))
    done = prepare(book, "--tokenizer=byte", "--val_fraction=0.3", "--strip_lines=^That was number 2")
    assert done.returncode == 0, done.stderr
    assert whisper == [10, 20, 30, 0] and "note: interval.wav: no speech" in done.stderr
    out = tmp_path / "out"
    assert documents(out) == [f"{transcript(loudness)}\n" for loudness in (10, 20, 30)]
    meta = read_meta(out)
    assert meta["tokenizer"] == {"kind": "byte"}  # the options of data/text/prepare.py work, too
    ids = [np.fromfile(out / f"{split}.bin", "<u2").tolist() for split in ("train", "val")]
    text = "".join(map(from_description(meta["tokenizer"]).decode, ids))
    assert [text.count(f"That was number {loudness}") for loudness in (10, 20, 30)] == [1, 0, 1]
    assert "python train.py --dataset=" in done.stdout
    assert_user_error(prepare(book), "has a dataset already", "--overwrite")
    assert prepare(book, "--overwrite").returncode == 0 and len(whisper) == 4  # transcripts are reused
    assert read_meta(out)["tokenizer"]["kind"] == "char"


def test_only_what_is_new_is_transcribed(whisper, book, prepare, tmp_path):
    write_wav(book / "chapter3.wav", np.full(1000, 99))
    killed = prepare(book)
    assert killed.returncode == 130 and "Traceback" not in killed.stderr
    assert whisper == [10, 20, 99]  # in natural order, whatever the case of letters
    (tmp_path / "out" / "transcripts" / "chapter3.0.part.0123.part").write_text("half a li")  # of the kill
    write_wav(book / "chapter3.wav", np.full(1000, 25))
    assert prepare(book).returncode == 0 and whisper[3:] == [25, 30]
    assert documents(tmp_path / "out") == [f"{transcript(loudness)}\n" for loudness in (10, 20, 25, 30)]
    assert {path.suffix for path in (tmp_path / "out" / "transcripts").iterdir()} == {".txt"}
    write_wav(book / "chapter1.wav", np.full(transcription.SAMPLE_RATE, 11))  # of the same size
    (mended,) = (tmp_path / "out" / "transcripts").glob("Chapter2.*")
    mended.write_text("I mended this by hand.\n")
    for name in (f"._{mended.name}", "._chapter 1.txt", "notes.txt", "my.notes.txt"):  # of others, and macOS
        (mended.parent / name).write_text("no transcript")
    moved = book.rename(tmp_path / "elsewhere")
    (moved / "chapter10.wav").rename(moved / "chapter0.wav")
    assert prepare(moved, "--overwrite").returncode == 0 and whisper[5:] == [11]
    assert documents(tmp_path / "out") == [
        *(f"{transcript(30)}\n", f"{transcript(11)}\n", "I mended this by hand.\n", f"{transcript(25)}\n")
    ]
    assert prepare(moved, "--overwrite", "--language=de").returncode == 0 and len(whisper) == 10
    (tmp_path / "model" / "model.bin").write_text("another one")
    assert prepare(moved, "--overwrite").returncode == 0 and len(whisper) == 14


def test_a_long_recording_is_cut_where_it_is_quiet_and_resumes_after_a_kill(whisper, tmp_path):
    rate = transcription.SAMPLE_RATE
    sound = np.full(25 * rate, 40)
    sound[int(7.2 * rate) : int(8.4 * rate)] = 0  # near the end of the first ten seconds
    sound[10 * rate :] = 99  # at which the fake is interrupted
    write_wav(tmp_path / "long.wav", sound)
    parts = list(transcription.read_parts(tmp_path / "long.wav", part_seconds=10, cut_seconds=4))
    assert 7.2 <= len(parts[0]) / rate <= 8.4 and max(map(len, parts)) <= 10 * rate + 1000
    np.testing.assert_array_equal(np.concatenate(parts), (sound / 32768).astype(np.float32))
    path, model = tmp_path / "t" / "long.1.txt", sys.modules["faster_whisper"].WhisperModel("")
    with pytest.raises(KeyboardInterrupt):
        list(transcription.transcribe(parts, path, model, None))
    assert whisper == [40, 99] and not path.exists()
    (tmp_path / "t" / "long.1.1.part").write_text("and no pause")  # as if it had come further
    whisper.clear()
    model.transcribe = lambda *sound, **options: (iter([]), None)
    seconds = list(transcription.transcribe(parts, path, model, None))
    assert whisper == [] and path.read_text() == transcript(40) + "\nand no pause\n"
    assert seconds == sorted(seconds) and seconds[-1] == 25
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["long.1.txt"]


def test_a_sentence_that_was_cut_stays_in_its_line():
    def text(*words):
        return transcription.text_of_words(
            Word(word=f" {word}", start=start, end=start + 0.5) for start, word in words
        )

    assert text((0, "Who"), (3, "waits?"), (3.8, "You."), (9, "Me")) == "Who waits? You.\nMe "
    assert text((0, "That"), (1, "is"), (2, "all.")) == "That is all.\n" and text() == ""


def test_broken_recordings_are_reported_after_the_others(whisper, book, prepare, tmp_path):
    (book / "chapter2.mp3").write_text("not music")
    write_wav(book / "empty.wav", np.zeros(0))
    done = prepare(book)
    assert_user_error(done, "2 of 5", "chapter2.mp3, empty.wav", "--skip_broken")
    assert "note: chapter2.mp3 cannot be decoded (Invalid data found)" in done.stderr
    assert whisper == [10, 20, 30] and not (tmp_path / "out" / "train.bin").exists()
    done = prepare(book, "--skip_broken")
    assert done.returncode == 0 and len(documents(tmp_path / "out")) == 3 and len(whisper) == 3


def test_lists_of_other_files_are_not_recordings(tmp_path):
    pytest.importorskip("av", reason="PyAV comes with faster-whisper")
    write_wav(tmp_path / "secret.wav", np.full(transcription.SAMPLE_RATE, 50))
    seconds = transcription.audio_seconds(tmp_path / "secret.wav")
    lists = {
        "concat": "ffconcat version 1.0\nfile secret.wav\nfile secret.wav\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    }
    for name, text in lists.items():
        (tmp_path / f"{name}.mp3").write_text(text)
        words = "a list of other files" if name == "concat" else "nvalid"
        with pytest.raises(transcription.BrokenRecording, match=words):
            next(transcription.read_samples(tmp_path / f"{name}.mp3"))
    samples = sum(map(len, transcription.read_parts(tmp_path / "secret.wav")))
    assert seconds == 1 and samples == transcription.SAMPLE_RATE


def test_help_lists_the_models_of_the_package():
    package = pytest.importorskip("faster_whisper", reason="optional")
    assert sorted(transcription.MODELS.split(", ")) == sorted(package.available_models())


def test_the_bar_is_for_long_recordings_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("tqdm")

    def stderr(seconds: float, terminal: bool) -> str:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        with transcription.progress_bar(seconds) as bar:
            transcription.show_progress(bar, seconds / 2)
            bar.write("a line", file=sys.stderr)
        return capsys.readouterr().err

    assert stderr(40, True) == stderr(600, False) == "a line\n"
    assert "0.08 of 0.17 h, " in stderr(600, True) and "0.50 of 1.00 h, " in stderr(3600, True)


def test_mistakes_are_reported_before_any_transcription(whisper, book, prepare, model, tmp_path, monkeypatch):
    assert_user_error(prepare(tmp_path / "none"), "none does not exist", ".m4b")
    assert_user_error(prepare(model), "has no supported files")
    assert_user_error(prepare(book, "--tokenizer=bpe"), "write bpe:4096")
    assert_user_error(prepare(book, "--tokenizer=nosuch"), "unknown --tokenizer nosuch")
    assert_user_error(prepare(book, "--strip_lines=("), "regular expression")
    assert_user_error(prepare(book, "--language=english"), "give one of de, en")
    assert_user_error(prepare(book, "--model=huge"), "tiny, small")
    assert_user_error(prepare(book, "--model=tinny"), "did you mean tiny?")
    assert_user_error(prepare(book, "--device=gpu"), "--device")
    assert_user_error(prepare(book, f"--model={book}"), "no model.bin", "ct2-transformers-converter")
    write_wav(tmp_path / "silence.wav", np.zeros(1000))
    assert_user_error(prepare(tmp_path / "silence.wav"), "no speech was found in any")
    assert whisper == [0]
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    missing = prepare(book)
    assert_user_error(missing, "needs faster-whisper", "pip install -r requirements-audio.txt")
    assert not (tmp_path / "out" / "train.bin").exists()


def test_a_model_that_is_not_in_the_cache_without_a_network(whisper, book, prepare, monkeypatch):
    def nothing(name, local_files_only=False):
        raise OSError("not in the cache")

    monkeypatch.setattr(sys.modules["faster_whisper"], "download_model", nothing, raising=False)
    assert_user_error(prepare(book, "--model=small"), "Whisper model small", "--model FOLDER")


@pytest.fixture
def piper(monkeypatch, tmp_path) -> str:
    """A fake voice: a tenth of a second for each sentence, as loud as it has characters."""

    class PiperVoice:
        config = types.SimpleNamespace(sample_rate=8000)

        @staticmethod
        def load(path):
            return PiperVoice()

        def synthesize(self, text):
            for sentence in filter(None, text.split(".")):
                samples = np.full(800, len(sentence), "<i2")
                yield types.SimpleNamespace(audio_int16_bytes=samples.tobytes())

    module = types.ModuleType("piper")
    module.PiperVoice, module.AudioChunk = PiperVoice, object
    monkeypatch.setitem(sys.modules, "piper", module)
    for name in ("voice.onnx", "voice.onnx.json"):
        (tmp_path / name).write_text("{}")
    return str(tmp_path / "voice.onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The flag of a checkpoint that writes some letters."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("abcdefgh. " * 200)
    done = prepare_here("data/text/prepare.py", "--input", folder / "text.txt", "--output", folder)
    assert done.returncode == 0, done.stderr
    train_here(*TINY, f"--dataset={folder}", f"--out_dir={folder / 'out'}", "--max_iters=1")
    return f"--out_dir={folder / 'out'}"


def test_samples_are_spoken_one_after_another(run, piper, tmp_path):
    words = (run, "--start=abc abc.", "--max_new_tokens=3", "--temperature=0", f"--voice={piper}")
    alone = sample_here(*words, f"--speak={tmp_path / 'a.wav'}", "--num_samples=1")
    assert alone.returncode == 0 and "a.wav: 0." in alone.stderr and "voice.onnx" in alone.stderr
    rate, one = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and one[:800].tolist() == [len("abc abc")] * 800
    done = sample_here(*words, f"--speak={tmp_path / 'b.wav'}", "--num_samples=2")
    assert done.returncode == 0 and done.stdout.count("abc abc.") == 2
    _, two = read_wav(tmp_path / "b.wav")
    np.testing.assert_array_equal(two, np.concatenate([one, np.zeros(int(TEXT_PAUSE * 8000)), one]))
    assert sorted(path.name for path in tmp_path.glob("*.wav*")) == ["a.wav", "b.wav"]


def test_speaking_is_checked_before_the_model_is_loaded(piper, run, tmp_path, monkeypatch):
    nowhere, voice = f"--out_dir={tmp_path / 'none'}", f"--voice={piper}"
    wav = f"--speak={tmp_path / 'out.wav'}"
    assert_user_error(
        sample_here(nowhere, f"--speak={tmp_path / 'none' / 'o.wav'}", voice), "cannot be written"
    )
    assert_user_error(sample_here(nowhere, "--speak=notes.txt", voice), "does not end with .wav")
    (tmp_path / "folder.wav").mkdir()
    assert_user_error(sample_here(nowhere, f"--speak={tmp_path / 'folder.wav'}", voice), "cannot be written")
    assert_user_error(sample_here(nowhere, wav, "--voice=nosuch.onnx"), "nosuch.onnx is not a file")
    monkeypatch.setitem(sys.modules, "piper", None)
    assert_user_error(sample_here(nowhere, wav, voice), "piper-tts", "pip install -r requirements-audio.txt")
    monkeypatch.setitem(sys.modules, "pyttsx3", None)
    assert_user_error(sample_here(nowhere, wav), "pyttsx3", "--voice=NAME.onnx for piper-tts")
    for wrong in ((wav, "--interactive=True"), (voice,)):
        assert_user_error(sample_here(nowhere, *wrong), "speak")
    assert not (tmp_path / "out.wav").exists()


def test_nothing_to_speak_leaves_the_old_file(run, piper, tmp_path):
    (tmp_path / "o.wav").write_bytes(b"old")
    words = (
        run,
        "--start=... ",
        "--max_new_tokens=1",
        "--stop=a",
        "--stop=b",
        "--temperature=0",
        "--echo=True",
    )
    letters = [f"--stop={char}" for char in "cdefgh"]
    done = sample_here(*words, *letters, f"--voice={piper}", f"--speak={tmp_path / 'o.wav'}")
    assert_user_error(done, "the text has nothing to speak")
    assert "..." in done.stdout and (tmp_path / "o.wav").read_bytes() == b"old"
    with pytest.raises(UserError, match="nothing"):
        wav_bytes("---\n\n***", load_voice(piper))


def test_a_voice_of_the_system_speaks_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "pyttsx3.py").write_text(
        "import wave\n"
        "class Engine:\n"
        "    def save_to_file(self, text, path):\n"
        "        print('Audio saved')\n"
        "        with wave.open(path, 'wb') as wav:\n"
        "            wav.setparams((1, 2, 9000, 0, 'NONE', ''))\n"
        "            wav.writeframes(b'ab' * 9 * len(text))\n"
        "    def runAndWait(self): pass\n"
        "init = Engine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    voice = load_voice()
    (tmp_path / "o.wav").write_bytes(wav_bytes("Hello", voice))
    assert (read_wav(tmp_path / "o.wav")[0], len(read_wav(tmp_path / "o.wav")[1])) == (9000, 45)
    (tmp_path / "pyttsx3.py").write_text("def init(): raise RuntimeError('eSpeak is not installed')")
    with pytest.raises(UserError, match=r"eSpeak is not installed.*apt install espeak-ng.*--voice=NAME.onnx"):
        load_voice()


def test_the_text_that_is_spoken():
    text = "# A *title*\nSome **bold** [link](http://x.y/z), wrapped\nhere. Dr. No!\n- item\n"
    text += "---\n\x00[[x]] \ud83d?"
    assert [*split_paragraphs(text)] == ["A title", "Some bold link , wrapped here. Dr. No!", "item", "x ?"]
    long = "One sentence of some length. " * 40
    assert " ".join(split_chunks(long)).split() == long.split()
    assert all(len(chunk) <= MAX_CHARS and chunk.rstrip().endswith(".") for chunk in split_chunks(long))
    assert [len(chunk) for chunk in split_chunks("x" * 1000)] == [MAX_CHARS, MAX_CHARS, 1000 - 2 * MAX_CHARS]


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(codec=None), st.sampled_from(".\n -#[]()*x7"))))
def test_any_text_can_be_spoken(text):
    for paragraph in split_paragraphs(text):
        for chunk in split_chunks(paragraph):
            assert len(chunk) <= MAX_CHARS and any(map(str.isalnum, chunk))
            assert "\0" not in chunk.encode("utf-8").decode() and "[[" not in chunk
