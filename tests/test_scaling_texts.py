"""The texts that docs/scaling_texts.py makes from a machine's files."""

import gzip

from conftest import load_docs_script

scaling_texts = load_docs_script("scaling_texts")

MANUAL = """.\\" a comment
.TH LS 1
.SH NAME
ls \\- list \\fBdirectory\\fR contents
.PP
.BR "ls" " prints names"
"""


def test_a_manual_page_is_plain_text(tmp_path):
    path = tmp_path / "man" / "ls.1.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(MANUAL.encode()))
    assert scaling_texts.plain(path) == "NAME\nls - list directory contents\n\nls  prints names\n"


def test_repetitions_are_left_out():
    long, seen = "a paragraph of more than sixty characters, which is the same twice", set()
    assert (
        scaling_texts.new_paragraphs(f"{long}\n\nshort\n\n{long}!\n\nshort", seen)
        == f"{long}\n\nshort\n\nshort"
    )
    assert scaling_texts.new_paragraphs(long, seen) == ""
    line = "The same line of text, number"
    assert scaling_texts.new_lines(f"{line} 1\nx\n{line} 2\nx", set()) == f"{line} 1\nx\nx"
