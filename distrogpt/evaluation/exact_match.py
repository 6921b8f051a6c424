"""Exact match: the fraction of held-out lines that the model completes without a mistake."""

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
    """The first `limit` lines of a split that contain the separator, or all. Raises UserError if there are
    none or a prompt does not fit into block_size."""
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
        raise UserError(f"no line of {split} contains the separator; choose another separator or dataset")
    check_prompt_length(max((problem.prompt for problem in problems), key=len), block_size)
    return problems


def check_prompt_length(prompt: list[int], block_size: int) -> None:
    """Raises UserError if a prompt is longer than block_size."""
    if len(prompt) > block_size:
        hint = "shorten it, or train with a larger block_size"
        raise UserError(f"a prompt has {len(prompt)} tokens, but block_size is {block_size}; {hint}")


@torch.no_grad()
def answer_problems(
    model: GPT,
    data: Dataset,
    problems: list[Problem],
    runtime: Runtime,
    batch_size: int,
    stop_requested: StopCheck = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt up to a newline, as token ids. The prompts are distributed over
    the ranks."""
    lengths = [len(problem.prompt) for problem in problems]
    longest = max(len(problem.answer) for problem in problems) + 1  # with the newline

    def answer(batch: list[int]) -> np.ndarray:
        """Continuations (B, longest) as ids + 1, and 0 from the newline on."""
        prompts = [torch.tensor(problems[i].prompt) for i in batch]
        lines = torch.zeros(len(batch), longest, dtype=torch.long, device=runtime.device)
        finished = torch.zeros(len(batch), 1, dtype=torch.bool, device=runtime.device)
        uniforms, vocab_size = torch.zeros(lines.shape), data.meta["vocab_size"]  # greedy decoding uses none
        with runtime.autocast():
            steps = stream(model, prompts, SamplingParams(0.0), uniforms, vocab_size, graph=False)
            for n, step in enumerate(steps):
                finished |= step.ids == data.newline  # (B, 1)
                lines[:, n : n + 1] = (step.ids + 1).masked_fill(finished, 0)
                if finished.all():
                    break
        return lines.cpu().numpy()

    rows = map_batches(answer, lengths, longest, batch_size, runtime, stop_requested)
    return [(row[row > 0] - 1).tolist() for row in rows]
