"""Measure a trained GPT: python eval.py --out_dir=out-addition
                           python eval.py --init_from=gpt2 --tasks=hellaswag

Each task first finds what it needs, so that mistakes are told before anything is computed.
"""

from configurator import configure
from distrogpt.settings import EvalConfig

if __name__ == "__main__":
    CONFIG = configure(EvalConfig)  # before torch is loaded, so that --help and mistakes answer at once

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distrogpt.data.dataset import Dataset, evaluation_windows, open_dataset, pad_windows, strided_windows
from distrogpt.data.meta import GPT2_META, tokenizers_differ
from distrogpt.data.tokenizer import Tokenizer, encode_prompt
from distrogpt.errors import UserError, cli_errors, exit_process, warn, writable
from distrogpt.evaluation.introspection import next_tokens
from distrogpt.evaluation.loss import EvalWindows, mean_losses, summed_loss
from distrogpt.evaluation.questions import GPT2_HELLASWAG
from distrogpt.evaluation.tasks import answers, check_lengths, choices, held_out_lines, open_questions
from distrogpt.inference.sampler import read_prompt
from distrogpt.kernels.cpu import to_device
from distrogpt.loading import find_tokenizer, load_trained
from distrogpt.runtime import Runtime, start_runtime, stop_runtime
from distrogpt.settings import EVAL_TASKS, TrainConfig
from model import GPT

Result = dict[str, Any]


class Trained(NamedTuple):
    """What is measured, and where."""

    model: GPT
    tokenizer: Tokenizer | None  # where a task needs it
    contents: dict[str, Any]  # of its checkpoint, {} where there is none
    source: str
    runtime: Runtime

    @property
    def settings(self) -> dict[str, Any]:
        """That it was trained with, {} where nobody knows them."""
        return self.contents.get("config", {})


def measure(config: EvalConfig) -> dict[str, Result]:
    """Do the tasks that the settings name; print them as a table. Raises UserError."""
    runtime = start_runtime(config.device, config.dtype)
    model, contents, source = load_trained(config.out_dir, config.init_from)
    names = tasks_of(config, contents.get("config", {}))
    tokenizer = None
    if names != ["loss"]:  # which needs none
        tokenizer = find_tokenizer(contents, model.config.vocab_size, source)
    trained = Trained(to_device(model, runtime.device).eval(), tokenizer, contents, source, runtime)
    prepare = {
        "loss": loss,
        "hellaswag": questions,
        "choice": questions,
        "accuracy": accuracy,
        "next": following,
    }
    ready = [(name, prepare[name](config, trained, name)) for name in names]
    if runtime.is_main:
        warn(f"{source} ({runtime.describe()})")
        if config.json:
            with writable(config.json):  # before an hour of computing
                pass
    results = {}
    for name, task in ready:
        begin = time.perf_counter()
        results[name] = task()
        results[name]["seconds"] = round(time.perf_counter() - begin, 2)
    if runtime.is_main:
        print("\n".join(table(results)))
        if config.json:
            text = json.dumps({"source": source, **results}, indent=1)
            with writable(config.json) as path:
                Path(path).write_text(text + "\n", encoding="utf-8")
    return results


def tasks_of(config: EvalConfig, settings: dict[str, Any]) -> list[str]:
    """The names in `tasks`; of auto what the run was for. Raises UserError."""
    if config.tasks == "auto":
        return ["accuracy" if settings.get("loss_after") else "loss"]
    names = [name.strip() for name in config.tasks.split(",") if name.strip()] or [config.tasks]
    for name in names:
        if name not in EVAL_TASKS:
            raise UserError(f"tasks={name[:40]} is not known; name some of {', '.join(EVAL_TASKS)}, by comma")
    return list(dict.fromkeys(names))


def data_of(config: EvalConfig, trained: Trained, **settings: Any) -> tuple[Dataset, TrainConfig]:
    """The data that the settings name, or that it was trained on, and how it is read. Raises UserError."""
    dataset = config.dataset or trained.settings.get("dataset")
    if not dataset:
        raise UserError(f"{trained.source} names no dataset; give --dataset=NAME")
    asked = TrainConfig(dataset=dataset, eval_iters=0, eval_splits=config.split, **settings)
    data = open_dataset(asked, (config.split,))
    theirs = trained.contents.get("meta", GPT2_META if trained.contents == {} else data.meta)["tokenizer"]
    if tokenizers_differ(theirs, data.meta["tokenizer"]):
        raise UserError(f"{trained.source} has another tokenizer than {dataset}; use a dataset of its own")
    if data.meta["vocab_size"] > trained.model.config.vocab_size:
        raise UserError(f"{dataset} has more tokens than {trained.source} knows; use a dataset of its own")
    return data, asked


