"""bench.py --report=True: parts in processes of their own, and checks that can fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, assert_user_error, run_here

from configurator import read_settings, refuse_unused
from distrogpt.benchmark.checks import Row, distance
from distrogpt.benchmark.report import Part, all_parts, bench_report, headline, read_curve, read_tests
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig, TrainConfig

CPU = Runtime(torch.device("cpu"), torch.float32)
GOOD = """
import json, sys
rows = [{"what": "logits", "value": 1e-7, "limit": 1e-4, "passes": True},
        {"what": "loss", "value": 0.5, "limit": 1e-4, "passes": False}]
json.dump({"rows": rows}, open(sys.argv[1], "w"))
"""
HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def part(name: str, *scripts: str, seconds: float = 20, fits: bool = False) -> Part:
    commands = [["-c", script, "RESULT"] for script in scripts]
    return Part(name, f"part {name}", commands, seconds, fits)


def test_a_part_that_fails_or_hangs_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = [
        part("hangs", HANG, seconds=4),
        part("fails", "raise SystemExit('error: no such thing; do this')"),
        part("fits", "raise SystemExit('error: out of memory; lower it')", GOOD, GOOD, fits=True),
        part("good", GOOD),
        part("late", GOOD, seconds=600),
    ]
    result = bench_report(read_settings(BenchConfig, ["--report_minutes=2"]), CPU, parts)
    status = {each["name"]: each["status"] for each in result["parts"]}
    assert status["hangs"] == "stopped at its time limit of 8 s"
    assert status["fails"] == "failed: error: no such thing; do this"
    assert status["fits"] == status["good"] == "ok"
    assert re.match(r"not run: \d+ s left of 2 minutes", status["late"])
    assert [len(each["results"]) for each in result["parts"]] == [0, 0, 1, 1, 0]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == result
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**2 of 4 checks passed.**" in text and "FAILED: loss: 0.5, at most 0.0001" in text
    for each in parts:
        assert (each.status in text) or each.status == "ok"
    if os.name == "posix":  # what a part has started ends with it
        child = int((tmp_path / "report" / "hangs-0.log").read_text())
        end = time.monotonic() + 10
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.05)
        assert not is_running(child)
    for _ in range(2):
        text = (tmp_path / "report" / "report.md").read_text()
        bench_report(read_settings(BenchConfig, []), CPU, [part("good", GOOD)])
        assert (tmp_path / "report.previous-1" / "report.md").read_text() == text
    assert not (tmp_path / "report.previous-2").exists()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_commands_of_its_parts_are_right(device, tmp_path, monkeypatch):
    monkeypatch.setattr("distrogpt.benchmark.report.SHAKESPEARE", Path(__file__))
    runtime = Runtime(torch.device(device), torch.bfloat16)
    (tmp_path / "model.py").touch()
    config = read_settings(BenchConfig, [f"--against={tmp_path}"])
    parts = all_parts(config, runtime)
    assert len({each.name for each in parts}) == len(parts)
    for words in (words for each in parts for words in each.commands):
        script = next((word for word in words if word.startswith(str(REPO)) and word.endswith(".py")), None)
        if script and "-m" not in words:
            kind = {"bench.py": BenchConfig, "train.py": TrainConfig}[Path(script).name]
            flags = [word for word in words[words.index(script) + 1 :] if word != "RESULT"]
            config = read_settings(kind, flags)
            refuse_unused(config, flags)
            assert config.device == device


def test_without_time_nothing_runs_and_the_report_says_so(tmp_path):
    done = run_here("bench.py", "--report=True", "--report_minutes=0.01", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"The machine: not run: \d s left of 0.01 minutes", text)


def test_a_check_by_itself(tmp_path):
    flags = ("--check=network", "--device=cpu", "--json=rows.json")
    done = run_here("bench.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r": ok$", done.stdout, re.M)) == 12, done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["passes"] for row in rows) and any(0 < row["value"] < 0.1 for row in rows)
    assert_user_error(run_here("bench.py", "--check=network", "--report=True"), "do not go together")
    with pytest.raises(Exception, match="one of machine"):
        read_settings(BenchConfig, ["--check=sums"])


def test_a_row_fails_above_its_limit_and_where_nothing_is_a_number():
    a = torch.tensor([1.0, 2.0])
    assert Row("same", distance(a, a), 0.0).passes
    assert not Row("twice", distance(2 * a, a), 0.99).passes
    assert distance(2 * a, a) == pytest.approx(1.0)
    assert not Row("nan", distance(a * float("nan"), a), 1.0).passes
    assert Row("informs", 5.0).passes


def test_results_that_other_commands_write(tmp_path, monkeypatch):
    (tmp_path / "test_them.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_d(broken): pass\n"
    )
    words = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--junitxml=them.xml",
        "test_them.py",
    ]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    rows = read_tests(tmp_path / "them.xml")["rows"]
    assert [row["value"] for row in rows[:3]] == ["1", "2", "1"] and all(row["passes"] for row in rows[:3])
    assert [row["what"] for row in rows[3:]] == ["test_them::test_b", "test_them::test_d"]
    assert not any(row["passes"] for row in rows[3:])
    (tmp_path / "report/train_shakespeare_char").mkdir(parents=True)
    log = tmp_path / "report/train_shakespeare_char/log.csv"
    log.write_text("step,seconds,loss,val_loss\n0,,,4.5\n10,1.5,2.0,\n20,3.0,1.9,1.4\n30,4.0,1.8,1.3\n")
    monkeypatch.chdir(tmp_path)
    result = read_curve("train_shakespeare_char")
    assert result["curve"] == [[0, 0.0, 4.5], [20, 3.0, 1.4], [30, 4.0, 1.3]]
    line = headline(result)
    assert line.startswith("best val loss 1.3000 at step 30, after 4 s; target 1.4697 (")
    assert line.endswith("reached after 3.0 s")
