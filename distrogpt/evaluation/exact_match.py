"""Exact match: which held-out lines does the model complete without a mistake?"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError
from distrogpt.evaluation.batches import map_batches, never
from distrogpt.inference.decoder import SamplingParams, stream
from distrogpt.runtime import Runtime
from model import GPT


class Problem(NamedTuple):
    """A line as token ids: a prompt, which ends with the separator, and the answer, without the newline."""

    prompt: list[int]
    answer: list[int]


def load_problems(
    data: Dataset, block_size: int, split: str = "val", limit: int | None = None
) -> list[Problem]:
    """The first `limit` lines of a split that have the separator (None: all). Raises UserError if there are
    none or a prompt does not fit into block_size."""
    problems = list(islice(iter_problems(data, split), limit))
    if not problems:
        raise UserError(f"no line of {split} has the separator; choose another separator, or another dataset")
    check_prompt_length(max((problem.prompt for problem in problems), key=len), block_size)
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


def check_prompt_length(prompt: list[int], block_size: int) -> None:
    """Raises UserError if a prompt is longer than block_size."""
    if len(prompt) > block_size:
        raise UserError(
            f"a prompt has {len(prompt)} tokens, the model reads {block_size}; shorten it, or train with a "
            "larger block_size"
        )


def answer_problems(
    model: GPT,
    data: Dataset,
    problems: list[Problem],
    runtime: Runtime,
    batch_size: int,
    stop_requested: Callable[[], bool] = never,
) -> list[list[int]] | None:
    """The greedy continuation of each prompt up to a newline, as token ids. The ranks share the prompts; None
    and stop_requested are those of map_batches."""
    lengths = [len(problem.prompt) for problem in problems]
    longest = max(len(problem.answer) for problem in problems) + 1  # with the newline

    def answer(batch: list[int]) -> np.ndarray:
        return greedy_lines(model, data, [problems[i].prompt for i in batch], longest, runtime)

    rows = map_batches(answer, lengths, longest, batch_size, runtime, stop_requested)
    return None if rows is None else [(row[row > 0] - 1).tolist() for row in rows]


@torch.no_grad()
def greedy_lines(
    model: GPT, data: Dataset, prompts: list[list[int]], max_new_tokens: int, runtime: Runtime
) -> np.ndarray:
    """Greedy continuations of prompts: (B, max_new_tokens), ids + 1, and 0 from the newline on."""
    lengths = [len(prompt) for prompt in prompts]
    idx = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        idx[row, : len(prompt)] = torch.tensor(prompt)
    idx = idx.to(runtime.device)
    lines = idx.new_zeros(len(prompts), max_new_tokens)
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool, device=idx.device)
    settings = {"vocab_size": data.meta["vocab_size"], "lengths": lengths, "graph": False}
    with runtime.autocast():
        for n, step in enumerate(stream(model, idx, max_new_tokens, SamplingParams(0.0), **settings)):
            finished |= step.ids == data.newline  # (B, 1)
            lines[:, n : n + 1] = (step.ids + 1).masked_fill(finished, 0)
            if finished.all():
                break
    return lines.cpu().numpy()
