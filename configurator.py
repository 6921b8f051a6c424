"""Settings of a command: a dataclass's defaults, then config files, then --key=value flags; with --help.

The annotation of a setting is its type; the flag of a tuple[str, ...] is repeated for each of its values.
The order of the fields is the order of --help, where a field with a heading begins a group.
"""

import ctypes
import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from distrogpt.errors import (
    CLOSE_OTHERS,
    REPO,
    UserError,
    cli_errors,
    leave_to_rank_0,
    near_name,
    quote,
    warn,
)
from distrogpt.files import read_text

NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # null, and surrogates that encode no byte
TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
TYPE_NAMES |= {tuple: "a list of texts, none of them empty", types.NoneType: "None"}
HELP_WIDTH, HELP_COLUMN = 100, 32  # of --help: its lines, and where explanations begin


def setting(default: Any, explanation: str, **limits: Any) -> Any:
    """A dataclass field; its limits are min, max, above, below, choices, or path=True for a file's name;
    path_after is a regular expression for the text before the names of files in a text. With heading=TEXT,
    the field begins a group of settings in --help."""
    return dataclasses.field(default=default, metadata={"explanation": explanation, **limits})


class Settings:
    """Base class of dataclasses of settings: checks and converts the fields. Raises ValueError."""

    uses_ranks = False  # under torchrun, this command's ranks work together
    most_used = ""  # names of settings that --help lists first
    given: frozenset[str] | None = None  # what config files and flags have set; None: made in Python, all is

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = check_value(type(self), field.name, getattr(self, field.name))
            except UserError as error:
                raise ValueError(error) from None
            setattr(self, field.name, value)

    @classmethod
    def never_used(cls) -> dict[str, str]:
        """Settings that have no effect in this command, by name, and why; --help does not list them."""
        return {}

    def unused(self) -> dict[str, str]:
        """Settings that have no effect beside the values of the others, and why. As flags they are mistakes;
        config files may have them, as these serve several commands."""
        return self.never_used()

    def idle(self) -> dict[str, str]:
        """Settings that another value of another setting would make use of, and which; flags get a note."""
        return {}


T = TypeVar("T", bound=Settings)


def configure(cls: type[T], argv: list[str] | None = None) -> T:
    """The settings of a command line, by default this process's; --help and mistakes end the process."""
    argv = sys.argv[1:] if argv is None else argv
    with suppress(ValueError):  # raised if this is not the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch loads, Ctrl-C ends without a traceback
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # if torchrun is killed, its ranks get SIGTERM and do not train on unnoticed
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    with cli_errors(CLOSE_OTHERS):
        if not cls.uses_ranks:
            leave_to_rank_0(Path(sys.argv[0]).name)
        for word, _, search in (word.partition("=") for word in argv):
            if word in ("-h", "--help"):
                text = help_text(cls, search)
                if not int(os.environ.get("RANK", 0)):
                    print(text)
                sys.exit(0)
        config = read_settings(cls, argv)
        refuse_unused(config, argv)
        return config


def refuse_unused(config: Settings, argv: list[str]) -> None:
    """Raises UserError if a flag has no effect in this command; prints a note if it has none this time."""
    reasons, idle = config.unused(), config.idle()
    for word in argv:
        name = word.removeprefix("--").partition("=")[0] if word.startswith("-") else "a config file"
        if name in reasons:
            raise UserError(f"{name} has no effect: {reasons[name]}; leave it out")
        if name in idle:
            warn(f"note     {name} has no effect {idle[name]}")


def read_settings(cls: type[T], argv: list[str]) -> T:
    """Settings from config files in their order, then from flags, left to right. Raises UserError."""
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    flags = [word for word in argv if word.startswith("-")]
    for flag in flags:
        name = flag.lstrip("-")
        if name in values:
            value = "True" if setting_types(cls)[name] == (bool,) else "VALUE"
            raise UserError(f"{flag} has no value; write --{name}={value}, without a space")
    given, shown = set(), values.keys() - cls.never_used()
    for path in [find_config(word, shown) for word in argv if not word.startswith("-")]:
        changed = run_config_file(path, values)
        if not changed:
            warn(f"note     {path} sets nothing; a setting is a line such as max_iters = 100")
        for key, value in changed.items():
            values[key] = check_value(cls, key, value, f"{path}: ")
            given.add(key)
    from_flags: dict[str, Any] = {}
    for flag in flags:
        key, _, text = flag.removeprefix("--").partition("=")
        value = check_value(cls, key, text, is_text=True)
        repeated = isinstance(value, tuple) and value != ()
        from_flags[key] = from_flags.get(key, ()) + value if repeated else value
    try:
        config = cls(**values | from_flags)
    except ValueError as error:  # raised by the dataclass itself
        raise UserError(error) from None
    config.given = frozenset(given | from_flags.keys())
    return config


