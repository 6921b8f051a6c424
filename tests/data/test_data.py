"""Token files and tokenizers: what is written is what is read, and what cannot be right is refused."""

import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NANOGPT

from distrogpt.data.meta import read_meta
from distrogpt.data.preparation.writer import write_dataset
from distrogpt.data.sampling import epoch_starts, random_starts
from distrogpt.data.token_stream import MAX_MAPS, TokenStream
from distrogpt.data.tokenizer import CharTokenizer, GPT2Tokenizer, from_description
from distrogpt.errors import UserError

META = {"tokenizer": None, "vocab_size": 100, "dtype": "uint16"}


def write_bin(folder, ids, name="train.bin", dtype="<u2"):
    np.asarray(ids).astype(dtype).tofile(folder / name)


def test_windows_are_the_ids_from_each_start_on(tmp_path):
    write_bin(tmp_path, np.arange(50))
    stream = TokenStream(tmp_path, "train", META, block_size=8)
    assert len(stream) == 50
    windows = stream.windows(np.array([0, 7, 41]), 9)
    assert windows.dtype == np.int64
    assert windows.tolist() == [list(range(9)), list(range(7, 16)), list(range(41, 50))]


def test_shards_read_as_one_stream(tmp_path):
    ids = np.random.default_rng(0).integers(0, 100, 60)
    for number, part in enumerate((ids[:10], ids[10:11], ids[11:40], ids[40:])):
        write_bin(tmp_path, part, f"train_{number:06d}.bin")
    stream = TokenStream(tmp_path, "train", META, block_size=8)
    assert len(stream) == 60
    starts = np.arange(50)
    assert np.array_equal(stream.windows(starts, 10), ids[starts[:, None] + np.arange(10)])


def test_after_the_last_id_comes_the_first(tmp_path):
    ids = np.arange(60)
    for number, part in enumerate((ids[:10], ids[10:40], ids[40:])):
        write_bin(tmp_path, part, f"train_{number:06d}.bin")
    stream = TokenStream(tmp_path, "train", META, block_size=8)
    assert stream.windows(np.array([55, 3]), 70).tolist() == [[(55 + i) % 60 for i in range(70)],
                                                              [(3 + i) % 60 for i in range(70)]]  # fmt: skip
    assert stream.positions_of(17).tolist() == [17]


def test_many_files_are_mapped_a_few_at_a_time(tmp_path):
    """50 gigabytes in 500 files that take no room on the disk."""
    for number in range(500):
        with open(tmp_path / f"train_{number:06d}.bin", "wb") as file:
            file.truncate(100_000_000)
    stream = TokenStream(tmp_path, "train", META, block_size=1024, ids_checked=64_000)
    assert len(stream) == 25_000_000_000

    def allocated() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    rng = np.random.default_rng(0)
    for batch in range(1000):
        starts = rng.integers(0, len(stream) - 1024, 12)
        assert stream.windows(starts, 1025).shape == (12, 1025)
        if batch == 100 and sys.platform == "linux":
            before = allocated()
    if sys.platform == "linux":
        assert allocated() - before < 4000  # kB; the pages of files are not counted, the system frees them
        assert 1 < Path("/proc/self/maps").read_text().count(str(tmp_path)) <= MAX_MAPS


def test_some_ids_of_some_files_are_checked_at_the_start_and_the_others_when_read(tmp_path):
    for number in range(100):
        write_bin(tmp_path, [1] * 9 + [100 if number == 2 else 1], f"train_{number:06d}.bin")
    stream = TokenStream(tmp_path, "train", META, block_size=8)  # file 2 is not among the 64
    stream.windows(np.array([0, 40, 500]), 9)
    with pytest.raises(UserError, match="the id 100"):
        stream.windows(np.array([0, 25]), 9)
    for number in (0, 99):
        write_bin(tmp_path, [100] * 10, f"train_{number:06d}.bin")
        with pytest.raises(UserError, match="the id 100"):
            TokenStream(tmp_path, "train", META, block_size=8)
        write_bin(tmp_path, [1] * 10, f"train_{number:06d}.bin")


