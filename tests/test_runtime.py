"""On a terminal, nothing long is silent: a bar of each evaluation, a clock of the rest."""

import contextlib
import time

import pytest
import torch
from conftest import TINY, Terminal

from configurator import read_settings
from distrogpt.data.dataset import open_dataset
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.runtime import Runtime, activity, log, progress_bar, start_logging
from distrogpt.settings import TrainConfig
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)


def until(terminal: Terminal, *words: str) -> None:
    """Work until all of this is shown."""
    end = time.monotonic() + 20
    while not all(word in terminal.getvalue() for word in words):
        assert time.monotonic() < end, terminal.getvalue()


def test_an_evaluation_shows_how_far_it_is_while_a_batch_takes_long(dataset):
    pytest.importorskip("tqdm")
    config = read_settings(TrainConfig, [*TINY, f"--dataset={dataset}", "--eval_splits=val"])
    data, batches = open_dataset(config), iter(range(9))
    model = GPT(GPTConfig(block_size=16, vocab_size=88, n_layer=1, n_head=1, n_embd=4))

    def look() -> bool:  # called before each of the two batches; the second takes as long as this
        if next(batches) == 1:
            until(stderr, f"evaluating {dataset}/val:", "50%", "1/2 [")
        return False

    with contextlib.redirect_stderr(Terminal()) as stderr:
        assert Evaluator(config, data, CPU).evaluate(model, look)["val"] > 0
    assert stderr.getvalue().endswith("\r")  # the bar is removed


def test_what_has_no_end_in_sight_shows_what_it_is_and_for_how_long(capsys):
    pytest.importorskip("tqdm")
    start_logging(is_main=True)
    with contextlib.redirect_stderr(Terminal()) as stderr, progress_bar(0, 2, CPU):
        with activity("compiles"):
            until(stderr, "compiles, 00:01", "0/2 [00:01<")
            log.info("a line")  # above both
        log.info("another")
    assert capsys.readouterr().out == "a line\nanother\n"


def test_other_ranks_and_files_show_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with contextlib.redirect_stderr(Terminal()) as stderr:
        with progress_bar(0, 2, CPU) as advance, activity("compiles"):
            advance()
    assert stderr.getvalue() == ""
