"""Measure a trained GPT: python eval.py --out_dir=out-addition
python eval.py --init_from=gpt2 --tasks=hellaswag
"""

from configurator import configure
from distrogpt.settings import EvalConfig

if __name__ == "__main__":
    CONFIG = configure(EvalConfig)  # before torch is loaded, so that --help and mistakes answer at once

import json
import sys
import time

from distrogpt.errors import cli_errors, exit_process, warn, writable
from distrogpt.evaluation.tasks import Result, load_tasks, result_table
from distrogpt.files import write_text
from distrogpt.runtime import start_runtime, stop_runtime


def measure(config: EvalConfig) -> dict[str, Result]:
    """Run the tasks of the settings and print their results as a table. Raises UserError before anything is
    computed."""
    runtime = start_runtime(config.device, config.dtype)
    source, tasks = load_tasks(config, runtime)
    if runtime.is_main:
        warn(f"{source} ({runtime.describe()})")
        if config.json:
            with writable(config.json):
                pass
    results = {}
    for name, task in tasks.items():
        begin = time.perf_counter()
        results[name] = task()
        results[name]["seconds"] = round(time.perf_counter() - begin, 2)
    if runtime.is_main:
        print(result_table(results))
        if config.json:
            text = json.dumps({"source": source, **results}, indent=1)
            write_text(config.json, text + "\n")
    return results


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    with cli_errors("lower --batch_size"):
        measure(CONFIG)
        stop_runtime()
        exit_process(0)
