"""When a run ends: by passes over the data, by time, by patience; and what its evaluations measure."""

import math
import signal
import time

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_weights, losses_of, ranks, train_here

from configurator import read_settings
from distrogpt.benchmark.plan import planned_shape
from distrogpt.checkpoint import best_checkpoint, load_checkpoint
from distrogpt.data.dataset import evaluation_windows, open_dataset, step_windows
from distrogpt.errors import UserError
from distrogpt.evaluation.evaluator import Evaluator
from distrogpt.hardware import peak_flops
from distrogpt.settings import BenchConfig, TrainConfig
from distrogpt.training import startup as start_file
from distrogpt.training.startup import resolve_max_iters
from sample import Sampler
from train import TrainResult, train

JUMPY = ("--learning_rate=0.3", "--decay_lr=False", "--warmup_iters=0", "--eval_interval=2", "--max_iters=60")


def config_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, [*TINY, *map(str, flags)])


class Killed(Exception):
    """As if the process had ended here."""


@pytest.fixture
def interrupt(at_each_step):
    """Returns a function that lets a run be asked to stop, or end at once, in a step of this test's."""

    def interrupt(at: int, kill: bool = False) -> None:
        def step(number: int, gradients: list[torch.Tensor]) -> None:
            if number == at and kill:
                raise Killed
            if number == at:
                signal.raise_signal(signal.SIGTERM)

        at_each_step(step)

    return interrupt


# patience


def end_by_patience(losses: list[dict[str, float]], patience: int, split: str = "val") -> int:
    """The step after which so many evaluations had nothing lower, in words that train.py does not use."""
    values = [point[split] for point in losses if point["step"]]
    for number in range(patience, len(values)):
        if min(values[number - patience + 1 : number + 1]) >= min(values[: number - patience + 1]):
            return losses[number + 1]["step"]
    return losses[-1]["step"]


@pytest.fixture(scope="module")
def jumpy(dataset, tmp_path_factory) -> TrainResult:
    """A run whose losses rise and fall."""
    return train(config_of(f"--dataset={dataset}", f"--out_dir={tmp_path_factory.mktemp('jumpy')}", *JUMPY))


def test_patience_ends_a_run_that_goes_on_where_it_was_interrupted(
    jumpy, dataset, tmp_path, interrupt, capsys
):
    flags = (f"--dataset={dataset}", "--init_from=auto", *JUMPY)
    ends = [end_by_patience(jumpy.losses, patience) for patience in range(1, 31)]  # at last, by none
    short, long = next((n, m) for n in range(2, 8) for m in range(n, 31) if ends[n - 1] < ends[m - 1])
    whole = train(config_of(*flags, f"--out_dir={tmp_path / 'whole'}", f"--patience={short}"))
    end = ends[short - 1]
    assert (whole.iter_num, whole.stopped_by) == (end, None)
    assert whole.losses == jumpy.losses[: len(whole.losses)] and whole.losses[-1]["step"] == end
    told = f"done: early stop after step {end}: no lower val loss in {short} evaluations; best val loss "
    assert told + f"{min(point['val'] for point in whole.losses[1:]):.4f}" in capsys.readouterr().out
    for kill in (False, True):
        out_dir = tmp_path / f"parts-{kill}"
        parts = (*flags, f"--out_dir={out_dir}")
        interrupt(end - 1, kill)  # in the middle of what patience counts
        if kill:
            with pytest.raises(Killed):
                train(config_of(*parts, f"--patience={short}"))
        else:
            assert train(config_of(*parts, f"--patience={short}")).stopped_by == 15
        assert load_checkpoint(out_dir / "last.pt")["no_lower"] == short - 1
        capsys.readouterr()
        assert train(config_of(*parts, f"--patience={short}")).iter_num == end
        assert told in capsys.readouterr().out
        assert losses_of(out_dir) == losses_of(tmp_path / "whole")
        assert_same_weights(tmp_path / "whole" / "last.pt", out_dir / "last.pt")
        written = (out_dir / "last.pt").stat().st_mtime_ns
        assert train(config_of(*parts, f"--patience={short}")).iter_num == end
        nothing = (
            f"resumes  after step {end}: nothing left to do (no lower val loss in {short} evaluations)\n"
        )
        assert nothing in capsys.readouterr().out and (out_dir / "last.pt").stat().st_mtime_ns == written
    assert train(config_of(*parts, f"--patience={long}")).iter_num == ends[long - 1]


