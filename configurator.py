"""Settings of a command: a dataclass's defaults, then config files, then --key=value flags; with --help.

A setting is a dataclass field made by `setting(default, "explanation", ...)`; its annotation is its type. One
of type tuple[str, ...] has several values: its flag is given again for each, a config file names a list.
"""

import ctypes
import dataclasses
import difflib
import inspect
import math
import os
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distrogpt.errors import UserError, cli_errors

REPO = Path(__file__).resolve().parent
Settings = TypeVar("Settings")


def setting(default: Any, explanation: str, **limits: Any) -> Any:
    """A dataclass field with its line for --help and its limits: at_least, at_most, above, below, choices, or
    path=True, what can name a file."""
    return dataclasses.field(default=default, metadata={"explanation": explanation, **limits})


def configure(cls: type[Settings], argv: list[str] | None = None) -> Settings:
    """The settings of a command line (by default this process's); --help and mistakes end the process."""
    argv = sys.argv[1:] if argv is None else argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch loads, Ctrl-C ends without a traceback
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # a rank whose torchrun was killed gets SIGTERM: it would train on, unseen
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    with cli_errors():
        if "--help" in argv or "-h" in argv:
            print(help_text(cls))
            sys.exit(0)
        return read_settings(cls, argv)


def read_settings(cls: type[Settings], argv: list[str]) -> Settings:
    """Config files first, in their order, then the flags, left to right. Raises UserError."""
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    for word in argv:
        if word.startswith("-") and word.lstrip("-") in values:
            name = word.lstrip("-")
            value = "True" if kinds_of(cls)[name] == (bool,) else "VALUE"
            raise UserError(f"{word} has no value; write --{name}={value}, without a space")
    for name in (word for word in argv if not word.startswith("-")):
        path = find_config(name)
        for key, value in run_config_file(path, values).items():
            values[key] = checked(cls, key, value, f"{path}: ")
    flags: dict[str, Any] = {}
    for word in (word for word in argv if word.startswith("-")):
        key, _, text = word.removeprefix("--").partition("=")
        value = checked(cls, key, text, text=True)
        flags[key] = flags.get(key, ()) + value if value and isinstance(value, tuple) else value
    values |= flags
    try:
        return cls(**values)
    except ValueError as error:  # what the dataclass itself finds wrong between settings
        raise UserError(error) from None


def check_settings(settings: Any) -> None:
    """Check and convert every field of a dataclass in place; for its __post_init__. Raises ValueError."""
    for field in dataclasses.fields(settings):
        try:
            value = checked(type(settings), field.name, getattr(settings, field.name))
        except UserError as error:
            raise ValueError(error) from None
        setattr(settings, field.name, value)


def find_config(name: str) -> Path:
    """A path as given, from here or from the repository; a bare name means config/NAME.py."""
    bare = f"config/{name}.py"
    for path in (Path(name), REPO / name, Path(bare), REPO / bare):
        if os.path.isfile(path):  # Path.is_file raises OSError for 5,000 characters
            return path
    if os.path.isdir(name):
        raise UserError(
            f"{shorten(name)} is a folder, not a config file; a run's is named by --out_dir={shorten(name)}"
        )
    known = sorted(path.stem for path in (REPO / "config").glob("*.py"))
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean config/{near[0]}.py?" if near else f"config/ has {', '.join(known)}"
    raise UserError(f"no config file {shorten(name)}; {hint} (settings are written --key=value)")


