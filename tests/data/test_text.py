"""data/text/prepare.py: any text becomes a dataset, byte for byte, and no mistake leaves half of one."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPO, assert_user_error, prepare_here, run, run_warm, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

from distrogpt.data.meta import read_meta
from distrogpt.data.preparation.documents import Corpus, cut, find_files, json_values
from distrogpt.data.preparation.own_text import next_commands
from distrogpt.data.token_stream import TokenStream
from distrogpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, from_description
from distrogpt.errors import UserError
from distrogpt.scaling import best_tokenizer

SCRIPT = "data/text/prepare.py"
STORIES = [
    f"Story {n}. Once upon a time, naïve 日本語 😀\n\n\tit went on" + " and on" * (n % 9) for n in range(40)
]


def prepare(tmp_path, *words, name="out", **more):
    return prepare_here(SCRIPT, *words, "--output", tmp_path / name, **more)


def ids_of(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", "<u2" if read_meta(folder)["dtype"] == "uint16" else "<u4")


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, read back by its own tokenizer."""
    tokenizer = from_description(read_meta(folder)["tokenizer"])
    ids = ids_of(folder, split)
    if tokenizer.end_of_text is None:
        return [tokenizer.decode(ids.tolist())]
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def write_stories(folder: Path, kind: str) -> list[str]:
    """The stories in files of a kind; the words for --input and others."""
    folder.mkdir()
    rows = [{"id": n, "text": story} for n, story in enumerate(STORIES)]
    lines = "".join(json.dumps(row, ensure_ascii=bool(row["id"] % 2)) + "\n" for row in rows).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, ["id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    tables = {"\t": io.StringIO(), ";": io.StringIO()}
    for separator, file in tables.items():
        csv.writer(file, delimiter=separator).writerows([["id", "text"], *enumerate(STORIES)])
    tables = {separator: file.getvalue() for separator, file in tables.items()}
    joined = END_OF_TEXT.join(STORIES).encode()
    zst = pyarrow.compress(lines, "zstd", asbytes=True)
    packed = {
        "stories.jsonl": lines,
        "stories.jsonl.gz": gzip.compress(lines[:500]) + gzip.compress(lines[500:]),  # of two members
        "stories.jsonl.zst": zst,
        "stories.json": json.dumps(rows, ensure_ascii=False).encode(),
        "texts.json.gz": gzip.compress(json.dumps(STORIES, indent=1).encode()),
        "lines.json": lines,
        "lines.ndjson": lines,
        "texts.jsonl": "".join(json.dumps(story) + "\n" for story in STORIES).encode(),
        "excel.tsv": tables["\t"].encode("utf-16"),  # as Excel saves "Unicode text"
        "semicolons.csv": b"sep=;\r\n" + tables[";"].encode("utf-8"),
        "stories.csv": table.getvalue().encode(),
        "stories.csv.gz": gzip.compress(table.getvalue().encode()),
        "stories.txt": joined,
        "stories.md.zst": pyarrow.compress(joined, "zstd", asbytes=True),
    }
    if kind in packed:
        (folder / kind).write_bytes(packed[kind])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(40), "text": STORIES}), folder / "s.parquet")
    else:
        for n, story in enumerate(STORIES):
            path = folder / f"{n // 10}" / f"{n:03d}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text(story, encoding="utf-8")
        (folder / "picture.png").write_bytes(b"\x89PNG\x00")  # of no kind that is read
        (folder / ".git").mkdir()
        (folder / ".git" / "config.txt").write_text("hidden")
    return [str(folder)]


