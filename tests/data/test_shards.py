"""Shards: documents of any number in their order, and after any interruption the same bytes."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, assert_user_error, prepare_here, start

from distrogpt.data.meta import read_meta
from distrogpt.data.preparation.documents import Corpus, Piece, find_files
from distrogpt.data.preparation.shards import Part, ShardSettings, write_shards
from distrogpt.data.preparation.writer import encode_in_order, write_dataset
from distrogpt.data.token_stream import TokenStream
from distrogpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from distrogpt.errors import UserError

SCRIPT = "data/hub/prepare.py"
DOCUMENTS = [f"Document {n}: " + "it goes on and on, " * (n % 13) + "é" * (n % 3) for n in range(900)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The documents in three files of JSON lines."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(3):
        lines = [json.dumps({"text": text, "n": 1}) for text in DOCUMENTS[number * 300 : (number + 1) * 300]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """All documents as one stream, by hand."""
    stream: list[int] = []
    for text in DOCUMENTS:
        stream += [*text.encode(), 256]
    return np.array(stream, "<u2")


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


def stream_of(folder: Path) -> np.ndarray:
    """val, and then train."""
    files = [*sorted(folder.glob("val_*.bin")), *sorted(folder.glob("train_*.bin"))]
    return np.concatenate([np.fromfile(path, "<u2") for path in files])


def write(source: Path, folder: Path, **settings) -> None:
    corpus = Corpus(find_files([str(source)]))
    write_shards(folder, corpus, ByteTokenizer(), ShardSettings(**{"shard_tokens": 5000, **settings}))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The shards of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write(source, folder)
    return folder


def test_the_first_shard_is_val_and_all_have_their_size(whole, ids):
    files = shards_of(whole)
    count = -(-len(ids) // 5000)
    assert list(files) == [*(f"train_{n:06d}.bin" for n in range(1, count)), "val_000000.bin"]
    assert {len(content) for name, content in files.items() if name != f"train_{count - 1:06d}.bin"} == {
        10_000
    }
    assert np.array_equal(stream_of(whole), ids)
    meta = read_meta(whole)
    assert meta["tokens"] == {"val": 5000, "train": len(ids) - 5000}
    text = (ids < 256).cumsum()
    assert meta["bytes"] == {"val": text[4999], "train": text[-1] - text[4999]}
    stream = TokenStream(whole, "train", meta, 64)
    assert np.array_equal(stream.windows(np.array([0, 4990]), 20), [ids[5000:5020], ids[9990:10010]])


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_workers(workers, source, whole, tmp_path):
    write(source, tmp_path, workers=workers)
    assert shards_of(tmp_path) == shards_of(whole)


class Killed(BaseException):
    """Stands for a machine that fails at this moment."""


def test_killed_at_any_rename_it_ends_with_the_same_bytes(source, tmp_path, monkeypatch):
    """At each of the renames (shards and progress) in turn, before and after it."""
    write(source, tmp_path / "whole", shard_tokens=11_000)
    expected = shards_of(tmp_path / "whole")
    rename, calls = os.replace, 0

    def failing(*names):
        nonlocal calls
        calls += 1
        if calls == fatal and when == "before":
            raise Killed
        rename(*names)
        if calls == fatal and when == "after":
            raise Killed

    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes its time
    fatal, kills = 1, 0
    while True:
        for when in ("before", "after"):
            folder, calls = tmp_path / f"{fatal}{when}", 0
            try:
                write(source, folder, shard_tokens=11_000)
            except Killed:
                kills += 1
                newest = max((path.stat().st_mtime_ns for path in folder.glob("*.bin")), default=0)
                fatal, again = -1, fatal
                write(source, folder, shard_tokens=11_000)
                fatal = again
                kept = [path for path in folder.glob("*.bin") if path.stat().st_mtime_ns <= newest]
                assert len(kept) >= (fatal - 1) // 2 - 1  # what was there is not written again
            assert shards_of(folder) == expected and not list(folder.glob("*.tmp"))
            assert read_meta(folder) == read_meta(tmp_path / "whole")
        if calls < fatal:
            break
        fatal += 1
    assert kills > 2 * len(expected)


def test_a_tenth_of_a_small_text_is_val(source, ids, tmp_path):
    write(source, tmp_path, shard_tokens=10**8)
    assert list(shards_of(tmp_path)) == ["train_000001.bin", "val_000000.bin"]
    assert np.array_equal(stream_of(tmp_path), ids)
    meta = read_meta(tmp_path)
    assert 0.08 < meta["tokens"]["val"] / len(ids) < 0.15  # the files have more than the text
    assert meta["bytes"]["val"] == (ids[: meta["tokens"]["val"]] < 256).sum()
    val = (tmp_path / "val_000000.bin").stat()
    (tmp_path / "train_000001.bin").unlink()
    write(source, tmp_path, shard_tokens=10**8)
    assert np.array_equal(stream_of(tmp_path), ids) and (tmp_path / "val_000000.bin").stat() == val
    write(source, tmp_path / "own", shard_tokens=10**8, val_tokens=777)
    assert read_meta(tmp_path / "own")["tokens"]["val"] == 777


def test_it_resumes_at_the_first_missing_shard(source, whole, tmp_path):
    write(source, tmp_path)
    (tmp_path / "train_000004.bin").unlink()
    os.truncate(tmp_path / "train_000006.bin", 100)
    os.utime(tmp_path / "train_000003.bin", (1, 1))
    write(source, tmp_path)
    assert shards_of(tmp_path) == shards_of(whole)
    assert (tmp_path / "train_000003.bin").stat().st_mtime == 1  # was not written again
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write(source, tmp_path)  # complete: nothing to do
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_parts_for_several_machines(source, ids, tmp_path):
    for number in (3, 1, 2):
        assert not (tmp_path / "meta.json").exists()
        write(source, tmp_path, part=Part(number, 3))
    assert np.array_equal(stream_of(tmp_path), ids)
    meta = read_meta(tmp_path)
    assert len(TokenStream(tmp_path, "train", meta, 8)) == meta["tokens"]["train"] == len(ids) - 5000
    assert len(list(tmp_path.glob("val*.bin"))) == 1
    (tmp_path / "train_00002_000001.bin").unlink()
    first = (tmp_path / "train_00001_000001.bin").stat().st_mtime_ns
    write(source, tmp_path, part=Part(2, 3))
    assert np.array_equal(stream_of(tmp_path), ids) and read_meta(tmp_path) == meta
    write(source, tmp_path, part=Part(2, 3), overwrite=True)
    assert np.array_equal(stream_of(tmp_path), ids) and read_meta(tmp_path) == meta
    assert (tmp_path / "train_00001_000001.bin").stat().st_mtime_ns == first


@pytest.mark.parametrize("overwrite", [False, True])
def test_parts_at_once(overwrite, source, ids, tmp_path):
    """Several machines on one folder, with another dataset in it that each would overwrite."""
    if overwrite:
        write(source, tmp_path, shard_tokens=3000)
    words = ("--input", source, "--tokenizer=byte", "--shard_tokens=2000", "--output", tmp_path)
    command = [sys.executable, str(REPO / SCRIPT), *map(str, words), *["--overwrite"] * overwrite]
    runs = [start([*command, f"--shard={number}/3"]) for number in (1, 2, 3)]
    for each in runs:
        out, err = each.communicate(timeout=60)
        assert each.returncode == 0, (out, err)
    assert np.array_equal(stream_of(tmp_path), ids) and read_meta(tmp_path)["tokens"]["val"] == 2000
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".bin", ".json")]


def test_two_equal_commands_at_once_write_one_dataset(source, whole, tmp_path):
    """The second waits a moment, and then says so, or finds all done."""
    words = ("--input", source, "--tokenizer=byte", "--shard_tokens=5000", "--output", tmp_path / "out")
    runs = [start([sys.executable, str(REPO / SCRIPT), *map(str, words)]) for _ in range(2)]
    for each in runs:
        _, err = each.communicate(timeout=60)
        assert each.returncode == 0 or "another prepare.py is writing to" in err.splitlines()[-1], err
    assert 0 in [each.returncode for each in runs] and shards_of(tmp_path / "out") == shards_of(whole)
    assert not list((tmp_path / "out").glob("*.lock"))


class Paused(Corpus):
    """Files that are read as soon as `go` is set."""

    go: threading.Event

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[Piece]:
        assert self.go.wait(60)
        yield from super().pieces(first, end)


@pytest.mark.parametrize("number", [1, 3])
def test_while_shards_are_written_only_other_parts_may_begin(number, source, ids, tmp_path):
    """Whole or in parts; threads stand for processes, as locks are of open files."""
    paused = Paused(find_files([str(source)]))
    paused.go = threading.Event()
    settings = ShardSettings(shard_tokens=5000, part=Part(1, number))
    first = threading.Thread(target=write_shards, args=(tmp_path, paused, ByteTokenizer(), settings))
    first.start()
    while not list(tmp_path.glob("progress*.json")) or (tmp_path / "prepare.lock").exists():
        time.sleep(0.001)
    refused = pytest.raises(UserError, match=r"another prepare\.py is writing to")
    try:
        for part in (Part(1, number), Part(2, 2)):  # the same, and one that would delete its shards
            with refused:
                write(source, tmp_path, part=part, overwrite=True)
        with refused, write_dataset(tmp_path, ByteTokenizer(), overwrite=True):
            pass
        for other in range(2, number + 1):
            write(source, tmp_path, part=Part(other, number))
    finally:
        paused.go.set()
        first.join()
    assert np.array_equal(stream_of(tmp_path), ids) and read_meta(tmp_path)["tokens"]["val"] == 5000
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("damage", ["other ids", "another shard"])
def test_a_shard_that_is_not_what_was_written_is_written_again(damage, source, whole, tmp_path, capsys):
    """Of the right length: of another run, or of a machine that failed."""
    write(source, tmp_path)
    path = tmp_path / "train_000003.bin"
    content = path.read_bytes()
    other = (tmp_path / "train_000002.bin").read_bytes()
    path.write_bytes(other if damage == "another shard" else content[:5000] + content[5002:] + b"ab")
    capsys.readouterr()
    write(source, tmp_path)
    assert f"note: {path} was changed or damaged" in capsys.readouterr().out
    assert shards_of(tmp_path) == shards_of(whole) and read_meta(tmp_path) == read_meta(whole)
    write(source, tmp_path)
    assert "is already complete" in capsys.readouterr().out


def test_progress_of_a_version_without_checksums_is_resumed(source, whole, tmp_path):
    write(source, tmp_path)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert len(progress.pop("checksums")) == len(progress["shards"]) == len(shards_of(whole))
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    (tmp_path / "train_000004.bin").unlink()
    os.utime(tmp_path / "train_000003.bin", (1, 1))
    write(source, tmp_path)
    assert shards_of(tmp_path) == shards_of(whole)
    assert (tmp_path / "train_000003.bin").stat().st_mtime == 1
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["checksums"][:4] == [None] * 4 and None not in progress["checksums"][4:]


def test_a_sample_of_so_many_tokens(source, ids, tmp_path):
    for limit in (12_345, 15_000, 400):
        write(source, tmp_path / str(limit), max_tokens=limit)
        assert np.array_equal(stream_of(tmp_path / str(limit)), ids[:limit])
    for number in (1, 2, 3):
        write(source, tmp_path / "parts", max_tokens=10_000, part=Part(number, 3))
    assert len(stream_of(tmp_path / "parts")) == 10_000


def test_memory_holds_a_few_batches_whatever_the_size():
    waiting = most = 0

    def read():
        nonlocal waiting, most
        for _ in range(400):
            waiting += 1
            most = max(most, waiting)
            yield Piece("x" * 50_000, True)

    for _ in encode_in_order(read(), ByteTokenizer(), workers=2):
        waiting -= 1
    assert 20 < most < 100  # of 400


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hub_sets_through_datasets_are_the_same(kind, whole, tmp_path):
    """A folder stands for the hub: the same code reads it as a stream."""
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    for number in range(3):
        part = Dataset.from_dict({"n": [1] * 300, "text": DOCUMENTS[number * 300 : (number + 1) * 300]})
        path = tmp_path / "set" / f"{number}.{kind}"
        part.to_json(path) if kind == "jsonl" else part.to_parquet(path)
    words = (f"--dataset={tmp_path / 'set'}", "--tokenizer=byte", "--shard_tokens=5e3")
    words = (*words, "--val_tokens=5000")
    done = prepare_here(SCRIPT, *words, f"--output={tmp_path / 'out'}", "--workers=2")
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
    assert shards_of(tmp_path / "out") == shards_of(whole)
    for number in (1, 2):
        part = (f"--shard={number}/2", f"--output={tmp_path / 'parts'}")
        assert prepare_here(SCRIPT, *words, *part).returncode == 0
    assert np.array_equal(stream_of(tmp_path / "parts"), stream_of(whole))
    done = prepare_here(SCRIPT, *words, "--strip_lines=é", f"--output={tmp_path / 'stripped'}")
    expected = [token for text in DOCUMENTS if "é" not in text for token in (*text.encode(), 256)]
    assert done.returncode == 0 and stream_of(tmp_path / "stripped").tolist() == expected
    wrong = prepare_here(SCRIPT, *words[:2], "--field=body", f"--output={tmp_path / 'no'}")
    assert_user_error(wrong, "no field 'body' (fields: ", "text")


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu", "hub"])
def test_web_sets_from_local_files_in_gpt2_bpe(name, source, gpt2_bpe, tmp_path):
    done = prepare_here(f"data/{name}/prepare.py", "--input", source, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ids = stream_of(tmp_path / "out")
    ends = np.flatnonzero(ids == 50256)
    tokenizer = GPT2Tokenizer()
    assert [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]] == DOCUMENTS


def test_mistakes(source, whole, tmp_path):
    byte = ("--tokenizer=byte", "--shard_tokens=5000", "--output", tmp_path / "out")
    out = ("--input", source, *byte)
    assert_user_error(prepare_here(SCRIPT, *byte), "--dataset")
    assert_user_error(
        prepare_here(SCRIPT, *byte, "--dataset=nobody/nothing"), "nobody/nothing", "--input PATH"
    )
    assert_user_error(prepare_here("data/openwebtext/prepare.py", *byte), "Skylion007/openwebtext", "--input")
    for wrong in ("--shard=0/2", "--shard=3/2", "--shard=x", "--shard_tokens=0", "--max_tokens=1.5"):
        assert_user_error(prepare_here(SCRIPT, *out, wrong), wrong.split("=")[0])
    assert_user_error(prepare_here(SCRIPT, *out, "--shard=1/4"), "3 files", "--shard I/N with N up to 3")
    assert_user_error(prepare_here(SCRIPT, *out, "--field=body"), "no field 'body'")
    assert prepare_here(SCRIPT, *out).returncode == 0  # what came to nothing is no dataset
    for other in ("--shard_tokens=6000", "--field=n", "--max_tokens=100", "--shard=1/2", "--tokenizer=gpt2"):
        if other != "--tokenizer=gpt2" or "TIKTOKEN_CACHE_DIR" in os.environ:
            assert_user_error(prepare_here(SCRIPT, *out, other), "another dataset", "--overwrite")
    assert shards_of(tmp_path / "out") == shards_of(whole)
    done = prepare_here(SCRIPT, *out, "--shard_tokens=6000", "--overwrite")
    assert done.returncode == 0 and (tmp_path / "out" / "train_000001.bin").stat().st_size == 12_000
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train.bin").write_bytes(b"of nanoGPT")
    assert_user_error(prepare_here(SCRIPT, *out, "--output", tmp_path / "old"), "another dataset")
    (tmp_path / "one.txt").write_text("x")
    short = (
        "--input",
        tmp_path / "one.txt",
        "--tokenizer=byte",
        "--max_tokens=1",
        "--output",
        tmp_path / "1",
    )
    assert_user_error(prepare_here(SCRIPT, *short), "of 1 tokens, none is left for train", "--val_tokens")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_keeps_what_is_written(source, whole, tmp_path, monkeypatch):
    real = open

    def full_at_shard_3(path, mode="r", **more):
        if str(path).endswith("shard.tmp") and (tmp_path / "out" / "train_000002.bin").exists() and full:
            path = "/dev/full"
        return real(path, mode, **more)

    full = True
    monkeypatch.setattr("builtins.open", full_at_shard_3)
    words = ("--input", source, "--tokenizer=byte", "--shard_tokens=5000", "--output", tmp_path / "out")
    done = prepare_here(SCRIPT, *words)
    assert done.returncode == 1 and "No space left" in done.stderr.splitlines()[-1], done.stderr
    assert "run the same command again" in done.stderr.splitlines()[-1]
    full = False
    assert prepare_here(SCRIPT, *words).returncode == 0
    assert shards_of(tmp_path / "out") == shards_of(whole)
