"""The notebook, executed on a tiny setting."""

import nbformat
from conftest import REPO
from nbclient import NotebookClient

from plot import read_log


def test_the_quickstart_runs_from_its_own_folder(dataset, tmp_path):
    notebook = nbformat.read(REPO / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # is kept without
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += f"""
dataset, out_dir = {str(dataset)!r}, {str(tmp_path / "out")!r}
shape = {{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "loss_plot": False}}
steps = {{"max_iters": 20, "eval_interval": 10, "eval_iters": 2, "log_interval": 5}}
"""
    where = {"metadata": {"path": str(REPO / "notebooks")}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=where).execute()  # raises errors
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [[out for out in outs if "image/png" in out.get("data", {})] for outs in outputs]
    assert [len(found) for found in pictures if found] == [1, 1, 1]  # the loss, the chances, the attention
    text = "".join(out.get("text", "") for outs in outputs for out in outs)
    assert "step 20: train loss" in text and text.count("def read(") >= 2 and "perplexity" in text
    assert read_log(tmp_path / "out" / "log.csv")["step"].max() == 20
    again = nbformat.v4.new_notebook(cells=[cell for cell in notebook.cells if "plt" not in cell.source])
    NotebookClient(again, timeout=100, kernel_name="python3", resources=where).execute()
    assert "nothing left to do" in str(again)