KINDS = (
    *("stories.jsonl", "stories.jsonl.gz", "stories.jsonl.zst", "stories.csv", "stories.csv.gz"),
    *(
        "stories.json",
        "texts.json.gz",
        "lines.json",
        "lines.ndjson",
        "texts.jsonl",
        "excel.tsv",
        "semicolons.csv",
    ),
    *("stories.txt", "stories.md.zst", "parquet", "folder of .md"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_documents(kind, tmp_path):
    words = write_stories(tmp_path / "in", kind)
    done = prepare(tmp_path, "--input", *words, "--tokenizer=byte", "--val_fraction=0.2")
    assert done.returncode == 0, done.stderr
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(STORIES)
    assert 0.15 < len("".join(val)) / len("".join(STORIES)) < 0.3
    assert train == [story for story in STORIES if story not in val]  # the order is kept
    meta = read_meta(tmp_path / "out")
    assert meta["bytes"] == {
        split: sum(len(story.encode()) for story in stories)
        for split, stories in (("train", train), ("val", val))
    }
    assert meta["tokens"] == {
        "train": meta["bytes"]["train"] + len(train),
        "val": meta["bytes"]["val"] + len(val),
    }


def test_the_split_is_the_same_for_all_tokenizers(tmp_path, gpt2_bpe):
    words = write_stories(tmp_path / "in", "stories.jsonl")
    vals = {}
    for tokenizer in ("char", "byte", "gpt2", "bpe:300"):
        done = prepare(tmp_path, "--input", *words, f"--tokenizer={tokenizer}", name=tokenizer)
        assert done.returncode == 0, done.stderr
        vals[tokenizer] = documents_of(tmp_path / tokenizer, "val")
        stream = TokenStream(tmp_path / tokenizer, "train", read_meta(tmp_path / tokenizer), 8)
        assert len(stream) == read_meta(tmp_path / tokenizer)["tokens"]["train"]
    assert len(vals["char"]) > 1 and all(val == vals["char"] for val in vals.values())


def test_one_document_is_split_by_position(tmp_path):
    text = "".join(STORIES)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--val_fraction=0.25")
    assert done.returncode == 0, done.stderr
    place = int(len(text) * 0.75)
    assert documents_of(tmp_path / "out", "train") == [text[:place]]
    assert documents_of(tmp_path / "out", "val") == [text[place:]]


@pytest.mark.parametrize(
    ("sizes", "val"),
    [
        ([10_000, 1_800, 60], ["b" * 1_800]),  # the nearest
        ([500] * 3, ["a" * 500]),  # a third, but a document
        ([1_000, 1_000], ["b" * 200]),  # a half is too much: the end of the text
        ([3_000, 10_000, 10, 20], ["b" * 1_273, "c" * 10, "d" * 20]),  # all are too large or too small
        ([100] * 10, None),
        ([100, 150, 120, 80, 130, 90, 3000, 110, 140, 60, 70, 105], None),
    ],
)
def test_val_has_its_share_of_the_text_however_unequal_the_documents(sizes, val, tmp_path):
    texts = [chr(ord("a") + number) * size for number, size in enumerate(sizes)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    assert prepare(tmp_path, "--input", tmp_path, "--tokenizer=byte").returncode == 0
    found = documents_of(tmp_path / "out", "val")
    if val is None:
        assert set(found) <= set(texts) and 0.05 < sum(map(len, found)) / sum(sizes) < 0.15
    else:
        assert found == val
    assert "".join(sorted("".join(documents_of(tmp_path / "out", "train") + found))) == "".join(texts)


def test_a_large_val_is_reported_with_a_remedy(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 500)
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    words = ("--tokenizer=byte", "--overwrite", "--input", *files)
    done = prepare(tmp_path, *words)
    assert "note: val is 33% of the text" in done.stdout and "try --val_fraction=0.05\n" in done.stdout
    asked = prepare(tmp_path, *words, "--val_fraction=0.3")
    assert documents_of(tmp_path / "out", "val") == ["c" * 500] and "note" not in asked.stdout
    smaller = prepare(tmp_path, *words, "--val_fraction=0.05")
    assert documents_of(tmp_path / "out", "val") == ["c" * 75] and "note" not in smaller.stdout
    assert done.stderr == ""  # no bar for what is done at once


def test_auto_chooses_the_tokenizer_by_the_size_of_the_text(tmp_path):
    (tmp_path / "book.txt").write_text("a short text " * 20)
    done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--tokenizer=auto")
    assert "tokenizer char: expected to learn most from 260 characters" in done.stdout
    assert read_meta(tmp_path / "out")["tokenizer"]["kind"] == "char"
    kinds = [best_tokenizer(10**n) for n in range(2, 12)]
    assert kinds[0] == "char" and kinds[-1].startswith("bpe:") and kinds == sorted(kinds, reverse=True)


def test_the_shortest_text_has_commands_that_run(tmp_path):
    (tmp_path / "book.txt").write_text("fifteen letters")
    done = prepare(tmp_path, "--input", tmp_path / "book.txt")
    (train,) = [line.split() for line in done.stdout.splitlines() if "train.py" in line]
    assert read_meta(tmp_path / "out")["tokens"] == {"train": 13, "val": 2}
    here = (
        f"--dataset={tmp_path / 'out'}",
        f"--out_dir={tmp_path / 'run'}",
        "--max_iters=2",
        "--minutes=0.03",
    )
    assert "bits per byte" in train_here(*train[2:], *here, "--device=cpu", "--loss_plot=False")


def test_many_documents_are_split_at_random_without_counting_them(tmp_path):
    rows = (json.dumps({"text": f"document {n}"}) for n in range(3000))
    (tmp_path / "many.jsonl").write_text("\n".join(rows))
    assert prepare(tmp_path, "--input", tmp_path / "many.jsonl", "--tokenizer=byte").returncode == 0
    val = [int(document.split()[1]) for document in documents_of(tmp_path / "out", "val")]
    assert abs(len(val) - 300) < 5 * np.sqrt(3000 * 0.1 * 0.9)
    assert abs(np.mean(val) - 1500) < 250 and len({n % 10 for n in val}) == 10


def test_stdin_globs_and_formats(tmp_path):
    write_stories(tmp_path / "in", "stories.jsonl")
    (tmp_path / "in" / "stories.jsonl").rename(tmp_path / "in" / "dump.0001")
    byte = ("--tokenizer=byte", "--val_fraction=0.2")
    assert (
        prepare(tmp_path, "--input", f"{tmp_path}/in/d*", "--format=jsonl", *byte, name="glob").returncode
        == 0
    )
    with open(tmp_path / "in" / "dump.0001", "rb") as file:
        done = run(SCRIPT, "--input", "-", "--format=jsonl", *byte, "--output", tmp_path / "pipe", stdin=file)
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / "glob", "train") == documents_of(tmp_path / "pipe", "train")
    assert sorted(path.name for path in (tmp_path / "pipe").iterdir()) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]


def test_what_a_killed_command_left_is_removed(tmp_path):
    (tmp_path / "book.txt").write_text("some text " * 100)
    (tmp_path / "out").mkdir()
    ours = (
        ".distrogpt-pipe0",
        "train.bin.tmp",
        ".distrogpt-1234abcd-meta.json",
        "prepare.lock",
        "progress.lock",
    )
    others = {"pipe1_notes.txt", "download.part"}
    for name in (*ours, *others):
        (tmp_path / "out" / name).write_bytes(b"half")
    assert prepare(tmp_path, "--input", tmp_path / "book.txt").returncode == 0
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"meta.json", "train.bin", "val.bin", *others}


