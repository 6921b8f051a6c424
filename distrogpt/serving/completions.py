"""OpenAI's /v1/completions without the HTTP: parse a request's body, and build the response's JSON."""

import secrets
import time
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

from configurator import Settings, setting, shorten
from distrogpt.errors import UserError, near_name
from distrogpt.inference.sampler import Sampler
from distrogpt.serving.engine import RequestOutput
from distrogpt.settings import SampleConfig, ServeConfig

NOT_SUPPORTED = ("logit_bias", "suffix", "presence_penalty", "frequency_penalty")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "stop_at_end")


@dataclass
class CompletionConfig(Settings):
    """The fields of a body, without the prompt and the sampling settings. All but `truncate` are OpenAI's."""

    model: str = setting("", "ignored: the server has one model")
    max_tokens: int = setting(16, "new tokens per sample", min=1)
    n: int = setting(1, "samples to return per prompt", min=1)
    best_of: int | None = setting(None, "samples to generate; the n most likely are returned", min=1)
    logprobs: int | None = setting(
        None, "return log-probabilities: of the sampled token and the N most likely", min=0, max=20
    )
    echo: bool = setting(False, "return the prompt before the text")
    stream: bool = setting(False, "send server-sent events")
    user: str = setting("", "ignored")
    truncate: bool = setting(False, "cut the beginning of a prompt longer than block_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_samples = self.best_of or self.n
        if self.num_samples < self.n:
            raise ValueError(f"best_of={self.best_of} is less than n={self.n}; raise it to at least n")
        if self.stream and self.num_samples > self.n:
            raise ValueError("best_of samples cannot be streamed; leave out best_of or stream")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of prompt tokens are not supported; leave out echo or logprobs")


FIELDS = ("prompt", "stream_options", *(field.name for field in fields(CompletionConfig)), *SAMPLING)


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    settings: SampleConfig


class Completion(NamedTuple):
    """The checked body of a request."""

    config: CompletionConfig
    prompts: list[Prompt]
    include_usage: bool  # at the end of a stream
    id: str


def parse_completion(body: dict[str, Any], sampler: Sampler, limits: ServeConfig) -> Completion:
    """Check the fields of a body. Raises UserError."""
    prompts, options = body.pop("prompt", ""), body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise UserError('stream_options must be an object; send {"include_usage": true}, or leave it out')
    has_seed = "seed" in body
    config, settings = parse_settings(body, limits)
    if not isinstance(prompts, list) or is_ids(prompts):
        prompts = [prompts]
    most = limits.batch_size + limits.queue
    if not 1 <= len(prompts) <= most:
        raise UserError(f"prompt is a list of {len(prompts)} prompts; send 1 to {most}")
    parsed = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
        text, ids = parse_prompt(prompt, name, sampler, config.truncate)
        if number and not has_seed:  # so that equal prompts get different texts
            settings = replace(settings, seed=settings.seed + 1)
        parsed.append(Prompt(text, ids, settings))
    return Completion(config, parsed, bool(options.get("include_usage")), f"cmpl-{secrets.token_hex(12)}")


def parse_settings(body: dict[str, Any], limits: ServeConfig) -> tuple[CompletionConfig, SampleConfig]:
    """The fields other than the prompt. Raises UserError."""
    for name in NOT_SUPPORTED:
        if body.pop(name, None):
            raise UserError(f"{name} is not supported; leave it out")
    for name in body.keys() - set(FIELDS):
        near = "max_tokens" if name == "max_new_tokens" else near_name(name, FIELDS)
        hint = f"did you mean {near}?" if near else f"the fields are {', '.join(FIELDS)}"
        raise UserError(f"unknown field {shorten(name)}; {hint}")
    params = {name: body.pop(name) for name in SAMPLING if name in body}
    defaults = {"temperature": 1.0, "top_k": None, "seed": secrets.randbits(31)}
    try:
        config = CompletionConfig(**body)
        lengths = {"num_samples": config.num_samples, "max_new_tokens": config.max_tokens}
        show_probs = config.logprobs is not None or config.num_samples > config.n
        settings = SampleConfig(**defaults | params | lengths, show_probs=show_probs)
    except ValueError as error:
        raise UserError(error) from None
    if len(settings.stop) > 16 or any(len(stop) > 200 for stop in settings.stop):
        raise UserError("stop is limited to 16 strings of up to 200 characters; send fewer or shorter ones")
    if config.max_tokens > (most := limits.max_new_tokens):
        raise UserError(f"max_tokens={config.max_tokens} is above the server's limit; send at most {most}")
    if config.num_samples > (most := limits.batch_size):
        name = "best_of" if config.best_of else "n"
        raise UserError(f"{name}={config.num_samples} is above the server's limit; send at most {most}")
    return config, settings


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def parse_prompt(prompt: Any, name: str, sampler: Sampler, truncate: bool) -> tuple[str, list[int]]:
    """The text and the token ids of a prompt, which is one of the two. Raises UserError."""
    block_size, vocab_size = sampler.model.config.block_size, sampler.tokenizer.vocab_size
    if isinstance(prompt, str):
        text, ids = prompt, sampler.ids_of(prompt, name)
    elif not is_ids(prompt):
        raise UserError(f"{name} is neither a string nor a list of token ids; send one of these")
    elif not all(0 <= id < vocab_size for id in prompt):
        raise UserError(f"{name} has a token id outside the vocabulary; send ids from 0 to {vocab_size - 1}")
    else:
        text, ids = sampler.tokenizer.decode(prompt), prompt
    if len(ids) > block_size and not truncate:
        hint = "shorten it, or send truncate=true"
        raise UserError(f"{name} has {len(ids)} tokens, the context length is {block_size}; {hint}")
    return text, ids[-block_size:]


def choice_json(index: int, output: RequestOutput, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """A choice of a response or event. With echo, the first output of a choice begins with the prompt."""
    config, text, logprobs = completion.config, output.text, None
    if config.echo and output.first:
        text = completion.prompts[index // config.n].text + text
    if config.logprobs is not None:
        texts = [token.text for token in output.tokens]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in output.tokens],
            "top_logprobs": [{token_name(i, tokenizer): lp for i, lp in top} for top in output.top_logprobs],
            "text_offset": list(accumulate(map(len, texts), initial=output.text_offset))[:-1],
        }
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": output.finish_reason}


def token_name(id: int, tokenizer: Any) -> str:
    """A token's text or, if that is not whole characters, its bytes as in OpenAI's responses."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_json(
    completion: Completion, model: str, choices: list[Any], num_tokens: int | None = None
) -> dict[str, Any]:
    """The body of a response, or an event of a stream; with num_tokens, it reports the usage."""
    usage = None
    if num_tokens is not None:
        read = sum(len(prompt.ids) for prompt in completion.prompts)
        usage = {"prompt_tokens": read, "completion_tokens": num_tokens, "total_tokens": read + num_tokens}
    head = {"id": completion.id, "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage}
