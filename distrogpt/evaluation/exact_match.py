"""Exact match: which held-out lines does the model complete without a mistake?"""

from typing import NamedTuple

import numpy as np
import torch

from distrogpt.data.dataset import Dataset
from distrogpt.errors import UserError
from distrogpt.evaluation.batches import StopCheck, map_batches
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.runtime import Runtime
from model import GPT


class Problem(NamedTuple):
    """A line as token ids: a prompt, which ends with the separator, and the answer, without the newline."""

    prompt: list[int]
    answer: list[int]


def load_problems(
    data: Dataset, block_size: int, split: str = "val", limit: int | None = None
) -> list[Problem]:
    """The first `limit` lines of a split that have the separator, or all. Raises UserError if there are none
    or a prompt does not fit into block_size."""
    problems: list[Problem] = []
    for part in data.parts:
        tokens = part.streams[split]
        ids = tokens.windows(np.array([0]), len(tokens))[0]  # all of the split
        *lines, _ = np.split(ids, np.flatnonzero(ids == data.newline) + 1)  # without an incomplete last line
        for line in lines:
            ends = np.flatnonzero(line == data.separator) + 1
            if len(ends) and len(problems) != limit:
                problems.append(Problem(line[: ends[0]].tolist(), line[ends[0] : -1].tolist()))
    if not problems:
        raise UserError(f"no line of {split} has the separator; choose another separator, or another dataset")
    check_prompt_length(max((problem.prompt for problem in problems), key=len), block_size)
    return problems


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
    stop_requested: StopCheck = lambda: False,
) -> list[list[int]]:
    """The greedy continuation of each prompt up to a newline, as token ids. The ranks share the prompts, as
    in map_batches."""
    lengths = [len(problem.prompt) for problem in problems]
    longest = max(len(problem.answer) for problem in problems) + 1  # with the newline

    def answer(batch: list[int]) -> np.ndarray:
        return greedy_lines(model, data, [problems[i].prompt for i in batch], longest, runtime)

    rows = map_batches(answer, lengths, longest, batch_size, runtime, stop_requested)
    return [(row[row > 0] - 1).tolist() for row in rows]


@torch.no_grad()
def greedy_lines(
    model: GPT, data: Dataset, prompts: list[list[int]], max_new_tokens: int, runtime: Runtime
) -> np.ndarray:
    """Greedy continuations of prompts: (B, max_new_tokens), ids + 1, and 0 from the newline on."""
    lines = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long, device=runtime.device)
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool, device=runtime.device)
    prompt_ids, vocab_size = [torch.tensor(prompt) for prompt in prompts], data.meta["vocab_size"]
    uniforms = torch.zeros(lines.shape)  # not used by greedy decoding
    with runtime.autocast():
        steps = stream(model, prompt_ids, SamplingParams(0.0), uniforms, vocab_size, graph=False)
        for n, step in enumerate(steps):
            finished |= step.ids == data.newline  # (B, 1)
            lines[:, n : n + 1] = (step.ids + 1).masked_fill(finished, 0)
            if finished.all():
                break
    return lines.cpu().numpy()
