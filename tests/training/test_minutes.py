"""train.py --minutes: the model and its training are chosen for the time."""

import math
import time
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ranks

from configurator import read_settings
from distrogpt import scaling
from distrogpt.checkpoint import load_checkpoint
from distrogpt.data.dataset import open_dataset
from distrogpt.errors import UserError
from distrogpt.runtime import start_runtime
from distrogpt.scaling import SIZES, Size, Text
from distrogpt.settings import TrainConfig
from distrogpt.training.minutes import Chooser, possible_sizes
from train import train

TEXT = Text(tokens=10_000_000, val_tokens=100_000, vocab_size=100, bytes_per_token=1.0, difficulty=2.0)
QUICK = ("--device=cpu", "--dtype=float32", "--loss_plot=False", "--eval_iters=1", "--minutes=0.06")


def settings_of(*flags: object) -> TrainConfig:
    return read_settings(TrainConfig, list(map(str, flags)))


def shape_of(out_dir: Path) -> dict[str, int]:
    return load_checkpoint(out_dir / "last.pt")["model_args"]


def test_a_run_of_some_minutes_says_what_it_chose_and_repeats_it(dataset, tmp_path, capsys):
    out_dir = tmp_path / "out"
    result = train(
        settings_of(f"--dataset={dataset}", f"--out_dir={out_dir}", *QUICK), started=time.perf_counter()
    )
    out = capsys.readouterr().out
    for word in ("measured tokens/s", "chosen   ", "reads    ", "rates    muon_lr", "expects  a val loss of"):
        assert word in out, word
    assert "max_minutes=0.06 is reached" in out
    config = load_checkpoint(out_dir / "last.pt")["config"]
    assert config["max_minutes"] == 0.06 and config["minutes"] is None
    assert config["optimizer"] == "muon" and config["rotary"] and config["eval_iters"] == 1
    # the settings, as a config file, and as a checkpoint
    again = settings_of(out_dir / "config.py")
    assert {name: getattr(again, name) for name in config} == config
    assert (
        train(settings_of(f"--out_dir={out_dir}", "--init_from=resume", "--device=cpu")).iter_num
        == result.iter_num
    )
    shape = shape_of(out_dir)
    train(settings_of(out_dir / "config.py", "--max_iters=2"))
    assert shape_of(out_dir) == shape
    assert load_checkpoint(out_dir / "last.previous-1.pt")["iter_num"] == result.iter_num


def test_given_settings_are_kept(dataset, tmp_path, capsys):
    given = {
        "n_embd": 24,
        "n_layer": 1,
        "batch_size": 3,
        "weight_decay": 0.3,
        "optimizer": "adamw",
        "block_size": 8,
    }
    flags = [f"--{name}={value}" for name, value in given.items()]
    flags += [f"--dataset={dataset}", f"--out_dir={tmp_path}", "--init_from=auto", *QUICK]
    train(settings_of(*flags, "--save_interval=2"))
    config = load_checkpoint(tmp_path / "last.pt")["config"]
    assert {name: config[name] for name in given} == given and config["lr_schedule"] == "wsd"
    # the same command resumes, and does not choose again
    capsys.readouterr()
    train(settings_of(*flags, "--minutes=0.07"))
    out = capsys.readouterr().out
    assert "resumes  after step" in out and "measured tokens/s" not in out
    after = load_checkpoint(tmp_path / "last.pt")["config"]
    assert after == config | {"max_minutes": 0.07}