def test_a_checkpoint_of_before_there_was_patience_goes_on(dataset, tmp_path):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=auto", "--patience=5")
    train(config_of(*flags, "--max_iters=10"))
    contents = load_checkpoint(tmp_path / "last.pt")
    del contents["no_lower"]
    torch.save(contents, tmp_path / "last.pt")
    assert train(config_of(*flags)).iter_num == 20


def test_a_last_step_is_no_early_stop(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"train": 1.0, "val": 1.0})
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_interval=4", "--patience=2")
    told = train_here(*TINY, *flags, "--max_iters=12")
    assert "early stop" not in told and "done: best val loss 1.0000" in told
    assert "early stop after step 12: no lower val loss in 2 evaluations" in train_here(*TINY, *flags)


# minutes


@pytest.fixture
def clock(monkeypatch):
    """A clock on which each training step takes six seconds, and all else no time."""
    peak_flops(torch.device("cpu"), torch.float32)  # measured once, by the real clock
    now, norm = [1000.0], torch.nn.utils.get_total_norm

    def slow(*args):
        now[0] += 6
        return norm(*args)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def test_max_minutes_count_the_whole_run(dataset, tmp_path, clock, interrupt, capsys):
    flags = [f"--dataset={dataset}", "--eval_interval=100", "--log_interval=4", "--init_from=auto"]
    flags.append("--max_iters=40")
    whole = train(config_of(*flags, "--max_minutes=1", f"--out_dir={tmp_path / 'whole'}"))
    assert (whole.iter_num, whole.stopped_by) == (10, None)
    assert [point["step"] for point in whole.losses] == [0, 10]
    out = capsys.readouterr().out
    assert "step 10: loss" in out  # told, as a last step is
    assert "done: after step 10: max_minutes=1 is reached; best val loss" in out
    assert load_checkpoint(tmp_path / "whole" / "last.pt")["iter_num"] == 10
    flags.append(f"--out_dir={tmp_path / 'parts'}")
    interrupt(4)
    assert train(config_of(*flags, "--max_minutes=1")).iter_num == 4
    assert train(config_of(*flags, "--max_minutes=1")).iter_num == 10
    assert losses_of(tmp_path / "parts")[-1] == losses_of(tmp_path / "whole")[-1]
    assert_same_weights(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt")
    capsys.readouterr()
    assert train(config_of(*flags, "--max_minutes=1")).iter_num == 10
    assert "after step 10: nothing left to do (max_minutes=1 is reached)\n" in capsys.readouterr().out
    assert train(config_of(*flags, "--max_minutes=1.55")).iter_num == 15  # 93 seconds
    assert train(config_of(*flags)).iter_num == 40


def test_a_signal_at_the_end_of_the_time_leaves_the_evaluation_to_do(dataset, tmp_path, clock, interrupt):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_minutes=0.5", "--init_from=auto")
    interrupt(5)
    assert train(config_of(*flags)).stopped_by == 15
    resumed = train(config_of(*flags))
    assert resumed.iter_num == 5 and [point["step"] for point in resumed.losses] == [5]


def test_ranks_stop_after_the_same_step(dataset, tmp_path):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", "--gradient_accumulation_steps=2")
    ends = ("--max_minutes=0.02", "--max_iters=1000000", "--eval_interval=1000000", "--log_interval=100000")
    done = ranks(*[("train.py", *TINY, *flags, *ends)] * 2)
    assert done.returncode == 0, done.stderr
    step = load_checkpoint(tmp_path / "last.pt")["iter_num"]
    assert f"done: after step {step}: max_minutes=0.02 is reached" in done.stdout


# epochs


def steps_of(*flags: object) -> tuple[TrainConfig, int]:
    config = config_of(*flags)
    data = open_dataset(config)
    return resolve_max_iters(config, data), sum(len(part.streams["train"]) for part in data.parts)


def test_epochs_are_as_many_steps_as_their_samples_take(dataset, copy):
    flags = ("--batch_size=10", "--gradient_accumulation_steps=3", "--max_epochs=2")
    for sampling in ("epochs", "random"):
        config, tokens = steps_of(f"--dataset={dataset}", f"--sampling={sampling}", *flags)
        windows = (tokens - 1) // 16 - 1
        assert config.max_iters == math.ceil(2 * windows / 30)
    config, _ = steps_of(f"--dataset={dataset}", "--sampling=lines", *flags, "--max_epochs=0.5")
    ids, newline = np.fromfile(dataset / "train.bin", "<u2"), open_dataset(config).newline
    assert config.max_iters == math.ceil(0.5 * (1 + (ids[:-1] == newline).sum()) / 30)
    config, _ = steps_of(f"--dataset={dataset}:0.9,{copy}:0.1", *flags)
    assert config.max_iters == math.ceil(2 * 2 * windows / 30)  # of both parts


def test_an_epoch_is_each_window_once(dataset):
    config, tokens = steps_of(
        f"--dataset={dataset}", "--sampling=epochs", "--batch_size=64", "--max_epochs=2"
    )
    data, windows = open_dataset(config), (tokens - 1) // 16 - 1
    starts = np.concatenate([step_windows(data, config, step)[1] for step in range(config.max_iters)])
    assert 0 <= len(starts) - 2 * windows < 64
    for epoch in starts[:windows], starts[windows : 2 * windows]:
        assert np.array_equal(np.diff(np.sort(epoch)), np.full(windows - 1, 16))


def test_a_decimal_number_of_epochs_is_exact(dataset, monkeypatch):
    monkeypatch.setattr(start_file, "samples_per_epoch", lambda *_: 10)  # 1.1 * 10 is above 11
    assert steps_of(f"--dataset={dataset}", "--batch_size=1", "--max_epochs=1.1")[0].max_iters == 11


def test_a_run_of_epochs_is_one_of_as_many_steps(dataset, tmp_path):
    flags = [*TINY, f"--dataset={dataset}", "--sampling=epochs", "--batch_size=100"]
    told = train_here(*flags, f"--out_dir={tmp_path / 'epochs'}", "--max_epochs=0.25", "--log_interval=1")
    config = load_checkpoint(tmp_path / "epochs" / "last.pt")["config"]
    steps, per_epoch = config["max_iters"], (len(np.fromfile(dataset / "train.bin", "<u2")) - 1) // 16 - 1
    assert steps == math.ceil(per_epoch / 400) and config["max_epochs"] == 0.25
    each = f"{per_epoch / 100:.1f}".removesuffix(".0")
    assert f"length   0.25 epochs of {each} steps: {steps} steps in total\n" in told
    train_here(*flags, f"--out_dir={tmp_path / 'steps'}", f"--max_iters={steps}", "--log_interval=1")
    assert losses_of(tmp_path / "epochs") == losses_of(tmp_path / "steps")  # the learning rate, too
    resume = (*flags, f"--out_dir={tmp_path / 'epochs'}", "--init_from=auto")
    assert f"after step {steps}: nothing left" in train_here(*resume, "--max_epochs=0.25")
    assert "done: best val loss" in train_here(*resume, "--max_epochs=0.3")
    assert load_checkpoint(tmp_path / "epochs" / "last.pt")["iter_num"] == math.ceil(per_epoch * 3 / 1000)


def test_a_plan_counts_epochs_on_the_dataset(dataset):
    flags = [*TINY, "--plan=True", "--max_epochs=3"]
    config, _, _ = planned_shape(read_settings(BenchConfig, [*flags, f"--dataset={dataset}"]))
    assert config.max_iters == steps_of(f"--dataset={dataset}", "--max_epochs=3")[0].max_iters
    with pytest.raises(UserError, match="max_epochs needs the dataset, which was not found; "):
        planned_shape(read_settings(BenchConfig, [*flags, "--dataset=none"]))


# what evaluations measure


def test_evaluations_of_one_split_are_those_of_both_without_the_other(dataset, tmp_path):
    found = {}
    for splits in ("both", "train", "val"):
        flags = (f"--dataset={dataset}", f"--out_dir={tmp_path / splits}", f"--eval_splits={splits}")
        found[splits] = train(config_of(*flags)).losses
    assert set(found["both"][0]) == {"step", "train", "val", "bits_per_byte"}
    for splits, names in (("train", ("step", "train")), ("val", ("step", "val", "bits_per_byte"))):
        assert found[splits] == [{name: point[name] for name in names} for point in found["both"]]
        measured = [row[-5:-2] for row in losses_of(tmp_path / splits) if any(row[-5:-2])]
        wanted = [[str(p.get(n, "")) for n in ("train", "val", "bits_per_byte")] for p in found[splits]]
        assert measured == [["train_loss", "val_loss", "val_bits_per_byte"], *wanted]
    assert_same_weights(tmp_path / "both" / "last.pt", tmp_path / "train" / "last.pt")


def test_a_run_that_measures_train_needs_no_val_and_keeps_what_is_best_there(copy, tmp_path, capsys):
    (copy / "val.bin").unlink()
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--eval_splits=train", "--init_from=auto")
    flags = (*flags, "--always_save_checkpoint=False", *JUMPY, "--patience=3")
    result = train(config_of(*flags))
    losses = {point["step"]: point["train"] for point in result.losses if point["step"]}
    assert result.iter_num == end_by_patience(result.losses, 3, "train") < 60
    best = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert best["iter_num"] == min(losses, key=losses.get)
    assert best["best_val_loss"] == result.best_val_loss == min(losses.values())
    out = capsys.readouterr().out
    assert f"no lower train loss in 3 evaluations; best train loss {min(losses.values()):.4f}" in out
    source = Sampler(str(tmp_path / "out"), device="cpu").source
    assert source.endswith(f"step {best['iter_num']}, train loss {min(losses.values()):.4f}")
    with pytest.raises(UserError, match=r"val\.bin is missing; "):
        train(config_of(*flags, "--eval_splits=both"))


def test_what_is_best_begins_anew_where_another_split_is_measured(dataset, tmp_path, capsys, monkeypatch):
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=auto", "--patience=1"]
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"train": 1.0})
    assert train(config_of(*flags, "--eval_splits=train", "--max_iters=30")).iter_num == 20
    monkeypatch.setattr(Evaluator, "evaluate", lambda *_: {"train": 0.5, "val": 2.0})
    assert train(config_of(*flags, "--max_iters=30")).best_val_loss == 2.0
    out = capsys.readouterr().out
    assert "resumes  after step 20\n" in out and "data has changed" not in out
    assert load_checkpoint(best_checkpoint(tmp_path))["best_val_loss"] == 2.0


