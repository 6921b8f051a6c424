"""Multiple choice, such as HellaSwag: which ending of a text is the most likely?"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from distrogpt.data.meta import DATA
from distrogpt.data.preparation.documents import json_values
from distrogpt.data.preparation.sources import download
from distrogpt.data.tokenizer import Tokenizer, encode_prompt
from distrogpt.errors import UserError
from distrogpt.evaluation.batches import StopCheck, map_batches
from distrogpt.files import read_text
from distrogpt.runtime import Runtime, activity
from model import GPT

HELLASWAG = (  # arXiv 1905.07830
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)
GPT2_HELLASWAG = {  # results of this method with OpenAI's weights, published with build-nanogpt
    "gpt2": {"acc": 0.2859, "acc_norm": 0.2955},
    "gpt2-xl": {"acc": 0.3842, "acc_norm": 0.4893},
}
EXAMPLE = '{"ctx": "text", "endings": ["one", "another"], "label": 0}'


class Question(NamedTuple):
    """A context and its possible endings as token ids, and the index of the right ending."""

    context: list[int]
    endings: list[list[int]]
    label: int


@activity("reading the questions")
def load_questions(
    path: str | None, flag: str, tokenizer: Tokenizer, block_size: int, limit: int | None, runtime: Runtime
) -> list[Question]:
    """The questions of a file. For None they are HellaSwag's, which one rank downloads if they are missing.
    Raises UserError; `flag` is the command's flag for a file, for its message."""
    if path is None and runtime.is_main:
        hellaswag_file(flag=flag)
    runtime.barrier()  # the other ranks wait for the file
    file = hellaswag_file(flag=flag) if path is None else Path(path)
    return read_questions(file, tokenizer, block_size, limit)


def hellaswag_file(
    folder: Path = DATA / "hellaswag", source: tuple[str, str] = HELLASWAG, flag: str = "--input=FILE"
) -> Path:
    """HellaSwag's 10,042 validation questions, downloaded once. Raises UserError."""
    return download(*source, folder / "hellaswag_val.jsonl", flag)


def read_questions(
    path: Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions of a file, or all. Raises UserError that names the line."""
    questions = []
    for number, entry in json_values([read_text(path)], str(path)):
        if len(questions) == limit:
            break
        try:
            questions.append(parse_question(entry, tokenizer, block_size))
        except (ValueError, UserError) as error:
            reason = error if isinstance(error, UserError) else f"{str(error)[:100]}; write {EXAMPLE}"
            raise UserError(f"{path}, line {number}: {reason}") from None
    if not questions:
        raise UserError(f"{path} has no questions; give a file with one JSON object per line")
    return questions


def parse_question(entry: Any, tokenizer: Tokenizer, block_size: int) -> Question:
    """The question of a JSON object. A context that does not fit with the longest ending is cut at its
    beginning. Raises ValueError if a field is missing or wrong, UserError if the text cannot be encoded or is
    too long."""
    if not isinstance(entry, dict):
        raise ValueError("it is not a JSON object")
    context, endings, label = (entry.get(name) for name in ("ctx", "endings", "label"))
    if isinstance(label, str) and label.isdecimal():  # as in some copies of HellaSwag
        label = int(label)
    if not isinstance(context, str):
        raise ValueError("ctx is not a string")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(one, str) for one in endings):
        raise ValueError("endings is not a list of two or more strings")
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError("label is not the index of an ending")
    ids = [tokenizer.encode(f" {ending}").tolist() for ending in endings]
    longest = max(map(len, ids))
    if longest > block_size:
        hint = "leave the line out, or train with a larger block_size"
        raise UserError(f"an ending has {longest} tokens, but block_size is {block_size}; {hint}")
    room = block_size + 1 - longest  # the last id of an ending is a target only
    return Question(encode_prompt(tokenizer, context)[-room:], ids, label)


def answer_multiple_choice(
    model: GPT, questions: list[Question], runtime: Runtime, batch_size: int, stop_requested: StopCheck = None
) -> np.ndarray:
    """The index of the most likely ending of each question, by the sum and the mean of log-probs: (N, 2)."""
    lengths = [len(context) + sum(map(len, endings)) for context, endings, _ in questions]

    def answer(batch: list[int]) -> np.ndarray:
        log_probs = ending_log_probs(model, [questions[i] for i in batch], runtime)
        scores = [[(math.fsum(ending), np.mean(ending)) for ending in endings] for endings in log_probs]
        return np.array([np.argmax(pairs, axis=0) for pairs in scores])  # (B, 2)

    return map_batches(answer, lengths, 2, batch_size, runtime, stop_requested)


@torch.no_grad()
def ending_log_probs(model: GPT, questions: list[Question], runtime: Runtime) -> list[list[list[float]]]:
    """The log-probability of each token of each ending of each question. A question is one row: the context,
    then each ending without its last id. The positions of each ending follow the context, and the mask hides
    the endings from one another."""
    T = max(len(context) + sum(len(ending) - 1 for ending in endings) for context, endings, _ in questions)
    T += -T % 16  # then a question gets the same numbers in any batch: kernels/cpu.py
    idx, positions, branch = (np.zeros((len(questions), T), np.int64) for _ in range(3))
    sources, targets = [], []  # indices of the tokens that predict the targets, in all rows as one
    for row, (context, endings, _) in enumerate(questions):
        n = end = len(context)
        idx[row, :n], positions[row, :n] = context, range(n)  # in branch 0, which all others read
        for number, ending in enumerate(endings, 1):
            begin, end = end, end + len(ending) - 1
            idx[row, begin:end], positions[row, begin:end] = ending[:-1], range(n, n + end - begin)
            branch[row, begin:end] = number
            sources += [row * T + n - 1, *range(row * T + begin, row * T + end)]
            targets += ending
        branch[row, end:] = -1  # padding
    arrays = (idx, positions, branch, np.array(sources), np.array(targets))
    idx, positions, branch, sources, targets = map(runtime.to_device, arrays)
    reads = ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])).tril()  # (B, T, T)
    mask = torch.zeros(reads.shape, dtype=runtime.dtype, device=runtime.device)
    mask = mask.masked_fill(~reads, -math.inf)[:, None]  # (B, 1, T, T)
    with runtime.autocast():
        x = model.hidden_states(idx, positions, mask).flatten(0, 1)[sources]  # (N, C)
        chunks = zip(x.split(256), targets.split(256), strict=True)  # all logits at once would take gigabytes
        losses = [F.cross_entropy(model.logits(x).float(), y, reduction="none") for x, y in chunks]
    log_probs = iter(torch.cat(losses).neg().tolist())
    return [[[next(log_probs) for _ in ending] for ending in question.endings] for question in questions]