class Namespace(dict[str, Any]):
    """The globals of a config file; `assigned` has the names that it sets, be it to the same value."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.assigned: set[str] = set()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.assigned.add(name)


def find_config(name: str, settings: Container[str] = ()) -> Path:
    """The path of a config file, from here or from the repository; a bare NAME is config/NAME.py. Raises
    UserError; `settings` are those of the command."""
    name = os.path.expanduser(name)
    bare = f"config/{name}.py"
    for path in (Path(name), REPO / name, Path(bare), REPO / bare):
        if os.path.isfile(path):  # Path.is_file raises OSError for 5,000 characters
            return path
    if os.path.isdir(name):
        run = f"for a run, give --out_dir={quote(shorten(name))}"
        hint = run if "out_dir" in settings else "give a config file"
        raise UserError(f"{shorten(name)} is a folder, not a config file; {hint}")
    if name.partition("=")[0] in settings:
        raise UserError(f"{shorten(name)} is not a config file; for the setting, write --{shorten(name)}")
    known = sorted(path.stem for path in (REPO / "config").glob("[!_]*.py"))
    stem = Path(name).stem
    near = stem if stem in known else near_name(stem, known)
    hint = f"did you mean config/{near}.py?" if near else f"config/ has {', '.join(known)}"
    raise UserError(f"no config file {quote(shorten(name))}; {hint} (settings are written --key=value)")


def run_config_file(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Run a config file with the settings as its globals; returns those that it set or imported, without its
    own names: modules, functions, classes, and those that begin with _."""
    scope = Namespace({"__file__": str(path), "__name__": path.stem, **values})
    source = read_text(path)
    try:
        exec(compile(source, str(path), "exec"), scope)
    except (Exception, SystemExit) as error:  # a config file that calls exit() is a mistake too
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None) or "?"
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise UserError(f"{path}, line {line}: {reason}; correct the config file") from None
    changed = {}
    for key, value in scope.items():
        own = not isinstance(key, str) or key.startswith("_") or inspect.ismodule(value) or callable(value)
        if key in scope.assigned or value is not values[key] if key in values else not own:
            changed[key] = value
    return changed


def check_value(cls: type, key: str, value: Any, source: str = "", *, is_text: bool = False) -> Any:
    """`value` converted to the type of the setting `key`, within its limits. Raises UserError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if key not in fields:
        near = near_name(shorten(key), [name for name in fields if name not in cls.never_used()])
        own = " (a name of your own begins with _)" if source else ""
        hint = f"did you mean {near}?" if near else f"--help lists all{own}"
        raise UserError(f"{source}unknown setting {quote(shorten(key))}; {hint}")
    expected = setting_types(cls)[key]
    try:
        value = parse_text(value, expected) if is_text else convert(value, expected)
    except (ValueError, OverflowError):
        wanted = " or ".join(TYPE_NAMES[kind] for kind in expected)
        raise UserError(f"{source}{key}={shorten(value, repr)} is not valid; give {wanted}") from None
    broken = broken_limit(value, fields[key].metadata)
    if broken:
        fault = "out of range" if isinstance(value, (int, float)) else "not valid"
        raise UserError(f"{source}{key}={shorten(value)} is {fault}; it must be {broken}")
    return expand_home(value, fields[key].metadata)


def expand_home(value: Any, limits: typing.Mapping[str, Any]) -> Any:
    """`value` with the home folder for ~ and ~USER where a path begins: shells leave --key=~/x as it is."""
    before = limits.get("path_after", r"\A" if "path" in limits else None)
    if before is None or not isinstance(value, str):
        return value
    home = rf"({before})(~[\w.-]*)(?=[/\\:,]|\Z)"
    return re.sub(home, lambda match: match[1] + os.path.expanduser(match[2]), value)


def broken_limit(value: Any, limits: typing.Mapping[str, Any]) -> str | None:
    """The limit that `value` breaks, in words; None if it keeps all."""
    if "choices" in limits and value not in limits["choices"]:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"])
    if "path" in limits and isinstance(value, str) and NOT_IN_PATHS.search(value):
        return "a path, without null characters and lone surrogates"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # products of two sizes must fit into the 64 bits in which numpy and torch count
    below = limits.get("below", math.inf if isinstance(value, float) else 2**31)
    tests = {
        "a finite number": isinstance(value, int) or math.isfinite(value),
        f"at least {limits.get('min')}": value >= limits.get("min", value),
        f"at most {limits.get('max')}": value <= limits.get("max", value),
        f"above {limits.get('above')}": value > limits.get("above", -math.inf),
        f"below {below}": value < below,
    }
    return next((words for words, passed in tests.items() if not passed), None)


def shorten(value: Any, write: Callable[[Any], str] = str) -> str:
    """`value` as text for a message, cut to 200 characters; its type if it cannot be written."""
    try:
        text = write(value)
    except Exception:  # a number of more than 4,300 digits, or a class of a config file
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."


def setting_types(cls: type) -> dict[str, tuple[type, ...]]:
    """The types of each setting: (float, NoneType) for `float | None`, (tuple,) for `tuple[str, ...]`."""
    return {
        name: (tuple,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
        for name, hint in typing.get_type_hints(cls).items()
    }


def parse_text(text: str, expected: tuple[type, ...]) -> Any:
    """The text of a flag as the first of the expected types that fits. Raises ValueError or OverflowError."""
    if types.NoneType in expected and text.lower() == "none":
        return None
    if bool in expected and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    if tuple in expected:  # one of its values, or none of them
        return (unescape(text),) if text else ()
    if str in expected:
        return text
    return convert(float(text) if any(mark in text for mark in ".eEn") else int(text), expected)


def unescape(text: str) -> str:
    r"""Replaces \n by a newline and \t by a tab, which are hard to type in a shell."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def convert(value: Any, expected: tuple[type, ...]) -> Any:
    """`value` as one of the types: 1 can be a float or a bool, 5e3 an int. ValueError or OverflowError."""
    if tuple in expected:
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, (tuple, list)) and all(isinstance(text, str) and text for text in texts):
            return tuple(texts)
    elif type(value) in expected:
        return value
    if bool in expected and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if int in expected and float(value).is_integer():
            return int(value)
        if float in expected:
            return float(value)
    if str in expected and isinstance(value, Path):
        return str(value)
    raise ValueError(value)


