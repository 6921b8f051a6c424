"""The notebook, executed on a tiny setting."""

import pytest
from conftest import REPO

from distrogpt.plotting import read_log

nbformat = pytest.importorskip("nbformat", reason="needs requirements-test.txt")
NotebookClient = pytest.importorskip("nbclient", reason="needs requirements-test.txt").NotebookClient


def test_the_quickstart_runs_from_its_own_folder(dataset, tmp_path):
    notebook = nbformat.read(REPO / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # is kept without
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += f"""
dataset, out_dir = {str(dataset)!r}, {str(tmp_path / "out")!r}
shape = {{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "loss_plot": False}}
steps = {{"max_iters": 20, "eval_interval": 10, "eval_iters": 2, "log_interval": 5}}
"""
    (training,) = (cell for cell in notebook.cells if "train(config" in cell.source)
    notebook.cells.append(nbformat.v4.new_code_cell(training.source))  # run again, when it is finished
    where = {"metadata": {"path": str(REPO / "notebooks")}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=where).execute()  # raises errors
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [[out for out in outs if "image/png" in out.get("data", {})] for outs in outputs]
    # the loss, the probabilities, the attention weights; the loss again
    assert [len(shown) for shown in pictures if shown] == [1, 1, 1, 1]
    assert "nothing left to do" in str(outputs[-1])
    text = "".join(out.get("text", "") for outs in outputs for out in outs)
    assert "step 20: train loss" in text and text.count("def read(") >= 2 and "perplexity" in text
    assert read_log(tmp_path / "out" / "log.csv")["step"].max() == 20
