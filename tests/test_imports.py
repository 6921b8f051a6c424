"""The layout of the repository: which file may import which, and how long files and functions may be.

Imports inside functions count as well: they are read from the source, nothing is run.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, load_docs_script

COMMANDS = {"train", "sample", "eval", "serve", "export", "bench", "plot", "ablate"}
ROOT_FILES = sorted(REPO.glob("*.py"))
PACKAGE_FILES = sorted((REPO / "distrogpt").rglob("*.py"))
DATASET_FILES = sorted((REPO / "data").rglob("*.py"))
MAX_LINES = {"model.py": 450, "train.py": 250}
MAX_ROOT_FILES, MAX_ROOT_LINES, MAX_PREPARE_LINES = 10, 1700, 60
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 6

# What breaks a rule, with the reason: to be emptied.
COMMAND_IMPORTS = {
    ("ablate", "train"): "a study calls train() itself: one process for its dozens of short runs",
    ("bench", "train"): "it measures train.py's own training step, and hands it to distrogpt/benchmark",
}
CIRCLES: dict[str, str] = {}  # "module -> imported module": reason
FUNCTIONS = {  # "path: function": reason
    "distrogpt/huggingface/modeling_distrogpt.py: forward": "transformers reads the names of its parameters",
}


architecture = load_docs_script("architecture")  # which draws what is tested here
MODULES, module_name, imports_of = architecture.MODULES, architecture.module_name, architecture.imports_of


def third_party(names: set[str]) -> set[str]:
    """The packages among the imports that belong neither to Python nor to this repository."""
    ours = {name.partition(".")[0] for name in MODULES}
    return {name.partition(".")[0] for name in names} - ours - set(sys.stdlib_module_names)


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path.relative_to(REPO)}: {node.name}", node


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_model_imports_torch_and_the_standard_library_alone():
    names = imports_of(REPO / "model.py")
    # from_pretrained alone loads transformers, when it is called
    assert third_party(names) == {"torch", "transformers"} and not names & set(MODULES)


def test_kernels_import_model_and_torch_alone():
    for path in (REPO / "distrogpt" / "kernels").glob("*.py"):
        names = imports_of(path)
        ours = {name for name in names & set(MODULES) if not name.startswith("distrogpt.kernels")}
        assert third_party(names) <= {"torch"} and ours <= {"model"}, path


def test_the_package_imports_no_command():
    found = {(module_name(path), name) for path in PACKAGE_FILES for name in imports_of(path) & COMMANDS}
    assert not found


def test_commands_do_not_import_one_another():
    assert {path.stem for path in ROOT_FILES} >= COMMANDS
    found = {(command, name) for command in COMMANDS for name in imports_of(MODULES[command]) & COMMANDS}
    assert found == set(COMMAND_IMPORTS)


def test_no_modules_import_one_another_in_a_circle():
    graph = {name: imports_of(path) & set(MODULES) for name, path in MODULES.items()}
    for circle in CIRCLES:
        module, _, imported = circle.partition(" -> ")
        assert imported in graph[module], f"{circle} is no import any more; remove it from CIRCLES"
        graph[module].discard(imported)
    while leaves := {name for name, names in graph.items() if not names & set(graph)}:
        graph = {name: names - leaves for name, names in graph.items() if name not in leaves}
    importers = {name: {other for other in graph if name in graph[other]} for name in graph}
    while unused := {name for name, others in importers.items() if not others}:  # these lead into a circle
        importers = {name: others - unused for name, others in importers.items() if name not in unused}
    assert not importers


def test_files_are_short():
    assert len(ROOT_FILES) <= MAX_ROOT_FILES
    assert sum(map(count_lines, ROOT_FILES)) <= MAX_ROOT_LINES
    limits = MAX_LINES | {f"data/{path.parent.name}/prepare.py": MAX_PREPARE_LINES for path in DATASET_FILES}
    lengths = {name: count_lines(REPO / name) for name in limits}
    assert {name: lines for name, lines in lengths.items() if lines > limits[name]} == {}


def test_data_has_dataset_folders_alone():
    assert {(path.parents[1].name, path.name) for path in DATASET_FILES} == {("data", "prepare.py")}


def test_the_architecture_page_names_files_and_folders_that_exist():
    table = (
        (REPO / "docs" / "architecture.md")
        .read_text(encoding="utf-8")
        .split("## The files")[1]
        .split("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in row.split("`")[1::2]]
    assert names and [name for name in names if not list(REPO.glob(name))] == []
    assert {path.name for path in ROOT_FILES} <= set(names)
    package = [path for path in (REPO / "distrogpt").glob("[!_]*") if path.is_dir() or path.suffix == ".py"]
    assert {f"distrogpt/{path.name}{'/' if path.is_dir() else ''}" for path in package} <= set(names)


def test_the_drawing_shows_the_imports_of_today():
    assert architecture.draw() == architecture.PICTURE.read_text(encoding="utf-8"), "run make docs"


@pytest.mark.parametrize("path", (*ROOT_FILES, *PACKAGE_FILES), ids=lambda path: str(path.relative_to(REPO)))
def test_functions_are_short_and_take_few_parameters(path):
    for name, node in functions_of(path):
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
        if name not in FUNCTIONS:
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{name} has too many lines"
            assert len(parameters) <= MAX_PARAMETERS, f"{name} has {len(parameters)} parameters"


@pytest.mark.parametrize("path", (*ROOT_FILES, *PACKAGE_FILES), ids=lambda path: str(path.relative_to(REPO)))
def test_no_function_assigns_to_outer_names(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    assert not [node.lineno for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal))]