def loss(config: EvalConfig, trained: Trained, name: str) -> Callable[[], Result]:
    """Loss, perplexity and bits per byte of each token of a split; of lines, what training measures."""
    lines = {"sampling": "lines"} if trained.settings.get("sampling") == "lines" else {}
    lines["loss_after"] = trained.settings.get("loss_after")
    T = config.block_size or trained.model.config.block_size
    if T > trained.model.config.block_size:
        longest = trained.model.config.block_size
        raise UserError(f"block_size={T} is longer than the model reads; give {longest} or less")
    data, asked = data_of(config, trained, block_size=T, batch_size=config.batch_size or 16, **lines)
    runtime, B, stride = trained.runtime, asked.batch_size, config.stride or T
    if config.stride and asked.sampling == "lines":
        raise UserError("stride is for text; this run's windows begin with lines: leave it out")
    if stride > T:
        raise UserError(f"stride={stride} is longer than a window of {T} tokens; give {T} or less")

    def task() -> Result:
        found = []
        for number, part in enumerate(data.parts):
            stream = part.streams[config.split]
            if asked.sampling == "lines":
                windows = evaluation_windows(part, number, config.split, asked, runtime.world_size)
            else:
                windows = strided_windows(len(stream), T, stride)
                windows = pad_windows(*windows, T, B * runtime.world_size)
            found.append(summed_loss(trained.model, data, EvalWindows(stream, *windows, B, T), runtime))
        if not all(count for _, count in found):
            raise UserError(f"no target of {config.split} stands after the separator; choose another dataset")
        means = mean_losses(data, {config.split: [total / count for total, count in found]}, config.split)
        mean = means.pop(config.split)
        tokens = int(sum(count for _, count in found))
        return {"loss": mean, "perplexity": math.exp(min(mean, 700)), **means, "tokens": tokens}

    return task


def questions(config: EvalConfig, trained: Trained, name: str) -> Callable[[], Result]:
    """Multiple choice: how often the right ending is the likeliest, by the sum (acc) and by the mean over its
    tokens (acc_norm) of the logarithms of their chances."""
    if name == "choice" and not config.input:
        raise UserError("choice reads a file; give --input=FILE, or --tasks=hellaswag")
    runtime, block_size = trained.runtime, trained.model.config.block_size
    found = open_questions(config.input, trained.tokenizer, block_size, config.max_items, runtime)

    def task() -> Result:
        chosen = choices(trained.model, found, runtime, config.batch_size or 16)
        right = chosen == [[question.label] for question in found]  # (N, 2)
        acc, acc_norm = right.mean(axis=0).tolist()
        result = {"acc": acc, "acc_norm": acc_norm, "questions": len(found)}
        if name == "hellaswag" and config.init_from in GPT2_HELLASWAG:
            result["published"] = dict(
                zip(("acc", "acc_norm"), GPT2_HELLASWAG[config.init_from], strict=True)
            )
        return result

    return task


def accuracy(config: EvalConfig, trained: Trained, name: str) -> Callable[[], Result]:
    """How many held-out lines are answered exactly; each is a prompt, up to the separator, and its answer."""
    separator = config.separator or trained.settings.get("loss_after") or "="
    data, _ = data_of(config, trained, block_size=1, loss_after=separator)
    problems = held_out_lines(data, config.split, config.max_items)
    check_lengths(problems, trained.model.config.block_size, separator)
    sizes = (trained.tokenizer.vocab_size, trained.runtime, config.batch_size or 256)

    def task() -> Result:
        found = answers(trained.model, problems, data.newline, *sizes)
        wrong = [answer for answer in found if answer.given != answer.right]
        right, decode = len(found) - len(wrong), trained.tokenizer.decode
        shown = [
            dict(zip(answer._fields, map(decode, answer), strict=True)) for answer in wrong[: config.show]
        ]
        return {"exact": right / len(found), "right": right, "lines": len(found), "wrong": shown}

    return task


def following(config: EvalConfig, trained: Trained, name: str) -> Callable[[], Result]:
    """The likeliest next tokens after a prompt."""
    prompt = read_prompt(config.start)
    ids = encode_prompt(trained.tokenizer, prompt)
    check_lengths([(ids, [])], trained.model.config.block_size, "")

    def task() -> Result:
        vocab_size, count = trained.tokenizer.vocab_size, max(config.show, 1)
        found = next_tokens(trained.model, ids, vocab_size, trained.runtime, count)
        rows = [{"token": trained.tokenizer.decode([i]), "id": i, "probability": p} for i, p in found]
        return {"prompt": prompt, "tokens": rows}

    return task


def table(results: dict[str, Result]) -> list[str]:
    """The results as lines: task, what, value."""
    rows: list[tuple[str, str, str]] = []
    for name, result in results.items():
        if name == "next":
            rows += [
                (name, repr(row["token"]), f"{100 * row['probability']:.2f} %") for row in result["tokens"]
            ]
        elif name == "accuracy":
            exact = f"{100 * result['exact']:.1f} % ({result['right']} of {result['lines']})"
            rows.append((name, "exact", exact))
            wrong = [
                f"{prompt}{given}, not {right}" for prompt, given, right in map(dict.values, result["wrong"])
            ]
            rows += [(name, "wrong", line) for line in wrong]
        else:
            for what, value in result.items():
                if isinstance(value, dict):
                    rows += [(name, f"{what} {key}", f"{level:.4f}") for key, level in value.items()]
                elif what != "seconds":
                    rows.append((name, what, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"))
    width = max(len(what) for _, what, _ in rows)
    return [f"{name:10} {what:{width}}  {value}" for name, what, value in rows]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    with cli_errors("lower --batch_size"):
        measure(CONFIG)
        stop_runtime()
        exit_process(0)
