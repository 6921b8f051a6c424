"""What a network is asked to do: choose the right ending of a text, finish lines, tell the next token.

Both eval.py and training ask it; under torchrun the ranks share the questions. All of them ask whether to
stop equally often, and stop_asked tells all of them the same.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from distrogpt.data.dataset import Dataset
from distrogpt.data.tokenizer import Tokenizer
from distrogpt.errors import UserError
from distrogpt.evaluation.questions import Question, hellaswag_file, read_questions
from distrogpt.inference.decoder import stream
from distrogpt.inference.sampling import SamplingParams
from distrogpt.runtime import Runtime
from model import GPT


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
    bias = torch.zeros(reads.shape, dtype=runtime.dtype).masked_fill_(torch.from_numpy(~reads), -math.inf)
    mask = bias[:, None].to(runtime.device)  # (B, 1, T, T)
    idx, places, targets, positions = map(runtime.to_device, (idx, places, targets, positions))
    with torch.no_grad(), runtime.autocast():
        scores = iter(
            log_likelihood(model, model.hidden_states(idx, positions, mask), places, targets).tolist()
        )
    return [[[next(scores) for _ in ending] for ending in question.endings] for question in questions]


def log_likelihood(model: GPT, x: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N,) of the ids `targets` (N,) to follow the positions `places` (N,) of the hidden states
    x (B, T, C), all rows of which are taken as one."""
    rows = x.flatten(0, 1)[places]  # (N, C)
    parts = zip(rows.split(256), targets.split(256), strict=True)  # all logits at once would take gigabytes
    return torch.cat([-F.cross_entropy(model.logits(x).float(), y, reduction="none") for x, y in parts])


def choices(
    model: GPT,
    questions: list[Question],
    runtime: Runtime,
    batch_size: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Which ending of each question is likeliest, by the sum and by the mean over its tokens: (N, 2). None
    where stop_asked.

    The ranks share the questions; all of them call the network equally often.
    """
    lengths = [len(context) + sum(map(len, endings)) for context, endings, _ in questions]
    chosen = np.zeros((len(questions), 2))
    for batch, ours in batches_of_rank(lengths, batch_size, runtime):
        if stop_asked():
            return None
        scores = ending_scores(model, [questions[i] for i in batch], runtime)
        for i, endings in zip(batch if ours else (), scores, strict=False):
            sums, means = ([f(tokens) for tokens in endings] for f in (math.fsum, np.mean))
            chosen[i] = int(np.argmax(sums)), int(np.argmax(means))
    return runtime.sum_over_ranks(chosen).astype(int)


def batches_of_rank(
    lengths: list[int], batch_size: int, runtime: Runtime
) -> Iterator[tuple[list[int], bool]]:
    """Numbers of things of near lengths, batch_size at a time, and whether they are this rank's to count: it
    gets as many batches as all others, and so some that are not."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # what takes most memory comes first
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    for begin in range(0, len(batches), runtime.world_size):
        number = begin + runtime.rank
        yield batches[number % len(batches)], number < len(batches)


class Answer(NamedTuple):
    """A prompt, what the model made of it, and what is right: ids, without the newline."""

    prompt: list[int]
    given: list[int]
    right: list[int]


def held_out_lines(
    data: Dataset, split: str = "val", limit: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each line that has the separator, in ids; the separator ends the prompt."""
    problems = []
    for part in data.parts:
        rest = np.empty(0, np.int64)  # what follows the last newline so far; at the end, no line
        for _, ids in part.streams[split].chunks():
            ids = np.concatenate([rest, ids])
            *lines, rest = np.split(ids, np.flatnonzero(ids == data.newline) + 1)
            for line in lines:
                if len(problems) == limit:
                    return problems
                at = np.flatnonzero(line == data.separator)
                if len(at):
                    problems.append((line[: at[0] + 1].tolist(), line[at[0] + 1 : -1].tolist()))
    return problems


def open_questions(
    given: str | None, tokenizer: Tokenizer, block_size: int, limit: int | None, runtime: Runtime
) -> list[Question]:
    """Those of a file, by default HellaSwag's, which one rank downloads where it is missing. UserError."""
    path = hellaswag_file(given, runtime.is_main)
    runtime.barrier()  # the others wait for it
    return read_questions(path, tokenizer, block_size, limit)


def check_lengths(problems: list[tuple[list[int], list[int]]], block_size: int, separator: str) -> None:
    """Raises UserError where there is nothing to ask, or a prompt is longer than the model reads."""
    if not problems:
        raise UserError(f"no line to ask has {separator!r}; choose another separator, or another dataset")
    longest = max(len(prompt) for prompt, _ in problems)
    if longest > block_size:
        raise UserError(
            f"a prompt has {longest} tokens, the model reads {block_size}; shorten it, or train with a "
            "larger block_size"
        )


def answers(
    model: GPT,
    problems: list[tuple[list[int], list[int]]],
    newline: int,
    vocab_size: int,
    runtime: Runtime,
    batch_size: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> list[Answer] | None:
    """What the model makes of each prompt up to a newline, always by the likeliest token. None where
    stop_asked. The ranks share the prompts, as in `choices`."""
    most = max(len(right) for _, right in problems) + 1
    given = np.zeros((len(problems), most))  # ids + 1, and 0 behind their end
    for batch, ours in batches_of_rank([len(prompt) for prompt, _ in problems], batch_size, runtime):
        if stop_asked():
            return None
        prompts, columns = [torch.tensor(problems[i][0]) for i in batch], []
        ended = torch.zeros(len(batch), 1, dtype=torch.bool, device=runtime.device)
        uniforms = torch.zeros(len(batch), most)
        with torch.no_grad(), runtime.autocast():
            for ids, _ in stream(model, prompts, SamplingParams(0.0), uniforms, vocab_size, graph=False):
                columns.append(ids)  # (B, 1)
                ended |= ids == newline
                if ended.all():
                    break
        rows = torch.cat(columns, dim=1).cpu().numpy() + 1
        rows[np.cumsum(rows == newline + 1, axis=1) > 0] = 0
        if ours:
            given[batch, : rows.shape[1]] = rows
    given = runtime.sum_over_ranks(given).astype(int)
    return [
        Answer(prompt, (row[row > 0] - 1).tolist(), right)
        for (prompt, right), row in zip(problems, given, strict=True)
    ]
