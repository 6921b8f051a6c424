"""The bench measures train.py's own step."""

import json
import math
import os
import re
import shutil
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from conftest import REPO, TINY, assert_user_error, run_here

import bench
import train
from configurator import read_settings
from distrogpt.benchmark.batch_size import (
    LARGEST,
    Trial,
    available_memory,
    bench_batch,
    search,
    step_with,
)
from distrogpt.benchmark.llama_cpp import check_llama_cpp, decoding_rate
from distrogpt.benchmark.studies import ladder_rungs, rung_step
from distrogpt.benchmark.timing import alternate, float32_precision, open_data, ratio
from distrogpt.benchmark.training import Trainer, bench_step, with_gpt2_shape
from distrogpt.errors import UserError, is_out_of_memory
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from model import GPTConfig

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_it_tells_time_speed_share_and_memory(dataset):
    done = run_here("bench.py", *TINY, f"--dataset={dataset}", "--bench_steps=5", "--warmup_steps=1")
    assert done.returncode == 0, done.stderr
    for line in (
        r"^step +4 sequences of 16 = 64 tokens$",
        r"^time +\d+\.\d\d ms median \(quartiles \d+\.\d\d to \d+\.\d\d\)$",
        r"^speed +[\d,]+ tokens/s, [\d,]+ GFLOP/s$",
        r"^mfu +\d+\.\d% of [\d,]+ GFLOP/s$",
        r"^memory +\d+\.\d\d GiB",
    ):
        assert re.search(line, done.stdout, re.M), (line, done.stdout)
    assert "random token ids" not in done.stdout


def test_random_ids_where_they_are_wanted_and_not_for_a_name_that_is_wrong():
    flags = (*TINY, "--bench_steps=2", "--n_layer=1", "--warmup_steps=0", "--dataset=none")
    done = run_here("bench.py", *flags, "--real_data=False", "--profile=True", "--ladder=True")
    assert_user_error(done, "ladder and profile do not go together")
    assert_user_error(run_here("bench.py", *flags), "no dataset none", "--real_data=False")
    done = run_here("bench.py", *flags, "--real_data=False")
    assert done.returncode == 0 and "random token ids, with GPT-2's vocabulary size" in done.stdout


@pytest.mark.parametrize(
    ("layers", "steps", "compiled"), [(1, 2000, False), (1, 10**6, True), (40, 10**6, False)]
)
def test_it_compiles_where_train_py_would(layers, steps, compiled, monkeypatch, dataset):
    monkeypatch.setattr("distrogpt.kernels.compile.compile_error", lambda device: "")
    shape = (f"--n_layer={layers}", "--n_embd=96", "--compile=auto", f"--max_iters={steps}")
    config = read_settings(BenchConfig, [*TINY, f"--dataset={dataset}", "--batch_size=2", *shape])
    trainer = Trainer(train.training_step, config, open_data(config), CPU)
    assert (trainer.model._compiled_call_impl is not None) == compiled


def test_a_rungs_vocabulary_and_optimizer_are_plain_ones(monkeypatch):
    calls, fused_adamw = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: calls.append(1) or fused_adamw(*a, **k))
    config = read_settings(BenchConfig, [*TINY, "--real_data=False", "--batch_size=2"])
    data = open_data(config)

    def training_step(model, *args):
        before = model.lm_head.weight.clone()
        calls.clear()
        train.training_step(model, *args)
        return model.config.vocab_size, not torch.equal(before, model.lm_head.weight)

    for on, size in ({"padded": True, "fused": True}, 50304), ({}, 50257):
        on["dtype"] = torch.float16  # either optimizer works with loss scaling
        assert rung_step(training_step, config, data, CPU, on)() == (size, True)
        assert bool(calls) == ("fused" in on)


