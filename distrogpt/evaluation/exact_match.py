"""Exact match: which held-out lines does the model complete without a mistake?"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError
from distrogpt.evaluation.loss import never
from distrogpt.evaluation.multiple_choice import batches_of_rank
from distrogpt.inference.decoder import SamplingParams, stream
from distrogpt.runtime import Runtime
from model import GPT


class Problem(NamedTuple):
    """A line as token ids: a prompt, which ends with the separator, and the answer, without the newline."""

    prompt: list[int]
    right: list[int]


class Answer(NamedTuple):
    """The token ids of a prompt, of the model's answer, and of the right one, without the newline."""

    prompt: list[int]
    given: list[int]
    right: list[int]


def load_problems(
    data: Dataset, block_size: int, split: str = "val", limit: int | None = None
) -> list[Problem]:
    """The first `limit` lines of a split that have the separator (None: all). Raises UserError if there are
    none or a prompt does not fit into block_size."""
    problems = list(islice(iter_problems(data, split), limit))
    if not problems:
        raise UserError(f"no line of {split} has the separator; choose another separator, or another dataset")
    check_prompt_length(max(len(problem.prompt) for problem in problems), block_size)
    return problems


def iter_problems(data: Dataset, split: str) -> Iterator[Problem]:
    """The lines of a split that have the separator; an incomplete line at the end is left out."""
    for part in data.parts:
        rest = np.empty(0, np.int64)  # the beginning of a line that continues in the next chunk
        for _, ids in part.streams[split].chunks():
            ids = np.concatenate([rest, ids])
            *lines, rest = np.split(ids, np.flatnonzero(ids == data.newline) + 1)
            for line in lines:
                separators = np.flatnonzero(line == data.separator)
                if len(separators):
                    n = separators[0] + 1
                    yield Problem(line[:n].tolist(), line[n:-1].tolist())


def check_prompt_length(length: int, block_size: int) -> None:
    """Raises UserError if a prompt is longer than block_size."""
    if length > block_size:
        raise UserError(
            f"a prompt has {length} tokens, the model reads {block_size}; shorten it, or train with a larger "
            "block_size"
        )


def answer_problems(
    model: GPT,
    data: Dataset,
    problems: list[Problem],
    runtime: Runtime,
    batch_size: int,
    stop_requested: Callable[[], bool] = never,
) -> list[Answer] | None:
    """The greedy continuation of each prompt up to a newline; the ranks share the prompts.

    Returns None if stop_requested, which has to return the same on all ranks.
    """
    max_new_tokens = max(len(problem.right) for problem in problems) + 1  # the newline
    given = np.zeros((len(problems), max_new_tokens))  # ids + 1, and 0 after their end
    for batch, is_ours in batches_of_rank([len(prompt) for prompt, _ in problems], batch_size, runtime):
        if stop_requested():
            return None
        rows = greedy_lines(model, data, [problems[i].prompt for i in batch], max_new_tokens, runtime)
        if is_ours:
            given[batch, : rows.shape[1]] = rows + 1
    given = runtime.sum_over_ranks(given).astype(int)
    return [
        Answer(prompt, (row[row > 0] - 1).tolist(), right)
        for (prompt, right), row in zip(problems, given, strict=True)
    ]


@torch.no_grad()
def greedy_lines(
    model: GPT, data: Dataset, prompts: list[list[int]], max_new_tokens: int, runtime: Runtime
) -> np.ndarray:
    """Greedy continuations of prompts, at most max_new_tokens long: ids (B, T), -1 from the newline on."""
    lengths = [len(prompt) for prompt in prompts]
    padded = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    idx, columns = runtime.to_device(padded), []
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool, device=idx.device)
    settings = {"vocab_size": data.meta["vocab_size"], "lengths": lengths, "graph": False}
    with runtime.autocast():
        for step in stream(model, idx, max_new_tokens, SamplingParams(0.0), **settings):
            finished |= step.ids == data.newline  # (B, 1)
            columns.append(step.ids.masked_fill(finished, -1))
            if finished.all():
                break
    return torch.cat(columns, dim=1).cpu().numpy()