def run_config_file(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Run a config file with the settings as its globals and return those that it set, unchecked."""
    scope = {"__file__": str(path), "__name__": path.stem, **values}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    except (Exception, SystemExit) as error:  # whoever calls exit() in a config file would wonder
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
        raise UserError(
            f"{path}, line {line}: {type(error).__name__}: {shorten(error)}; mend the config file"
        ) from None

    changed = {key: value for key, value in scope.items() if key not in values or value is not values[key]}
    helpers = {
        key
        for key, value in changed.items()
        if not isinstance(key, str)
        or key.startswith("_")
        or (key not in values and (inspect.ismodule(value) or callable(value)))
    }
    return {key: value for key, value in changed.items() if key not in helpers}


def checked(cls: type, key: str, value: Any, where: str = "", *, text: bool = False) -> Any:
    """`value` in the type of the field `key` and within its limits. Raises UserError that names the mend."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key.replace("-", "_"), fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists all (a name of your own begins with _)"
        raise UserError(f"{where}unknown setting {shorten(key)}; {hint}")
    kinds, limits = kinds_of(cls)[key], fields[key].metadata
    try:
        value = from_text(value, kinds) if text else from_python(value, kinds)
    except (ValueError, OverflowError):
        wanted = " or ".join(kind_name(kind) for kind in kinds)
        raise UserError(f"{where}{key}={shorten(value, repr)} does not fit; give it {wanted}") from None
    wrong = limit_broken(value, limits)
    if wrong:
        raise UserError(f"{where}{key}={shorten(value)} is out of range; it must be {wrong}")
    return value


def limit_broken(value: Any, limits: typing.Mapping[str, Any]) -> str | None:
    """What `value` must be and is not, in words; None where it is within its limits."""
    if "choices" in limits and value not in limits["choices"]:
        return "one of " + ", ".join(str(choice) for choice in limits["choices"])
    if "path" in limits and isinstance(value, str) and not is_path(value):
        return "a path, without null characters and halves of characters"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # products of two sizes must fit into the 64 bits in which numpy and torch count
    below = limits.get("below", math.inf if isinstance(value, float) else 2**31)
    tests = {
        "a finite number": isinstance(value, int) or math.isfinite(value),
        f"at least {limits.get('at_least')}": value >= limits.get("at_least", value),
        f"at most {limits.get('at_most')}": value <= limits.get("at_most", value),
        f"above {limits.get('above')}": value > limits.get("above", -math.inf),
        f"below {below}": value < below,
    }
    return next((words for words, passed in tests.items() if not passed), None)


def is_path(text: str) -> bool:
    """Whether a file could have this name: the system's calls raise ValueError where none can."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def shorten(value: Any, write: Callable[[Any], str] = str) -> str:
    """`value` as text for a message, cut to 200 characters; its type where it cannot be written."""
    try:
        text = write(value)
    except Exception:  # a number of more than 4,300 digits, or a class of a config file
        return f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."


def kinds_of(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that each field takes: (int,) for `int`, (float, NoneType) for `float | None`, (tuple,) for
    `tuple[str, ...]`."""
    hints = typing.get_type_hints(cls)
    return {
        name: (tuple,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
        for name, hint in hints.items()
    }


def kind_name(kind: type) -> str:
    names = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple: "a list of texts that are not empty",
        types.NoneType: "None",
    }
    return names[kind]


def from_text(text: str, kinds: tuple[type, ...]) -> Any:
    """A flag's text as the first of `kinds` that it can be; as one of several, or none of them where it is
    empty. Raises ValueError."""
    words = {"true": True, "false": False, "1": True, "0": False}
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in words:
        return words[text.lower()]
    if tuple in kinds:
        return (unescape(text),) if text else ()
    for kind in (int, float):
        if kind in kinds:
            try:
                return from_python(
                    float(text) if any(mark in text for mark in ".eEn") else int(text), (kind,)
                )
            except (ValueError, OverflowError):
                pass
    if str in kinds:
        return text
    raise ValueError(text)


def unescape(text: str) -> str:
    r"""A text with what a shell's user cannot easily type: the characters \n are a newline, \t a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def from_python(value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as one of `kinds`: 1 does for a float or a bool, 5e3 for an int. Raises ValueError or
    OverflowError."""
    if tuple in kinds:
        several = (value,) if isinstance(value, str) else value
        if isinstance(several, (tuple, list)) and all(isinstance(part, str) and part for part in several):
            return tuple(several)
    elif type(value) in kinds:
        return value
    if bool in kinds and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if int in kinds and float(value).is_integer():
            return int(value)
        if float in kinds:
            return float(value)
    if str in kinds and isinstance(value, Path):
        return str(value)
    raise ValueError(value)


def help_text(cls: type) -> str:
    """The dataclass's docstring, then a line for each setting: name, default, type, explanation."""
    lines = [inspect.getdoc(cls) or "", "", "settings (--name=default, type, meaning):", ""]
    for field in dataclasses.fields(cls):
        limits = field.metadata
        names = {types.NoneType: "None", tuple: "str, again for more"}
        kinds = [names.get(kind, kind.__name__) for kind in kinds_of(cls)[field.name]]
        kind = " | ".join(map(str, limits["choices"])) if "choices" in limits else " | ".join(kinds)
        default = "" if field.default == () else field.default
        default = default if str(default).isprintable() else repr(default)
        lines.append(f"  --{field.name}={default}".ljust(36) + f" {limits['explanation']}  [{kind}]")
    return "\n".join(lines)
