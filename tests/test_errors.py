"""Wrong inputs to train.py: status 2, one line, nothing written over."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_user_error, run_here

from distrogpt.data.meta import find_dataset
from distrogpt.errors import UserError, first_line
from distrogpt.hardware import find_device


def train_on(dataset, *flags):
    return run_here("train.py", *TINY, f"--dataset={dataset}", *flags)


def test_datasets_that_are_not_there(tmp_path):
    assert_user_error(
        train_on("shakespear_char"), "no dataset shakespear_char", "did you mean shakespeare_char?"
    )
    assert_user_error(train_on("xyz"), "no dataset xyz", "stdlib_char")
    (tmp_path / "empty").mkdir()
    assert_user_error(train_on(tmp_path / "empty"), "train.bin is missing", "data/text/prepare.py --input")
    assert_user_error(train_on("text"), "data/text/train.bin is missing", "--input FILE --name NAME")
    (tmp_path / "book.txt").write_text("words")
    assert_user_error(train_on(tmp_path / "book.txt"), "book.txt is a file", "data/text/prepare.py")


def test_datasets_that_are_prepared_are_named(tmp_path, monkeypatch):
    files = [
        "mybook/train.bin",
        "data/notes/val.bin",
        "data/shards/train_000001.bin",
        "texts/a",
        "data/texts/a",
    ]
    for path in map(tmp_path.joinpath, files):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"ab")
    monkeypatch.chdir(tmp_path)
    for name, says in {
        "xyz": r"no dataset xyz; prepared: ((?!texts).)*mybook, .*notes, .*shards((?!texts).)*;",
        "mybok": r"no dataset mybok; did you mean mybook\?",
        "data/note": r"no dataset data/note; did you mean data/notes\?",
        "mybook/train.bin": r"dataset mybook/train.bin is a file; give its folder, mybook",
        "texts": r"data/texts/train.bin is missing",
    }.items():
        with pytest.raises(UserError, match=says):
            find_dataset(name)
    (tmp_path / "data/mybook").mkdir()  # which has nothing yet
    assert find_dataset("mybook") == Path("mybook") and find_dataset("notes") == Path("data/notes")


@pytest.mark.parametrize(
    ("split", "content", "says"),
    [
        ("train", b"", "train.bin has 0 bytes"),
        ("val", b"abc", "val.bin has 3 bytes"),
        ("train", np.full(5000, 60_000, "<u2").tobytes(), "the id 60000"),
        ("val", np.zeros(16, "<u2").tobytes(), "too few for block_size=16; set --block_size=15 or less"),
    ],
)
def test_token_files_that_cannot_be(split, content, says, copy, tmp_path):
    (copy / f"{split}.bin").write_bytes(content)
    assert_user_error(train_on(copy, f"--out_dir={tmp_path / 'out'}"), says)
    assert not (tmp_path / "out").exists()


def test_block_longer_than_the_data(dataset):
    assert_user_error(train_on(dataset, "--block_size=100000"), "too few for block_size=100000")


def test_a_file_cut_off_between_two_ids_is_told_by_its_meta(copy, tmp_path):
    (copy / "train.bin").write_bytes((copy / "train.bin").read_bytes()[:2000])
    assert_user_error(train_on(copy), "train has 1,000 tokens, but its meta.json says 89,694", "cut off")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_hostile_pickles_run_nothing(copy, dataset, tmp_path):
    trap = tmp_path / "trap"
    (copy / "meta.json").unlink()
    (copy / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Hostile(trap)}))
    assert_user_error(train_on(copy, f"--out_dir={tmp_path / 'out'}"), "meta.pkl cannot be read")
    (tmp_path / "run").mkdir()
    torch.save({"model": Hostile(trap)}, tmp_path / "run" / "ckpt.pt")
    for done in (
        train_on(dataset, "--init_from=resume", f"--out_dir={tmp_path / 'run'}"),
        run_here("sample.py", f"--out_dir={tmp_path / 'run'}"),
    ):
        assert_user_error(done, "ckpt.pt is damaged or not a checkpoint")
    assert not trap.exists()
    assert first_line(KeyError(101)) == "KeyError(101)"  # torch's, for other files


def test_resuming_what_cannot_be_resumed(dataset, trained, tmp_path):
    out_dir = tmp_path / "out"
    assert_user_error(train_on(dataset, "--init_from=resume", f"--out_dir={out_dir}"), "last.pt is missing")
    assert_user_error(train_on(dataset, "--init_from=scrach"), "did you mean scratch?")
    assert_user_error(train_on(dataset, "--init_from=auto-run"), "init_from=auto-run is neither")
    out_dir.mkdir()
    half = (trained / "last.pt").read_bytes()[:5000]
    (out_dir / "last.pt").write_bytes(half)
    assert_user_error(train_on(dataset, "--init_from=resume", f"--out_dir={out_dir}"), "last.pt is damaged")
    assert (out_dir / "last.pt").read_bytes() == half
    too_long = train_on(dataset, "--init_from=resume", f"--out_dir={trained}", "--block_size=17")
    assert_user_error(too_long, "block_size=17", "--block_size=16 or less")


def test_a_model_too_small_for_the_datasets_vocabulary(copy, trained):
    meta = (copy / "meta.json").read_text()
    (copy / "meta.json").write_text(meta.replace('"vocab_size": 88', '"vocab_size": 200'))
    done = train_on(copy, f"--out_dir={trained}", "--init_from=resume")
    assert_user_error(done, "the dataset has a vocabulary of 200", "of 88")


def test_resuming_on_data_of_another_tokenizer(copy, trained):
    meta = json.loads((copy / "meta.json").read_text())
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    (copy / "meta.json").write_text(json.dumps(meta))
    before = (trained / "last.pt").read_bytes()
    done = train_on(copy, f"--out_dir={trained}", "--init_from=resume", "--max_iters=30")
    assert_user_error(done, "another tokenizer")
    assert (trained / "last.pt").read_bytes() == before


def test_starting_from_a_run_of_another_tokenizer(copy, trained, tmp_path):
    meta = json.loads((copy / "meta.json").read_text())
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    (copy / "meta.json").write_text(json.dumps(meta))
    done = train_on(copy, f"--out_dir={tmp_path / 'new'}", f"--init_from={trained}")
    assert_user_error(done, f"{trained} was trained with another tokenizer")


def test_a_gpu_has_its_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        assert find_device(name) == torch.device("cuda", number)
    with pytest.raises(UserError, match="has cuda:0, cuda:1; use one of these"):
        find_device("cuda:2")


def test_numbers_past_all_measure(dataset):
    assert_user_error(train_on(dataset, "--seed=99999999999999999999999999"), "below")
    assert_user_error(train_on(dataset, "--batch_size=10000000000000"), "below 2147483648")
    huge = train_on(dataset, "--batch_size=2000000000", "--gradient_accumulation_steps=2000")
    assert huge.returncode == 1 and huge.stderr.startswith("error: out of memory; lower --batch_size")
    assert_user_error(train_on(dataset, "--out_dir="), "empty")


def test_out_dir_that_takes_no_files(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    assert_user_error(
        train_on(dataset, f"--out_dir={tmp_path / 'file'}"), "cannot be written", "choose another"
    )
    assert_user_error(train_on(dataset, f"--out_dir={tmp_path / 'file' / 'x'}"), "cannot be written")


def test_devices_that_are_not_here(dataset):
    assert_user_error(train_on(dataset, "--device=toaster"), "device=toaster is not a known device")
    if not torch.cuda.is_available():
        assert_user_error(train_on(dataset, "--device=cuda"), "finds no CUDA")
    if not torch.backends.mps.is_available():
        assert_user_error(train_on(dataset, "--device=mps"), "no Apple GPU")