def test_profile_shows_operations_and_writes_a_trace(dataset, tmp_path):
    done = run_here(
        "bench.py", *TINY, f"--dataset={dataset}", "--bench_steps=2", "--profile=True", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout
    trace = json.loads((tmp_path / "bench_trace.json").read_text())
    assert any("aten::mm" in str(event.get("name")) for event in trace["traceEvents"])


def test_it_takes_a_training_config_and_its_own_settings():
    config = read_settings(BenchConfig, ["config/train_shakespeare_cpu.py", "--bench_steps=3"])
    assert (config.n_layer, config.batch_size, config.bench_steps) == (4, 12, 3)
    assert read_settings(BenchConfig, []).batch_size is None
    assert_user_error(run_here("bench.py", "--bench_step=3"), "did you mean bench_steps?")


def test_the_step_is_train_pys(dataset):
    assert bench.training_step is train.training_step
    calls = []

    def training_step(*args):
        calls.append(args)
        return train.training_step(*args)

    flags = [*TINY, f"--dataset={dataset}", "--bench_steps=4", "--warmup_steps=2"]
    bench_step(read_settings(BenchConfig, flags), CPU, training_step)
    assert len(calls) == 6 and all(len(batches) == 1 for _, _, _, batches, *_ in calls)


@pytest.mark.parametrize("against", [str(REPO), "transformers"])  # our model.py has nanoGPT's face too
def test_others_are_timed_in_turns_and_the_results_written(against, dataset, tmp_path):
    flags = (f"--dataset={dataset}", "--bench_steps=4", f"--against={against}", "--dropout=0.1")
    done = run_here("bench.py", *TINY, *flags, f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    name = "transformers" if against == "transformers" else REPO.name
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["steps"]) == {"ours", name} and found["torch"] == torch.__version__
    assert found["settings"]["n_embd"] == 16 and "cpu" in found["device"]
    printed = float(re.search(r"^ratio +(\d+\.\d+) times", done.stdout, re.M)[1])
    assert printed == pytest.approx(found["ratio"]["median"], abs=0.01)
    times = found["steps"]
    assert times["ours"]["low"] <= times["ours"]["median"] <= times["ours"]["high"]
    assert times["ours"]["tokens_per_second"] == pytest.approx(64 / times["ours"]["median"])


def test_mistakes_of_against_and_json(dataset, tmp_path):
    (tmp_path / "model.py").write_text("GPT = 1")
    flags = (*TINY, f"--dataset={dataset}", "--bench_steps=1", "--warmup_steps=0")
    assert_user_error(run_here("bench.py", *flags, "--against=nowhere"), "no model.py", "nanoGPT checkout")
    assert_user_error(run_here("bench.py", *flags, f"--against={tmp_path}"), "is not nanoGPT's")
    (tmp_path / "model.py").write_text("raise ValueError('no')")
    assert_user_error(run_here("bench.py", *flags, f"--against={tmp_path}"), "is not nanoGPT's")
    done = run_here("bench.py", *flags, f"--json={tmp_path}")
    assert_user_error(done, "cannot be written")
    assert "median" not in done.stdout  # told before all that takes time
    done = run_here("bench.py", *flags, "--generate=True", "--max_new_tokens=20")
    assert_user_error(done, "block_size=16 leaves 0 tokens", "raise --block_size")


def test_alternation_takes_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = alternate(steps, 1, 2, CPU)
    assert order == list("ababab")
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
    order.clear()
    times = alternate(steps, 0, 25, CPU)  # turns of three
    assert "".join(order) == 8 * "aaabbb" + "ab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 25, "b": 25}


def test_a_ratio_is_how_many_times_faster_ours_is():
    assert ratio([2.0, 6.0, 8.0], [1.0, 2.0, 2.0])["median"] == 3.0


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="no C++ compiler")
def test_ladder_has_a_table_and_a_plot(dataset, tmp_path):
    flags = (*TINY, f"--dataset={dataset}", "--bench_steps=2", "--dropout=0.1", "--dtype=bfloat16")
    flags = (*flags, "--compile=True")
    done = run_here("bench.py", *flags, "--ladder=True", "--json=found.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rungs = json.loads((tmp_path / "found.json").read_text())["rungs"]
    names = [rung["rung"] for rung in rungs]
    assert names[0] == "fp32, plain" and {"bfloat16", "fused AdamW", "compile"} < set(names)
    assert all(name in done.stdout for name in names)
    assert rungs[-1]["total"] == pytest.approx(math.prod(rung["gain"] for rung in rungs))
    assert (tmp_path / "bench_ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_ladder_leads_from_gpt2_to_the_settings(dataset):
    """The network and the optimizers of the first rung, and of the last; no rung that changes nothing."""
    recipe = ("--optimizer=muon", "--n_kv_head=1", "--activation=swiglu", "--rotary=True", "--tied=False")
    config = read_settings(BenchConfig, [*TINY, f"--dataset={dataset}", *recipe])
    data, rungs = open_data(config), ladder_rungs(config, open_data(config), CPU)
    assert {"rotary=True", "n_kv_head=1", "activation=swiglu", "tied=False", "optimizer=muon"} < set(rungs)
    assert not {"compile", "bfloat16", "byte-mask dropout", "qk_norm=True"} & set(rungs)
    seen = []

    def training_step(model, optimizers, *args):
        seen.append((model.config, [type(optimizer).__name__ for optimizer in optimizers]))

    on = {}
    for improvement in rungs.values():
        on |= improvement
        rung_step(training_step, config, data, CPU, on)()
    Trainer(training_step, config, data, CPU)()
    assert (seen[0][0].rotary, seen[0][0].activation, seen[0][1]) == (False, "gelu_tanh", ["AdamW"])
    assert seen[-2] == seen[-1] and seen[-1][1] == ["AdamW", "Muon"] and seen[-1][0].kv_heads == 1
    assert all(one != other for one, other in pairwise(seen[-6:-1]))


def test_each_side_is_told(dataset, tmp_path):
    recipe = ("--optimizer=muon", "--activation=swiglu", "--rotary=True", "--bench_steps=1")
    done = run_here("bench.py", *TINY, f"--dataset={dataset}", *recipe, f"--against={REPO}")
    ours = "parameters: GPT-2 with activation=swiglu, rotary=True; Muon; float32; not compiled"
    assert f" {ours}\n" in done.stdout
    assert f"{REPO.name:8} GPT-2 with activation=gelu; AdamW; float32; not compiled\n" in done.stdout
    note = f"note     {REPO.name} does not support activation=swiglu, rotary=True, optimizer=muon: "
    assert note in done.stdout
    plain = run_here("bench.py", *TINY, f"--dataset={dataset}", "--bench_steps=1", f"--against={REPO}")
    assert "GPT-2; AdamW" in plain.stdout and "does not support" not in plain.stdout
    shape = ("--real_data=False", "--block_size=32", "--n_layer=1", "--n_head=2", "--n_embd=16")
    words = ("--generate=True", "--max_new_tokens=4", "--num_samples=1", "--rounds=1", "--rotary=True")
    done = run_here("bench.py", *shape, *words, "--against=transformers", "--dtype=float32", "--device=cpu")
    assert "GPT-2 with rotary=True; float32\n" in done.stdout
    assert "transformers GPT-2 with bias=True; float32\n" in done.stdout
    assert "note     transformers does not support rotary=True: " in done.stdout


def test_the_shape_is_that_of_init_from(dataset):
    xl = with_gpt2_shape(read_settings(BenchConfig, ["config/finetune_shakespeare.py", "--rotary=True"]))
    assert (xl.n_layer, xl.n_embd, xl.bias, xl.rotary) == (48, 1600, True, False)
    medium = with_gpt2_shape(read_settings(BenchConfig, ["--init_from=auto:gpt2-medium"]))
    assert (medium.n_layer, medium.n_embd) == (24, 1024)
    done = run_here("bench.py", *TINY, f"--dataset={dataset}", "--init_from=some/model")
    assert_user_error(done, "cannot read the shape of init_from=some/model", "--init_from=scratch")


def test_the_ladder_leaves_the_precision_of_products_as_it_was(dataset):
    modern = ("--optimizer=muon", "--n_kv_head=1", "--activation=relu2")  # the ladder is GPT-2's
    config = read_settings(BenchConfig, [*TINY, f"--dataset={dataset}", *modern])
    precisions, before = [], torch.get_float32_matmul_precision()

    def training_step(*args):
        precisions.append(torch.get_float32_matmul_precision())

    data = open_data(config)
    with float32_precision("medium"):
        for on in {}, {"products": True}:
            rung_step(training_step, config, data, CPU, on)()
        assert precisions == ["highest", "medium"] and torch.get_float32_matmul_precision() == "medium"
    assert before == torch.get_float32_matmul_precision()


def test_a_rung_has_plain_layers_for_what_is_not_on(dataset):
    config = read_settings(BenchConfig, [*TINY, f"--dataset={dataset}", "--dropout=0.1"])
    layers = []

    def training_step(model, *args):
        layers.append({type(layer).__name__ for layer in model.modules()})

    for on in {}, {"attention": True}, {"attention": True, "dropout": True}:
        rung_step(training_step, config, open_data(config), CPU, on)()
    plain, attention, both = layers
    assert {"PlainAttention", "Dropout"} <= plain and {"CPUAttention", "Dropout"} <= attention
    assert {"CPUAttention", "CPUDropout"} <= both and not both & (plain - attention)


@pytest.mark.parametrize("against", [None, str(REPO), "transformers"])
def test_generate_tells_prefill_decode_and_the_bandwidths_share(against, tmp_path):
    shape = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --max_new_tokens=8 --num_samples=3".split()
    flags = ("--generate=True", "--real_data=False", "--rounds=2", f"--json={tmp_path / 'found.json'}")
    done = run_here(
        "bench.py", *shape, *flags, *([f"--against={against}"] if against else []), "--device=cpu"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(run["name"], run["batch"]) for run in found["runs"]] == [
        (name, batch) for name in ("ours", "ours, int8") for batch in (1, 3)
    ]
    for one in found["runs"]:
        weights = 12 * 32 * 32 + 50304 * 32
        nbytes = 1 if "int8" in one["name"] else 2 if "bfloat16" in found["device"] else 4
        limit = found["bandwidth"] / (weights * nbytes)
        assert one["share"] == pytest.approx(one["decode"]["median"] / one["batch"] / limit)
    assert ("ratio" in found) == (against is not None)


LLAMA = "--generate=True --real_data=False --n_layer=1 --n_head=2 --n_embd=32 --block_size=64".split()
LLAMA += ["--against=llama.cpp", "--device=cpu"]


class FakeLlama:
    """llama-cpp-python's Llama, which records what it is asked for."""

    made: list["FakeLlama"] = []

    def __init__(self, path: str, **options: object) -> None:
        with open(path, "rb") as file:
            self.magic = file.read(4)
        self.name, self.options, self.calls, self.count = os.path.basename(path), options, [], 0
        self.made.append(self)

    def generate(self, ids: list[int], **sampling: object):
        self.calls.append((ids, sampling))
        while True:
            self.count += 1
            yield 1

    def reset(self) -> None:
        self.calls.append("reset")

    def close(self) -> None:
        self.calls.append("close")


def test_llama_cpp_decodes_the_same_number_of_tokens_in_turns(monkeypatch):
    pytest.importorskip("gguf", reason="optional: pip install gguf")
    fake = ModuleType("llama_cpp")
    fake.Llama, fake.__version__, fake.__spec__ = FakeLlama, "1.2.3", object()
    monkeypatch.setattr(FakeLlama, "made", [])
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    done = run_here("bench.py", *LLAMA, "--dtype=float32", "--rounds=2", "--max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp f32 and q8_0, 1 threads, llama-cpp-python 1.2.3\n" in done.stdout
    assert [llama.name for llama in FakeLlama.made] == ["f32.gguf", "q8_0.gguf"]
    prompts = set()
    for llama in FakeLlama.made:
        assert llama.magic == b"GGUF" and llama.count == 3 * 8  # two rounds, and one that is not counted
        assert llama.options["n_threads"] == llama.options["n_threads_batch"] == torch.get_num_threads()
        assert llama.options["n_gpu_layers"] == 0 and llama.options["n_ctx"] == 64
        assert llama.options["flash_attn"]
        assert [call for call in llama.calls if isinstance(call, str)] == [*["reset"] * 3, "close"]
        for ids, sampling in (call for call in llama.calls if not isinstance(call, str)):
            prompts.add(tuple(ids))
            assert sampling == {"top_k": 200, "temp": 0.8, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    ((*prompt,),) = prompts  # the same for both
    assert len(prompt) == 16


def test_the_rate_of_llama_cpp_has_neither_the_prompt_nor_the_second_token(monkeypatch, tmp_path):
    (tmp_path / "f32.gguf").touch()
    llama = FakeLlama(str(tmp_path / "f32.gguf"))
    seconds = [0, 100, 110, *range(111, 120)]  # after each token
    monkeypatch.setattr("distrogpt.benchmark.llama_cpp.time.perf_counter", lambda: seconds[llama.count])
    assert decoding_rate(llama, torch.zeros(1, 16, dtype=torch.long), 8) == 1.0


def test_llama_cpp_is_timed_beside_ours(tmp_path):
    pytest.importorskip("gguf", reason="optional: pip install gguf")
    pytest.importorskip("llama_cpp", reason="optional: pip install llama-cpp-python (takes minutes)")
    flags = ("--rounds=2", "--num_samples=1", f"--json={tmp_path / 'found.json'}")
    done = run_here("bench.py", *LLAMA, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    dtype = "bf16" if "bfloat16" in found["device"] else "f32"
    assert list(found["llama.cpp"]) == [dtype, "q8_0"]
    for run, (kind, both) in zip(found["runs"], found["llama.cpp"].items(), strict=True):
        assert both["ours"] == run["decode"] and both["other"]["low"] > 0
        low, high = (
            both["ours"][end] / both["other"][other] for end, other in (("low", "high"), ("high", "low"))
        )
        assert low * 0.5 < both["ratio"]["median"] < high * 2  # of neighbouring rounds
        line = f"ratio    {both['ratio']['median']:.2f} times llama.cpp's speed in {kind} ("
        assert f"{line}{both['ratio']['low']:.2f} to {both['ratio']['high']:.2f}): " in done.stdout


def test_mistakes_of_llama_cpp(monkeypatch, tmp_path):
    wrong = run_here("bench.py", "--against=llama.cpp", "--real_data=False")
    assert_user_error(wrong, "against=llama.cpp only generates text; add --generate=True")
    with pytest.raises(UserError, match=r"on CPUs only; add --device=cpu"):
        check_llama_cpp(GPTConfig(), Runtime(torch.device("cuda"), torch.bfloat16))
    packages = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    for module in packages:
        fake = ModuleType(module)
        fake.__spec__ = object()
        monkeypatch.setitem(sys.modules, module, fake)
    for module, package in packages.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            wrong = run_here("bench.py", *LLAMA)
        assert_user_error(wrong, f"against=llama.cpp needs {package}; run: pip install {package}")
        assert "decode" not in wrong.stdout
    wrong = run_here("bench.py", *LLAMA, "--activation=relu2", "--logit_softcap=15")
    assert_user_error(wrong, "a network with activation=relu2, logit_softcap=15.0; time one with --")
    assert "decode" not in wrong.stdout


def test_what_a_checkpoint_costs(dataset, tmp_path):
    flags = [*TINY, f"--dataset={dataset}", "--checkpoint=True", "--bench_steps=5", "--rounds=2"]
    done = run_here("bench.py", *flags, f"--json={tmp_path / 'found.json'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    size = int(re.search(r"writes   (\d+) MB", done.stdout)[1])
    assert round(found["bytes"] / 1e6) == size and found["wait"]["median"] > 0 < found["write"]["median"]
    assert re.search(r"cost     -?\d+\.\d\d s per checkpoint, .* -?\d+\.\d\d% of 250 steps", done.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


# the largest batch


@pytest.mark.parametrize("careful", [True, False])
def test_the_search_finds_the_largest_batch_to_an_eighth(careful):
    for limit in [*range(1, 40), 100, 255, 256, 257, 1000, LARGEST - 1]:
        attempted = []

        def attempt(batch, limit=limit, attempted=attempted):
            attempted.append(batch)
            return Trial(batch, batch, batch <= limit, 1.0)

        def computed(batch, limit=limit):  # trusted only by the careful
            return Trial(batch, batch, batch <= (limit if careful else 3))

        trials = search(attempt, computed, careful, time_all=True)
        largest = max(batch for batch, trial in trials.items() if trial.fits)
        assert largest <= limit <= largest + largest // 8 and list(trials) == sorted(trials)
        assert set(attempted) <= set(trials) and len(attempted) == len(set(attempted)) < 2 * 16
        assert max(attempted) <= limit if careful else limit < max(attempted)
    none = search(lambda batch: Trial(batch, 1, False), lambda batch: Trial(batch, 1, True), careful)
    assert list(none) == [1]
    most = search(lambda batch: Trial(batch, 1, True, 1.0), lambda batch: Trial(batch, 1, True), careful)
    assert max(most) == LARGEST


def test_larger_batches_are_not_timed_where_it_is_not_worth_it():
    def timed(seconds_of, careful):
        trials = search(
            lambda batch: Trial(batch, 1, True, seconds_of(batch)),
            lambda batch: Trial(batch, 1, batch <= 1000),
            careful,
        )
        assert max(batch for batch, trial in trials.items() if trial.fits) > (900 if careful else 2**14)
        return [batch for batch, trial in trials.items() if trial.seconds]

    assert timed(lambda batch: 0.1 + 0.1 * batch, True) == [1, 2, 4, 8, 16, 32, 64]  # slow: 6.5 s
    assert timed(lambda batch: 0.01 * max(batch, 4), True) == [1, 2, 4, 8, 16, 32]  # flat from 4 on
    assert timed(lambda batch: 0.0001 * max(batch, 4), False)[-1] == LARGEST  # only trying knows


@pytest.mark.parametrize(
    "steps, size, gpus, largest, flags",
    [
        (40, 12, 1, 100, "--batch_size=96 --gradient_accumulation_steps=5"),
        (40, 12, 1, 7, "--batch_size=6 --gradient_accumulation_steps=80"),
        (1, 12, 1, 2000, "--batch_size=12 --gradient_accumulation_steps=1"),
        (40, 12, 8, 100, "--batch_size=60 --gradient_accumulation_steps=8"),
        (1, 13, 1, 12, "--batch_size=12 --gradient_accumulation_steps=1"),  # 13 is prime: nearest
    ],
)
def test_flags_keep_the_tokens_of_a_step(steps, size, gpus, largest, flags):
    words = [f"--gradient_accumulation_steps={steps}", f"--batch_size={size}", f"--n_gpus={gpus}"]
    found = step_with(read_settings(BenchConfig, words), largest)
    assert found["flags"] == flags and found["batch_size"] <= largest
    assert abs(found["sequences"] - steps * size) <= (flags.startswith("--batch_size=12") and size == 13)


FIND = (*TINY, "--find_batch=True", "--gradient_accumulation_steps=10", "--loss_after==")


def test_on_a_cpu_nothing_is_tried_that_memory_has_no_room_for(capsys, dataset):
    tried, room, config = [], 0.7 * 0.185 * 2**30, read_settings(BenchConfig, [*FIND, f"--dataset={dataset}"])

    def step(model, optimizers, scaler, batches, *args):
        has_gradients = all(p.grad is not None for p in model.parameters())
        tried.append((len(batches), batches.current[0].x.size(0), has_gradients))
        return train.training_step(model, optimizers, scaler, batches, *args)

    result = bench_batch(config, CPU, step, room, time_all=True)
    largest = result["largest"]
    assert {count for count, _, _ in tried} == {1} and largest["batch"] == max(size for _, size, _ in tried)
    assert all(has == (size < 40) for _, size, has in tried)  # of earlier micro-steps, in a step of 40
    assert largest["memory"] <= room < max(row["memory"] for row in result["trials"])
    for row in result["trials"]:
        assert row["fits"] == (row["memory"] <= room) == bool(row["seconds"])
        if row["fits"]:
            assert row["tokens_per_second"] == pytest.approx(row["batch"] * 16 / row["seconds"])
    rates = [row["tokens_per_second"] or 0 for row in result["trials"]]
    assert result["fastest"]["tokens_per_second"] == max(rates)
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    for name in ("largest", "fastest"):
        flags = re.search(rf"^{name} .*: (--.*)$", printed, re.M)[1].split()
        found = read_settings(BenchConfig, flags)
        assert found.batch_size * found.gradient_accumulation_steps == 40
        assert found.batch_size <= result[name]["batch"]
    tried.clear()
    with pytest.raises(UserError, match=r"one sequence needs 0\.\d+ GiB, but 0\.00 are free; lower"):
        bench_batch(config, CPU, step, 2**20)
    assert not tried


def test_what_runs_out_of_memory_is_too_large(dataset):
    config = read_settings(BenchConfig, [*FIND, f"--dataset={dataset}"])
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def step(model, optimizers, scaler, batches, *args):
        if batches.current[0].x.size(0) > 11:
            raise error
        return train.training_step(model, optimizers, scaler, batches, *args)

    found = bench_batch(config, CPU, step, math.inf, time_all=True)
    assert found["largest"]["batch"] == 11
    assert [row["batch"] for row in found["trials"] if not row["fits"]] == [12, 16]
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        bench_batch(config, CPU, step, math.inf, time_all=True)
    for kind, words in ((RuntimeError, "DefaultCPUAllocator: can't allocate memory"), (MemoryError, "")):
        assert is_out_of_memory(kind(words)) and not is_out_of_memory(OSError(words))


def test_what_is_left_of_memory_is_the_least_that_the_system_says(tmp_path):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n")
    (proc / "self" / "cgroup").write_text("4:cpu:/\n")
    assert available_memory(proc, cgroups) == 5000 * 1024

    def limited(folder, limit, used, stat, names):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "stat"), (limit, used, stat), strict=True):
            (folder / f"memory.{name}").write_text(f"{text}\n")

    (proc / "self" / "cgroup").write_text("0::/job/step\n")  # version 2; the limit stands above
    limited(cgroups / "job" / "step", "max", 100, "inactive_file 7", ("max", "current"))
    assert available_memory(proc, cgroups) == 5000 * 1024
    limited(cgroups / "job", 3000, 1000, "anon 5\ninactive_file 500\nactive_file 9", ("max", "current"))
    assert available_memory(proc, cgroups) == 2500
    (proc / "self" / "cgroup").write_text("0::/\n9:cpu,memory:/docker/abc\n")  # 1, in a container
    names = ("limit_in_bytes", "usage_in_bytes")
    limited(cgroups / "memory", 4000, 3900, "inactive_file 1\ntotal_inactive_file 20", names)
    assert available_memory(proc, cgroups) == 120
    limited(cgroups / "memory", 4000, 4100, "inactive_file 1", names)
    assert available_memory(proc, cgroups) == 0
    if hasattr(os, "sysconf"):
        assert 2**20 < available_memory(tmp_path / "none") < 2**50  # another system
    assert available_memory() > 0


def test_what_logs_cost(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture, which takes seconds
    flags = [*TINY, f"--dataset={dataset}", "--logs=True", "--bench_steps=20"]
    found = bench.bench(read_settings(BenchConfig, flags))
    assert 0 < found["lines"] < 0.1 and found["share"] == pytest.approx(found["cost"] / found["step"])
    printed = capsys.readouterr().out
    assert re.search(r"^lines    \d+\.\d{3} ms per step, \d+\.\d\d%: screen, log\.csv, Tensor", printed, re.M)
    assert re.search(r"^cost     \d+\.\d{3} ms per step, \d+\.\d\d%$", printed, re.M)
    assert not list(tmp_path.iterdir())