@pytest.mark.parametrize("spoil", ["truncate", "empty", "remove", "touch", "replace"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_changes_is_reported_when_it_is_read(spoil, mapped, tmp_path):
    for number in range(3):
        write_bin(tmp_path, np.arange(20), f"train_{number:06d}.bin")
        os.utime(tmp_path / f"train_{number:06d}.bin", (1e9, 1e9))
    stream = TokenStream(tmp_path, "train", META, block_size=8, ids_checked=10)
    spoiled, replacement = tmp_path / "train_000001.bin", tmp_path / "new"
    if mapped:
        stream.windows(np.array([15]), 9)
    write_bin(tmp_path, np.arange(20, 40), "new")
    spoilers = {
        "truncate": lambda: os.truncate(spoiled, 4),
        "empty": lambda: os.truncate(spoiled, 0),
        "remove": spoiled.unlink,
        "touch": spoiled.touch,
        "replace": lambda: os.replace(replacement, spoiled),
    }
    spoilers[spoil]()
    assert stream.windows(np.array([0, 40]), 20)[1, 0] == 0  # the other files are what they were
    event = "was removed during the run" if spoil == "remove" else "changed during the run"
    with pytest.raises(UserError, match=f"train_000001.bin {event}"):
        stream.windows(np.array([15]), 9)


def test_uint32_where_meta_says_so(tmp_path):
    write_bin(tmp_path, np.arange(70_000, 70_020), dtype="<u4")
    stream = TokenStream(tmp_path, "train", {**META, "vocab_size": 80_000, "dtype": "uint32"}, 4)
    assert stream.windows(np.array([3]), 2).tolist() == [[70_003, 70_004]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"\x01\x00\x02", "3 bytes"),
        (np.arange(8, dtype="<u2").tobytes(), "--block_size=7 or less"),
        (np.full(50, 100, "<u2").tobytes(), "the id 100, but the vocabulary ends at 99"),
    ],
)
def test_impossible_files_are_refused(content, says, tmp_path):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=says):
        TokenStream(tmp_path, "train", META, block_size=8)


def test_an_id_past_the_part_checked_at_start_is_found_when_read(tmp_path):
    write_bin(tmp_path, [1] * 20 + [100] * 20)
    stream = TokenStream(tmp_path, "train", META, block_size=8, ids_checked=10)
    stream.windows(np.array([0]), 9)
    with pytest.raises(UserError, match="the id 100"):
        stream.windows(np.array([15]), 9)


def test_random_starts_depend_on_their_arguments_alone():
    first = random_starts(1337, 5, 1000, 777)
    random_starts(1, 2, 3, 4)
    assert np.array_equal(first, random_starts(1337, 5, 1000, 777))
    assert first.min() >= 0 and first.max() == 776
    others = [(1338, 5, 0), (1337, 6, 0), (1337, 5, 1)]
    for seed, step, purpose in others:
        assert not np.array_equal(first, random_starts(seed, step, 1000, 777, purpose))


def test_random_starts_are_uniform():
    counts = np.bincount(
        np.concatenate([random_starts(0, step, 500, 10) for step in range(200)]), minlength=10
    )
    assert (np.abs(counts - 10_000) < 5 * np.sqrt(10_000)).all()


