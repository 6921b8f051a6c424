"""What a network is asked to do: choose the right ending of a text, finish lines, tell the next token.

Both eval.py and training ask it; under torchrun the ranks share the questions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from attention import Branches
from data.dataset import Dataset
from data.questions import Question
from decoding import Choice, stream
from model import GPT
from runtime import Runtime


class Answer(NamedTuple):
    """A prompt, what the model made of it, and what is right: ids, without the newline."""

    prompt: list[int]
    given: list[int]
    right: list[int]


class Row(NamedTuple):
    """A question as one sequence: the context, then each ending but its last id, which nobody reads."""

    ids: list[int]
    positions: list[int]  # each ending goes on from the context
    branch: list[int]  # 0 of the context, n of ending n, from 1 on
    places: list[int]  # of `ids`, from which the ids of the endings are told
    targets: list[int]  # these


def as_row(question: Question) -> Row:
    """The question, so that its context is read once for all endings."""
    context = question.context
    row = Row([*context], [*range(len(context))], [0] * len(context), [], [])
    for number, ending in enumerate(question.endings, 1):
        row.places.extend([len(context) - 1, *range(len(row.ids), len(row.ids) + len(ending) - 1)])
        row.targets.extend(ending)
        row.ids.extend(ending[:-1])
        row.positions.extend(range(len(context), len(context) + len(ending) - 1))
        row.branch.extend([number] * (len(ending) - 1))
    return row


def ending_scores(model: GPT, questions: list[Question], runtime: Runtime) -> list[list[list[float]]]:
    """The logarithm of the chance of each token of each ending of each question, all read at once."""
    rows = [as_row(question) for question in questions]
    T = max(len(row.ids) for row in rows)
    T += -T % 16  # the same numbers as in another batch: attention.py
    idx, positions, branch = (np.zeros((len(rows), T), np.int64) for _ in range(3))
    for number, row in enumerate(rows):
        n = len(row.ids)
        idx[number, :n], positions[number, :n], branch[number, :n] = row.ids, row.positions, row.branch
        branch[number, n:] = -1
    reads = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])  # (B, T, T)
    reads &= np.tri(T, dtype=bool)
    places = np.concatenate([np.array(row.places) + number * T for number, row in enumerate(rows)])
    targets = np.concatenate([row.targets for row in rows])
    branches = Branches(runtime.to_device(reads))
    idx, places, targets, positions = map(runtime.to_device, (idx, places, targets, positions))
    with torch.no_grad(), runtime.autocast():
        scores = iter(model.log_likelihood(idx, places, targets, branches, positions).tolist())
    return [[[next(scores) for _ in ending] for ending in question.endings] for question in questions]


def choices(
    model: GPT,
    questions: list[Question],
    runtime: Runtime,
    batch_size: int,
    stop_asked: Callable[[], bool] = lambda: False,
    advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray | None:
    """Which ending of each question is likeliest, by the sum and by the mean over its tokens: (N, 2). None
    where stop_asked, on any rank.

    The ranks share the questions, and make equally many calls of the model. `advance` hears how many are done.
    """
    order = sorted(range(len(questions)), key=lambda i: sum(map(len, questions[i].endings), len(questions[i][0])))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    chosen = np.zeros((len(questions), 2))
    for turn in range(math.ceil(len(batches) / runtime.world_size)):
        if runtime.total(stop_asked())[0]:
            return None
        number = turn * runtime.world_size + runtime.rank
        batch = batches[number % len(batches)]
        scores = ending_scores(model, [questions[i] for i in batch], runtime)
        for i, endings in zip(batch, scores, strict=True):
            by_sum = max(range(len(endings)), key=lambda n: sum(endings[n]))
            by_mean = max(range(len(endings)), key=lambda n: sum(endings[n]) / len(endings[n]))
            if number < len(batches):
                chosen[i] = by_sum, by_mean
        advance(sum(map(len, batches[turn * runtime.world_size :][: runtime.world_size])))
    return runtime.sum_over_ranks(chosen).astype(int)