def settings_by_heading(cls: type[Settings]) -> dict[str, list[dataclasses.Field]]:
    """The settings that have an effect in a command, in groups; its own before those that it inherits."""
    inherited = {name for base in cls.__bases__ for name in getattr(base, "__dataclass_fields__", ())}
    groups: dict[str, list[dataclasses.Field]] = {}
    heading = "settings"
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name in inherited):
        heading = field.metadata.get("heading", heading)
        if field.name not in cls.never_used():
            groups.setdefault(heading, []).append(field)
    return groups


def help_text(cls: type[Settings], search: str = "") -> str:
    """The dataclass's docstring, the settings that are most used, then all by heading; or only those with the
    words of `search` in name, heading or explanation. Raises UserError if there are none."""
    groups, search = settings_by_heading(cls), search.strip()
    if search:
        groups, parts = find_settings(cls, groups, search), []
    else:
        by_name = {field.name: field for fields in groups.values() for field in fields}
        most_used = [by_name[name] for name in cls.most_used.split()]
        groups = {"most used": most_used, **groups} if most_used else groups
        parts = [inspect.getdoc(cls) or ""]
    for heading, fields in groups.items():
        parts.append("\n".join([heading, *(describe_setting(cls, field) for field in fields)]))
    if not search:
        parts.append("--help=WORD lists the settings with WORD in their name, heading or explanation.")
    return "\n\n".join(parts)


def describe_setting(cls: type, field: dataclasses.Field) -> str:
    """The lines of --help for a setting: name, default, explanation, type."""
    name = f"  --{field.name}={default_text(field)}"
    kinds, indent = type_text(cls, field), " " * HELP_COLUMN
    kinds = kinds.replace(" ", "\xa0") if len(kinds) < 60 else kinds  # not to be broken
    text = f"{field.metadata['explanation']}  [{kinds}]"
    begin = name.ljust(HELP_COLUMN) if len(name) < HELP_COLUMN - 1 else indent
    lines = textwrap.fill(text, HELP_WIDTH, initial_indent=begin, subsequent_indent=indent,
                          break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")  # fmt: skip
    return lines if begin != indent else f"{name}\n{lines}"


def default_text(field: dataclasses.Field) -> str:
    """The default of a setting as it is written in a flag; newlines and the like as escapes."""
    text = "" if field.default == () else str(field.default)
    return text if text.isprintable() else repr(text)


def type_text(cls: type, field: dataclasses.Field) -> str:
    """The choices or the types of a setting."""
    names = {types.NoneType: "None", tuple: "str, can be repeated"}
    kinds = [names.get(kind, kind.__name__) for kind in setting_types(cls)[field.name]]
    return " | ".join(map(str, field.metadata.get("choices", kinds)))


def find_settings(
    cls: type, groups: dict[str, list[dataclasses.Field]], search: str
) -> dict[str, list[dataclasses.Field]]:
    """The settings of these groups that have words that begin with those of `search`. Raises UserError."""

    def plain(text: str) -> str:  # max_iters, --max-iters and "max iters" are the same
        return re.sub(r"[\W_]+", " ", f" {text.casefold()} ")

    words, found = [word for part in search.split() if (word := plain(part).rstrip())], {}
    for heading, fields in groups.items():
        texts = [plain(f"{heading} {describe_setting(cls, field)}") for field in fields]
        matching = [f for f, text in zip(fields, texts, strict=True) if all(word in text for word in words)]
        if words and matching:
            found[heading] = matching
    if not found:
        names = [field.name for fields in groups.values() for field in fields]
        near = near_name(search.lstrip("-"), [*names, *groups])
        hint = f"did you mean --help={near}?" if near else "try another word, or --help for all settings"
        raise UserError(f"no setting of this command has {quote(shorten(search))} in its text; {hint}")
    return found
