"""Copy the pages of the site into the folder .site; `make site` builds it from there.

Links in docs/ are those of the repository, such as ../BENCHMARKS.md and ../config/modern.py, and work on a
forge. The site has the pages of docs/ and of the root in one folder. Other files of the repository to which a
page has links are copied, as text that a browser shows.
"""

import re
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SITE = REPO / ".site"
ROOT_PAGES = ("README.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md")
KEPT = (".png", ".svg", ".ipynb")
RENAMED = {"README.md": "readme.md"}  # as README.md would be the front page, which is docs/index.md
CODE = re.compile(r"^(```+|~~~+).*?^\1[^\S\n]*$|``[^\n]+?``|`[^`\n]+`", re.M | re.S)
LINK = re.compile(r"""(\]\(<?|^\[[^\]]+\]:\s+|\b(?:href|src|srcset)=["'])([^\s)>"']+)""", re.M)


def links_of(text: str) -> list[str]:
    """The targets of all links and pictures of a page, without those in code."""
    return [match[2] for match in LINK.finditer(CODE.sub("", text))]


def is_relative(target: str) -> bool:
    """Whether a link leads to a file of the repository."""
    return not re.match(r"[a-z][a-z+.-]*:|#|/", target, re.I)


def target_of(page: Path, target: str) -> Path:
    """The file that a relative link of a page leads to."""
    return (page.parent / target.partition("#")[0]).resolve()


def name_in_site(path: Path) -> str:
    """The place of a file of the repository in the site."""
    name = path.relative_to(REPO).as_posix().removeprefix("docs/")
    return RENAMED.get(name, name if path.suffix in (".md", *KEPT) else f"{name}.txt")


def copy_page(page: Path, site: Path) -> None:
    """Copy a page, whose links lead to places in the site then, and the files to which they lead."""

    def rewrite(match: re.Match[str]) -> str:
        before, target = match.groups()
        if not is_relative(target):
            return match[0]
        path = target_of(page, target)
        name = name_in_site(path)
        if path.suffix != ".md":
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                (site / name).write_text("\n".join(sorted(file.name for file in path.iterdir())))
            elif path.is_file():
                shutil.copyfile(path, site / name)
        return before + name + "".join(target.partition("#")[1:])

    text, end, parts = page.read_text(encoding="utf-8"), 0, []
    for code in CODE.finditer(text):
        parts += [LINK.sub(rewrite, text[end : code.start()]), code[0]]
        end = code.end()
    parts.append(LINK.sub(rewrite, text[end:]))
    (site / name_in_site(page)).write_text("".join(parts), encoding="utf-8")


def main(site: Path = SITE) -> None:
    """Replace a folder by the site's pages and the files to which they have links."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for page in [*sorted((REPO / "docs").glob("*.md")), *(REPO / name for name in ROOT_PAGES)]:
        targets = filter(is_relative, links_of(page.read_text(encoding="utf-8")))
        missing = [target for target in targets if not target_of(page, target).exists()]
        if missing:  # the site's builder sees missing pages, but not missing pictures
            sys.exit(f"error: {page.name} has links to missing files: {', '.join(missing)}; correct them")
        copy_page(page, site)


if __name__ == "__main__":
    main()  # without an argument, as it deletes the folder
