"""Each prepare.py, run by its path from another folder."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, assert_user_error, prepare_here, run

from distrogpt.data.tokenizer import from_description

SCRIPTS = sorted(str(path.relative_to(REPO)) for path in REPO.glob("data/*/prepare.py"))
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "no_proxy": ""}


def read(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", "<u2")


def decode(folder: Path, split: str) -> str:
    meta = json.loads((folder / "meta.json").read_text())
    return from_description(meta["tokenizer"]).decode(read(folder, split).tolist())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes(script, tmp_path):
    assert {"stdlib_char", "shakespeare_char", "shakespeare", "openwebtext"} <= {
        Path(s).parent.name for s in SCRIPTS
    }
    done = run(script, "--help", cwd=tmp_path)
    generated = Path(script).parent.name in ("addition", "roman", "sequence")
    assert done.returncode == 0 and "--output" in done.stdout and ("--input" in done.stdout) != generated
    assert_user_error(prepare_here(script, "--inputs=x", "--bogus"), "--bogus")


def test_stdlib_is_this_machines_source(tmp_path):
    done = run("data/stdlib_char/prepare.py", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train, val = decode(tmp_path, "train"), decode(tmp_path, "val")
    assert len(train) + len(val) > 3_000_000 and 0.05 < len(val) / (len(train) + len(val)) < 0.2
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8").strip("\n")
    assert source in train or source in val
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["vocab_size"] == 96 and meta["tokens"] == {"train": len(train), "val": len(val)}
    first = (tmp_path / "train.bin").read_bytes()
    run("data/stdlib_char/prepare.py", "--output", tmp_path, cwd=tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == first  # the order is fixed


def test_stdlib_leaves_out_tests_and_foreign_characters_and_splits_by_file(tmp_path):
    source = tmp_path / "source"
    (source / "test").mkdir(parents=True)
    (source / "package").mkdir()
    for number in range(20):
        (source / "package" / f"m{number:02d}.py").write_text(f"x = {number}\n")
    (source / "test" / "a.py").write_text("left = 'out'\n")
    (source / "umlaut.py").write_text("left = 'öut'\n", encoding="utf-8")
    (source / "tab.py").write_text("\tleft_out\n")
    (source / "empty.py").write_text("\n")
    done = run("data/stdlib_char/prepare.py", "--input", source, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    numbers = [number for number in range(20) if number % 10 != 9]
    assert decode(tmp_path / "out", "train") == "".join(f"x = {number}\n\n\n" for number in numbers)
    assert decode(tmp_path / "out", "val") == "x = 9\n\n\nx = 19\n\n\n"
    assert_user_error(run("data/stdlib_char/prepare.py", "--input", tmp_path / "out"), "--input FOLDER")


def test_tiny_shakespeare_as_characters(tiny_shakespeare, tmp_path):
    done = run(
        "data/shakespeare_char/prepare.py", "--input", tiny_shakespeare, "--output", tmp_path, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (len(read(tmp_path, "train")), len(read(tmp_path, "val"))) == (1_003_854, 111_540)
    assert json.loads((tmp_path / "meta.json").read_text())["vocab_size"] == 65
    assert decode(tmp_path, "train") + decode(tmp_path, "val") == tiny_shakespeare.read_text()
    assert "note" not in done.stdout


def test_tiny_shakespeare_in_gpt2_bpe(tiny_shakespeare, gpt2_bpe, tmp_path):
    done = run("data/shakespeare/prepare.py", "--input", tiny_shakespeare, "--output", tmp_path, env=gpt2_bpe)
    assert done.returncode == 0, done.stderr
    assert (len(read(tmp_path, "train")), len(read(tmp_path, "val"))) == (301_966, 36_059)
    assert read(tmp_path, "train")[:2].tolist() == [5962, 22307]
    assert decode(tmp_path, "train") + decode(tmp_path, "val") == tiny_shakespeare.read_text()


def test_another_text_is_used_with_a_note(tmp_path):
    (tmp_path / "mine.txt").write_text("my own words, " * 10)
    done = run("data/shakespeare_char/prepare.py", "--input", tmp_path / "mine.txt", "--output", tmp_path)
    assert done.returncode == 0 and "is not the published tiny Shakespeare" in done.stdout
    assert decode(tmp_path, "train") + decode(tmp_path, "val") == "my own words, " * 10


@pytest.mark.parametrize("script", ["data/shakespeare_char/prepare.py", "data/shakespeare/prepare.py"])
def test_without_network_one_line_says_what_to_fetch(script, tmp_path):
    done = run(script, "--output", tmp_path, env=NO_NETWORK)
    assert_user_error(done, "raw.githubusercontent.com", "tinyshakespeare/input.txt", "--input PATH")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_download_is_refused(tmp_path):
    (tmp_path / "input.txt").write_text("half of it")  # what an earlier download left
    done = run("data/shakespeare_char/prepare.py", "--output", tmp_path, env=NO_NETWORK)
    assert_user_error(done, "input.txt", "86c4e6aa9db7c042", "--input PATH")
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_unreadable_inputs(tmp_path):
    script = "data/shakespeare_char/prepare.py"
    assert_user_error(run(script, "--input", tmp_path / "none.txt", "--output", tmp_path), "none.txt")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait")
    assert_user_error(run(script, "--input", tmp_path / "latin1.txt", "--output", tmp_path), "offset 3")
    (tmp_path / "one.txt").write_text("a")
    assert_user_error(run(script, "--input", tmp_path / "one.txt", "--output", tmp_path), "too short")
    assert_user_error(run(script, "--input", __file__, "--output", tmp_path / "one.txt"), "cannot be written")
    assert not (tmp_path / "train.bin").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_changes_nothing(tmp_path):
    (tmp_path / "val.bin.tmp").symlink_to("/dev/full")
    done = run("data/shakespeare_char/prepare.py", "--input", __file__, "--output", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
