"""Sample from a trained GPT: python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"

From Python: `Sampler("out-shakespeare-char")`, then its `generate` and `stream` as often as needed.
"""

import sys

from configurator import configure
from settings import SampleConfig

if __name__ == "__main__":
    CONFIG = configure(SampleConfig)  # before torch is loaded, so that --help and mistakes answer at once

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoint import best_checkpoint, load_checkpoint, load_pretrained, restore_model
from data.dataset import read_dataset_meta
from data.meta import GPT2_META
from data.tokenizer import Tokenizer, from_description, start_of_text
from decoding import Choice, prepare, stream, uniform_draws
from errors import UserError, one_line_errors
from runtime import compile_works, start_runtime

SEPARATOR = "---------------"


class Sampler:
    """A model and its tokenizer, loaded once. Raises UserError where they cannot be."""

    def __init__(
        self,
        out_dir: str = "out",
        init_from: str = "resume",
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
        int8: bool = False,
    ) -> None:
        self.runtime = start_runtime(device, dtype)
        if init_from == "resume":
            path = best_checkpoint(Path(out_dir))
            contents = load_checkpoint(path)
            model = restore_model(contents, path)
            loss = contents.get("val_loss", contents.get("best_val_loss", math.nan))
            split = "train" if contents.get("config", {}).get("eval_splits") == "train" else "val"
            self.source = f"{path}, step {contents['iter_num']}, {split} loss {float(loss):.4f}"
        else:
            model, contents = load_pretrained(init_from)
            self.source = init_from
        self.config = contents.get("config", {})  # the settings that it was trained with
        self.tokenizer = find_tokenizer(contents, model.config.vocab_size, self.source)
        compile = compile and compile_works(self.runtime.device, warn)
        self.model = prepare(model.to(self.runtime.device), self.runtime.dtype, int8, compile)

    def encode(self, prompt: str) -> torch.Tensor:
        """The prompt's ids (1, T), T >= 1; an empty one is the start of a document. Raises UserError."""
        ids = self.tokenizer.encode(prompt) if prompt else [start_of_text(self.tokenizer)]
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            raise UserError(f"the prompt has {len(ids)} tokens, the model reads {block_size}; shorten it")
        return torch.tensor([list(map(int, ids))], device=self.runtime.device)

    def ids(
        self,
        prompt: str,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        seed: int,
    ) -> Iterator[torch.Tensor]:
        """The next id of each sample (N, 1), max_new_tokens times: what follows the prompt. UserError."""
        choices = {"temperature": temperature, "top_k": top_k, "seed": seed}
        try:
            SampleConfig(start=prompt, num_samples=num_samples, max_new_tokens=max_new_tokens, **choices)
        except ValueError as error:
            raise UserError(error) from None
        idx = self.encode(prompt)  # (1, T)
        draws = uniform_draws(seed, num_samples, max_new_tokens)
        sizes = {"vocab_size": self.tokenizer.vocab_size, "copies": num_samples}
        drawn = stream(self.model, idx, max_new_tokens, Choice(temperature, top_k), draws=draws, **sizes)
        return (ids for ids, _ in drawn)

    def generate(
        self,
        prompt: str = "\n",
        num_samples: int = 1,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
    ) -> list[str]:
        """num_samples texts that begin with the prompt, made as one batch. Raises UserError."""
        columns = list(self.ids(prompt, num_samples, max_new_tokens, temperature, top_k, seed))
        rows = torch.cat(columns, dim=1).tolist()  # waits for the device once, at the end
        return [prompt + self.tokenizer.decode(row) for row in rows]

    def stream(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
    ) -> Iterator[str]:
        """What follows the prompt in one sample, in pieces, each as soon as it is made. Raises UserError."""
        columns = self.ids(prompt, 1, max_new_tokens, temperature, top_k, seed)
        return decode_stream((column.item() for column in columns), self.tokenizer)


def decode_stream(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text of the ids, piece by piece; a character made of several tokens comes when it is complete."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(waiting) == 8:  # 8: no character at all
            yield text
            waiting = []
    yield tokenizer.decode(waiting)


def find_tokenizer(contents: dict[str, Any], vocab_size: int, source: str) -> Tokenizer:
    """The tokenizer of a checkpoint: its own, or that of its dataset, or else GPT-2's. Raises UserError."""
    meta = contents.get("meta")
    if meta is None and "dataset" in contents.get("config", {}):  # nanoGPT's checkpoints name it only
        meta = read_dataset_meta(contents["config"]["dataset"])
    meta = meta or GPT2_META
    if not meta["tokenizer"]:
        raise UserError(f"the vocabulary of {source} names no characters; put its meta.json beside the data")
    if meta["vocab_size"] > vocab_size:
        raise UserError(
            f"{source} has {vocab_size} tokens, its tokenizer {meta['vocab_size']}; "
            "put the meta.json that it was trained with into its data folder"
        )
    return from_description(meta["tokenizer"])


def read_prompt(start: str) -> str:
    """The prompt: the setting itself, or what stands in the file of FILE:path. Raises UserError."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the name
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"the prompt file {start[5:]} cannot be read ({reason}); name a text file") from None


def warn(line: str) -> None:
    """Notes go to stderr, so that stdout has the samples alone."""
    print(line, file=sys.stderr)


def main(config: SampleConfig) -> None:
    prompt = read_prompt(config.start)
    where = (config.device, config.dtype, config.compile, config.int8)
    sampler = Sampler(config.out_dir, config.init_from, *where)
    choices = (config.max_new_tokens, config.temperature, config.top_k, config.seed)
    warn(f"{sampler.source} ({sampler.runtime.describe()})")
    if config.num_samples == 1:
        pieces = sampler.stream(prompt, *choices)  # a mistake in the prompt comes before its echo
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for text in sampler.generate(prompt, config.num_samples, *choices):
        print(text)
        print(SEPARATOR)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    with one_line_errors("lower --num_samples or --max_new_tokens"):
        main(CONFIG)
