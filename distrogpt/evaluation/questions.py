"""Multiple choice from JSON lines as in HellaSwag: {"ctx": text, "endings": [text, ...], "label": 0}."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from distrogpt.data.meta import DATA
from distrogpt.data.preparation.sources import download
from distrogpt.data.tokenizer import Tokenizer, encode_prompt
from distrogpt.errors import UserError

HELLASWAG = (  # arXiv 1905.07830
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)
# acc, acc_norm of OpenAI's weights on it by this method, as published with build-nanogpt
GPT2_HELLASWAG = {"gpt2": (0.2859, 0.2955), "gpt2-xl": (0.3842, 0.4893)}


class Question(NamedTuple):
    """A text and its possible endings in ids, and which of them is right."""

    context: list[int]
    endings: list[list[int]]
    label: int


def hellaswag_file(given: str | None = None, fetch: bool = True) -> Path:
    """The file, or HellaSwag's 10,042 questions, downloaded once into data/hellaswag. Raises UserError."""
    path = DATA / "hellaswag" / "hellaswag_val.jsonl" if given is None else Path(given)
    return download(*HELLASWAG, path) if given is None and fetch else path


def read_questions(
    path: Path, tokenizer: Tokenizer, block_size: int, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions of a file, all if None, in ids: endings with a space before them.

    Of a context that does not fit into block_size together with each ending, the end is kept. Raises
    UserError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); name a file of JSON lines") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if len(questions) == limit:
            break
        if not line.strip():
            continue
        try:
            context, endings, label = fields(json.loads(line))
            ids = [encode_prompt(tokenizer, context)]
            ids += [tokenizer.encode(f" {ending}").tolist() for ending in endings]
        except (ValueError, RecursionError) as error:  # deeply nested brackets
            raise UserError(
                f'{path}, line {number}: {str(error)[:100]}; give {{"ctx": "text", "endings": ["one", '
                '"another"], "label": 0}'
            ) from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        room = block_size + 1 - max(map(len, ids[1:]))  # the last id is read by none
        if room < 1:
            raise UserError(
                f"{path}, line {number}: an ending has {block_size + 1 - room} tokens, the model reads "
                f"{block_size}; leave the line out, or train with a larger block_size"
            )
        questions.append(Question(ids[0][-room:], ids[1:], label))
    if not questions:
        raise UserError(f"{path} has no question; name a file of JSON lines")
    return questions


def fields(entry: Any) -> tuple[str, list[str], int]:
    """Context, endings and label of a line. Raises ValueError where they are not what they should be."""
    if not isinstance(entry, dict):
        raise ValueError("it is no object")
    context, endings, label = (entry.get(name) for name in ("ctx", "endings", "label"))
    if isinstance(label, str) and label.isdecimal():  # as in some copies of it
        label = int(label)
    if not isinstance(context, str):
        raise ValueError("ctx is no text")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(one, str) for one in endings):
        raise ValueError("endings is no list of two texts or more")
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError("label is not the number of an ending, from 0 on")
    return context, endings, label
