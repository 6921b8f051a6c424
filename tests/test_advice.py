"""What messages advise: each setting that a command's messages name is one of that command.

Read from the source: the functions that a command can reach, and the texts in them.
"""

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from conftest import COMMANDS, PREPARE, REPO, TINY, assert_user_error, prepare_here, run_here, train_here

from configurator import configure, help_text
from distrogpt import settings
from distrogpt.errors import command, quote

FILES = [*REPO.glob("*.py"), *(REPO / "distrogpt").rglob("*.py"), *(REPO / "data").glob("*/prepare.py")]
PROGRAMS = r"(data/\w+/prepare\.py|\w+\.py|lm_eval|vllm|torchrun|pip|ct2-transformers-converter)\b"
NOT_SAID = {  # why a command that lacks a setting does not say it; or it is no message
    "ablate.py --init_from": "the runs of a study begin from scratch",
    "ablate.py --out_dir": "and write into folders of their own",
    "distrogpt.errors.OOM_HINT": "the test below: commands without these settings say something else",
    "distrogpt.evaluation.evaluator.Evaluator": "eval.py and ablate.py never ask train.py's questions",
    "distrogpt.settings.SampleConfig": "other commands make it without voice, for its checks of a sample",
    "distrogpt.training.logger.LossPlot": "the arguments of plot.py",
    "distrogpt.benchmark.serving.running_server": "the arguments of serve.py",
    "distrogpt.benchmark.report.all_parts": "the arguments of pytest",
    "distrogpt.benchmark.checks.check_ranks": "the arguments of torchrun",
    "distrogpt.benchmark.checks.training_flags": "the arguments of train.py",
    "distrogpt.benchmark.checks.check_resume": "the arguments of train.py",
    "distrogpt.huggingface.gguf.how_to_run": "the arguments of llama-completion",
    "distrogpt.huggingface.model_card.how_to_load --include_path": "the arguments of lm_eval",
    "distrogpt.data.preparation.hub.prepare_shards --dataset": "only of the script that has it",
    "configurator.find_config --out_dir": "only commands that have it",
    "distrogpt.data.preparation.documents": "data/audio/prepare.py reads what it has written in UTF-8",
}


def module_name(path) -> str:
    return path.relative_to(REPO).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def read_module(path) -> tuple[dict[str, list[ast.AST]], dict[str, str]]:
    """The code of a file by the names that it defines, "" for the rest; what it imports, by local name."""
    defined: dict[str, list[ast.AST]] = {"": []}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        names = [""]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        for name in names:
            defined.setdefault(name, []).append(node)
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return defined, imported


MODULES = {module_name(path): read_module(path) for path in FILES}


def reachable(module: str) -> set[tuple[str, str]]:
    """The names of modules that the script can reach, by module."""
    found, todo = set(), [(module, "")]
    while todo:
        module, name = place = todo.pop()
        if place in found:
            continue
        found.add(place)
        defined, imported = MODULES[module]
        for tree in defined[name]:
            for node in ast.walk(tree):
                word = full = None
                if isinstance(node, ast.Name):
                    word, full = node.id, imported.get(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    full = f"{imported.get(node.value.id)}.{node.attr}"
                if word in defined:
                    todo.append((module, word))
                elif full and full.rpartition(".")[0] in MODULES:
                    parent, _, word = full.rpartition(".")
                    if word in MODULES[parent][0]:
                        todo.append((parent, word))
    return found


def texts_of(tree: ast.AST) -> Iterator[str]:
    """The texts of the code without docstrings; those with fields as one, each field as {}."""
    if isinstance(tree, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in tree.values)
        for part in tree.values:
            if isinstance(part, ast.FormattedValue):
                yield from texts_of(part)
        return
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "command":
        flags = [f"--{keyword.arg}" for keyword in tree.keywords if keyword.arg]
        yield " ".join([ast.literal_eval(tree.args[0]), *flags])
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.arguments):  # defaults; callers in other commands give their own
            continue
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring:
            yield from texts_of(node)


@pytest.fixture(scope="module")
def settings_of_commands() -> dict[str, set[str]]:
    helps = {name: help_text(cls) for name, cls in COMMANDS.items()}
    helps |= {script: prepare_here(script, "--help").stdout for script in PREPARE}
    return {name: {"help", "key", *re.findall(r"^  --(\w+)", text, re.M)} for name, text in helps.items()}


@pytest.mark.parametrize("script", [*COMMANDS, *PREPARE])
def test_messages_of_a_command_name_its_own_settings(script, settings_of_commands):
    wrong = []
    for module, name in sorted(reachable(module_name(REPO / script))):
        texts = {text for tree in MODULES[module][0][name] for text in texts_of(tree)}
        for text in texts:
            if re.fullmatch(r"--\w+", text):  # the definition of an option
                continue
            program = script
            for word in re.finditer(rf"{PROGRAMS}|(then\b)|--([a-z]\w*)\b(?!-)( [A-Z]+\b)?", text):
                program = word[1] or (script if word[2] else program)
                known = settings_of_commands.get(program, {word[3]})
                spaced = word[4] and program in COMMANDS  # which take --key=VALUE alone
                places = {module, f"{module}.{name}", f"{module}.{name} --{word[3]}", f"{script} --{word[3]}"}
                if word[3] and (word[3] not in known or spaced) and not NOT_SAID.keys() & places:
                    wrong.append(f"{module}.{name}: {word[0]} of {program}: {text[:90]!r}")
    assert wrong == [], "\n".join(wrong)


