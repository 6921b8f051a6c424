"""Text files of users in the encodings in which editors save them; files that two commands write at once."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from configurator import run_config_file
from distrogpt.audio.transcription import gather
from distrogpt.data.tokenizer import ByteTokenizer
from distrogpt.errors import UserError
from distrogpt.evaluation.multiple_choice import read_questions
from distrogpt.inference.sampler import read_prompt
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
