"""A model and its tokenizer, loaded once, to generate text from Python."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from configurator import check_value
from distrogpt.data.tokenizer import encode_prompt
from distrogpt.errors import UserError, warn
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.detokenizer import Detokenizer, Token
from distrogpt.inference.sampling import SamplingParams, uniform_noise
from distrogpt.kernels.compile import compile_error
from distrogpt.loading import find_tokenizer, load_trained
from distrogpt.runtime import start_runtime
from distrogpt.settings import SAMPLING_FIELDS, SampleConfig


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
        model, contents, self.source = load_trained(out_dir, init_from)
        self.config = contents.get("config", {})  # the settings that it was trained with
        self.tokenizer = find_tokenizer(contents, model.config.vocab_size, self.source)
        error = compile_error(self.runtime.device) if compile else ""
        if error:
            warn(f"note     {error}")
        compile = compile and not error
        self.model = optimize_for_inference(model.to(self.runtime.device), self.runtime.dtype, int8, compile)

    def ids_of(self, prompt: str, name: str = "the prompt", whole: bool = True) -> list[int]:
        """The prompt's ids, one at least; with `whole` no more than the network reads. Raises UserError."""
        check_value(SampleConfig, "start", prompt)
        try:
            ids = encode_prompt(self.tokenizer, prompt)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        block_size = self.model.config.block_size
        if whole and len(ids) > block_size:
            raise UserError(f"{name} has {len(ids)} tokens, the model reads {block_size}; shorten it")
        return ids

    def steps(
        self, prompts: Sequence[list[int]], draws: torch.Tensor, asked: SampleConfig, every: int = 1
    ) -> Iterator[list[Detokenizer]]:
        """The samples of one batch while they are written, the same ones each time: after `every` tokens of
        each and when all have ended. Each of N prompts goes on once for each row of draws."""
        copies, scored = len(draws), asked.best_of > 1 or asked.show_probs
        end = self.tokenizer.end_of_text if asked.stop_at_end else None
        writers = [Detokenizer(self.tokenizer, asked.stop, end) for _ in range(len(prompts) * copies)]
        drawn = stream(
            self.model,
            [torch.tensor(ids) for ids in prompts],
            SamplingParams.from_settings(asked),
            draws.repeat(len(prompts), 1),
            self.tokenizer.vocab_size,
        )
        columns, chances, none = [], [], torch.zeros(len(writers), 1)
        for number, (ids, logits) in enumerate(drawn, 1):
            columns.append(ids)
            chances.append(logits.float().log_softmax(-1).gather(1, ids) if scored else none)
            if number % every and number < asked.max_new_tokens:
                continue  # the device need not be waited for
            new = zip(writers, torch.cat(columns, 1).tolist(), torch.cat(chances, 1).tolist(), strict=True)
            for writer, row, logprobs in new:
                for id, logprob in zip(row, logprobs, strict=True):
                    writer.add(id, logprob)
                if number == asked.max_new_tokens:
                    writer.close()
            columns, chances = [], []
            yield writers
            if all(writer.ended for writer in writers):
                return

    def samples(
        self,
        prompts: Sequence[list[int]],
        asked: SampleConfig,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> Iterator[Detokenizer]:
        """num_samples of each prompt, one prompt after another, each when it has ended; of its candidates the
        likeliest. `advance` is told the tokens made."""
        copies, candidates = asked.num_samples * asked.best_of, []
        draws = uniform_noise(asked.seed, copies, asked.max_new_tokens)
        together = max(1, asked.batch_size // copies)  # prompts at once
        every = 16 if self.runtime.device.type == "cuda" else 1
        for begin in range(0, len(prompts), together):
            for some in draws.split(asked.batch_size):
                told = 0
                for writers in self.steps(prompts[begin : begin + together], some, asked, every):
                    made = sum(len(writer.logprobs) for writer in writers)
                    advance(made - told)
                    told = made
                for writer in writers:
                    candidates.append(writer)
                    if len(candidates) == asked.best_of:
                        yield max(candidates, key=lambda writer: writer.score)  # of equal ones the first
                        candidates = []

    def live(self, prompt: list[int], asked: SampleConfig) -> Iterator[Detokenizer]:
        """One sample while it is written, the same again and again; the best of several when it is done."""
        if asked.best_of > 1:
            yield from self.samples([prompt], replace(asked, num_samples=1))
        else:
            for (writer,) in self.steps([prompt], uniform_noise(asked.seed, 1, asked.max_new_tokens), asked):
                yield writer

    def generate(
        self,
        prompt: str | Sequence[str] = "\n",
        num_samples: int = 1,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **more: Any,
    ) -> list[str]:
        """num_samples texts of each prompt, one prompt after another, that begin with it unless echo=False.

        `more` are settings of SampleConfig that concern a sample: top_p, stop, best_of, ... Raises UserError.
        """
        several = isinstance(prompt, (list, tuple))
        prompts = prompt if several else [prompt]
        asked = asked_for(max_new_tokens, temperature, top_k, seed, num_samples=num_samples, **more)
        ids = [
            self.ids_of(text, f"prompt {n}" if several else "the prompt") for n, text in enumerate(prompts, 1)
        ]
        begins = [text if asked.echo else "" for text in prompts for _ in range(asked.num_samples)]
        return [begin + done.text for begin, done in zip(begins, self.samples(ids, asked), strict=True)]

    def stream(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **more: Any,
    ) -> Iterator[str]:
        """What follows the prompt in one sample, in pieces, each as soon as it is certain. As `generate`."""
        asked = asked_for(max_new_tokens, temperature, top_k, seed, **more)
        return (text for writer in self.live(self.ids_of(prompt), asked) if (text := writer.take_text()))

    def tokens(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **more: Any,
    ) -> Iterator[Token]:
        """The tokens of what `stream` yields, with the network's own log-probability of each."""
        asked = asked_for(max_new_tokens, temperature, top_k, seed, **more | {"show_probs": True})
        return (token for writer in self.live(self.ids_of(prompt), asked) for token in writer.take_tokens())


def asked_for(
    max_new_tokens: int, temperature: float, top_k: int | None, seed: int, **more: Any
) -> SampleConfig:
    """The settings of a call from Python. Raises UserError; TypeError for those that concern no sample."""
    strange = set(more) - {*SAMPLING_FIELDS, "num_samples", "echo", "batch_size"}
    if strange:
        raise TypeError(f"{min(strange)} is no setting of a sample")
    choices = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    try:
        return SampleConfig(**choices, **more)
    except ValueError as error:
        raise UserError(error) from None


def read_text(name: str) -> str:
    """The text of a file, or of stdin where its name is -. Raises UserError."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the name
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"the prompt file {name} cannot be read ({reason}); name a text file") from None


def read_prompt(start: str) -> str:
    """The prompt: the setting itself, or what stands in the file of FILE:path. Raises UserError."""
    return read_text(start[5:]) if start.startswith("FILE:") else start
