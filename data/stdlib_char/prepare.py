"""The Python standard library's own source on this machine, as characters: 9 MB, vocabulary 96, no download.

Tests, tables of text encodings, and files with characters other than printable ASCII are left out. Every
tenth file, in the order of paths, is val. The vocabulary is the newline, then ASCII 32 to 126.
"""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.sources import argument_parser
from distrogpt.data.preparation.writer import write_dataset
from distrogpt.data.tokenizer import CharTokenizer
from distrogpt.errors import CLOSE_OTHERS, UserError, cli_errors
from distrogpt.progress import show_wait

CHARS = "\n" + "".join(map(chr, range(32, 127)))
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}


def source_files(folder: Path) -> list[str]:
    """The texts of the .py files under a folder, in the order of their paths, two empty lines after each."""
    texts = []
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            try:
                text = path.read_text(encoding="utf-8-sig", errors="replace")  # U+FFFD is not in CHARS
            except OSError:  # such as a broken link
                continue
            if text.strip() and set(text) <= set(CHARS):
                texts.append(text.strip("\n") + "\n\n\n")
    return texts


@cli_errors(CLOSE_OTHERS)
def main() -> None:
    parser = argument_parser(
        sys.argv[0], __doc__.splitlines()[0], "folder of Python files, instead of the standard library"
    )
    args = parser.parse_args()
    folder = args.input or Path(sysconfig.get_path("stdlib"))
    with show_wait("reading the files"):
        texts = source_files(folder)
    if len(texts) < 10:
        raise UserError(
            f"{folder} has {len(texts)} ASCII .py files, fewer than 10; give another --input FOLDER"
        )
    tokenizer, source = CharTokenizer(CHARS), f"{folder}, Python {sys.version.split()[0]}"
    with write_dataset(args.output, tokenizer, args.overwrite, source=source) as add:
        for number, text in enumerate(texts):
            add("val" if number % 10 == 9 else "train", tokenizer.encode(text), len(text))


if __name__ == "__main__":
    main()
