"""The pictures of the docs: they are all there, small, and drawn again from their data."""

import io
import json
import sys

import pytest
from conftest import load_docs_script
from PIL import Image

from distrogpt.benchmark import serving
from distrogpt.errors import UserError
from distrogpt.plotting import read_log

pictures, nanogpt_log = load_docs_script("pictures"), load_docs_script("nanogpt_log")
NAMES = [*pictures.FROM_DATA, *pictures.FROM_RUN]


def assert_small_png(path) -> None:
    with Image.open(path) as image:
        image.load()  # all of it
        assert image.format == "PNG" and 800 <= image.width <= 1600
    assert path.stat().st_size < 150_000


def assert_nothing_is_cut_off(figure) -> None:
    figure.draw_without_rendering()  # at its own resolution again
    texts = [text for axes in figure.axes for text in axes.texts] + figure.texts
    assert texts
    for text in texts:
        box = text.get_window_extent()
        inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert inside and box.y1 <= figure.bbox.y1, text.get_text()


def test_all_pictures_and_no_others_are_in_the_docs():
    assert {path.name for path in pictures.PICTURES.glob("*.png")} == {f"{name}.png" for name in NAMES}
    for name in NAMES:
        assert_small_png(pictures.PICTURES / f"{name}.png")


@pytest.mark.parametrize("name", pictures.FROM_DATA)
def test_pictures_are_drawn_from_the_data_of_the_docs(name, tmp_path):
    figure = pictures.FROM_DATA[name]()
    pictures.write(name, figure, tmp_path)
    assert_nothing_is_cut_off(figure)
    assert_small_png(tmp_path / f"{name}.png")


@pytest.mark.parametrize("name", ["loss", "attention"])
def test_pictures_are_drawn_from_a_run(name, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "TEXT", "def f(a):\n")  # the block holds 16 tokens
    figure = pictures.FROM_RUN[name](trained)
    pictures.write(name, figure, tmp_path)
    assert_nothing_is_cut_off(figure)
    assert_small_png(tmp_path / f"{name}.png")


def test_the_data_have_an_origin_and_no_paths_of_a_machine():
    readme = (pictures.DATA / "README.md").read_text(encoding="utf-8")
    paths = [path for path in pictures.DATA.iterdir() if path.name != "README.md"]
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert f"`{path.name}`" in readme and len(text) < 100_000 and '"/' not in text
        if path.suffix == ".json":
            assert json.loads(text)["runs" if path.name.startswith("scaling") else "rungs"]
        elif path.name != "cpu-decoding.csv":
            assert read_log(path)["val_loss"].size


def test_mistakes_and_a_missing_browser(monkeypatch, capsys):
    with pytest.raises(UserError, match="no picture x; choose from loss-over-seconds, "):
        pictures.main(["ladder", "x"])
    monkeypatch.setattr(serving, "CHROMIUM", None)
    pictures.main(["page-light", "page-dark"])  # trains nothing
    assert capsys.readouterr().out.startswith("note     no pictures of the page: they need Chromium")


def test_nanogpts_lines_become_a_log(tmp_path, monkeypatch, capsys):
    lines = """num decayed parameter tensors: 18, with 802,944 parameters
step 0: train loss 4.1676, val loss 4.1649
iter 0: loss 4.1828, time 1000.00ms, mfu -100.00%
iter 10: loss 3.7366, time 34.00ms, mfu 1.00%
saving checkpoint to out
step 250: train loss 2.4302, val loss 2.4455
"""
    monkeypatch.setattr(sys, "argv", ["nanogpt_log.py", "768"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    nanogpt_log.main()
    (tmp_path / "log.csv").write_text(capsys.readouterr().out)
    log = read_log(tmp_path / "log.csv")
    assert log["step"].tolist() == [0, 1, 11, 250] and log["tokens"].tolist() == [0, 768, 8448, 192000]
    assert log["loss"][1:3].tolist() == [4.1828, 3.7366] and log["val_loss"][[0, 3]].tolist() == [
        4.1649,
        2.4455,
    ]
    assert (log["seconds"] >= 0).all()
