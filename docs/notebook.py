"""Execute docs/quickstart.ipynb and keep its outputs: make notebook

It trains from the start, for some minutes. What differs from run to run is left out: lines with speed or
seconds, folders, dates and versions.
"""

import re
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOK = REPO / "docs" / "quickstart.ipynb"
LEFT_OUT = re.compile(r"tokens/s|^done: |^note ")


def cleaned(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Pictures, results, and the lines of stdout in one piece."""
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    lines = text.replace(f"{REPO}/", "").splitlines(keepends=True)
    text = "".join(line for line in lines if not LEFT_OUT.search(line))
    others = [output for output in outputs if output.output_type != "stream"]
    for output in others:
        output.metadata = {}
    return [nbformat.v4.new_output("stream", name="stdout", text=text), *others] if text else others


def clean(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = cleaned(cell.outputs)


if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.rmtree(REPO / "out-notebook", ignore_errors=True)  # a finished run would not train
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=where).execute()
    clean(notebook)
    nbformat.write(notebook, NOTEBOOK)
