"""Mixtures of datasets: exact weights, functions of the sample's number alone; evaluation; bits per byte."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_weights, train_here

from configurator import read_settings
from distrogpt.benchmark.plan import planned_shape
from distrogpt.checkpoint import load_checkpoint
from distrogpt.data.dataset import evaluation_windows, open_dataset, parse_mixture, step_windows
from distrogpt.data.sampling import epoch_starts, interleave, random_starts
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.plotting import read_log
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig, TrainConfig
from distrogpt.training.batches import step_batches
from distrogpt.training.run_directory import COLUMNS
from distrogpt.training.startup import fingerprint
from model import GPT, GPTConfig
from train import train

RANDOM, EPOCH = [461, 347, 838, 901], [468, 804, 132, 836]
CPU = Runtime(torch.device("cpu"), torch.float32)


def config_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, [*TINY, *map(str, flags)])


@pytest.fixture
def other(dataset, tmp_path) -> Path:
    """A second dataset of the same vocabulary: the ids of the first one, backwards; of half the length."""
    folder = tmp_path / "other"
    folder.mkdir()
    meta = json.loads((dataset / "meta.json").read_text())
    for split in ("train", "val"):
        ids = np.fromfile(dataset / f"{split}.bin", "<u2")[::-2]
        ids.tofile(folder / f"{split}.bin")
        meta["tokens"][split] = len(ids)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize("weights", [[1.0], [0.9, 0.1], [0.5, 0.3, 0.2], [1e-9, 1 - 1e-9], [0.25] * 4])
def test_samples_are_interleaved_by_exact_weights(weights):
    which, within = interleave(0, 20_000, weights)
    for part, weight in enumerate(weights):
        assert within[which == part].tolist() == list(range((which == part).sum()))  # each once, in order
        counts = np.cumsum(which == part)
        assert np.abs(counts - weight * np.arange(1, 20_001)).max() < 2.1
    for first in (1, 777, 12_345):  # however they are asked for
        assert np.array_equal(interleave(first, 500, weights), [which[first:][:500], within[first:][:500]])
    far, numbers = interleave(10**12, 1000, weights)  # of a run on 10^15 tokens
    assert all(abs((far == part).mean() - weight) < 0.003 for part, weight in enumerate(weights))
    assert all(abs(number - 10**12 * weights[0]) < 10**6 for number in numbers[far == 0])  # of 10^12


def test_a_single_dataset_is_drawn_as_before_there_were_mixtures(dataset):
    """The starts of train.py at its commit b2aa50d, where the same settings were given."""
    length = np.fromfile(dataset / "train.bin", "<u2").size
    for sampling, expected in (
        ("random", random_starts(1337, 5, 12, length - 16)),
        ("epochs", epoch_starts(1337, 60, 12, length, 16)),
    ):
        config = config_of(
            f"--dataset={dataset}", "--gradient_accumulation_steps=3", f"--sampling={sampling}"
        )
        data = open_dataset(config)
        assert step_windows(data, config, 5)[1].tolist() == expected.tolist()
    # numbers written down at that commit
    assert random_starts(1337, 5, 4, 1000).tolist() == RANDOM
    assert epoch_starts(1337, 5, 4, 1000, 16).tolist() == EPOCH
    part = data.parts[0]
    for purpose, split in enumerate(("train", "val"), 1):
        starts, _ = evaluation_windows(part, 0, split, config)
        assert starts.tolist() == random_starts(1337, 0, 8, len(part.streams[split]) - 16, purpose).tolist()
    assert set(fingerprint(data)) == {"train", "val"} and len(fingerprint(data)["val"]) == 2


@pytest.mark.parametrize("sampling", ["random", "epochs", "lines"])
def test_a_mixture_trains_by_its_weights_and_on_each_window_once_per_epoch(sampling, dataset, other):
    flags = (f"--dataset={dataset}:3,{other}:1", f"--sampling={sampling}", "--batch_size=8")
    config = config_of(*flags, "--gradient_accumulation_steps=5")
    data = open_dataset(config)
    drawn = [step_windows(data, config, step) for step in range(80)]
    assert all(abs((which == 0).sum() - 30) <= 1 for which, _ in drawn)
    assert all(
        np.array_equal(one, two) for one, two in zip(drawn[7], step_windows(data, config, 7), strict=True)
    )
    which, starts = (np.concatenate(columns) for columns in zip(*drawn, strict=True))
    assert (which == 0).sum() == 2400 and (which == 1).sum() == 800
    for number, part in enumerate(data.parts):
        own, length = starts[which == number], len(part.streams["train"])
        if sampling == "lines":
            size = min(len(own), len(part.line_starts["train"]))
            assert len(set(own[:size])) == size and set(own) <= set(part.line_starts["train"])
        elif sampling == "epochs":
            size = min(len(own), (length - 1) // 16 - 1)
            assert len(set(own[:size])) == size and len(set(own[:size] % 16)) == 1
        else:
            assert abs(own.mean() / length - 0.5) < 0.05
        ids = data.windows("train", np.full(9, number), own[:9], 17)
        assert np.array_equal(ids, part.streams["train"].windows(own[:9], 17))
    batch = step_batches(data, config, CPU, 3)[2]
    rows = [data.parts[part].streams["train"].windows(np.array([start]), 17)[0, 1:] for part, start in
            zip(drawn[3][0][16:24], drawn[3][1][16:24], strict=True)]  # fmt: skip
    assert batch.y.tolist() == np.array(rows).tolist()


def test_a_mixtures_loss_is_the_weighted_mean_of_its_parts(dataset, other, tmp_path):
    config = config_of(f"--dataset={dataset}:0.7,{other}:0.3", "--eval_iters=0")
    data = open_dataset(config)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=data.meta["vocab_size"], n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.lm_head.weight *= 30
    found = Evaluator(config, data, CPU).evaluate(model)
    alone = []
    for folder in (dataset, other):
        config = config_of(f"--dataset={folder}", "--eval_iters=0")
        alone.append(Evaluator(config, open_dataset(config), CPU).evaluate(model))
    assert found["val"] == pytest.approx(0.7 * alone[0]["val"] + 0.3 * alone[1]["val"], rel=1e-12)
    assert found[f"val/{other}"] == alone[1]["val"] != alone[0]["val"]
    assert list(alone[0]) == ["train", "val", "bits_per_byte"]
    printed = train_here(*TINY, f"--dataset={dataset}:0.7,{other}:0.3", f"--out_dir={tmp_path / 'out'}")
    assert f"({dataset} " in printed and f", {other} " in printed and "data     30.0% " in printed


def test_a_mixture_resumes_bit_for_bit_and_its_checkpoint_is_read(dataset, other, tmp_path):
    flags = (f"--dataset={dataset}:0.7,{other}:0.3", "--max_iters=20", "--lr_decay_iters=20")
    train(config_of(*flags, "--sampling=epochs", f"--out_dir={tmp_path / 'whole'}"))
    train(config_of(*flags, "--sampling=epochs", f"--out_dir={tmp_path / 'parts'}", "--max_iters=7"))
    train(config_of(*flags, "--sampling=epochs", f"--out_dir={tmp_path / 'parts'}", "--init_from=resume"))
    assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    contents = load_checkpoint(tmp_path / "whole" / "last.pt")
    assert set(contents["meta"]) == {"tokenizer", "vocab_size", "dtype"} and len(contents["data"]) == 4
    others = (f"--dataset={dataset}:0.6,{other}:0.4", f"--out_dir={tmp_path / 'parts'}", "--max_iters=21")
    assert "the data has changed since" in train_here(*TINY, *others, "--init_from=resume")
    from distrogpt.loading import find_tokenizer

    del contents["meta"]  # as in nanoGPT's checkpoints
    assert find_tokenizer(contents, 100, "it").describe()["chars"]
    planned = read_settings(BenchConfig, [flags[0], "--plan=True"])
    assert planned_shape(planned)[1].vocab_size == open_dataset(config_of(*flags)).meta["vocab_size"]
    from distrogpt.benchmark.timing import open_data

    assert len(open_data(read_settings(BenchConfig, [*TINY, flags[0]])).parts) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("openwebtext", [("openwebtext", 1.0)]),
        ("a:0.5", [("a", 1.0)]),
        ("C:\\data", [("C:\\data", 1.0)]),
        ("a:3, b:1", [("a", 0.75), ("b", 0.25)]),
        ("x:/a:2,b:6", [("x:/a", 0.25), ("b", 0.75)]),
        ("a,b", [("a", 0.5), ("b", 0.5)]),
    ],
)
def test_names_and_weights(text, expected):
    assert parse_mixture(text) == expected


@pytest.mark.parametrize(
    "text", ["a:0.9,b", "a:0,b:1", "a:nan,b:1", "a:inf,b:1", "a:-1,b:1", "a:1,a:1", "a:1,"]
)
def test_weights_that_cannot_be(text):
    with pytest.raises(UserError, match=";"):
        parse_mixture(text)


def test_a_folder_whose_name_looks_like_a_mixture(dataset, tmp_path):
    for name in ("a:1,b:2", "c:0.5"):
        (tmp_path / name).symlink_to(dataset)
        assert parse_mixture(str(tmp_path / name)) == [(str(tmp_path / name), 1.0)]


def test_parts_of_different_vocabularies_are_refused(dataset, copy):
    meta = json.loads((copy / "meta.json").read_text())
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="differ in tokenizer"):
        open_dataset(config_of(f"--dataset={dataset},{copy}"))


def test_bits_per_byte(copy, dataset, tmp_path):
    meta = json.loads((copy / "meta.json").read_text())
    meta["bytes"] = {"train": 3 * meta["tokens"]["train"], "val": 2 * meta["tokens"]["val"]}
    (copy / "meta.json").write_text(json.dumps(meta))
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}")
    config = config_of(*flags)
    found = train(config).losses[-1]
    assert found["bits_per_byte"] == pytest.approx(found["val"] / math.log(2) / 2, rel=1e-12)
    assert read_log(tmp_path / "out" / "log.csv")["val_bits_per_byte"][-1] == found["bits_per_byte"]
    printed = train_here(*TINY, *flags, "--init_from=resume", "--eval_only=True")
    assert f", {found['bits_per_byte']:.4f} bits per byte\n" in printed
    # of a mixture, only where all parts know theirs
    config = config_of(f"--dataset={copy},{dataset}")
    model = GPT(GPTConfig(block_size=16, vocab_size=meta["vocab_size"], n_layer=1, n_head=2, n_embd=16))
    found = Evaluator(config, open_dataset(config), CPU).evaluate(model)
    nats_per_byte = (found[f"val/{copy}"] / 2 + found[f"val/{dataset}"]) / 2  # by the halves that they are
    assert found["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2), rel=1e-3)
    (copy / "meta.json").write_text(json.dumps({key: meta[key] for key in meta if key != "bytes"}))
    assert "bits_per_byte" not in Evaluator(config, open_dataset(config), CPU).evaluate(model)
    meta["bytes"]["val"] = 0
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="not positive numbers"):
        open_dataset(config_of(*flags))


def test_a_log_without_bits_per_byte_is_continued(dataset, tmp_path):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--lr_decay_iters=20"]
    train_here(*flags, "--max_iters=10")
    path = tmp_path / "log.csv"
    rows = [row.split(",") for row in path.read_text().splitlines()]
    old = rows[0].index("val_bits_per_byte")
    path.write_text("".join(",".join(row[:old]) + "\n" for row in rows))
    train_here(*flags, "--init_from=resume")
    rows_after = [row.split(",") for row in path.read_text().splitlines()]
    assert rows_after[0] == list(COLUMNS) and all(len(row) == len(COLUMNS) for row in rows_after)
    steps = [int(row[0]) for row in rows_after[1:]]
    assert steps == [0, 5, 10, 15, 20] and rows_after[1] == [*rows[1][:old], "", "", ""]
