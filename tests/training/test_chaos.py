"""Kill a run at random moments, again and again: each file left is whole, and the end is bit for bit right.

CHAOS_KILLS=60 (make chaos) is the long version; CHAOS_SEED chooses other moments.
"""

import os
import random
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, assert_same_weights, losses_of, start_warm, train_here

from distrogpt.checkpoint import load_checkpoint, restore_model

KILLS = int(os.environ.get("CHAOS_KILLS", 3))
# checkpoints of 5 MB at each step: there is nearly always one being written
SHAPE = (
    "--n_layer=2",
    "--n_embd=128",
    "--dropout=0.1",
    "--gradient_accumulation_steps=2",
    "--log_interval=1",
)
SAVES = ("--save_interval=1", "--keep_checkpoints=2", "--eval_interval=7")


def kill_somewhere(process, out_dir: Path, chance: random.Random) -> tuple[str, int]:
    """Kill it while it starts, computes or writes; how, and the last step that it told."""
    told, left = -1, 0
    kind = chance.choices(("start", "step", "write"), (1, 4, 5))[0]
    if kind == "start":
        time.sleep(chance.uniform(0, 0.2))  # in which it reads what lies there
    else:
        left = chance.randint(1, 8)
        for line in process.stdout:
            step = re.match(r"step (\d+): loss", line)
            told, left = (int(step[1]), left - 1) if step else (told, left)
            if left == 0:
                break
        end = time.monotonic() + 1
        while kind == "write" and time.monotonic() < end and not list(out_dir.glob("*.tmp")):
            pass
        time.sleep(chance.uniform(0, 0.02))
    number = chance.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0]
    process.send_signal(number)
    for line in process.communicate(timeout=60)[0].splitlines():
        step = re.match(r"step (\d+): loss", line)
        told = int(step[1]) if step else told
    return signal.Signals(number).name, told


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_killed_again_and_again_it_ends_bit_for_bit_right(tmp_path, dataset):
    chance = random.Random(int(os.environ.get("CHAOS_SEED", 0)))
    steps = 25 * KILLS + 25  # more than it makes before the last kill
    flags = [*TINY, *SHAPE, *SAVES, f"--dataset={dataset}", f"--max_iters={steps}", "--init_from=auto"]
    whole, out_dir = tmp_path / "whole", tmp_path / "killed"
    train_here(*flags, f"--out_dir={whole}")

    kills, halves, lost, loaded = [], 0, [], 0
    while len(kills) < KILLS:
        process = start_warm("train.py", *flags, f"--out_dir={out_dir}")
        name, told = kill_somewhere(process, out_dir, chance)
        assert process.returncode != 0 or told == steps
        if process.returncode == 0:  # it was faster than the signal
            break
        kills.append(name)
        halves += bool(list(out_dir.glob("*.tmp")))
        newest = 0
        for path in out_dir.glob("*.pt"):
            contents = load_checkpoint(path)
            restore_model(contents, path)
            loaded += 1
            newest = contents["iter_num"] if path.name == "last.pt" else newest
        if told >= 0:
            lost.append(max(0, told - newest))
    train_here(*flags, f"--out_dir={out_dir}")
    for name in ("last.pt", "ckpt.pt"):
        assert_same_weights(whole / name, out_dir / name)
    assert losses_of(whole) == losses_of(out_dir)
    assert len(kills) == KILLS and not list(out_dir.glob("*.tmp"))
    print(
        f"\nchaos: {len(kills)} kills ({', '.join(f'{kills.count(n)} {n}' for n in sorted(set(kills)))}), "
        f"{halves} while a file was written, all survived; {loaded} files loaded, 0 corrupt; steps lost, "
        f"with a save at each: {statistics.median(lost)} median, {max(lost)} at most"
    )