def test_ranks_that_torchrun_restarts_do_not_choose_again(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", *QUICK, "--n_embd=16", "--n_layer=1")
    train(settings_of(*flags))
    assert "measured tokens/s" in capsys.readouterr().out
    config = load_checkpoint(tmp_path / "last.pt")["config"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(settings_of(*flags))
    assert "measured tokens/s" not in (out := capsys.readouterr().out) and "resumes  after step" in out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    train(settings_of(*flags))
    assert "measured tokens/s" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt")["config"]["n_embd"] == config["n_embd"] == 16


def test_a_run_made_in_python_keeps_what_differs_from_the_defaults(dataset, tmp_path):
    settings = {"n_layer": 2, "eval_iters": 1, "loss_plot": False, "device": "cpu", "dtype": "float32"}
    train(TrainConfig(dataset=str(dataset), out_dir=str(tmp_path), minutes=0.05, **settings))
    config = load_checkpoint(tmp_path / "last.pt")["config"]
    assert config["n_layer"] == 2 and config["n_embd"] in {size.n_embd for size in SIZES}


def test_each_dataset_has_a_folder_of_its_own(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(settings_of(f"--dataset={dataset}", *QUICK, "--n_layer=1", "--n_embd=16", "--max_iters=1"))
    assert (tmp_path / f"out-{dataset.name}" / "config.py").is_file()


def test_ranks_choose_the_same(dataset, tmp_path):
    words = ("train.py", f"--dataset={dataset}", f"--out_dir={tmp_path}", *QUICK)
    done = ranks(*[words] * 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured tokens/s") == 1
    assert load_checkpoint(tmp_path / "last.pt")["config"]["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--minutes=1", "--max_minutes=1"], "minutes and max_minutes both limit the time; give one of them"),
        (["--minutes=0"], "minutes=0.0 is out of range; it must be above 0"),
        (["--minutes=1", "--eval_only=True"], "minutes trains a model, eval_only trains nothing"),
        (["--minutes=1", "--lr_decay_iters=9"], "decays until the end; leave out lr_decay_iters"),
        (["--minutes=1", "--init_from=resume"], "last.pt is missing; train first"),
        (["--minutes=1", "--block_size=100000"], "too few for block_size=100000"),
        (["--minutes=1", "--init_from=gpt2"], "init_from=gpt2 has a size; give --max_minutes=1 instead"),
    ],
)
def test_mistakes_are_told(dataset, tmp_path, flags, words):
    with pytest.raises(UserError) as told:
        train(settings_of(f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", *flags))
    assert words in str(told.value) and not (tmp_path / "out").exists()


# the choice, for machines of any speed


def chooser_of(dataset: Path, monkeypatch, seconds_of: callable, *flags: str) -> Chooser:
    """A Chooser on a machine whose steps take seconds_of(parameters of the blocks, tokens)."""
    now = [0.0]

    def training_step(model, optimizers, scaler, batches, *_):
        blocks = sum(p.numel() for p in model.transformer.h.parameters())
        now[0] += seconds_of(blocks, sum(batch.x.numel() for batch in batches))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = settings_of(f"--dataset={dataset}", "--device=cpu", *flags)
    config.given = config.given or frozenset()
    meta = open_dataset(settings_of(f"--dataset={dataset}", "--block_size=1")).meta
    return Chooser(config, meta, TEXT, start_runtime("cpu", "float32"), training_step, 60 * config.minutes)


def test_faster_machines_and_longer_times_get_larger_models(dataset, monkeypatch):
    chosen = {}
    for minutes in (1, 10, 200):
        for flops in (1e10, 1e11):
            chooser = chooser_of(
                dataset,
                monkeypatch,
                lambda n, tokens, flops=flops: 6 * n * tokens / flops,
                f"--minutes={minutes}",
            )
            best = chooser.best()
            assert best in chooser.seconds_per_token
            chosen[minutes, flops] = SIZES.index(best)
            losses = [scaling.relative_loss(size, TEXT, chooser.tokens(size)) for size in SIZES]
            assert losses.index(min(losses)) == SIZES.index(best)
    assert chosen[1, 1e10] < chosen[10, 1e10] < chosen[200, 1e10]
    assert chosen[1, 1e10] < chosen[1, 1e11] and chosen[200, 1e10] < chosen[200, 1e11]


def test_a_machine_that_is_slow_at_small_sizes_is_measured_until_the_best_is_found(dataset, monkeypatch):
    """As on a GPU, on which the smallest sizes take as long as larger ones."""
    chooser = chooser_of(
        dataset, monkeypatch, lambda n, tokens: max(0.03, 6 * n * tokens / 3e12), "--minutes=10"
    )
    best = chooser.best()
    assert best.parameters(0) >= Size(6, 6, 384).parameters(0)


def test_a_size_for_which_memory_is_too_small_gets_smaller_batches_or_is_left(dataset, monkeypatch):
    chooser = chooser_of(dataset, monkeypatch, lambda n, tokens: 6 * n * tokens / 1e11, "--minutes=100")
    chooser.text = TEXT._replace(tokens=10**9)
    step = chooser.training_step

    def small_memory(model, optimizers, scaler, batches, *more):
        if batches[0].x.numel() * model.config.n_embd > 256 * 384:
            raise torch.OutOfMemoryError
        step(model, optimizers, scaler, batches, *more)

    chooser.training_step = small_memory
    best = chooser.best()
    config = chooser.settings(best, chooser.tokens(best))
    assert config.batch_size * config.block_size * best.n_embd <= 256 * 384
    assert config.gradient_accumulation_steps > 1


def test_given_batches_keep_the_tokens_of_a_step():
    for given, batch_size, micro_steps in (
        ({}, 2, 2), ({"batch_size": 1}, 1, 4), ({"gradient_accumulation_steps": 4}, 1, 4),
        ({"block_size": 64}, 8, 2), ({"batch_size": 64}, 64, 2),
        ({"batch_size": 3, "gradient_accumulation_steps": 8}, 3, 8),
    ):  # fmt: skip
        recipe = scaling.recipe(Size(4, 4, 128), TEXT, 1e6, 2, False, given) | given
        assert (recipe["batch_size"], recipe["gradient_accumulation_steps"]) == (batch_size, micro_steps), (
            given
        )


def test_without_val_the_train_loss_counts(dataset, tmp_path):
    train(
        settings_of(
            f"--dataset={dataset}", f"--out_dir={tmp_path}", *QUICK, "--eval_splits=train", "--n_layer=1"
        )
    )
    assert load_checkpoint(tmp_path / "last.pt")["config"]["eval_splits"] == "train"


def test_sizes_have_the_given_layers_heads_and_width():
    assert possible_sizes({}) == SIZES
    assert {size.n_layer for size in possible_sizes({"n_layer": 7})} == {7}
    assert possible_sizes({"n_layer": 3, "n_head": 5, "n_embd": 40}) == [Size(3, 5, 40)]
    assert all(size.n_embd % 3 == 0 for size in possible_sizes({"n_head": 3}))
    assert all(size.n_head % 2 == 0 for size in possible_sizes({"n_kv_head": 2}))
    assert possible_sizes({"n_embd": 80})[0] == Size(2, 2, 80)
    assert possible_sizes({"n_embd": 33})  # GPTConfig reports the mistake


def test_the_law():
    small, large = Size(4, 4, 128), Size(12, 6, 768)
    assert small.parameters(100) == 12 * 4 * 128**2 + 12_800 and large.parameters(0) == 84_934_656
    losses = [scaling.relative_loss(small, TEXT, tokens) for tokens in (1e6, 1e7, 1e8, 1e9)]
    assert losses == sorted(losses, reverse=True)
    assert scaling.relative_loss(large, TEXT, 1e7) < losses[1]
    law = {"floor": 0.2, "size": 3.0, "size_power": 1.0, "data": 8.0, "data_power": 2.0, "power": 2.0}
    assert scaling.loss_by_law(0.5, 2.0, law) == 64.2
    assert scaling.effective_tokens(5e6, 1e7, 15.0) == 5e6
    assert 1e7 < scaling.effective_tokens(2e7, 1e7, 15.0) < 2e7
    assert scaling.effective_tokens(1e12, 1e7, 15.0) == pytest.approx(1e7 * 16)


def test_texts_that_are_harder_to_predict_have_more_bits(text):
    shuffled = bytearray(text.encode())
    Random(1).shuffle(shuffled)
    easy, real, hard = map(scaling.difficulty_of, (bytes(10_000), text.encode(), bytes(shuffled)))
    assert easy < 0.1 and 1.5 < real < 2.5 and 3.5 < hard < 6


def test_a_recipe_fits_a_short_text():
    tiny = Text(tokens=100, val_tokens=40, vocab_size=10, bytes_per_token=1.0, difficulty=None)
    recipe = scaling.recipe(Size(2, 2, 64), tiny, 1e6, ranks=4, on_gpu=False, given={})
    assert recipe["block_size"] == 32 and recipe["gradient_accumulation_steps"] % 4 == 0
    assert recipe["weight_decay"] > scaling.recipe(Size(2, 2, 64), TEXT, 1e6, 1, False, {})["weight_decay"]
    assert math.log2(scaling.recipe(Size(2, 2, 64), TEXT, 1e6, 1, False, {})["block_size"]) == 8


def test_each_gpu_gets_tokens_enough():
    size = Size(12, 6, 768)
    for n in (1, 8):
        recipe = scaling.recipe(size, TEXT, 1e8, n, on_gpu=True, given={})
        assert recipe["batch_size"] * recipe["block_size"] == 16_384
        assert recipe["gradient_accumulation_steps"] == n
    assert (
        scaling.recipe(size, TEXT, 4e13, 8, on_gpu=True, given={})["batch_size"] * 1024 == 181_248
    )  # for longer runs
