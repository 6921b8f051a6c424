"""Draw docs/pictures/architecture.svg from the imports of the code: python docs/architecture.py

The boxes are the commands, the larger files, and the folders of distrogpt/. An arrow points from a box to one
that it imports. Arrows that follow from a chain of others are left out, and so are those to the base, which
every box but model.py and kernels/ may import. Needs the standard library alone.
"""

import ast
from pathlib import Path
from xml.sax.saxutils import escape

REPO = Path(__file__).resolve().parents[1]
PICTURE = REPO / "docs" / "pictures" / "architecture.svg"
BASE = "base"
COMMANDS = ("plot", "ablate", "train", "bench", "eval", "sample", "serve", "export")
# The place of each box: column and row of its middle. What is not here is a file of the base.
PLACES = {name: (0.5 + column, 0.0) for column, name in enumerate(COMMANDS)} | {
    "benchmark": (3.15, 1.0),
    "serving": (6.7, 1.0),
    "training": (1.6, 2.0),
    "evaluation": (3.0, 3.0),
    "audio": (6.6, 3.0),
    "inference": (5.0, 4.0),
    "loading": (7.4, 5.0),
    "kernels": (2.0, 5.5),
    "huggingface": (7.4, 6.0),
    "data/preparation": (6.0, 6.0),
    "checkpoint": (4.2, 7.0),
    "plotting": (0.6, 8.0),
    "model": (2.4, 8.0),
    "data": (6.0, 8.0),
    BASE: (4.0, 9.1),
}
DESCRIPTIONS = {
    "plot": "curves of runs",
    "ablate": "recipe studies",
    "train": "training loop",
    "bench": "timings, plans",
    "eval": "measure",
    "sample": "generate text",
    "serve": "page and API",
    "export": "to other tools",
    "training": "optimizers, ranks, logs",
    "inference": "decoding, sampling",
    "evaluation": "losses, tasks, accuracy",
    "data": "token files, tokenizers",
    "data/preparation": "text to token files",
    "kernels": "faster layers",
    "huggingface": "formats, export",
    "serving": "page and API",
    "audio": "speech in and out",
    "benchmark": "timings, planner",
    "checkpoint": "contents of a file",
    "loading": "models by name",
    "plotting": "curves of log.csv",
    "model": "the network",
}
COLUMN, ROW, BOX_WIDTH, BOX_HEIGHT, MARGIN = 124, 78, 110, 48, 26
WIDE_BOX = 160  # of what is not a command
WIDTH, HEIGHT = 8 * COLUMN + 2 * MARGIN, int(9.1 * ROW) + BOX_HEIGHT + 2 * MARGIN + 30
STYLE = """
  .page { fill: #ffffff } text { fill: #1f2328; font: 13px sans-serif; text-anchor: middle }
  .name { font-weight: bold; font-size: 14px } .note { fill: #57606a }
  .box { stroke: #57606a } .arrow { fill: none; stroke: #57606a; stroke-width: 1.4; opacity: 0.85 }
  .back { stroke-dasharray: 5 4 } #head path { fill: #57606a }
  .command { fill: #cfe3f5 } .room { fill: #f1f3f5 } .model { fill: #fbe3c0 } .base { fill: #dcefdc }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .note { fill: #a5afba }
    .box { stroke: #8b949e } .arrow { stroke: #8b949e } #head path { fill: #8b949e }
    .command { fill: #173a5a } .room { fill: #21262d } .model { fill: #5a3d12 } .base { fill: #1b3d24 }
  }
"""


def module_name(path: Path) -> str:
    """distrogpt/kernels/cpu.py is distrogpt.kernels.cpu, distrogpt/kernels/__init__.py distrogpt.kernels."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


# the modules of the root and of distrogpt/ by their full names
MODULES = {
    module_name(path): path for path in sorted([*REPO.glob("*.py"), *(REPO / "distrogpt").rglob("*.py")])
}


def imports_of(path: Path) -> set[str]:
    """The full names of the modules that a file imports, at its top or inside functions."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:  # `from package import module` imports that module
                full = f"{base}.{alias.name}"
                names.add(full if full in MODULES else base)
    return names


def box_of(module: str) -> str:
    """The box of a module: its file, or the innermost folder below distrogpt/ that has a box."""
    path = module.removeprefix("distrogpt.").replace(".", "/")
    while path not in PLACES and "/" in path:
        path = path.rpartition("/")[0]
    return path if path in PLACES else BASE