def test_cleaning_leaves_out_lines_by_pattern(tmp_path):
    page = "THE TITLE\nIt was a dark night. THE TITLE of it was\nPage 12\nunknown.\n"
    (tmp_path / "book.txt").write_text(page * 500 + "THE TITLE")
    words = (
        "--strip_lines",
        r"(?i)^PAGE (\d)+$",
        "--strip_lines",
        r"^(T)HE \1ITLE$",
    )  # with groups of their own
    assert prepare(tmp_path, "--input", tmp_path / "book.txt", *words).returncode == 0
    both = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert "".join(both) == "It was a dark night. THE TITLE of it was\nunknown.\n" * 500


def test_ends_of_lines_and_the_mark_of_windows(tmp_path):
    (tmp_path / "windows.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode() * 1)
    assert prepare(tmp_path, "--input", tmp_path / "windows.txt").returncode == 0
    both = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert "".join(both) == "one\ntwo\nthree\n"


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv"])
def test_files_in_every_encoding_and_with_every_end_of_line(kind, tmp_path):
    story = "Über\ndie Straße"
    text = {"txt": story, "json": json.dumps([story], ensure_ascii=False, indent=1)}
    text |= {"jsonl": json.dumps({"text": story}, ensure_ascii=False) + "\n"}
    text |= {"csv": f'id;text\n1;"{story}"\n', "tsv": f'id\ttext\n1\t"{story}"\n'}
    path = tmp_path / f"file.{kind}"
    for end in ("\n", "\r\n", "\r"):
        content = text[kind].replace("\n", end)
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            path.write_bytes(content.encode(encoding))
            assert [piece.text for piece in Corpus([path]).pieces()] == [story], (end, encoding)
        for encoding in ("cp1252", "utf-16-le", "utf-16-be"):
            path.write_bytes(content.encode(encoding))
            with pytest.raises(UserError, match=f"--encoding={encoding}"):
                list(Corpus([path]).pieces())
            assert [piece.text for piece in Corpus([path], encoding=encoding).pieces()] == [story]


def test_json_of_any_layout_is_read_a_piece_at_a_time():
    values = ["a", {"text": 'b "]" \\'}, [1, {"x": None}], "é" * 50, True, {}]
    for layout in (
        json.dumps(values),
        json.dumps(values, indent=2, ensure_ascii=False),
        "\n".join(map(json.dumps, values)),
        " ".join(json.dumps(value, indent=1) for value in values),
    ):
        for size in (1, 2, 3, 7, 1000):
            texts = [layout[i : i + size] for i in range(0, len(layout), size)]
            found = list(json_values(texts, "x.json"))
            assert [value for _, value in found] == values
            assert found[1][0] == layout.count("\n", 0, layout.index("{")) + 1


def test_a_folder_of_nothing_but_json_is_read(tmp_path):
    (tmp_path / "a.json").write_text('["one"]')
    assert [path.name for path in find_files([str(tmp_path)])] == ["a.json"]
    (tmp_path / "b.txt").write_text("two")  # beside which .json may be settings of a program
    assert [path.name for path in find_files([str(tmp_path)])] == ["b.txt"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é日\n \t<|endoftext|>.'s", max_size=400), st.integers(1, 60))
def test_pieces_are_tokenized_as_the_whole(text, block):
    """A document is cut only where GPT-2's words end: the ids are those of the whole."""
    from distrogpt.data.tokenizer import train_bpe

    tokenizer = WHOLE.setdefault("bpe", train_bpe([" aa bb'ss a.b\n\n  \n\t ab" * 9 + STORIES[0]], 400))
    parts = [text[i : i + 7] for i in range(0, len(text), 7)]
    pieces = list(cut(parts, block=block))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    if max((len(word) for word in text.split()), default=0) < 64 * block - len(END_OF_TEXT):
        ids = np.concatenate([tokenizer.encode_text(piece.text) for piece in pieces])
        assert ids.tolist() == tokenizer.encode_text(text).tolist()
    documents = "".join(piece.text + "\0" * piece.ends for piece in cut(parts, END_OF_TEXT, block))
    assert documents == text.replace(END_OF_TEXT, "\0") + "\0"


WHOLE: dict = {}


def test_the_commands_that_it_names_run(tmp_path, text):
    (tmp_path / "book.txt").write_text(text[:4000], encoding="utf-8")
    done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--tokenizer=bpe:300")
    train, sample = [line.split() for line in done.stdout.splitlines() if line.startswith("  python ")]
    book = next_commands(tmp_path / "out", "mybook", ByteTokenizer())[0].split()  # as in the README
    assert book[1:] == ["train.py", "--dataset=mybook", "--minutes=10"]
    out_dir = tmp_path / "run"
    quick = (
        "--max_iters=3",
        "--minutes=0.03",
        "--device=cpu",
        f"--out_dir={out_dir}",
        f"--dataset={tmp_path / 'out'}",
        "--log_interval=1",
        "--loss_plot=False",
    )
    trained = run_warm(*train[1:], *quick)
    assert trained.returncode == 0, trained.stderr
    assert "bits per byte" in trained.stdout
    sampled = run_warm(
        *sample[1:2], f"--out_dir={out_dir}", "--num_samples=1", "--max_new_tokens=20", "--start="
    )
    assert sampled.returncode == 0, sampled.stderr


def test_another_datasets_tokenizer(tmp_path):
    write_stories(tmp_path / "in", "stories.txt")
    assert prepare(tmp_path, "--input", tmp_path / "in", "--tokenizer=bpe:300", name="one").returncode == 0
    (tmp_path / "new.txt").write_text("Something else, with é and œ. " * 20, encoding="utf-8")
    done = prepare(tmp_path, "--input", tmp_path / "new.txt", f"--tokenizer={tmp_path / 'one'}", name="two")
    assert done.returncode == 0, done.stderr
    assert read_meta(tmp_path / "two")["tokenizer"] == read_meta(tmp_path / "one")["tokenizer"]
    done = prepare(tmp_path, "--input", tmp_path / "new.txt", "--tokenizer=nothing", name="three")
    assert_user_error(done, "unknown --tokenizer nothing")


@pytest.mark.parametrize("script", [SCRIPT, "data/hub/prepare.py"])
def test_what_is_no_tokenizer(script, tmp_path):
    """A folder that was never prepared is no dataset; what there is, kinds and datasets, is listed."""
    write_stories(tmp_path / "in", "stories.txt")
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    for name in (*"audio text hub word GPT2".split(), tmp_path / "out", tmp_path / "in", REPO):
        done = prepare_here(script, *words, f"--tokenizer={name}")
        known = "gpt2, " if script == SCRIPT else "gpt2"
        assert_user_error(done, f"unknown --tokenizer {name}", "byte", known)
        assert ("bpe:4096" in done.stderr) == (script == SCRIPT)
        assert ("did you mean gpt2?" in done.stderr) == (name == "GPT2")
        assert not (tmp_path / "out").exists()
    assert prepare_here(SCRIPT, *words, "--tokenizer=byte").returncode == 0
    done = prepare_here(script, *words, f"--tokenizer={tmp_path / 'outt'}")
    assert_user_error(done, f"did you mean {tmp_path / 'out'}?", "prepared dataset (", f"{tmp_path / 'out'})")


def test_files_of_a_folder_that_are_left_out_are_counted(tmp_path):
    write_stories(tmp_path / "in", "stories.txt")
    for name in ("a.docx", "b.pdf"):
        (tmp_path / "in" / name).write_bytes(b"PK")
    done = prepare(tmp_path, "--input", tmp_path / "in", "--tokenizer=byte")
    assert done.returncode == 0 and "2 files of other types left out (.docx, .pdf)" in done.stderr


def test_a_large_vocabulary_takes_uint32_and_says_so(tmp_path):
    (tmp_path / "all.txt").write_text(
        "".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2, encoding="utf-8"
    )
    done = prepare(tmp_path, "--input", tmp_path / "all.txt")
    assert done.returncode == 0 and "a vocabulary of 70,000 takes 4 bytes" in done.stdout, done.stderr
    meta = read_meta(tmp_path / "out")
    assert (meta["dtype"], meta["vocab_size"]) == ("uint32", 70_000)
    assert (tmp_path / "out" / "train.bin").stat().st_size == 4 * meta["tokens"]["train"]
    assert TokenStream(tmp_path / "out", "val", meta, 8).windows(np.array([13_990]), 9).max() > 65_535


MISTAKES = [
    (b"caf\xe9 au lait", [], ["book.txt", "utf-8", "0xe9", "offset 3", "--errors=replace"]),
    (b"x" * 2_000_000 + b"\xff", [], ["0xff", "offset 2000000"]),
    (b"x" * 1_048_575 + "é".encode() + b"\xe9 x", [], ["offset 1048577"]),  # the character spans two blocks
    (b"cut off: \xc3", [], ["offset 9"]),
    (b"\x00\x01binary", [], ["a null character", "may be binary"]),
    (b"caf\xe9 au lait", [], ["--encoding=cp1252"]),
    ("cafe au lait".encode("utf-16-le"), [], ["--encoding=utf-16-le"]),
    ("café ".encode() * 50, ["--encoding=utf-16"], ["is not utf-16 text, but utf-8"]),
    ("cafe ".encode("utf-16") * 50 + b"x", [], ["offset 600", "repair it"]),
    (b"PK\3\4\0\xff\xfe\xfd" * 100, [], ["zip file, not text", "save its text"]),
    (b"%PDF-1.7\nabc" * 100, ["--encoding=cp1252"], ["a PDF, not text", "save its text"]),
    ("café au lait".encode("utf-16-be"), [], ["offset 7", "--encoding=utf-16-be"]),
    (b'["a", "b"', ["--format=json"], ["is cut off", "(line 1)"]),
    (b'["a",\n "b', ["--format=json"], ["line 2 is not valid JSON (Unterminated string"]),
    (b'["a",\n\n5]', ["--format=json"], ["line 3 is 5, not a string or an object", "give strings"]),
    (b'[{"text": "a"}, {"body": "b"}]', ["--format=json"], ["line 1 has no field 'text' (fields: body)"]),
    (b'id\ttext\n1\t"Yes," she said\n', ["--format=tsv"], ["is not a valid table", "write quotes"]),
    (b"id;body\n1;2\n", ["--format=csv"], ["no field 'text' (fields: id, body)"]),
    (b"id;text\n1;2;3\n", ["--format=csv"], ["row 1 has more or fewer", "text that contains ';'"]),
    (b"id\ttext\n1\t2\t3\n", ["--format=tsv"], ["row 1 has more or fewer columns"]),
    (b"", [], ["no text", "book.txt"]),
    (b" \n\t\n", [], ["no text"]),
    (b"x", [], ["too short"]),
    (b"one book " * 100, ["--val_fraction=0"], ["--val_fraction 0", "above 0 and below 1"]),
    (b"one book " * 100, ["--val_fraction=1.5"], ["--val_fraction 1.5"]),
    (b"text " * 100, ["--tokenizer=bpe"], ["bpe:4096"]),
    (b"text " * 100, ["--tokenizer=bpe:x"], ["bpe:4096"]),
    (b"text " * 100, ["--tokenizer=bpe:100"], ["from 258"]),
    (b"text " * 100, ["--tokenizer=words"], ["unknown --tokenizer words"]),
    (b"text " * 100, ["--encoding=klingon"], ["--encoding klingon", "utf-8"]),
    (b"text " * 100, ["--strip_lines=("], ["--strip_lines", "regular expression"]),
    (b"text " * 100, ["--format=pdf"], ["--format"]),
    (b"{}\n", ["--format=jsonl"], ["line 1", "no field 'text'", "--field=NAME"]),
    (b'{"text": "a"}\n{"body": "b"}\n', ["--format=jsonl"], ["line 2", "no field 'text' (fields: body)"]),
    (b'{"text": 5}\n', ["--format=jsonl"], ["line 1: field 'text' is not text"]),
    (b'{"text": "a"}\n{"te', ["--format=jsonl"], ["line 2 is not valid JSON"]),
    (b"[1]\n", ["--format=jsonl"], ["line 1 is [1], not a string or an object"]),
    (b"a,b\n1,2\n", ["--format=csv"], ["row 1", "no field 'text' (fields: a, b)"]),
    (b"id,text\n1,Hello, world\n", ["--format=csv"], ["row 1 has more or fewer columns", "quote"]),
    (b"id,text\n1\n", ["--format=csv"], ["row 1 has more or fewer columns"]),
    (b"[" * 100_000, ["--format=jsonl"], ["line 1 is not valid JSON"]),
    (b"text " * 100, ["--tokenizer=bpe:\u00b2"], ["bpe:4096"]),
    (b"text " * 100, ["--tokenizer=bpe:2000000000"], ["bpe:4096"]),
    (b"text " * 100, ["--encoding=undefined"], ["--encoding undefined"]),
    (b"nothing like it", ["--format=parquet"], ["book.txt cannot be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words", "says"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(content, words, says, tmp_path):
    (tmp_path / "book.txt").write_bytes(content)
    assert_user_error(prepare(tmp_path, "--input", tmp_path / "book.txt", *words), *says)
    assert not (tmp_path / "out").exists()


def test_wrong_encodings_can_be_read_on_demand(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"caf\xe9 \x00 " * 20)
    for words, read in (
        (["--errors=replace"], "caf\ufffd \0 "),
        (["--encoding=latin-1", "--errors=replace"], "café \0 "),
    ):
        done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--overwrite", *words)
        assert done.returncode == 0, done.stderr
        both = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
        assert "".join(both) == read * 20


def test_a_text_without_pairs_has_a_tokenizer_of_bytes(tmp_path):
    (tmp_path / "digits.txt").write_text("".join(f"{n}\n" for n in range(10)) * 9)
    assert prepare(tmp_path, "--input", tmp_path / "digits.txt", "--tokenizer=bpe:300").returncode == 0
    assert documents_of(tmp_path / "out", "train")[0].startswith("0\n1\n2\n")


def test_lines_without_end_are_read_in_time(tmp_path):
    """A million blank lines with --strip_lines, nowhere to cut: joined once, not for each of them."""
    (tmp_path / "blank.txt").write_text("x" + "\n" * 3_000_000 + "x\n")
    done = prepare(tmp_path, "--input", tmp_path / "blank.txt", "--strip_lines=nothing", "--tokenizer=byte")
    assert done.returncode == 0 and len(ids_of(tmp_path / "out", "train")) > 2_500_000


def test_the_same_file_by_two_paths_is_one_document(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number}.md").write_text(f"note {number} " * 20)
    twice = [tmp_path / "1.md", tmp_path / ".." / tmp_path.name / "1.md", tmp_path]
    assert prepare(tmp_path, "--input", *twice, "--tokenizer=byte").returncode == 0
    both = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(both) == [f"note {number} " * 20 for number in (1, 2, 3)]


def test_files_that_are_not_what_their_names_say(tmp_path):
    whole = gzip.compress(b"some text " * 10_000)
    for name, content in (
        ("cut.txt.gz", whole[: len(whole) // 2]),
        ("not.txt.gz", b"plain"),
        ("not.jsonl.zst", b"plain"),
        ("cut.txt.zst", pyarrow.compress(b"some text " * 1000, "zstd", asbytes=True)[:-9]),
        ("some.parquet", b"PAR1 no"),
    ):
        (tmp_path / name).write_bytes(content)
        assert_user_error(prepare(tmp_path, "--input", tmp_path / name, "--tokenizer=byte"), name)
        assert not (tmp_path / "out").exists(), name
    for name, content in (
        ("latin.txt.gz", gzip.compress(b"caf\xe9 au lait")),
        ("latin.txt.zst", pyarrow.compress(b"caf\xe9 au lait", "zstd", asbytes=True)),
    ):
        (tmp_path / name).write_bytes(content)
        assert_user_error(prepare(tmp_path, "--input", tmp_path / name), name, "0xe9", "--errors=replace")


def test_where_things_are_not_or_may_not_be(tmp_path):
    (tmp_path / "book.txt").write_text("some text " * 100)
    assert_user_error(prepare(tmp_path, "--input", tmp_path / "none.txt"), "none.txt", "does not exist")
    assert_user_error(prepare(tmp_path, "--input", tmp_path / "*.docx"), "*.docx", "does not exist")
    (tmp_path / "empty").mkdir()
    assert_user_error(prepare(tmp_path, "--input", tmp_path / "empty"), "has no supported files", ".parquet")
    book = ("--input", tmp_path / "book.txt")
    assert_user_error(prepare_here(SCRIPT, *book), "--name is missing")
    assert_user_error(prepare_here(SCRIPT, *book, "--name", "../up"), "--name '../up'")
    assert_user_error(
        prepare_here(SCRIPT, *book, "--name", "shakespeare"), "shakespeare is the folder of another dataset"
    )
    assert_user_error(prepare_here(SCRIPT, "--name=x"), "--input")
    assert_user_error(prepare(tmp_path, *book, name="book.txt"), "cannot be written")
    assert not (REPO / "data" / "x").exists()


def test_an_existing_dataset_is_kept_unless_overwritten(tmp_path):
    (tmp_path / "book.txt").write_text("some text " * 100)
    assert prepare(tmp_path, "--input", tmp_path / "book.txt").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--tokenizer=bpe:300")
    assert_user_error(done, "has a dataset already", "--overwrite")
    (tmp_path / "bad.txt").write_bytes(b"good text " * 200_000 + b"\xff")
    assert_user_error(prepare(tmp_path, "--input", tmp_path / "bad.txt", "--overwrite"), "0xff")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "train_000000.bin").write_bytes(b"of an older one")
    done = prepare(tmp_path, "--input", tmp_path / "book.txt", "--tokenizer=bpe:300", "--overwrite")
    assert done.returncode == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_reported_and_changes_nothing(tmp_path):
    (tmp_path / "book.txt").write_text("some text " * 100_000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin.tmp").symlink_to("/dev/full")
    done = prepare(tmp_path, "--input", tmp_path / "book.txt")
    assert done.returncode == 1 and "No space left" in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "out").exists()


def test_a_huge_document_is_never_in_memory_whole(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        for _ in range(40):
            file.write(b"a line of text that is repeated\n" * (1 << 15))  # 1 MB
    longest = max(len(piece.text) for piece in Corpus(find_files([str(tmp_path / "huge.txt")])).pieces())
    assert longest < 3 << 20
    done = prepare(tmp_path, "--input", tmp_path / "huge.txt", "--tokenizer=byte")
    assert done.returncode == 0 and len(ids_of(tmp_path / "out", "train")) == int((40 << 20) * 0.9) + 1