def test_only_training_is_advised_to_lower_its_sizes_if_memory_is_short():
    for path in FILES:
        if path.relative_to(REPO).as_posix() not in ("train.py", "bench.py", "ablate.py"):
            assert "cli_errors()" not in path.read_text(encoding="utf-8"), f"{path} says what it cannot do"


NAMES = ("out sp", "it's", 'a"b', "a$HOME", "x;y", "(1)", "*", "ünï", "a\\b", "two  spaces", "-dash", "~")


@pytest.mark.skipif(os.name == "nt", reason="another shell")
@pytest.mark.parametrize("name", NAMES)
def test_a_printed_command_names_the_same_folder_in_a_shell(name):
    line = command("sample.py", "a b", out_dir=name, start="")
    words = subprocess.run(["sh", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True).stdout
    assert words.split("\0")[:-1] == ["python", "sample.py", "a b", f"--out_dir={name}", "--start="]


def test_commands_for_windows(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        quoted = [quote(word) for word in (r"C:\a\b-c.txt", "out sp", "it's", "a&b", "(1)")]
    assert quoted == [r"C:\a\b-c.txt", '"out sp"', '"it\'s"', '"a&b"', '"(1)"']


def test_a_command_is_printed_as_it_runs_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    assert command("data/text/prepare.py") == "python data/text/prepare.py"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command("sample.py")) == ["python", str(REPO / "sample.py")]


def test_the_commands_that_follow_are_quoted(dataset, tmp_path, monkeypatch, capsys):
    """At the end of a run, of a prepare.py and of an export; in errors, with the spaces of a name."""
    monkeypatch.chdir(tmp_path)
    out_dir = "out  sp's"
    printed = train_here(*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", "--max_iters=2")
    last = shlex.split(printed.splitlines()[-1].partition("; ")[2])
    assert last == ["python", str(REPO / "sample.py"), f"--out_dir={out_dir}"]
    (tmp_path / "text.txt").write_text("some text " * 200)
    done = prepare_here("data/text/prepare.py", "--input", tmp_path / "text.txt", "--output", "my set")
    train, sample = (shlex.split(line) for line in done.stdout.splitlines()[-2:])
    assert "--dataset=my set" in train and sample[2] == "--out_dir=out-my set"
    done = run_here("export.py", f"--out_dir={out_dir}", "--to=my hf", cwd=tmp_path)
    assert "sample.py --init_from='my hf'" in done.stdout
    with pytest.raises(SystemExit):
        configure(settings.TrainConfig, [out_dir])
    assert capsys.readouterr().err.rstrip().endswith(f"--out_dir={shlex.quote(out_dir)}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("text", "python data/text/prepare.py --input FILE --name NAME, then use --dataset=NAME"),
        ("audio", "python data/audio/prepare.py --input FOLDER --name NAME, then use --dataset=NAME"),
        ("hub", "python data/hub/prepare.py --dataset OWNER/SET --output data/NAME, then use --dataset=NAME"),
    ],
)
def test_a_folder_of_a_script_is_told_with_the_whole_command(name, says):
    assert_user_error(run_here("train.py", *TINY, f"--dataset={name}"), "train.bin is missing", says)


def test_advice_that_a_command_can_follow(dataset, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("distrogpt.evaluation.multiple_choice.DATA", tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: open("no network"))
    asked = run_here(
        "train.py", *TINY, f"--dataset={dataset}", "--eval_hellaswag=True", f"--out_dir={tmp_path / 'o'}"
    )
    assert_user_error(asked, "download failed", "give --hellaswag_input=FILE")
    for way in ("scratch", "auto", "auto:gpt2"):
        asked = run_here("sample.py", f"--init_from={way}")
        assert_user_error(asked, f"init_from={way} is only for train.py")
    assert_user_error(run_here("sample.py", "--init_from=scrach"), "use a folder, or one of gpt2")
    assert_user_error(run_here("sample.py", "--init_from=gpt2-x1"), "did you mean gpt2-xl?")
    there = prepare_here("data/roman/prepare.py", "--output", dataset)
    assert_user_error(there, "has a dataset already; choose another --output, or give --overwrite")
    there = prepare_here("data/text/prepare.py", "--input", dataset, "--output", dataset)
    assert_user_error(there, "has a dataset already; choose another --name or --output, or give --overwrite")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("hub --input x --dataset y", "--dataset has no effect with --input"),
        ("openwebtext --input x --split test", "--split has no effect with --input"),
        ("fineweb_edu --encoding latin-1", "--encoding has no effect without --input"),
        ("text --input x --name y --output z", "--name y has no effect with --output z"),
    ],
)
def test_options_of_prepare_without_effect_are_refused(words, says):
    script, *options = words.split()
    assert_user_error(prepare_here(f"data/{script}/prepare.py", *options), says)


def test_the_home_folder_stands_for_a_tilde_in_options_of_prepare(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a text of two files " * 40)
    for script, *options in (
        ("text", "--input", "~/a.txt", "~/b*.txt", "--output=~/one"),
        ("text", "--input=~/a.txt", "--output=~/two", "--tokenizer=~/one"),
        ("hub", "--input=~/a.txt", "--output=~/three", "--tokenizer=~/one"),
        ("shakespeare_char", "--input=~/a.txt", "--output=~/four"),
    ):
        done = prepare_here(f"data/{script}/prepare.py", *options)
        assert done.returncode == 0, done.stderr
    assert all((tmp_path / name / "meta.json").is_file() for name in ("one", "two", "three", "four"))
    assert not (tmp_path / "~").exists()
