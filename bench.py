"""Benchmark training and sampling on this machine: python bench.py config/train_shakespeare_cpu.py"""

from configurator import configure
from distrogpt.settings import BenchConfig

if __name__ == "__main__":
    CONFIG = configure(BenchConfig)  # before torch is imported, so that --help and mistakes answer at once

import json
from dataclasses import asdict
from typing import Any

import torch

from distrogpt.benchmark import batch_size, checks, decoding, plan, report, serving, studies, training
from distrogpt.errors import cli_errors, writable
from distrogpt.files import write_text
from distrogpt.runtime import enable_onednn_float32, start_runtime
from train import training_step

# by setting; the functions of the first table run train.py's training step
TRAINING = {"plan": plan.bench_plan, "find_batch": batch_size.bench_batch, "check": checks.bench_check}
TRAINING |= {"ladder": studies.bench_ladder, "checkpoint": studies.bench_checkpoint}
TRAINING |= {"logs": studies.bench_logs, "profile": training.bench_step}
OTHERS = {"generate": decoding.bench_generate, "questions": studies.bench_questions}
OTHERS |= {"serve": serving.bench_serve, "report": report.bench_report}


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run the benchmark of the settings; print its results, write them to config.json, and return them."""
    name = config.measurement
    if "init_from" not in config.unused():
        config = training.with_gpt2_shape(config)
    planned = config.plan and config.gpu != "here"  # for another machine
    runtime = start_runtime("cpu" if planned else config.device, config.dtype)
    if config.json:
        with writable(config.json):  # before an hour of measuring
            pass
    if config.batch_size is None:
        config.batch_size = 1 if runtime.device.type == "cpu" and not planned else 12
    if not planned:
        print(f"machine  {runtime.describe()}, torch {torch.__version__}")
    if not (config.generate or config.serve):
        enable_onednn_float32(runtime)
    if name in OTHERS:
        result = OTHERS[name](config, runtime)
    else:
        result = TRAINING[name](config, runtime, training_step)
    result |= {"device": runtime.describe(), "torch": torch.__version__, "settings": asdict(config)}
    if config.json:
        write_text(config.json, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    with cli_errors():
        bench(CONFIG)
