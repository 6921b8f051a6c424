"""Write docs/settings.md, the reference of all settings, from their dataclasses: python docs/settings.py"""

import inspect
import re
import sys
from dataclasses import Field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import Settings, default_text, settings_by_heading, type_text
from distrogpt import settings

PAGE = Path(__file__).with_suffix(".md")
COMMANDS: dict[str, type[Settings]] = {
    "train.py": settings.TrainConfig,
    "sample.py": settings.SampleConfig,
    "eval.py": settings.EvalConfig,
    "serve.py": settings.ServeConfig,
    "export.py": settings.ExportConfig,
    "bench.py": settings.BenchConfig,
    "plot.py": settings.PlotConfig,
    "ablate.py": settings.AblateConfig,
}
ABOUT = """<!-- Made by `make docs` from distrogpt/settings.py. Do not edit. -->

# Settings

Every setting of every command. Set it with a flag, `--name=value`, or in a config file, `name = value`; flags
override config files. `python train.py --help` prints the settings of a command, and
`python train.py --help=WORD` searches them.

Write `True`, `False` and `None` as in Python, and numbers as `300`, `0.1` or `6e-4`. `~` in a path is your
home folder. An unknown flag is an error, and so is one that the command never uses; a flag that only the
other settings make useless gets a note.

`make docs` makes this page from the code; do not edit it.
"""
CODE = re.compile(r"[\w./\\*=+-]*[_*=\\][\w./\\*=+-]*")  # words such as max_iters, step-*.pt, \n and =


def slug(heading: str) -> str:
    """The anchor that forges and mkdocs give a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def type_cell(cls: type, field: Field) -> str:
    """The choices of a setting, or its type and limits."""
    if "choices" in field.metadata:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    words = {"min": "at least", "above": "above", "max": "at most", "below": "below"}
    limits = [f"{word} {field.metadata[key]}" for key, word in words.items() if key in field.metadata]
    return ", ".join([type_text(cls, field).replace(" | ", " or "), *limits]).replace(str(2**63), "`2**63`")


def table(cls: type, group: list[Field]) -> list[str]:
    """A row for each setting. An empty default has an empty cell."""
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for field in group:
        default = f"`{text}`" if (text := default_text(field)) else ""
        meaning = CODE.sub(r"`\g<0>`", field.metadata["explanation"])
        lines.append(f"| `{field.name}` | {default} | {type_cell(cls, field)} | {meaning} |")
    return [*lines, ""]


def own_groups(cls: type[Settings]) -> dict[str, list[Field]]:
    """The settings of a command by heading, without those that it inherits unchanged."""
    inherited = [field for base in cls.__bases__ if base is not Settings for field in fields(base)]
    groups = {
        heading: [field for field in group if not any(field is other for other in inherited)]
        for heading, group in settings_by_heading(cls).items()
    }
    return {heading: group for heading, group in groups.items() if group}


def section(command: str, cls: type[Settings]) -> list[str]:
    """What a command does, its usage, and its settings."""
    about, usage, *notes = inspect.getdoc(cls).split("\n\n")
    usages = [line.removeprefix("usage:").strip() for line in usage.splitlines()]
    examples = [line for line in usages if "[" not in line]  # without the general form
    lines = [f"## {command}", "", about.replace("\n", " "), ""]
    lines += ["```sh", *examples, "```", ""] if examples else []
    for note in notes:
        lines += [note.replace("\n", " "), ""]
    groups = own_groups(cls)
    for heading, group in groups.items():
        if len(groups) > 1:
            lines += [f"### {command}: {heading}", ""]
        lines += table(cls, group)
    own = {field.name for group in groups.values() for field in group}
    shared = {name: [f.name for f in group if f.name not in own]
              for name, group in settings_by_heading(cls).items()}  # fmt: skip
    if any(shared.values()):
        lines += [f"### {command}: settings of train.py", "", "It also reads these settings of train.py:", ""]
        for heading, names in shared.items():
            if names:
                link = f"[{heading}](#{slug(f'train.py: {heading}')})"
                lines.append(f"- {link}: {', '.join(f'`{name}`' for name in names)}")
        lines.append("")
    return lines


def settings_page() -> str:
    """The text of docs/settings.md."""
    index = []
    for command, cls in COMMANDS.items():
        groups = own_groups(cls)
        links = [f"[{heading}](#{slug(f'{command}: {heading}')})" for heading in groups]
        index.append(f"- [{command}](#{slug(command)})" + (f": {', '.join(links)}" if len(links) > 1 else ""))
    sections = [line for command, cls in COMMANDS.items() for line in section(command, cls)]
    return "\n".join([ABOUT, *index, "", *sections]).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
    print(PAGE)
