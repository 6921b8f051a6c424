"""Text files of users in the encodings in which editors save them; files that two commands write at once."""

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, MODERN, REPO, TINY, Terminal, assert_user_error, run_here, sample_here

from configurator import run_config_file
from distrogpt.audio.transcription import gather
from distrogpt.data.tokenizer import ByteTokenizer
from distrogpt.errors import UserError
from distrogpt.evaluation.multiple_choice import read_questions
from distrogpt.files import locked, read_text, write_text
from distrogpt.inference.sampler import read_prompt
from distrogpt.progress import show_wait
from distrogpt.serving.app import find_key
from distrogpt.settings import SampleConfig, ServeConfig
from sample import read_prompts

QUESTION = {"ctx": "Was heißt", "endings": ["groß", "klein"], "label": 0}
MARKED = {"utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-16-be": b"\xfe\xff", "utf-32": b""}
ENDS = {"lf": "\n", "crlf": "\r\n", "cr": "\r"}


def read_config(path: Path) -> int:
    return run_config_file(path, {"batch_size": 1})["batch_size"]


def read_transcript(path: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        gather([path], path.with_suffix(".all"))
    return path.with_suffix(".all").read_text(encoding="utf-8")


def read_key(path: Path) -> str | None:
    return find_key(ServeConfig(api_key=f"FILE:{path}"))


READERS = {  # by kind: what the file has, how it is read, and what is read
    "config": ("# größer\nbatch_size = 5\n", read_config, 5),
    "FILE:": ("Über\nuns\n", lambda path: read_prompt(f"FILE:{path}"), "Über\nuns\n"),
    "prompts": (
        "Über\n\nuns\n",
        lambda path: [*read_prompts(SampleConfig(prompts=str(path))).values()],
        ["Über", "uns"],
    ),
    "key": ("secret\n", read_key, "secret"),
    "questions": (
        f"{json.dumps(QUESTION, ensure_ascii=False)}\n" * 2,
        lambda path: len(read_questions(path, ByteTokenizer(), 32)),
        2,
    ),
    "array of questions": (
        json.dumps([QUESTION] * 2, ensure_ascii=False, indent=1),
        lambda path: len(read_questions(path, ByteTokenizer(), 32)),
        2,
    ),
    "transcript": ("Die größte Geschichte.\n", read_transcript, "Die größte Geschichte.\n"),
}


@pytest.mark.parametrize("kind", READERS)
def test_text_of_users_in_every_encoding_that_names_itself(kind, tmp_path):
    text, read, expected = READERS[kind]
    for encoding, mark in MARKED.items():
        for end in ENDS.values():
            (tmp_path / "file").write_bytes(mark + text.replace("\n", end).encode(encoding))
            assert read(tmp_path / "file") == expected, (encoding, end)


@pytest.mark.parametrize("kind", READERS)
def test_other_encodings_are_one_line_that_says_what_to_save(kind, tmp_path):
    text, read, expected = READERS[kind]
    for encoding in ("cp1252", "utf-16-le", "utf-16-be"):
        (tmp_path / "file").write_bytes(text.encode(encoding))
        if encoding == "cp1252" and text.isascii():
            assert read(tmp_path / "file") == expected
            continue
        with pytest.raises(UserError, match=r"file is .*; save it as UTF-8") as error:
            read(tmp_path / "file")
        if encoding == "cp1252":
            place = text.encode("cp1252").index(next(c for c in text if not c.isascii()).encode("cp1252"))
            assert f"at offset {place})" in str(error.value)


def test_a_prompt_in_a_pipe_has_its_encoding_too(trained):
    """--interactive reads lines as they come, not the whole."""
    flags = (f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=9", "--num_samples=1")
    plain = sample_here(*flags, "--start=def ").stdout
    for data in (b"def \n", b"\xef\xbb\xbfdef \r\n", b"\xff\xfe" + "def \r\n".encode("utf-16-le")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), newline="\n"))
            assert sample_here(*flags, "--interactive=True").stdout == plain


def test_a_file_with_several_writers_is_whole(tmp_path):
    """Several threads, for several processes: each has a temporary file of its own."""
    path, texts = tmp_path / "result.json", [str(number) * 300_000 for number in range(6)]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_text(path) in texts and list(tmp_path.iterdir()) == [path]
    if sys.platform == "win32":  # where links are for administrators
        return
    (tmp_path / "link.json").symlink_to(path)
    write_text(tmp_path / "link.json", "new")
    assert read_text(path) == "new" and (tmp_path / "link.json").is_symlink()


def test_a_lock_is_free_as_soon_as_its_process_is_killed(tmp_path):
    """And leaves no file behind, when the next one ends."""
    code = "import sys\nfrom pathlib import Path\nfrom distrogpt.files import locked\n"
    code += "with locked(Path(sys.argv[1]), ''): print('locked', flush=True); sys.stdin.read()"
    command, pipes = [sys.executable, "-c", code, tmp_path / "x.lock"], {"stdin": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPO, env=ENVIRONMENT, stdout=subprocess.PIPE, **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="busy; wait"), locked(tmp_path / "x.lock", "busy; wait", 0.1):
            pass
        process.kill()
    with locked(tmp_path / "x.lock", "busy; wait"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_study_or_report_in_the_same_files_is_refused(dataset, tmp_path):
    """Each held by another process, for which this one stands."""
    study = [*TINY, *MODERN, f"--dataset={dataset}", f"--json={tmp_path / 'a.json'}"]
    with locked(tmp_path / "a.json.lock", ""):
        assert_user_error(run_here("ablate.py", *study), "another ablate.py is writing to", "another --json")
    with locked(tmp_path / "report.lock", ""):
        done = run_here("bench.py", "--report=True", "--device=cpu", cwd=tmp_path)
        assert_user_error(done, "another bench.py is writing to report", "in another folder")
    assert not (tmp_path / "report").exists()


def test_a_wait_is_shown_on_a_terminal_alone(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        end = time.monotonic() + 20
        with show_wait("reads", lambda: "5%", after=0):
            while shown and "reads 5%, 0 s" not in stream.getvalue() and time.monotonic() < end:
                time.sleep(0.001)
        assert ("\rreads 5%, 0 s" in stream.getvalue()) == shown and stream.getvalue().strip(" \r")[13:] == ""
