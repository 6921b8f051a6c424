"""How many held-out lines a trained GPT answers exactly: python eval.py --out_dir=out-addition

Each line of the val split is a prompt, up to the separator, and its answer, up to the newline. The model goes
on from the prompt with the likeliest token, again and again, until it writes a newline.
"""

from configurator import configure
from settings import EvalConfig

if __name__ == "__main__":
    CONFIG = configure(EvalConfig)  # before torch is loaded, so that --help and mistakes answer at once

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from data.dataset import Dataset, open_dataset
from decoding import Choice, stream
from errors import UserError, one_line_errors
from sample import Sampler, warn
from settings import TrainConfig


class Answer(NamedTuple):
    """A prompt, what the model made of it, and what is right: ids, without the newline."""

    prompt: list[int]
    given: list[int]
    right: list[int]


def held_out_lines(data: Dataset, max_lines: int | None = None) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each line of val that has the separator, in ids; the separator ends the prompt."""
    problems = []
    for part in data.parts:
        ids = np.concatenate([ids for _, ids in part.streams["val"].chunks()])
        ends = np.flatnonzero(ids == data.newline)
        for line in np.split(ids, ends + 1)[: len(ends)]:  # what follows the last newline is no line
            at = np.flatnonzero(line == data.separator)
            if len(at):
                problems.append((line[: at[0] + 1].tolist(), line[at[0] + 1 : -1].tolist()))
    return problems[:max_lines]


def answers(
    sampler: Sampler, problems: list[tuple[list[int], list[int]]], newline: int, batch_size: int
) -> Iterator[Answer]:
    """What the model answers, greedily, up to a newline; prompts of one length together."""
    for length in sorted({len(prompt) for prompt, _ in problems}):
        same = [problem for problem in problems if len(problem[0]) == length]
        for begin in range(0, len(same), batch_size):
            some = same[begin : begin + batch_size]
            idx = torch.tensor([prompt for prompt, _ in some], device=sampler.runtime.device)  # (N, T)
            most = max(len(right) for _, right in some) + 1
            columns, ended = [], torch.zeros(len(some), 1, dtype=torch.bool, device=idx.device)
            for column, _ in stream(sampler.model, idx, most, Choice(0.0), sampler.tokenizer.vocab_size):
                columns.append(column)  # (N, 1)
                ended |= column == newline
                if ended.all():
                    break
            rows = torch.cat(columns, dim=1).tolist()
            for (prompt, right), row in zip(some, rows, strict=True):
                end = row.index(newline) if newline in row else None  # None: longer than any right answer
                yield Answer(prompt, row[:end], right)


def evaluate_lines(config: EvalConfig) -> list[Answer]:
    """Ask the checkpoint each held-out line; print how many answers are exact, and some that are not.

    Raises UserError.
    """
    sampler = Sampler(config.out_dir, device=config.device, dtype=config.dtype)
    block_size, decode = sampler.model.config.block_size, sampler.tokenizer.decode
    warn(f"{sampler.source} ({sampler.runtime.describe()})")
    dataset = config.dataset or sampler.config.get("dataset")
    if not dataset:
        raise UserError(f"{sampler.source} names no dataset; give --dataset=NAME")
    separator = config.separator or sampler.config.get("loss_after") or "="
    asked = TrainConfig(dataset=dataset, loss_after=separator, block_size=1)
    data = open_dataset(asked, ("val",))
    if sampler.tokenizer.describe() != data.meta["tokenizer"]:
        raise UserError(
            f"{config.out_dir} was trained with another tokenizer than {dataset} has; use its own"
        )
    problems = held_out_lines(data, config.max_lines)
    if not problems:
        raise UserError(f"no line of {dataset}'s val split has {separator!r}; give another --separator")
    longest = max(len(prompt) for prompt, _ in problems)
    if longest > block_size:
        raise UserError(
            f"a prompt has {longest} tokens, the model reads {block_size}; train it with a larger block_size"
        )
    found = list(answers(sampler, problems, data.newline, config.batch_size))
    wrong = [answer for answer in found if answer.given != answer.right]
    exact = len(found) - len(wrong)
    print(f"exact {100 * exact / len(found):.1f} % ({exact} of {len(found)})")
    for prompt, given, right in wrong[: config.show]:
        print(f"wrong {decode(prompt)}{decode(given)}, not {decode(right)}")
    return found


if __name__ == "__main__":
    with one_line_errors("lower --batch_size"):
        evaluate_lines(CONFIG)
