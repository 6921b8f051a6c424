"""The notebook: executed on a tiny setting, and committed with the pictures of a longer run."""

import base64
import struct

import pytest
from conftest import REPO

from distrogpt.plotting import read_log

nbformat = pytest.importorskip("nbformat", reason="needs requirements-test.txt")
NotebookClient = pytest.importorskip("nbclient", reason="needs requirements-test.txt").NotebookClient

NOTEBOOK = REPO / "docs" / "quickstart.ipynb"


def pictures_of(cells):
    """The PNGs of each cell that has some."""
    outputs = [[output.get("data", {}) for output in cell.get("outputs", ())] for cell in cells]
    pictures = [
        [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data] for shown in outputs
    ]
    return [pngs for pngs in pictures if pngs]


def test_the_committed_notebook_shows_its_pictures():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run make notebook"
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    pictures = pictures_of(code)
    assert [len(pngs) for pngs in pictures] == [1, 1, 1]  # the loss, the probabilities, the attention weights
    for (png,) in pictures:
        signature, chunk, width, height = struct.unpack_from(">8s4x4s2I", png)
        assert (
            signature == b"\x89PNG\r\n\x1a\n" and chunk == b"IHDR" and png.endswith(b"IEND\xae\x42\x60\x82")
        )
        assert min(width, height) >= 200 and len(png) < 150_000
    text = "".join(output.get("text", "") for output in outputs)
    assert "step 1500: train loss" in text and text.count("def read(") == 2 and "perplexity" in text
    assert NOTEBOOK.stat().st_size < 600_000
    assert not [line for line in NOTEBOOK.read_text(encoding="utf-8").splitlines() if str(REPO) in line]


def test_the_quickstart_runs_from_its_own_folder(dataset, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += f"""
dataset, out_dir = {str(dataset)!r}, {str(tmp_path / "out")!r}
shape = {{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "loss_plot": False}}
steps = {{"max_iters": 20, "eval_interval": 10, "eval_iters": 2, "log_interval": 5}}
"""
    (training,) = (cell for cell in notebook.cells if "train(config" in cell.source)
    notebook.cells.append(nbformat.v4.new_code_cell(training.source))  # run again, when it is finished
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=where).execute()  # raises errors
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    # the loss, the probabilities, the attention weights; the loss again
    assert [len(pngs) for pngs in pictures_of(notebook.cells)] == [1, 1, 1, 1]
    assert "nothing left to do" in str(outputs[-1])
    text = "".join(out.get("text", "") for outs in outputs for out in outs)
    assert "step 20: train loss" in text and text.count("def read(") >= 2 and "perplexity" in text
    assert read_log(tmp_path / "out" / "log.csv")["step"].max() == 20
