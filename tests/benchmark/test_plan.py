"""The planner: its bytes against memory measured here, its times against what is published and by hand."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ENVIRONMENT, REPO, assert_user_error, run_here
from torch.utils.flop_counter import FlopCounterMode

from bench import bench
from configurator import read_settings
from distrogpt.benchmark.plan import (
    COMPILER,
    LIBRARIES,
    Split,
    as_trained,
    count,
    data_rates,
    exchange,
    find_hardware,
    memory,
    plan,
    planned_shape,
    saved_bytes,
    settle,
    share_out,
    step_time,
)
from distrogpt.errors import UserError
from distrogpt.gpus import GPUS, find_gpu
from distrogpt.kernels.cpu import causal_mask
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.optim import make_optimizers
from model import GPT, GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
GPT2 = ("config/train_gpt2.py", "--plan=True", "--real_data=False")
SMALL = "--n_layer=3 --n_head=2 --n_embd=32 --block_size=64 --batch_size=2".split()
MODERN = (
    "--rotary=True --qk_norm=True --norm=rmsnorm --activation=swiglu --n_kv_head=1 --tied=False "
    "--logit_softcap=15 --embedding_skip=True --key_offset=True --dropout=0.1"
).split()


def counted(*flags: str, half: bool = False, on_gpu: bool = True):
    """The settings, the hardware and the counts of a plan."""
    config = read_settings(BenchConfig, [*GPT2, "--gpu=h100", *flags])
    config, shape, _ = planned_shape(config)
    return config, find_hardware(config, CPU), count(shape, config, half, on_gpu)


def planned(capsys, *flags: str):
    """What a plan prints, and what it returns."""
    capsys.readouterr()
    result = plan(read_settings(BenchConfig, [*GPT2, *flags]), CPU)
    printed = capsys.readouterr().out
    assert all(len(line) <= 110 for line in printed.splitlines()), printed
    return printed, result


def test_the_example_runs_and_its_proposal_can_be_run(tmp_path, capsys):
    command = (*GPT2, "--gpu=h100", "--n_gpus=64", "--device=cuda", "--json=plan.json")  # no GPU is needed
    done = run_here("bench.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed, result = done.stdout, json.loads((tmp_path / "plan.json").read_text())
    flags = re.search(r"^flags +(.*)$", printed, re.M)[1].split()
    config = read_settings(BenchConfig, [*GPT2, *flags])
    assert config.gradient_accumulation_steps % 64 == 0 and config.batch_size <= 12
    tokens = config.max_iters * config.gradient_accumulation_steps * config.batch_size
    assert tokens == pytest.approx(600_000 * 480, rel=1e-5) and config.lr_decay_iters == config.max_iters
    for line in (
        r"^batch +40 micro-steps of 12 cannot be split among 64 GPUs; nearest: 64 of 8 = 512 sequences",
        r"^         shard, checkpointing( +\d+\.\d\d){6}  fits$",
        r"^fits +with these flags: \d+\.\d of 71.1 GiB usable$",
        r"^mfu +40% of the peak FLOP/s, assumed",
        r"^step +[\d.]+ ms for 524,288 tokens",
        r"^run +562,500 steps, 294.9 billion tokens: [\d.]+ hours, [\d.,]+ GPU-hours$",
        r"^writes +1.49 GB per checkpoint",
        r"^limits +communication: 10% of a step or more is exposed from \d+ GPUs on$",
        r"^         batch: 480 sequences are too few for 512 GPUs",
        r"^         data: an SSD of 1,000 MB/s per node is enough up to 4,096 GPUs \(",
    ):
        assert re.search(line, printed, re.M), (line, printed)
    assert [row["n"] for row in result["scaling"]] == [2**i for i in range(13)]
    assert result["checkpoint_bytes"] == 12 * result["counts"]["parameters"]
    run_, parts = result["run"], ("compute", "update", "waits")
    assert run_["seconds"] == pytest.approx(sum(run_[part] for part in parts))
    second, _ = planned(capsys, *flags, "--gpu=h100", "--n_gpus=64")
    assert re.search(r"^fits +yes", second, re.M) and not re.search("^(flags|batch)", second, re.M)


def test_published_runs(capsys):
    """nanoGPT: 600,000 steps in about 4 days on 8 A100 40GB. llm.c: 10 B tokens in 45 minutes on 8 H100."""
    _, result = planned(capsys, "--gpu=a100-40gb", "--n_gpus=8", "--mfu=0.29")
    assert result["run"]["days"] == pytest.approx(4, rel=0.1) and not result["flags"]
    steps = 10**10 // 491_520
    _, result = planned(capsys, "--gpu=h100", "--n_gpus=8", f"--max_iters={steps}")
    assert result["run"]["days"] * 24 * 60 == pytest.approx(45, rel=0.15)


@pytest.mark.parametrize("flags", [SMALL, SMALL + MODERN])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_counts_are_those_of_the_whole_model_with_true_numbers(flags, half, on_gpu):
    """The counts come from one and two layers of fake tensors; here are three layers of true ones."""
    _, _, counts = counted(*flags, half=half, on_gpu=on_gpu)
    true = saved_bytes(as_trained(GPT(counts.shape).train(), on_gpu), 4, half)
    fixed = 3 * counts.block_fixed + counts.head_fixed
    assert fixed + 4 * (3 * counts.block_each + counts.head_each) == true
    assert type(causal_mask(0, 4, torch.float32)) is torch.Tensor  # no fake one stayed behind


def test_two_and_four_layers_differ_by_two_blocks():
    _, _, counts = counted(*SMALL, on_gpu=False)
    sizes = {
        L: saved_bytes(as_trained(GPT(GPTConfig(64, 128, L, 2, 32, bias=False)).train(), False), 2, False)
        for L in (2, 4)
    }
    assert sizes[4] - sizes[2] == 2 * (counts.block_fixed + 2 * counts.block_each)
    # a block's: its input and the sum, fp32, and what LayerNorm makes of each; its MLP, two of four times the
    # width; query, key, value, all weights above the diagonal's square, and what they read
    T, C = 64, 32
    inputs, mlp, attend = 4 * T * C, 8 * T * C, 3 * T * C + 2 * T * T + T * C
    assert counts.block_each == pytest.approx(4 * (inputs + mlp + attend), rel=0.02)


def test_memory_of_variants():
    _, hardware, counts = counted()
    N = counts.parameters
    one = memory(counts, hardware, Split(1, 12, 40))
    assert (one["weights"], one["gradients"], one["averages"], one["more"]) == (4 * N, 4 * N, 8 * N, 0)
    kinds = {how: memory(counts, hardware, Split(8, 12, 5, *how)) for how in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert kinds[1, 0]["weights"] * 8 == kinds[0, 0]["weights"]
    assert kinds[0, 0]["peak"] > max(kinds[0, 1]["peak"], kinds[1, 0]["peak"]) > kinds[1, 1]["peak"]
    assert kinds[0, 1]["activations"] < kinds[0, 0]["activations"]
    each = [memory(counts, hardware, Split(1, B, 2))["activations"] for B in (1, 2, 3)]
    assert each[2] - each[1] == each[1] - each[0]  # linear in the batch
    matrices = 12 * 12 * 768**2
    assert counted("--optimizer=muon")[2].averages == 8 * N - 4 * matrices
    assert counted("--optimizer=sgd")[2].averages == 4 * N


def test_an_update_by_muon_has_the_flops_of_its_products():
    """Counted by torch while it updates a model."""
    assert counted()[2].update_flops == 0.0
    for flags in (SMALL, [*SMALL, *MODERN]):
        config, _, counts = counted("--optimizer=muon", *flags)
        model = GPT(counts.shape)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        muon = make_optimizers(model, config, CPU)[1]
        with FlopCounterMode(display=False) as counter:
            muon.step()
        assert counts.update_flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    config, hardware, counts = counted("--optimizer=muon")
    adamw = step_time(counts._replace(update_flops=0.0), hardware, Split(8, 12, 5), 0.4)
    muon = step_time(counts, hardware, Split(8, 12, 5), 0.4)
    assert muon["update"] - adamw["update"] == pytest.approx(counts.update_flops / hardware.peak / 0.4)
    assert muon["seconds"] > adamw["seconds"]


# what a process of its own finds: how far its resident set grows in three training steps; without
# start_runtime, by which glibc keeps what is freed, and holes whose sizes differ from run to run by a fifth
STEPS = """
import sys
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from configurator import read_settings
from distrogpt.benchmark.timing import RandomStream
from distrogpt.benchmark.training import Trainer
from distrogpt.data.dataset import Dataset, Part
from distrogpt.data.meta import GPT2_META
from distrogpt.hardware import find_dtype
from distrogpt.runtime import Runtime, enable_onednn_float32
from distrogpt.settings import BenchConfig
from distrogpt.training.optim import make_optimizers
from train import training_step

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

