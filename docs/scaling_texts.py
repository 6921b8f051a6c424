"""Write the texts of docs/data/scaling.json that no prepare.py makes, from the files of a Linux machine:

python docs/scaling_texts.py english FOLDER
python data/text/prepare.py --input FOLDER/english.txt --name english --val_fraction=0.02

english: manual pages, README and NEWS files, licences, documentation; headers: C and C++ headers. Repeated
paragraphs are left out, in english repeated lines too: documentation repeats itself, and val would repeat
train.
"""

import gzip
import html
import re
import sys
from collections.abc import Callable, Iterator
from hashlib import md5
from pathlib import Path

DOC = "usr/share/doc"
ENGLISH = [f"usr/share/man/man{section}/*" for section in range(1, 9)]
ENGLISH += [
    f"{DOC}/**/README*",
    f"{DOC}/**/NEWS*",
    f"{DOC}/**/*.txt",
    f"{DOC}/**/*.txt.gz",
    f"{DOC}/*/copyright",
]
ENGLISH += [f"{DOC}/**/*.rst*", f"{DOC}/**/*.md*", "usr/share/perl/**/*.pod", "usr/share/info/*.gz"]
ENGLISH += [f"{DOC}/[!n]*/**/*.html"]  # those of node.js are there as .md
GENERATED = ("gcloud", "/man1/bq", "gsutil")  # thousands of nearly the same manual pages
HEADERS, LONGEST, ENOUGH = "usr/include/**/*.h", 200_000, 6_000_000

REQUEST = re.compile(r"\.\s*(\S+)\s*(.*)")  # of a manual page
WITH_TEXT = set("SH SS B I BR IR RB BI IB RI TP IP Sh Ss Nm Fl Ar Xr Pa Dv Li Em Sy".split())
PARAGRAPHS = set("PP P Pp LP sp".split())
FONTS = re.compile(r"\\f\(?[A-Z0-9]{1,2}|\\f\[[^]]*\]|\\&|\\s[-+]?\d|\\/|\\,")
ESCAPES = {
    r"\-": "-",
    r"\(aq": "'",
    r"\(bu": "*",
    r"\e": "\\",
    r"\(cq": "'",
    r"\(lq": '"',
    r"\(rq": '"',
    r"\ ": " ",
}


def plain_manual(text: str) -> str:
    """A manual page without its requests and fonts."""
    lines = []
    for line in text.split("\n"):
        if line.startswith(("'\\\"", '.\\"')):
            continue
        if match := REQUEST.match(line):
            if match[1] in PARAGRAPHS:
                lines.append("")
            if match[1] not in WITH_TEXT:
                continue
            line = match[2].replace('"', "")
        lines.append(line)
    text = FONTS.sub("", "\n".join(lines))
    for escape, character in ESCAPES.items():
        text = text.replace(escape, character)
    return text


def plain(path: Path) -> str:
    """The text of a file, in ASCII."""
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        text = file.read().decode("utf-8", "ignore")
    if "/man/" in str(path):
        text = plain_manual(text)
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(script|style).*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = text.encode("ascii", "ignore").decode().replace("\r", "").replace("\t", "    ")
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f]", "", text)


def is_new(words: str, seen: set[bytes]) -> bool:
    """Whether a text is not in `seen`, to which it is added."""
    key, before = md5(words.encode()).digest(), len(seen)
    seen.add(key)
    return len(seen) > before


def new_paragraphs(text: str, seen: set[bytes]) -> str:
    """The short paragraphs, and the long ones that are new but for spaces and punctuation."""
    paragraphs = re.split(r"\n[ \n]*\n", text)
    kept = [p.rstrip() for p in paragraphs if len(p) <= 60 or is_new(re.sub(r"\W+", "", p), seen)]
    return "\n\n".join(kept).strip()


def new_lines(text: str, seen: set[bytes]) -> str:
    """The short lines, and those whose letters are new."""
    letters = {line: re.sub(r"[\W\d_]+", "", line).lower() for line in text.split("\n")}
    kept = [line for line in text.split("\n") if len(letters[line]) <= 20 or is_new(letters[line], seen)]
    return re.sub(r"\n\n\n+", "\n\n", "\n".join(kept)).strip()


def english() -> Iterator[str]:
    seen: set[bytes] = set()
    for pattern in ENGLISH:
        for path in sorted(Path("/").glob(pattern)):
            if path.is_file() and not any(word in str(path) for word in GENERATED):
                text = new_lines(new_paragraphs(plain(path), seen), seen)
                if len(text) > 500:
                    yield text


def headers() -> Iterator[str]:
    seen: set[bytes] = set()
    paths = [path for path in Path("/").glob(HEADERS) if path.is_file() and not path.is_symlink()]
    size = 0
    for path in sorted(paths, key=lambda path: md5(str(path).encode()).hexdigest()):
        text = plain(path)
        if 300 <= len(text) <= LONGEST and size <= ENOUGH:
            text = new_paragraphs(text, seen)
            size += len(text)
            yield text


TEXTS: dict[str, Callable[[], Iterator[str]]] = {"english": english, "headers": headers}

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    Path(folder, f"{name}.txt").write_text("<|endoftext|>".join(TEXTS[name]()), encoding="utf-8")
