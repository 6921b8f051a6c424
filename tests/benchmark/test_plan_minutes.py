"""The planner with minutes: by the law of scaling.py, what it chooses has the lowest loss after that time."""

import math
import re

import pytest
import torch
from conftest import assert_user_error, run_here

from configurator import read_settings, refuse_unused
from distrogpt import scaling
from distrogpt.benchmark.plan import plan
from distrogpt.benchmark.plan_minutes import WEB_TEXT
from distrogpt.errors import UserError
from distrogpt.gpus import GPUS
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
PLAN = ("--plan=True", "--real_data=False", "--gpu=h100", "--n_gpus=8")


def planned(capsys, *flags: str):
    """What a plan prints, what it returns, and the size that it chose."""
    capsys.readouterr()
    result = plan(read_settings(BenchConfig, [*PLAN, *flags]), CPU)
    printed = capsys.readouterr().out
    assert all(len(line) <= 115 for line in printed.splitlines()), printed
    shape = result["counts"]["shape"]
    return printed, result, scaling.Size(shape["n_layer"], shape["n_head"], shape["n_embd"])


def test_the_size_is_that_which_learns_most(capsys):
    printed, result, size = planned(capsys, "--minutes=600")
    tokens = result["tokens"]
    flops = 8 * GPUS["h100"].peak_flops * 0.4 * 600 * 60  # all that could be computed
    assert 0.5 * flops < tokens * result["counts"]["flops_per_token"] < 0.99 * flops
    loss = scaling.relative_loss(size, WEB_TEXT, tokens)
    for other in scaling.SIZES:  # at as many FLOPs
        block_size = scaling.recipe(other, WEB_TEXT, tokens, 8, True, {})["block_size"]
        share = other.flops_per_token(50304, block_size) / result["counts"]["flops_per_token"]
        assert other == size or scaling.relative_loss(other, WEB_TEXT, tokens / share) > 0.995 * loss
    nats, bits = scaling.expected_loss(size, WEB_TEXT, tokens)
    for line in (
        r"^text     assumed: unlimited English web text, 4.5 bytes per token",
        rf"^chosen   {size}, which is expected to have the lowest loss after 600 minutes$",
        rf"^reads    {tokens:,.0f} tokens, each of them once$",
        r"^rates    muon_lr [\d.]+, learning_rate [\d.]+, weight_decay 0.1, dropout 0$",
        rf"^expects  a val loss of {nats:.2f} \([\d.]+ to [\d.]+\), {bits:.2f} bits per byte$",
        rf"^run      {result['run']['max_iters']:,} steps, .* hours, .* GPU-hours$",
        r"^         the start and evaluations take the rest of the 600 minutes$",
    ):
        assert re.search(line, printed, re.M), (line, printed)
    _, shorter, smaller = planned(capsys, "--minutes=10", "--n_gpus=1")
    assert smaller.parameters(0) < size.parameters(0) and shorter["tokens"] < tokens
    assert scaling.expected_loss(smaller, WEB_TEXT, shorter["tokens"])[0] > nats


def test_given_settings_are_kept(capsys):
    given = ("--n_layer=4", "--block_size=512", "--muon_lr=0.02", "--activation=gelu", "--mfu=0.2")
    printed, result, size = planned(capsys, "--minutes=10", "--max_iters=100", *given)
    shape = result["counts"]["shape"]
    assert (size.n_layer, shape["block_size"], shape["activation"], result["mfu"]) == (4, 512, "gelu", 0.2)
    assert "muon_lr 0.02," in printed and shape["rotary"] and shape["norm"] == "rmsnorm"
    assert re.search(r"^run      100 steps,", printed, re.M)


def test_max_minutes_decide_the_number_of_steps(capsys):
    steps, small = {}, ("config/train_gpt2.py", "--n_gpus=1")
    for minutes in (3, 60):
        printed, result, _ = planned(capsys, *small, f"--max_minutes={minutes}")
        steps[minutes] = result["run"]["max_iters"]
        assert "chosen" not in printed and "tokens" not in result
        assert 0.5 < steps[minutes] * result["run"]["seconds"] / (60 * minutes) < 0.99
    assert 20 < steps[60] / steps[3] < 40  # compiling takes a larger share of three minutes
    printed, _, _ = planned(capsys, *small, "--max_minutes=3", "--max_iters=7")
    assert re.search(r"^run      7 steps,", printed, re.M)
    printed, result, _ = planned(capsys, *small, "--max_minutes=3", "--n_gpus=64")
    assert "--batch_size=" in result["flags"] and "max_iters" not in result["flags"]


def test_it_chooses_for_a_dataset_on_this_machine(dataset, tmp_path):
    flags = ("--plan=True", f"--dataset={dataset}", "--minutes=0.1", "--device=cpu", "--dtype=float32")
    done = run_here("bench.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = re.search(r"^chosen   ([\d/]+), which", done.stdout, re.M)[1]
    measured = re.findall(r"^model    ([\d/]+), [\d,]+ parameters:", done.stdout, re.M)
    assert size == measured[-1] and len(set(measured)) == len(measured)
    assert re.search(r"^reads    [\d,]+ tokens, [\d.,]+ times the text's [\d,]+$", done.stdout, re.M)
    assert "measured here" in done.stdout and "text  " not in done.stdout


def test_wrong_settings(tmp_path):
    mistakes = {
        "--init_from=gpt2": "init_from=gpt2 has a size; give --max_minutes=5 instead",
        "--init_from=resume": "init_from=resume has a size",
        "--max_minutes=3": "give one of them",
        "--n_embd=100 --n_head=3": "n_embd",
    }
    for flags, expected in mistakes.items():
        assert_user_error(run_here("bench.py", *PLAN, "--minutes=5", *flags.split(), cwd=tmp_path), expected)
    with pytest.raises(UserError, match="minutes has no effect: timing a training step does not use it"):
        refuse_unused(read_settings(BenchConfig, ["--minutes=5"]), ["--minutes=5"])


def test_web_text_is_unlimited():
    assert math.isinf(WEB_TEXT.tokens)
    assert scaling.effective_tokens(1e15, WEB_TEXT.tokens, 15.0) == 1e15
