"""How fast multiple choice is answered, batched against one question at a time: bench.py --questions=True"""

import random
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from distrogpt.benchmark.timing import ratio, spread, synchronize
from distrogpt.data.meta import GPT2_META
from distrogpt.evaluation.questions import Question
from distrogpt.evaluation.tasks import choices
from distrogpt.kernels.cpu import to_device
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.startup import new_model_config
from model import GPT

COUNT = 48  # questions of a round
BATCHES = (1, 4, 16, COUNT)


def made_up(count: int, block_size: int) -> list[Question]:
    """Questions of random ids, about as long as HellaSwag's in GPT-2's tokens, or as fits: neighbours by
    length out of many, as those of a batch are."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        n = min(rng.randint(low, high), max(1, block_size // 2))
        return [rng.randrange(GPT2_META["vocab_size"]) for _ in range(n)]

    many = [Question(ids(20, 90), [ids(8, 40) for _ in range(4)], 0) for _ in range(100 * count)]
    many.sort(key=lambda question: len(question.context) + sum(map(len, question.endings)))
    third = count // 3
    return [question for part in (20, 50, 80) for question in many[part * count :][:third]]


def one_by_one(model: GPT, questions: list[Question], runtime: Runtime) -> list[list[int]]:
    """What `choices` finds, in the plain way: the endings of a question, each behind its context, are four
    padded rows of a batch, and all logits are computed."""
    chosen = []
    for context, endings, _ in questions:
        rows = torch.zeros(len(endings), len(context) + max(map(len, endings)), dtype=torch.long)
        counted = torch.zeros_like(rows, dtype=torch.bool)
        for number, ending in enumerate(endings):
            end = len(context) + len(ending)
            rows[number, :end] = torch.tensor(context + ending)
            counted[number, len(context) : end] = True
        rows, counted = rows.to(runtime.device), counted.to(runtime.device)[:, 1:]
        with torch.no_grad(), runtime.autocast():
            logits, _ = model(rows[:, :-1], rows[:, 1:].contiguous())
            losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        sums = (losses.view(counted.shape) * counted).sum(dim=1)
        chosen.append([int(sums.argmin()), int((sums / counted.sum(dim=1)).argmin())])
    return chosen


def bench_questions(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Both, in turns, on the network of the settings with random weights."""
    torch.manual_seed(config.seed)
    shape = replace(new_model_config(config, GPT2_META), zero_init=False)  # which would have no choice
    model = to_device(GPT(shape), runtime.device).eval()
    questions = made_up(COUNT, config.block_size)
    ways = {f"batches of {size}": lambda m, q, r, size=size: choices(m, q, r, size) for size in BATCHES}
    ways = {"one by one": one_by_one, **ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for number in range(config.rounds + 1):
        for name, way in ways.items():
            synchronize(runtime)
            begin = time.perf_counter()
            found[name] = way(model, questions, runtime)
            synchronize(runtime)
            if number:  # the first is a warm-up
                times[name].append(time.perf_counter() - begin)
    result: dict[str, Any] = {}
    for name, seconds in times.items():
        rate, gain = spread([COUNT / s for s in seconds]), ratio(times["one by one"], seconds)
        same = sum(list(a) == list(b) for a, b in zip(found[name], found["one by one"], strict=True))
        result[name] = {"questions_per_second": rate, "gain": gain, "same": same / COUNT}
        print(
            f"{name:14} {rate['median']:8.2f} questions/s, {gain['median']:.2f} times ({gain['low']:.2f} to "
            f"{gain['high']:.2f}), the same choices in {same} of {COUNT}"
        )
    return result