def read_imports() -> dict[str, set[str]]:
    """The boxes that each box imports. Raises ValueError if PLACES has a box without code."""
    imports: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        boxes = {box_of(name) for name in imports_of(path) & set(MODULES)}
        imports.setdefault(box_of(module), set()).update(boxes - {box_of(module), BASE})
    if missing := set(PLACES) - set(imports):
        raise ValueError(f"{missing}: there is no such file or folder; change PLACES")
    return imports


def reachable(start: str, arrows: set[tuple[str, str]]) -> set[str]:
    """The boxes at the end of a chain of arrows from `start`."""
    found, new = set(), {start}
    while new:
        new = {end for begin, end in arrows if begin in new} - found
        found |= new
    return found


def arrows_to_draw(imports: dict[str, set[str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Arrows that do not follow from others, and those against the direction, which point up."""
    arrows = {(begin, end) for begin, ends in imports.items() for end in ends}
    up = {(begin, end) for begin, end in arrows if PLACES[begin][1] > PLACES[end][1]}
    down = arrows - up
    needed = {arrow for arrow in down if arrow[1] not in reachable(arrow[0], down - {arrow})}
    return sorted(needed), sorted(up)


def half_width(name: str) -> float:
    if name == BASE:
        return WIDTH / 2 - MARGIN
    return (BOX_WIDTH if name in COMMANDS else WIDE_BOX) / 2


def middle(name: str) -> tuple[float, float]:
    column, row = PLACES[name]
    x, y = MARGIN + column * COLUMN, MARGIN + 34 + row * ROW + BOX_HEIGHT / 2
    return min(max(x, MARGIN + half_width(name)), WIDTH - MARGIN - half_width(name)), y


def arrow_svg(begin: str, end: str, kind: str = "arrow") -> str:
    (x0, y0), (x1, y1) = middle(begin), middle(end)
    if y0 == y1:  # side by side
        sign = 1 if x1 > x0 else -1
        path = f"M{x0 + sign * half_width(begin):.0f} {y0:.0f} H{x1 - sign * (half_width(end) + 2):.0f}"
    else:
        sign = 1 if y1 > y0 else -1
        y0, y1 = y0 + sign * BOX_HEIGHT / 2, y1 - sign * (BOX_HEIGHT / 2 + 2)
        left = max(x0 - half_width(begin), x1 - half_width(end))
        right = min(x0 + half_width(begin), x1 + half_width(end))
        if right - left > 30:  # one above the other: straight
            x0 = x1 = (left + right) / 2
        else:
            side = 1 if x1 > x0 else -1
            x0, x1 = x0 + side * half_width(begin) * 0.6, x1 - side * half_width(end) * 0.6
        bend = (y1 - y0) / 2
        path = f"M{x0:.0f} {y0:.0f} C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#head)"/>'


def box_svg(name: str, files_of_base: list[str]) -> str:
    if name == BASE:
        kind, title = "base", "The base: every part but model.py and kernels/ may import it"
        note = ", ".join(files_of_base)
    else:
        kind = "command" if name in COMMANDS else "model" if name == "model" else "room"
        title = f"{name}/" if (REPO / "distrogpt" / name).is_dir() else f"{name}.py"
        note = DESCRIPTIONS[name]
    (x, y), half = middle(name), half_width(name)
    shape = f'x="{x - half:.0f}" y="{y - BOX_HEIGHT / 2:.0f}" width="{2 * half:.0f}" height="{BOX_HEIGHT}"'
    return (
        f'<rect class="box {kind}" rx="6" {shape}/>'
        f'<text class="name" x="{x:.0f}" y="{y - 4:.0f}">{escape(title)}</text>'
        f'<text class="note" x="{x:.0f}" y="{y + 14:.0f}">{escape(note)}</text>'
    )


def draw() -> str:
    arrows, up = arrows_to_draw(read_imports())
    base = [module.rpartition(".")[2] for module in MODULES if box_of(module) == BASE]
    base.remove("distrogpt")
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    caption = "An arrow points to what is imported; arrows that a chain of others implies are left out."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {size}>',
        "<title>Architecture of distroGPT: which part imports which</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"',
        ' orient="auto"><path d="M0 0 8 4 0 8z"/></marker>',
        f'<rect class="page" {size} rx="8"/>',
        f'<text class="note" x="{WIDTH / 2:.0f}" y="{MARGIN + 4}">{caption}</text>',
        *(arrow_svg(begin, end) for begin, end in arrows),
        *(arrow_svg(begin, end, "arrow back") for begin, end in up),
        *(box_svg(name, base) for name in PLACES),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8", newline="\n")
    print(f"wrote {PICTURE.relative_to(REPO)}")