def test_written_dataset_is_read_back(tmp_path):
    tokenizer = CharTokenizer("abc\n")
    with write_dataset(tmp_path, tokenizer, source="test") as add:
        add("train", tokenizer.encode("abcabc\n"), 7)
        add("train", [0, 1], 2)
        add("val", tokenizer.encode("cab"), 3)
    meta = read_meta(tmp_path)
    assert meta["vocab_size"] == 4 and meta["source"] == "test"
    assert meta["tokens"] == meta["bytes"] == {"train": 9, "val": 3}
    assert (tmp_path / "train.bin").read_bytes() == np.array([0, 1, 2, 0, 1, 2, 3, 0, 1], "<u2").tobytes()
    stream = TokenStream(tmp_path, "val", meta, 2)
    assert from_description(meta["tokenizer"]).decode(stream.windows(np.array([0]), 3)[0]) == "cab"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_an_interrupted_writer_leaves_what_was_there(tmp_path):
    tokenizer = CharTokenizer("ab")
    with write_dataset(tmp_path, tokenizer) as add:
        add("train", [0, 1, 0], 3)
        add("val", [1, 0], 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), write_dataset(tmp_path, tokenizer, overwrite=True) as add:
        add("train", [1] * 1000, 1000)
        raise KeyboardInterrupt
    with (
        pytest.raises(UserError, match="val has 0 tokens"),
        write_dataset(tmp_path, tokenizer, overwrite=True) as add,
    ):
        add("train", [1] * 1000, 1000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_meta_of_nanogpt():
    meta = read_meta(NANOGPT)
    assert meta["vocab_size"] == 58
    tokenizer = from_description(meta["tokenizer"])
    ids = TokenStream(NANOGPT, "train", meta, 32).windows(np.array([0]), 14)[0]
    assert tokenizer.decode(ids) == "First Citizen:"
    assert tokenizer.encode("First Citizen:").tolist() == ids.tolist()


def test_without_meta_it_is_gpt2s_vocabulary(tmp_path):
    assert read_meta(tmp_path)["vocab_size"] == 50257


@pytest.mark.parametrize("left", ["progress.json", "progress_00002.json", "meta.json.tmp"])
def test_an_incomplete_dataset_is_refused(left, tmp_path):
    write_bin(tmp_path, [1] * 100)
    (tmp_path / left).write_text("{}")
    with pytest.raises(UserError, match="is not complete"):
        read_meta(tmp_path)


def test_another_dataset_is_overwritten_on_demand_only(tmp_path):
    tokenizer = CharTokenizer("ab")
    for about, overwrite in (("one", False), ("one", False), ("two", True)):
        with write_dataset(tmp_path, tokenizer, overwrite, source=about) as add:
            add("train", [0, 1, 0], 3)
            add("val", [1, 0], 2)
    with pytest.raises(UserError, match="--overwrite"), write_dataset(tmp_path, tokenizer, source="three"):
        pass
    assert read_meta(tmp_path)["source"] == "two"


class Hostile:
    """A pickle of it creates a file when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_runs_nothing(protocol, tmp_path):
    trap = tmp_path / "trap"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Hostile(trap)}, protocol=protocol))
    with pytest.raises(UserError, match="cannot be read"):
        read_meta(tmp_path)
    assert not trap.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())  # read without care, it springs
    assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04garbage",
        pickle.dumps([1, 2]),
        pickle.dumps({}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "a"}}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}}),
        pickle.dumps({"vocab_size": "x"}),
    ],
)
def test_a_damaged_meta_pkl_is_refused(content, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl cannot be read"):
        read_meta(tmp_path)


def test_a_meta_pkl_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": 1, "itos": {0: "a"}}, file)
        file.truncate(100 << 20)
    with pytest.raises(UserError, match="too large"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tokenizer": 1, "vocab_size": 5, "dtype": "uint16"}',
        '{"tokenizer": {}, "vocab_size": 5, "dtype": "uint16", "tokens": [1]}',
        '{"tokenizer": {}, "vocab_size": 5, "dtype": "uint16", "tokens": {"train": "many"}}',
        '{"tokenizer": {}, "vocab_size": 0, "dtype": "uint16"}',
        '{"tokenizer": {}, "vocab_size": true, "dtype": "uint16"}',
        '{"tokenizer": {}, "vocab_size": 5, "dtype": "object"}',
    ],
)
def test_a_damaged_meta_json_is_refused(content, tmp_path):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json cannot be read"):
        read_meta(tmp_path)


def test_characters_survive_the_round_trip():
    text = "naïve café, 日本語, 😀\n\ttabs and \x00 too"
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    rebuilt = from_description(json.loads(json.dumps(tokenizer.describe())))
    for each in (tokenizer, rebuilt):
        assert each.decode(each.encode(text)) == text
    assert sorted(set(tokenizer.encode(text).tolist())) == list(range(tokenizer.vocab_size))
    assert tokenizer.encode("").tolist() == []


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'é' at position 3"):
        CharTokenizer("cafe").encode("café")
    with pytest.raises(UserError, match="'z' at position 0"):
        CharTokenizer("abc").encode("z")


@pytest.mark.parametrize(
    "description", [{}, {"kind": "magic"}, {"kind": "char", "chars": "aa"}, {"kind": "char"}]
)
def test_an_unknown_tokenizer_is_refused(description):
    with pytest.raises(UserError, match="is unknown or incomplete"):
        from_description(description)


def test_gpt2_bpe(gpt2_bpe):
    tokenizer = GPT2Tokenizer()
    assert tokenizer.encode("First Citizen").tolist() == [5962, 22307]
    assert tokenizer.encode("a<|endoftext|>b").tolist() == [64, 50256, 65]
    assert 50256 not in tokenizer.encode_text("<|endoftext|>")  # text is never a command
    assert tokenizer.decode(tokenizer.encode("日本語 😀")) == "日本語 😀"


@pytest.mark.parametrize("length, T", [(1000, 16), (1003854, 256), (40, 16), (17, 16), (34, 16)])
def test_an_epoch_takes_each_window_once(length, T):
    windows = max(1, (length - 1) // T - 1)
    epochs = [epoch_starts(7, epoch * windows, windows, length, T) for epoch in range(3)]
    for starts in epochs:
        assert starts.min() >= 0 and starts.max() + T < length  # inputs and the last target are in the text
        assert set(np.diff(np.sort(starts))) <= {T}  # side by side, none twice
        assert windows < 5 or list(starts) != sorted(starts)
    if windows > 5:
        orders = {tuple(np.argsort(starts)) for starts in epochs}
        assert len(orders) == 3 and len({starts.min() for starts in epochs}) > 1
        assert list(epoch_starts(8, 0, windows, length, T)) != list(epochs[0])
        # however the samples are asked for, also over the end of an epoch
        parts = [epoch_starts(7, first, 5, length, T) for first in range(0, 2 * windows, 5)]
        whole = np.concatenate(epochs)[: 5 * len(parts)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_an_epoch_of_a_web_scale_text_needs_no_memory():
    starts = epoch_starts(1, 10**12, 1000, 10**13, 1024)
    assert len(set(starts)) == 1000 and starts.min() >= 0 and starts.max() < 10**13 - 1024
    assert abs(starts.mean() / 10**13 - 0.5) < 0.05  # from everywhere


def test_neighbours_are_shuffled_apart():
    starts = epoch_starts(3, 0, 3920, 1003854, 256) / 1003854
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.06
    assert abs(np.corrcoef(starts, np.arange(3920))[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x80\x04}r\x00\x00\x00\x01.", "vocab_size"),  # a memo of that size
        (
            b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s.",
            "KeyError",
        ),  # a tuple as a key that takes 2^60 steps to hash
        (pickle.dumps({"vocab_size": 10**400}), "over 31 bits"),
        (pickle.dumps({"vocab_size": 2**31}), "over 31 bits"),  # more than GPTConfig takes
    ],
)
def test_pickled_vocabularies_of_memory_or_time_without_end(data, says, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match=says):
        read_meta(tmp_path)


def test_a_tokenizer_has_no_ids_past_the_vocabulary(tmp_path):
    meta = {"tokenizer": {"kind": "char", "chars": "abc"}, "vocab_size": 2, "dtype": "uint16", "tokens": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="3 ids"):
        read_meta(tmp_path)
