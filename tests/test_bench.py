"""The bench measures train.py's own step."""

import json
import re
from pathlib import Path

from conftest import TINY, assert_user_error, run

from configurator import read_settings
from settings import BenchConfig


def test_it_tells_time_speed_share_and_memory(dataset):
    done = run("bench.py", *TINY, f"--dataset={dataset}", "--bench_steps=5", "--warmup_steps=1")
    assert done.returncode == 0, done.stderr
    for line in (
        r"^step +4 sequences of 16 = 64 tokens$",
        r"^time +\d+\.\d\d ms median \(\d+\.\d\d to \d+\.\d\d\)$",
        r"^speed +[\d,]+ tokens/s, [\d,]+ GFLOP/s$",
        r"^mfu +\d+\.\d% of [\d,]+ GFLOP/s$",
        r"^memory +\d+\.\d\d GiB",
    ):
        assert re.search(line, done.stdout, re.M), (line, done.stdout)
    assert "random ids" not in done.stdout


def test_random_ids_where_there_is_no_dataset(tmp_path):
    done = run("bench.py", *TINY, "--dataset=none", "--bench_steps=2", "--n_layer=1", "--warmup_steps=0")
    assert done.returncode == 0 and "instead of data: no dataset none" in done.stdout


def test_profile_shows_operations_and_writes_a_trace(dataset, tmp_path):
    done = run("bench.py", *TINY, f"--dataset={dataset}", "--bench_steps=2", "--profile=True", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout
    trace = json.loads((tmp_path / "bench_trace.json").read_text())
    assert any("aten::mm" in str(event.get("name")) for event in trace["traceEvents"])


def test_it_takes_a_training_config_and_its_own_settings():
    config = read_settings(BenchConfig, ["config/train_shakespeare_cpu.py", "--bench_steps=3"])
    assert (config.n_layer, config.batch_size, config.bench_steps) == (4, 12, 3)
    assert read_settings(BenchConfig, []).batch_size is None
    assert_user_error(run("bench.py", "--bench_step=3"), "did you mean bench_steps?")


def test_the_step_is_train_pys():
    import bench
    import train

    assert bench.training_step is train.training_step and bench.step_batches is train.step_batches
    assert "def training_step" not in Path(bench.__file__).read_text()
