"""docs/settings.md is what docs/settings.py makes of the settings."""

import re

from conftest import COMMANDS, load_docs_script

from configurator import settings_by_heading

script = load_docs_script("settings")


def test_the_page_is_up_to_date():
    assert script.PAGE.read_text(encoding="utf-8") == script.settings_page(), "run make docs"


def test_the_page_has_every_setting_of_every_command_once():
    page = script.settings_page()
    assert script.COMMANDS == COMMANDS
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    for command, cls in script.COMMANDS.items():
        names = {field.name for group in settings_by_heading(cls).values() for field in group}
        rows = re.findall(r"^\| `(\w+)` \|", sections[command], re.M)
        lists = " ".join(line for line in sections[command].splitlines() if line.startswith("- ["))
        shared = re.findall(r"`(\w+)`", lists)
        assert sorted(rows + shared) == sorted(names), command
        assert not shared or command in ("bench.py", "ablate.py")


def test_its_tables_and_links_are_whole():
    page = script.settings_page()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows and {row.count("|") for row in rows} == {5} and {row.count("`") % 2 for row in rows} == {0}
    plain = [re.sub(r"`[^`]*`", "", row) for row in rows]
    assert not [row for row in plain if re.search(r"[_*<>\[\]\\]", row)]  # nothing to be taken for markup
    headings = [script.slug(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")]
    assert len(headings) == len(set(headings))
    assert set(re.findall(r"\(#([\w-]+)\)", page)) <= set(headings)
