"""How fast multiple choice is answered, batched against one question at a time: bench.py --questions=True"""

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from distrogpt.benchmark.timing import quartiles, ratio, seconds_of, spread
from distrogpt.data.meta import GPT2_META
from distrogpt.evaluation.multiple_choice import Question, answer_multiple_choice
from distrogpt.kernels.cpu import to_device
from distrogpt.runtime import Runtime
from distrogpt.settings import BenchConfig
from distrogpt.training.startup import new_model_config
from model import GPT

COUNT = 48  # questions of a round
BATCHES = (1, 4, 16, COUNT)


def random_questions(count: int, block_size: int) -> list[Question]:
    """Questions of random ids, about as long as HellaSwag's in GPT-2's tokens, or as fits; like the questions
    of a batch, they are neighbours by length among many."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        n = min(rng.randint(low, high), max(1, block_size // 2))
        return [rng.randrange(GPT2_META["vocab_size"]) for _ in range(n)]

    many = [Question(ids(20, 90), [ids(8, 40) for _ in range(4)], 0) for _ in range(100 * count)]
    many.sort(key=lambda question: len(question.context) + sum(map(len, question.endings)))
    return [question for percent in (20, 50, 80) for question in many[percent * count :][: count // 3]]


@torch.no_grad()
def one_by_one(model: GPT, questions: list[Question], runtime: Runtime) -> list[list[int]]:
    """The choices of `answer_multiple_choice` in the plain way: the endings of a question, each after its
    context, are four padded rows of a batch, and all logits are computed."""
    chosen = []
    for context, endings, _ in questions:
        rows = torch.zeros(len(endings), len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for row, ending in enumerate(endings):
            end = len(context) + len(ending)
            rows[row, :end] = torch.tensor(context + ending)
            mask[row, len(context) : end] = True
        rows, mask = rows.to(runtime.device), mask.to(runtime.device)[:, 1:]
        with runtime.autocast():
            logits, _ = model(rows[:, :-1], rows[:, 1:].contiguous())
            losses = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
        sums = (losses.view(mask.shape) * mask).sum(dim=1)
        chosen.append([int(sums.argmin()), int((sums / mask.sum(dim=1)).argmin())])
    return chosen


def bench_questions(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Both ways, in turns, on the network of the settings with random weights."""
    torch.manual_seed(config.seed)
    shape = replace(new_model_config(config, GPT2_META), zero_init=False)  # all its endings would be equal
    model = to_device(GPT(shape), runtime.device).eval()
    questions, chosen = random_questions(COUNT, config.block_size), {}
    ways = {"one by one": one_by_one}
    ways |= {f"batches of {size}": partial(answer_multiple_choice, batch_size=size) for size in BATCHES}
    times: dict[str, list[float]] = {name: [] for name in ways}

    def answer(name: str) -> None:
        chosen[name] = ways[name](model, questions, runtime)

    for _ in range(config.rounds + 1):
        for name in ways:
            times[name].append(seconds_of(answer, name, runtime=runtime))
    result: dict[str, Any] = {}
    for name, (_, *seconds) in times.items():  # the first is a warm-up
        rate, gain = spread([COUNT / s for s in seconds]), ratio(times["one by one"][1:], seconds)
        same = sum(list(a) == list(b) for a, b in zip(chosen[name], chosen["one by one"], strict=True))
        result[name] = {"questions_per_second": rate, "gain": gain, "same": same / COUNT}
        print(
            f"{name:14} {rate['median']:8.2f} questions/s, {gain['median']:.2f} times {quartiles(gain)}, "
            f"the same choices in {same} of {COUNT}"
        )
    return result
