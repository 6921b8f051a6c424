"""Threads spin at barriers on a quiet machine and sleep on a busy one."""

import os
import subprocess
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPO, TINY, train_here

from distrogpt.openmp import (
    INTERVAL,
    WAITS,
    ThreadWaits,
    find_cores_taken,
    find_switch,
    switch_of_llvm,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def switches(*cores_waited_for: float) -> list[bool]:
    """What ThreadWaits switches to if the process waits for this many cores in each interval."""
    waits, switched = ThreadWaits(), []
    seconds_waited = accumulate(INTERVAL * cores for cores in cores_waited_for)
    with pytest.raises(StopIteration):
        waits.watch(lambda: next(seconds_waited), switched.append)
    assert waits.sleeping == (switched or [False])[-1]
    return switched


def test_threads_sleep_while_the_process_waits_for_cores_and_spin_afterwards():
    assert switches(0, 0, 0.1, 0.2, 0, 0.1) == []  # short bursts, as every machine has them
    assert switches(0, 1.0, 1.0) == [True]
    assert switches(0, 1.0, 1.0, 0.4, 0.4, 0, 0, 0, 0, 0) == [True, False]


def run_script(script: str, **env: str) -> None:
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, **env}, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


TOGGLE = """
import os, time, torch
from distrogpt.openmp import find_switch

def threads_now(wanted):
    end = time.monotonic() + 60
    while not wanted(now := len(os.listdir("/proc/self/task"))) and time.monotonic() < end:
        time.sleep(0.01)
    return now

a = torch.randn(300, 300)
expected = a @ a
switch, before = find_switch(), len(os.listdir("/proc/self/task"))
for _ in range(3):
    switch(True)
    more = before + max(2, len(os.sched_getaffinity(0)))  # more than cores, with the 2 that compute
    assert threads_now(lambda now: now == more) == more
    assert torch.equal(a @ a, expected)
    switch(False)
    assert threads_now(lambda now: now == before) == before
    assert torch.equal(a @ a, expected)
"""


@linux
def test_a_team_of_idle_threads_comes_and_goes():
    if "switch_of_gnu" not in getattr(find_switch(), "__qualname__", ""):
        pytest.skip("this torch has no GNU OpenMP")
    run_script(TOGGLE, OMP_NUM_THREADS="2")


ADAPT = """
import os, threading, time, torch
from distrogpt.runtime import start_runtime
from distrogpt.openmp import WAITS

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two threads on one core wait for it in turns
start_runtime("cpu")
a = torch.randn(600, 600)
end = time.monotonic() + WATCH
while not WAITS.sleeping and time.monotonic() < end:
    a @ a
assert WAITS.sleeping == EXPECTED
"""


@linux
def test_a_process_whose_threads_share_a_core_switches_unless_the_user_has_chosen():
    if not Path("/proc/self/schedstat").is_file() or find_switch() is None:
        pytest.skip("this machine does not say how long threads wait, or torch has another OpenMP")
    run_script(ADAPT.replace("WATCH", "60").replace("EXPECTED", "True"), OMP_NUM_THREADS="2")
    passive = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    run_script(ADAPT.replace("WATCH", "2").replace("EXPECTED", "False"), **passive)
    run_script(ADAPT.replace("WATCH", "2").replace("EXPECTED", "False"), OMP_NUM_THREADS="1")


def test_what_other_programs_use_counts_where_linux_does_not_say(monkeypatch):
    used = SimpleNamespace(user=1000.0, system=50.0)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(cpu_times=lambda: used))
    taken = find_cores_taken()
    before = taken()
    used.user += 2e6
    used.system += 1e6
    assert taken() - before == pytest.approx(3e6, rel=0.01)  # less what this test takes of all cores
    before, began = taken(), time.perf_counter()
    time.sleep(0.2)
    assert taken() - before < -0.4 * (time.perf_counter() - began)  # nothing else runs


def test_the_main_thread_sets_how_long_llvms_threads_spin():
    calls = []

    def kmp_set_blocktime(milliseconds: int) -> None:
        calls.append((milliseconds, threading.current_thread()))

    switch = switch_of_llvm(
        SimpleNamespace(kmp_set_blocktime=kmp_set_blocktime, kmp_get_blocktime=lambda: 200)
    )
    for sleeping, milliseconds in ((True, 0), (False, 200)):
        other = threading.Thread(target=switch, args=(sleeping,))
        other.start()
        other.join()
        end = time.monotonic() + 60
        while not calls and time.monotonic() < end:
            time.sleep(0.001)
        assert calls == [(milliseconds, threading.main_thread())]
        calls.clear()


def test_a_run_notes_a_busy_machine_once(dataset, tmp_path):
    flags = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    assert "other programs use the CPU" not in train_here(*flags)
    WAITS.sleeping = True
    try:
        assert train_here(*flags).count("other programs use the CPU") == 1
    finally:
        WAITS.sleeping = False
