"""Many ranks learn what one learns, copied or in parts; they end together, and go on by themselves."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    MODERN,
    REPO,
    TINY,
    assert_same_weights,
    losses_of,
    ranks,
    run_warm,
    start_warm,
    torchrun,
    train_here,
    until,
)
from torch.nn.parallel import DistributedDataParallel
from warm import Started

from distrogpt.checkpoint import load_checkpoint
from distrogpt.runtime import Runtime
from distrogpt.training.batches import MicroBatch
from model import GPT, GPTConfig
from train import training_step

DROPOUT = ("--dropout=0.1", "--gradient_accumulation_steps=4", "--bias=True")
RECIPE = (
    *MODERN, "--zero_init=False", "--gradient_accumulation_steps=6", "--n_layer=2",
    "--muon_lr=2e-3", "--learning_rate=1e-3", "--embedding_lr=3e-3",  # at higher ones rounding grows to 1e-3
)  # fmt: skip
SGD = ("--optimizer=sgd", "--learning_rate=0.3")
shares_a_run = pytest.mark.xdist_group("unbroken")  # one worker makes it, once
no_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")


def train_on(count: int, *flags: object) -> subprocess.CompletedProcess:
    return ranks(*[("train.py", *TINY, *flags)] * count)


def train_by_torchrun(count: int, *flags: object) -> subprocess.CompletedProcess:
    """The same by the command that a user types."""
    return subprocess.run(
        torchrun(count, "train.py", *TINY, *flags),
        capture_output=True, text=True, timeout=100, cwd=REPO, env=ENVIRONMENT,
    )  # fmt: skip


def start_torchrun(count: int, *flags: object, options: tuple[str, ...] = ("--standalone",)) -> Started:
    """torchrun in the background; its ranks are started as a user's are."""
    return start_warm(*torchrun(count, "train.py", *TINY, *flags, options=options)[1:])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dataset):
    """The out_dirs of runs of one process, by their settings."""
    made = {}

    def out_dir(*flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("alone")
            train_here(*TINY, f"--dataset={dataset}", f"--out_dir={made[flags]}", *flags)
        return made[flags]

    return out_dir


def asking(flags, questions_file):
    """The recipe's runs ask questions, too, and tell samples."""
    asks = ("--eval_hellaswag=True", "--eval_samples=2", "--sample_tokens=20")
    return (*flags, *asks, f"--hellaswag_input={questions_file}") if flags == RECIPE else flags


def assert_same_run(one, other, atol=2e-4) -> None:
    """Both learned the same, but for the order of sums."""
    assert_same_weights(one / "last.pt", other / "last.pt", atol)
    ours, theirs = (losses_of(folder)[1:] for folder in (one, other))
    numbers = [np.array([[float(v or "nan") for v in row] for row in rows]) for rows in (ours, theirs)]
    np.testing.assert_allclose(*numbers, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("count", "more", "how"),
    [
        (1, DROPOUT, train_on),
        (2, DROPOUT, train_by_torchrun),
        (4, DROPOUT, train_on),
        (2, RECIPE, train_on),
    ],
    ids=lambda value: str(value)[:9],
)
def test_ranks_learn_what_one_process_learns(count, more, how, alone, tmp_path, dataset, questions_file):
    more = asking(more, questions_file)
    done = how(count, f"--dataset={dataset}", f"--out_dir={tmp_path}", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20: loss") == 1  # one rank speaks
    assert_same_run(alone(*more), tmp_path)


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, DROPOUT),
        (2, (*DROPOUT, "--grad_clip=0.1", "--tied=False", "--activation_checkpointing=True", *SGD)),
        (3, RECIPE),  # parts of unequal size
    ],
    ids=["gpt2", "untied", "recipe"],
)
def test_ranks_with_a_part_of_each_weight_learn_the_same(
    count, flags, alone, tmp_path, dataset, questions_file
):
    flags = asking(flags, questions_file)
    done = train_on(count, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--shard=True", *flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(alone(*(flag for flag in flags if "checkpointing" not in flag)), tmp_path)


def test_parts_in_bf16_have_weights_in_fp32(alone, tmp_path, dataset):
    flags = (*DROPOUT, "--dtype=bfloat16")
    done = train_on(2, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--shard=True", *flags)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_checkpoint(out / "last.pt") for out in (alone(*flags), tmp_path))
    assert {tensor.dtype for tensor in theirs["model"].values()} == {next(iter(ours["model"].values())).dtype}
    assert theirs["best_val_loss"] == pytest.approx(ours["best_val_loss"], abs=5e-3)
    refused = train_on(2, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--shard=True", "--dtype=float16",
                       "--gradient_accumulation_steps=2")  # fmt: skip
    assert "error: shard=True does not support float16; use" in refused.stderr


def test_a_run_goes_on_with_another_number_of_ranks_and_with_parts_or_without(alone, tmp_path, dataset):
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", *DROPOUT, "--init_from=auto")
    done = train_on(2, *flags, "--lr_decay_iters=20", "--shard=True", "--max_iters=10")
    assert done.returncode == 0, done.stderr
    assert "resumes  after step 10" in train_here(*TINY, *flags, "--lr_decay_iters=20", "--max_iters=15")
    done = train_on(4, *flags)
    assert done.returncode == 0 and "resumes  after step 15" in done.stdout, done.stderr
    assert_same_weights(alone(*DROPOUT) / "last.pt", tmp_path / "last.pt", atol=2e-4)


def test_ranks_exchange_gradients_once_a_step(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
        shared, exchanged = DistributedDataParallel(model), []

        def count(_, bucket):
            exchanged.append(bucket.buffer().numel())
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        shared.register_comm_hook(None, count)
        optimizers = [model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")]
        scaler, x = torch.amp.GradScaler("cpu", enabled=False), torch.arange(8)[None]
        runtime = Runtime(torch.device("cpu"), torch.float32)
        assert training_step(shared, optimizers, scaler, [MicroBatch(x, x, 0)] * 4, 1.0, runtime).applied
        assert sum(exchanged) == model.get_num_params(non_embedding=False)
    finally:
        dist.destroy_process_group()


def test_mistakes_are_told_once(dataset, tmp_path):
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    done = start_torchrun(2, *flags, "--gradient_accumulation_steps=3")
    _, errors = done.communicate()
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    wanted = "error: gradient_accumulation_steps=3 is not divisible by the 2 ranks; set it to a multiple of 2"
    assert done.returncode != 0 and told == [wanted]
    assert list(tmp_path.iterdir()) == []


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_nodes(alone, dataset, tmp_path):
    """torchrun as on two machines, of one rank each."""
    where = ("--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=localhost:{free_port()}")
    flags = (f"--dataset={dataset}", f"--out_dir={tmp_path}", *DROPOUT)
    processes = [start_torchrun(1, *flags, options=("--nnodes=2", *where)) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(output.count("step 20: loss") for output, _ in outputs) == 1
    assert_same_run(alone(*DROPOUT), tmp_path)


def test_ranks_with_other_settings_are_told(dataset, tmp_path):
    flags = ("train.py", *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", *DROPOUT)
    done = ranks(flags, (*flags, "--learning_rate=1e-3"))
    assert done.returncode and "error: the ranks have different settings; " in done.stderr
    assert list(tmp_path.iterdir()) == []


LONG = ("--max_iters=120", "--lr_decay_iters=120", "--eval_interval=40", "--log_interval=1", *DROPOUT)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, dataset):
    """The out_dir of a longer run of two ranks that nothing interrupts."""
    out_dir = tmp_path_factory.mktemp("unbroken")
    done = train_on(2, f"--dataset={dataset}", f"--out_dir={out_dir}", *LONG)
    assert done.returncode == 0, done.stderr
    return out_dir


@no_signals
@shares_a_run
def test_signals_end_all_ranks_with_their_state_saved(unbroken, tmp_path, dataset):
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", *LONG, "--init_from=auto"]
    process = start_torchrun(2, *flags)
    assert until(process, "step 50: loss")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert process.returncode != 0 and "error: " not in errors and stopped >= 50
    assert load_checkpoint(tmp_path / "last.pt")["iter_num"] == stopped
    done = train_on(2, *flags)
    assert done.returncode == 0 and f"resumes  after step {stopped}" in done.stdout, done.stderr
    assert_same_weights(unbroken / "last.pt", tmp_path / "last.pt")
    assert losses_of(unbroken) == losses_of(tmp_path)


@no_signals
@shares_a_run
def test_the_slurm_script_saves_requeues_and_goes_on(unbroken, tmp_path, dataset):
    """With stand-ins for SLURM's own commands, which do what its manual says of them."""
    (tmp_path / "bin").mkdir()
    commands = {
        "srun": 'echo $$ > "$STATE/step"; exec "$@"',
        "scancel": 'kill -TERM "$(cat "$STATE/step")"',
        "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> "$STATE/requeued"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    environment = {**ENVIRONMENT, **slurm, "SLURM_JOB_ID": "17", "PORT": str(free_port())}
    environment |= {"STATE": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *LONG]
    command = ["bash", str(REPO / "config" / "train.slurm"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=REPO, env=environment, **pipes)
    assert until(process, "step 20: loss")
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped after step" in output, errors
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    done = subprocess.run(command, cwd=REPO, env=environment, timeout=60, **pipes)
    assert done.returncode == 0 and "resumes  after step" in done.stdout, done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert_same_weights(unbroken / "last.pt", tmp_path / "out" / "last.pt")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The ranks' process ids, by rank."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


@no_signals
@shares_a_run
def test_after_a_killed_rank_torchrun_starts_again_and_the_run_goes_on(unbroken, tmp_path, dataset):
    """In a folder that has another run's files: those it does not go on from."""
    train_here(*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--max_iters=1", "--seed=9")
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", *LONG]
    process = start_torchrun(2, *flags, options=("--standalone", "--max-restarts=3"))
    for rank, words in enumerate(("step 20: loss", "step 60: loss")):  # before the first checkpoint, after it
        assert until(process, words)
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(re.findall("resumes  after step (?:40|80|120)", output)) == 1
    assert_same_weights(unbroken / "last.pt", tmp_path / "last.pt")
    assert losses_of(unbroken) == losses_of(tmp_path)
    assert load_checkpoint(tmp_path / "last.previous-1.pt")["iter_num"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path, dataset):
    flags = [f"--dataset={dataset}", f"--out_dir={tmp_path}", *LONG, "--max_iters=100000"]
    process = start_torchrun(2, *flags)
    assert until(process, "step 20: loss")
    pids = ranks_of(process)
    process.kill()
    assert until(process, "stopped after step")
    process.communicate(timeout=60)
    assert load_checkpoint(tmp_path / "last.pt")["iter_num"] >= 20
    end = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}/cwd") for pid in pids) and time.time() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}/cwd") for pid in pids)


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("sample.py", ("--out_dir={}", "--num_samples=2", "--max_new_tokens=5", "--device=cpu"), "----"),
        ("plot.py", ("{}", "--output={}/two.png"), "run      "),
        ("data/addition/prepare.py", ("--digits=1", "--output={}/sums", "--overwrite"), "train.bin: "),
        ("train.py", ("--help",), "usage: "),
    ],
)
def test_a_command_for_one_process_is_rank_0s(script, flags, says, trained, tmp_path):
    if script == "plot.py":
        pytest.importorskip("matplotlib")
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    words = (script, *(flag.format(tmp_path) for flag in flags))
    both, alone = ranks(words, words), run_warm(*words)
    assert both.returncode == alone.returncode == 0 and says in alone.stdout, both.stderr + alone.stderr
    assert both.stdout == alone.stdout
    assert both.stderr.count("runs as a single process and needs no torchrun; the other ranks exit") == (
        script != "train.py"
    )
