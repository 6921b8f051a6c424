"""The documentation against the repository: its links, the site's navigation, its commands and messages."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from conftest import COMMANDS, PREPARE, REPO, load_docs_script

from configurator import find_config, read_settings, refuse_unused
from distrogpt.errors import UserError

build_site = load_docs_script("build_site")
DOCS = sorted((REPO / "docs").glob("*.md"))
PAGES = [*(REPO / name for name in build_site.ROOT_PAGES), *DOCS]
SCRIPT = re.compile(r"(?:.*/)?(data/\w+/prepare\.py|(?:" + "|".join(COMMANDS).replace(".", r"\.") + r"))")
NOT_SHELL = ("python", "json", "html", "yaml", "toml", "csv")  # languages of blocks without commands
OTHER_PROGRAMS = """--help --max-restarts --shutdown-timeout --master_addr --master_port --node_rank --nnodes
    --nproc_per_node --standalone --rdzv_backend --rdzv_id --rdzv_endpoint --array --wrap --shm-size --gpus
    --entrypoint --model_args --tasks --include_path --setting""".split()
PLACEHOLDER = re.compile(r"\.\.\.|(?:[\w-]+[_/-])?[A-Z]+(?:\.\w+)?")  # in running text: --seed=S, out-X
FENCE = re.compile(r"^ *(```+)(\w*)[^\n]*\n(.*?)^ *\1 *$", re.M | re.S)


@pytest.fixture(autouse=True, scope="module")
def beside_a_nanogpt(tmp_path_factory):
    """A folder in which ../nanoGPT is one, as the commands of the pages expect it."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("here", "nanoGPT"):
        (folder / name).mkdir()
    (folder / "nanoGPT" / "model.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "here")
        yield


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def pages(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())(test)


# links


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them, and its own."""
    text, found = FENCE.sub("", read(page)), Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found[slug] += 1
    numbered = {f"{slug}-{n}" for slug, count in found.items() for n in range(1, count)}
    return {*found, *numbered, *re.findall(r"""<a (?:id|name)=["']([^"']+)""", text)}


@pages
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for target in build_site.links_of(read(page)):
        path, anchor = build_site.target_of(page, target), target.partition("#")[2]
        if target.startswith("#"):
            path = page
        elif not build_site.is_relative(target):
            continue
        if not path.is_relative_to(REPO) or not path.exists():
            wrong.append(target)
        elif anchor and path.suffix == ".md" and anchor not in anchors_of(path):
            wrong.append(target)
    assert wrong == []


def navigation() -> list[str]:
    yaml = pytest.importorskip("yaml", reason="needs requirements-test.txt")
    groups = yaml.safe_load(read(REPO / "mkdocs.yml"))["nav"]
    assert [name for group in groups for name in group] == ["Start", "Guides", "Understand", "Reference"]
    entries = [entry for group in groups for entries in group.values() for entry in entries]
    return [page for entry in entries for page in entry.values()]


def test_every_page_is_in_the_navigation_once():
    assert sorted(navigation()) == sorted(build_site.name_in_site(page) for page in PAGES)


def test_every_page_can_be_reached_from_the_first():
    todo, found = [REPO / "docs" / "index.md"], set()
    while todo:
        page = todo.pop()
        if page in PAGES and page not in found and page.is_file():
            found.add(page)
            todo += [build_site.target_of(page, target) for target in build_site.links_of(read(page))]
    assert found == set(PAGES)


def test_the_site_has_all_pages_and_links_within_itself(tmp_path):
    build_site.main(tmp_path)
    for page in tmp_path.glob("*.md"):
        for target in filter(build_site.is_relative, build_site.links_of(read(page))):
            assert (tmp_path / target.partition("#")[0]).is_file(), f"{page.name}: {target}"
    assert {path.name for path in tmp_path.glob("*.md")} == {build_site.name_in_site(page) for page in PAGES}


# commands


def words_of(line: str) -> list[str]:
    """The words of a shell's line, with ; & | < > as words of their own, without comments."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    reader.whitespace_split = True
    try:
        return list(reader)
    except ValueError:  # a quote that is not closed: no command
        return []


def lines_of(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a page that can be commands, and whether they stand in a block."""
    for _, language, block in FENCE.findall(text):
        if language not in NOT_SHELL:
            yield from ((line, True) for line in block.replace("\\\n", " ").split("\n"))
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        yield " ".join(code.split()), False


def commands_of(text: str) -> Iterator[tuple[str, list[str], bool]]:
    """Calls of our scripts and of make in a page: the script, its arguments, and whether in a block."""
    for line, in_block in lines_of(text):
        yield from ((name, arguments, in_block) for name, arguments in calls_of(line))


def calls_of(line: str) -> Iterator[tuple[str, list[str]]]:
    for is_separator, group in groupby(words_of(line), lambda word: set(word) <= set(";&|<>")):
        words = list(group)
        if is_separator:
            continue
        if words[0] == "make":
            yield "make", words[1:]
        for number, word in enumerate(words):
            if " " in word and SCRIPT.search(word):  # sbatch --wrap 'python ...'
                yield from calls_of(word)
            elif word.endswith("config/train.slurm"):
                yield "train.py", words[number + 1 :]
            elif match := SCRIPT.fullmatch(word):
                yield match[1], words[number + 1 :]
            else:
                continue
            break


def fault_of(script: str, arguments: list[str], in_block: bool) -> str | None:
    """Why the command would be refused before it begins; None if it would not."""
    arguments = [re.sub(r"\$\w+", "1", word) for word in arguments if word != "..."]
    arguments = [
        word for word in arguments if not re.fullmatch(r"out\S*/config\.py", word)
    ]  # a run writes it
    if not in_block:  # where out-X, --seed=S and --seed alone stand for others
        arguments = [word for word in arguments if not PLACEHOLDER.fullmatch(word.partition("=")[2] or word)]
        if script in COMMANDS:
            arguments = [word for word in arguments if "=" in word or not word.startswith("-")]
    if not arguments or any(word.partition("=")[0] == "--help" for word in arguments):
        return None
    if script == "make":
        targets = re.findall(r"^([a-z-]+):", read(REPO / "Makefile"), re.M)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        return f"make {shlex.join(unknown)}" if unknown else None
    return fault_of_prepare(script, arguments) if script in PREPARE else fault_of_settings(script, arguments)


def fault_of_settings(script: str, arguments: list[str]) -> str | None:
    if script == "plot.py":  # its other words are folders
        arguments = [word for word in arguments if word.startswith("-")]
    try:
        config = read_settings(COMMANDS[script], arguments)
        refuse_unused(config, arguments)
    except UserError as error:
        return f"{script} {shlex.join(arguments)}: {error}"
    flags = {word.removeprefix("--").partition("=")[0] for word in arguments}
    idle = {name: why for name, why in config.idle().items() if name in flags}
    return f"{script} {shlex.join(arguments)}: no effect: {idle}" if idle else None


class Parsed(Exception):
    """A prepare.py has read its arguments."""


def parser_of(script: str, arguments: list[str] | None) -> argparse.ArgumentParser:
    """The parser of a prepare.py, which has read these arguments. Raises SystemExit if they are wrong."""
    found = []

    def parse_args(parser: argparse.ArgumentParser) -> None:
        found.append(parser)
        if arguments is not None:
            unpatched(parser, arguments)
        raise Parsed

    unpatched = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(REPO / script)])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(Parsed):
            runpy.run_path(str(REPO / script), run_name="__main__")
    return found[0]