def test_an_evaluation_reads_what_it_measures_alone(copy, tmp_path):
    train(config_of(f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--max_iters=10"))
    flags = (f"--dataset={copy}", f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--eval_only=True")
    both = train(config_of(*flags)).losses[0]
    for split, other in (("val", "train"), ("train", "val")):
        ids = (copy / f"{other}.bin").read_bytes()
        (copy / f"{other}.bin").unlink()
        found = train(config_of(*flags, f"--eval_splits={split}", "--max_epochs=1")).losses
        assert [(point["step"], point[split]) for point in found] == [(10, both[split])]
        (copy / f"{other}.bin").write_bytes(ids)


def test_a_whole_evaluation_of_train_alone_counts_each_of_its_tokens_once(dataset):
    for sampling in ("random", "lines"):
        config = config_of(f"--dataset={dataset}", "--eval_splits=train", f"--sampling={sampling}")
        config.eval_iters = 0
        part = open_dataset(config).parts[0]
        starts, skip = evaluation_windows(part, 0, "train", config, 2)
        if sampling == "lines":
            assert np.array_equal(
                starts[skip == 0][: len(part.line_starts["train"])], part.line_starts["train"]
            )
            continue
        counted = [s + i + 1 for s, first in zip(starts, skip, strict=True) for i in range(first, 16)]
        assert sorted(counted) == list(range(1, len(part.streams["train"])))


# mistakes


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--patience=0", "patience=0 is out of range; it must be at least 1"),
        ("--patience=1.5", "patience='1.5' is not valid; give a whole number or None"),
        ("--max_epochs=-1", "max_epochs=-1.0 is out of range; it must be above 0"),
        ("--max_epochs=0", "max_epochs=0.0 is out of range; it must be above 0"),
        ("--max_minutes=nan", "max_minutes=nan is out of range; it must be a finite number"),
        ("--max_minutes=0", "max_minutes=0.0 is out of range; it must be above 0"),
        ("--eval_splits=test", "eval_splits=test is not valid; it must be one of both, train, val"),
    ],
)
def test_mistakes_are_told(flag, words):
    with pytest.raises(UserError) as told:
        config_of(flag)
    assert words in str(told.value)


def test_more_epochs_than_can_be_counted_are_refused(dataset):
    for epochs in ("1e8", "1e300"):
        with pytest.raises(UserError, match=r"max_epochs=1e\+.*max_iters=.* is out of range; .*; lower it"):
            steps_of(f"--dataset={dataset}", f"--max_epochs={epochs}")
    assert steps_of(f"--dataset={dataset}", "--max_epochs=1e-9")[0].max_iters == 1