config = read_settings(BenchConfig, sys.argv[1:])
device = torch.device("cpu")
runtime = Runtime(device, find_dtype(config.dtype, device))
enable_onednn_float32(runtime)
data = Dataset([Part("random ids", 1.0, Path(), GPT2_META, {"train": RandomStream(50257, 10_000)})])
before = resident("VmRSS")
trainer = Trainer(training_step, config, data, runtime)
for _ in range(3):
    trainer()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "flags",
    [
        "--n_layer=6 --n_embd=256 --block_size=128 --batch_size=4",
        "--n_layer=4 --n_embd=256 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2",
        "--n_layer=6 --n_embd=64 --block_size=256 --batch_size=2 --activation_checkpointing=True",
    ],
)
def test_planned_memory_is_what_training_takes_here(flags):
    words = ["--n_head=4", "--dtype=float32", "--compile=False", *flags.split()]
    run = subprocess.run(
        [sys.executable, "-c", STEPS, *words], cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    config = read_settings(BenchConfig, ["--plan=True", "--real_data=False", *words])
    config, shape, _ = planned_shape(config)
    hardware = find_hardware(config, CPU, peak=1e12)._replace(is_cpu=False)  # without room for such holes
    split = Split(1, config.batch_size, config.gradient_accumulation_steps)
    split = split._replace(recompute=config.activation_checkpointing)
    expected = memory(count(shape, config, False, False), hardware, split)["peak"] + LIBRARIES
    expected += COMPILER * split.recompute
    assert expected == pytest.approx(int(run.stdout.split()[-1]), rel=0.25)


def test_exchange_by_hand():
    _, hardware, counts = counted("--gpu=a100-80gb", "--gpus_per_node=8", half=True)
    sent = 4 * counts.parameters
    assert exchange(counts, hardware, 1, False) == exchange(counts, hardware, 1, True) == (0, 0)
    buckets = math.ceil(sent / (25 * 2**20))
    wire = 2 * 7 / 8 * sent / (0.8 * 300e9)  # NVLink
    assert exchange(counts, hardware, 8, False)[0] == pytest.approx(wire + buckets * 3 * 10e-6)
    wire = 2 * 63 / 64 * sent / (0.8 * 8 * 25e9)  # eight network cards of 200 Gbit/s, slower than NVLink
    assert exchange(counts, hardware, 64, False)[0] == pytest.approx(wire + buckets * 6 * 10e-6)
    blocks = 12 * 12 * 768**2 + 24 * 768
    tables = counts.parameters - blocks
    wire = 7 / 8 * (2 * 2 * blocks + 4 * tables + sent) / (0.8 * 300e9)
    assert exchange(counts, hardware, 8, True)[0] == pytest.approx(wire + 3 * 25 * 3 * 10e-6)
    for shard in (False, True):
        times = [exchange(counts, hardware, n, shard)[0] for n in range(1, 100)]
        assert times == sorted(times)
    slow = hardware._replace(network=1e9)
    assert exchange(counts, slow, 16, False)[0] > exchange(counts, hardware, 16, False)[0]


def test_data_rates():
    _, _, counts = counted()
    rates = data_rates(counts, 1e6, 4)
    assert (rates["total"], rates["node"]) == (2e6, 0.5e6)
    assert rates["disk"] == pytest.approx(0.5e6 * (1 + 2048 / 4096) * 4096 / 2050)
    _, _, large = counted("--n_layer=1")
    large = large._replace(shape=GPTConfig(vocab_size=70_000))
    assert data_rates(large, 1e6, 1)["total"] == 4e6


def test_sequences_are_shared_out():
    assert share_out(480, 8, 12) == (12, 5)  # as it was
    assert share_out(480, 16, 12) == (10, 3)  # as many in all
    assert share_out(480, 64, 12) == (8, 1)
    assert share_out(480, 4096, 12) == (1, 1)
    for n in (3, 7, 48, 100, 500):
        B, rounds = share_out(480, n, 12)
        assert 1 <= B <= 12 and abs(n * B * rounds - 480) <= max(n / 2, n - 480)


def test_the_batch_shrinks_until_it_fits_and_then_other_ways_are_taken(capsys):
    config, hardware, counts = counted()
    tight = hardware._replace(memory=6 * 2**30)
    split = settle(config, counts, tight, Split(8, 1, 1))
    assert split.B < 12 and split.sequences == 480
    assert memory(counts, tight, split)["fits"] and not memory(counts, tight, split._replace(B=12))["fits"]
    xl = ("--init_from=gpt2-xl", "--gpu=a100-40gb", "--gradient_accumulation_steps=8", "--batch_size=4")
    printed, result = planned(capsys, *xl, "--n_gpus=1", "--block_size=512")
    assert result["run"]["memory"]["fits"] and not result["run"]["shard"]
    assert 1.55e9 < result["counts"]["parameters"] < 1.57e9
    printed, result = planned(capsys, *xl, "--gpu=a10", "--n_gpus=2")
    assert result["run"]["shard"] and "--shard=True" in result["flags"]
    printed, result = planned(capsys, *xl, "--gpu=t4", "--n_gpus=1")
    assert re.search(r"^fits +no: at least [\d.]+ GiB needed, [\d.]+ GiB usable; use more", printed, re.M)


def test_it_plans_for_this_machine_from_a_step_made_here(dataset, tmp_path):
    flags = (*SMALL, "--real_data=True", f"--dataset={dataset}", "--bench_steps=2", "--compile=False")
    flags += ("--device=cpu", "--dtype=float32", "--json=plan.json")
    done = run_here("bench.py", *GPT2, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "plan.json").read_text())
    assert "measured here" in done.stdout and result["mfu"] > 0
    assert result["place"]["is_cpu"] and result["counts"]["shape"]["vocab_size"] < 256


def test_wrong_settings():
    for flag, expected in {
        "gpu=h1000": "one of here, b200",
        "n_gpus=0": "at least 1",
        "mfu=1.5": "at most 1",
    }.items():
        with pytest.raises(UserError, match=expected):
            read_settings(BenchConfig, [*GPT2, f"--{flag}"])
    config = read_settings(BenchConfig, [*GPT2, "--gpu=h100"])
    for other in ({"ladder": True}, {"against": "transformers"}):
        with pytest.raises(UserError, match=r"plan and (ladder|against) do not go together"):
            bench(replace(config, **other))
    with pytest.raises(UserError, match="init_from=some/model"):
        planned_shape(replace(config, init_from="some/model"))
    assert_user_error(run_here("bench.py", *GPT2, "--interconnect=0"), "above 0")


def test_a_data_sheet_is_found_by_the_name_of_the_device():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "Tesla V100-SXM2-32GB": "v100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    assert {name: find_gpu(name) for name in names} == {name: GPUS[gpu] for name, gpu in names.items()}
    assert find_gpu("NVIDIA A10G") is None and find_gpu("cpu") is None