def fault_of_prepare(script: str, arguments: list[str]) -> str | None:
    try:
        parser_of(script, arguments)
    except SystemExit:
        return f"{script} {shlex.join(arguments)}"
    return None


@pages
def test_commands_have_settings_that_exist(page, capsys):
    faults = []
    for script, arguments, in_block in commands_of(read(page)):
        if script.endswith("prepare.py") and script not in PREPARE:
            if not re.search(r"data/(NAME|X)/", script):
                faults.append(f"no {script}")
        elif fault := fault_of(script, arguments, in_block):
            faults.append(f"{fault} {capsys.readouterr().err}".strip())
    assert faults == []


@cache
def all_flags() -> set[str]:
    """The flags of all commands, of each prepare.py, and of programs that pages mention."""
    names = {f"--{name}" for cls in COMMANDS.values() for name in cls.__dataclass_fields__}
    helps = [parser_of(script, None).format_help() for script in PREPARE]
    options = {word for text in helps for word in re.findall(r"--\w+", text)}
    return names | options | set(OTHER_PROGRAMS)


@pages
def test_flags_and_configs_in_running_text_exist(page):
    text = read(page)
    words = [word for code, in_block in lines_of(text) if not in_block for word in code.split()]
    flags = [word.partition("=")[0] for word in words if re.match("--[a-z]", word)]
    assert set(flags) - all_flags() == set()
    for name in set(re.findall(r"\bconfig/(\w+)\.py", text)) - {"NAME", "X"}:
        find_config(f"config/{name}.py")


# messages


@cache
def source_texts() -> str:
    """All texts in the code, a line each, with ... for their fields; and the Makefile."""
    texts = [read(REPO / "Makefile")]
    for path in [*REPO.glob("*.py"), *(REPO / "distrogpt").rglob("*.py"), *(REPO / "data").glob("*/*.py")]:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts).replace("\n", " "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("\n", " "))
    return "\n".join(texts)


def test_quoted_messages_are_those_of_the_code():
    rows = re.findall(r"^\| (.*?) \|", read(REPO / "docs" / "troubleshooting.md"), re.M)
    quoted = [code for row in rows for code in re.findall(r"`([^`]+)`", row) if " " in code]
    halves = [half.strip() for message in quoted for half in message.split(";")]  # often of two texts
    patterns = {half: ".*".join(map(re.escape, half.split("..."))) for half in halves}
    assert len(quoted) > 40
    assert [half for half, pattern in patterns.items() if not re.search(pattern, source_texts())] == []
