"""A model and its tokenizer, loaded once, to generate text from Python."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from configurator import check_value
from distrogpt.checkpoint import check_range
from distrogpt.data.tokenizer import encode_prompt, keep_ends
from distrogpt.errors import UserError, warn
from distrogpt.files import read_text
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.detokenizer import Detokenizer, Token
from distrogpt.inference.sampling import SamplingParams, uniform_noise
from distrogpt.kernels.compile import compile_error
from distrogpt.loading import find_tokenizer, load_trained
from distrogpt.runtime import start_runtime
from distrogpt.settings import SAMPLING_FIELDS, SampleConfig


class Sampler:
    """A model and its tokenizer, loaded once. Raises UserError if they cannot be."""

    def __init__(
        self,
        out_dir: str = "out",
        init_from: str = "resume",
        device: str = "auto",
        dtype: str = "auto",
        compile: bool = False,
        int8: bool = False,
        **settings: str | None,
    ) -> None:
        """The arguments are settings of SampleConfig, and `settings` takes one more: `dataset`. Raises
        TypeError for others."""
        dataset = settings.pop("dataset", None)
        if settings:
            raise TypeError(f"Sampler() has no argument {min(settings)}")
        self.runtime = start_runtime(device, dtype)
        out_dir, init_from = os.path.expanduser(out_dir), os.path.expanduser(init_from)
        model, contents, self.source = load_trained(out_dir, init_from)
        check_range(model, self.runtime.dtype)
        self.config = contents.get("config", {})  # of its training
        self.tokenizer = find_tokenizer(contents, model.config.vocab_size, self.source, dataset)
        error = compile_error(self.runtime.device) if compile else ""
        if error:
            warn(f"note     {error}")
        compile = compile and not error
        self.model = optimize_for_inference(model.to(self.runtime.device), self.runtime.dtype, int8, compile)

    def ids_of(self, prompt: str, name: str = "the prompt") -> list[int]:
        """The token ids of a prompt, at least one. Raises UserError."""
        check_value(SampleConfig, "start", prompt)
        try:
            return encode_prompt(self.tokenizer, prompt)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def prompt_ids(self, prompts: Mapping[str, str]) -> list[list[int]]:
        """The last block_size token ids of each prompt, which are what the model reads; prompts are given by
        name. Raises UserError."""
        ids = {name: self.ids_of(prompt, name) for name, prompt in prompts.items()}
        return keep_ends(ids, self.model.config.block_size)

    def sample_batch(
        self, prompts: Sequence[list[int]], uniforms: torch.Tensor, config: SampleConfig, interval: int = 1
    ) -> Iterator[list[Detokenizer]]:
        """Generate a batch, one sample of each prompt for each row of `uniforms`. Yields the samples, the
        same objects each time, every `interval` tokens and when all are finished."""
        n, with_logprobs = len(prompts) * len(uniforms), config.best_of > 1 or config.show_probs
        end_token = self.tokenizer.end_of_text if config.stop_at_end else None
        samples = [Detokenizer(self.tokenizer, config.stop, end_token) for _ in range(n)]
        steps = stream(
            self.model,
            [torch.tensor(ids) for ids in prompts],
            SamplingParams.from_settings(config),
            uniforms.repeat(len(prompts), 1),
            self.tokenizer.vocab_size,
        )
        new_ids, new_logprobs, zeros = [], [], torch.zeros(n, 1)
        for number, (ids, logits) in enumerate(steps, 1):
            new_ids.append(ids)
            new_logprobs.append(logits.float().log_softmax(-1).gather(1, ids) if with_logprobs else zeros)
            if number % interval and number < config.max_new_tokens:
                continue  # without waiting for the device
            rows = zip(torch.cat(new_ids, 1).tolist(), torch.cat(new_logprobs, 1).tolist(), strict=True)
            for sample, row in zip(samples, rows, strict=True):
                for id, logprob in zip(*row, strict=True):
                    sample.add(id, logprob)
                if number == config.max_new_tokens:
                    sample.finish()
            new_ids, new_logprobs = [], []
            yield samples
            if all(sample.finished for sample in samples):
                return

    def samples(
        self,
        prompts: Sequence[list[int]],
        config: SampleConfig,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> Iterator[Detokenizer]:
        """Yield num_samples samples of each prompt, prompt by prompt. Each is the most likely of best_of
        candidates. `advance` is called with the number of new tokens."""
        n, candidates = config.num_samples * config.best_of, []
        uniforms = uniform_noise(config.seed, n, config.max_new_tokens)
        prompts_per_batch = max(1, config.batch_size // n)
        interval = 16 if self.runtime.device.type == "cuda" else 1
        for begin in range(0, len(prompts), prompts_per_batch):
            batch_prompts = prompts[begin : begin + prompts_per_batch]
            for batch_uniforms in uniforms.split(config.batch_size):
                n_tokens = 0
                for batch in self.sample_batch(batch_prompts, batch_uniforms, config, interval):
                    previous, n_tokens = n_tokens, sum(len(sample.logprobs) for sample in batch)
                    advance(n_tokens - previous)
                for sample in batch:
                    candidates.append(sample)
                    if len(candidates) == config.best_of:
                        yield max(candidates, key=lambda sample: sample.score)  # the first of equal ones
                        candidates = []

    def stream_sample(self, prompt: list[int], config: SampleConfig) -> Iterator[Detokenizer]:
        """Yield one sample after each of its tokens, the same object each time; with best_of, once at the
        end."""
        if config.best_of > 1:
            yield from self.samples([prompt], replace(config, num_samples=1))
        else:
            uniforms = uniform_noise(config.seed, 1, config.max_new_tokens)
            for (sample,) in self.sample_batch([prompt], uniforms, config):
                yield sample

    def generate(
        self,
        prompt: str | Sequence[str] = "\n",
        num_samples: int = 1,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **settings: Any,
    ) -> list[str]:
        """num_samples texts of each prompt, prompt by prompt. They begin with the prompt unless echo=False.

        `settings` are other sampling settings of SampleConfig (top_p, stop, ...). Raises UserError.
        """
        several = isinstance(prompt, (list, tuple))
        prompts = prompt if several else [prompt]
        config = sample_config(max_new_tokens, temperature, top_k, seed, num_samples=num_samples, **settings)
        names = [f"prompt {number + 1}" if several else "the prompt" for number in range(len(prompts))]
        ids = self.prompt_ids(dict(zip(names, prompts, strict=True)))
        texts = [sample.text for sample in self.samples(ids, config)]
        if not config.echo:
            return texts
        return [prompts[number // config.num_samples] + text for number, text in enumerate(texts)]

    def stream(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **settings: Any,
    ) -> Iterator[str]:
        """Stream one sample: the continuation of the prompt, piece by piece. Settings as in `generate`."""
        config = sample_config(max_new_tokens, temperature, top_k, seed, **settings)
        (ids,) = self.prompt_ids({"the prompt": prompt})
        samples = self.stream_sample(ids, config)
        return (text for sample in samples if (text := sample.pop_text()))

    def tokens(
        self,
        prompt: str = "\n",
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 200,
        seed: int = 1337,
        **settings: Any,
    ) -> Iterator[Token]:
        """The tokens of the text that `stream` yields, with the model's log-probability of each."""
        config = sample_config(max_new_tokens, temperature, top_k, seed, **settings | {"show_probs": True})
        (ids,) = self.prompt_ids({"the prompt": prompt})
        samples = self.stream_sample(ids, config)
        return (token for sample in samples for token in sample.pop_tokens())


def sample_config(
    max_new_tokens: int, temperature: float, top_k: int | None, seed: int, **settings: Any
) -> SampleConfig:
    """The settings of a call from Python. Raises UserError, and TypeError for other than sampling
    settings."""
    unknown = set(settings) - {*SAMPLING_FIELDS, "num_samples", "echo", "batch_size"}
    if unknown:
        raise TypeError(f"{min(unknown)} is not a sampling setting")
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    try:
        return SampleConfig(**settings)
    except ValueError as error:
        raise UserError(error) from None


def read_prompt(start: str, what: str = "the prompt file") -> str:
    """The prompt: the setting itself, or the text of the file in FILE:path. Raises UserError."""
    return read_text(start[5:], f"{what} {start[5:]}") if start.startswith("FILE:") else start
