"""OpenAI's /v1/completions without HTTP: from a request's body to prompts and settings, and back to JSON."""

import difflib
import secrets
import time
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple

from configurator import check_settings, setting, shorten
from distrogpt.errors import UserError
from distrogpt.inference.sampler import Sampler
from distrogpt.serving.engine import RequestOutput
from distrogpt.settings import SampleConfig, ServeConfig

NOT_SUPPORTED = ("logit_bias", "suffix", "presence_penalty", "frequency_penalty")
SAME_AS_SAMPLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_at_end")


@dataclass
class CompletionConfig:
    """The fields of a body beside its prompt, with OpenAI's defaults; the last five are ours."""

    model: str = setting("", "not read: the server has one")
    max_tokens: int = setting(16, "of each sample", at_least=1)
    n: int = setting(1, "samples of each prompt", at_least=1)
    best_of: int | None = setting(None, "samples to generate, of which the n likeliest return", at_least=1)
    temperature: float = setting(1.0, "as in sample.py, which checks this and the others")
    top_p: float = setting(1.0, "as in sample.py")
    seed: int | None = setting(None, "None: a random one")
    stop: tuple[str, ...] = setting((), "a sample ends before any of these texts")
    logprobs: int | None = setting(None, "N: also those of the N likeliest tokens", at_least=0, at_most=20)
    echo: bool = setting(False, "return the prompt, too")
    stream: bool = setting(False, "send server-sent events")
    user: str = setting("", "not read")

    top_k: int | None = setting(None, "as in sample.py")
    min_p: float = setting(0.0, "as in sample.py")
    repetition_penalty: float = setting(1.0, "as in sample.py")
    stop_at_end: bool = setting(True, "a sample ends at the end-of-text token")
    truncate: bool = setting(False, "drop the beginning of a prompt that is too long")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_samples < self.n:
            raise ValueError(f"best_of={self.best_of} is below n={self.n}; make it as many or more")
        if self.stream and self.num_samples > self.n:
            raise ValueError("the best samples are known at the end only; leave out best_of or stream")
        if len(self.stop) > 16 or any(len(stop) > 200 for stop in self.stop):
            raise ValueError("stop has over 16 texts, or one of over 200 characters; send fewer or shorter")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of a prompt's tokens are not supported; leave out echo")

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class Completion(NamedTuple):
    """A body that was checked."""

    config: CompletionConfig
    prompts: list[Prompt]
    settings: SampleConfig  # of each prompt's samples
    include_usage: bool  # at the end of a stream

    def prefix(self, index: int) -> str:
        """What the text of choice `index` begins with."""
        return self.prompts[index // self.config.n].text if self.config.echo else ""


def parse_completion(body: Any, sampler: Sampler, limits: ServeConfig) -> Completion:
    """Check the JSON of a body, in which null is the same as a missing field. Raises UserError."""
    if not isinstance(body, dict):
        raise UserError('the body is not a JSON object; send {"prompt": "..."}')
    body = {name: value for name, value in body.items() if value is not None}
    prompt, options = body.pop("prompt", ""), body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise UserError("stream_options is not a JSON object; leave it out")
    config = parse_config(body, limits)
    try:
        settings = SampleConfig(
            **{name: getattr(config, name) for name in SAME_AS_SAMPLE},
            num_samples=config.num_samples,
            max_new_tokens=config.max_tokens,
            seed=secrets.randbits(31) if config.seed is None else config.seed,
            show_probs=config.logprobs is not None or config.num_samples > config.n,
        )
    except ValueError as error:
        raise UserError(error) from None
    several = prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]
    most = limits.batch_size + limits.queue
    if not 1 <= len(several) <= most:
        raise UserError(f"{len(several)} prompts; send 1 to {most} at once")
    names = [f"prompt {n}" for n in range(1, len(several) + 1)] if len(several) > 1 else ["the prompt"]
    prompts = [
        parse_prompt(one, name, sampler, config.truncate) for one, name in zip(several, names, strict=True)
    ]
    return Completion(config, prompts, settings, bool(options.get("include_usage")))


def parse_config(body: dict[str, Any], limits: ServeConfig) -> CompletionConfig:
    """The fields beside the prompt. Raises UserError."""
    for name in NOT_SUPPORTED:
        if body.pop(name, None):
            raise UserError(f"{name} is not supported; leave it out")
    names = ["prompt", *(field.name for field in fields(CompletionConfig))]
    for name in set(body) - set(names):
        near = ["max_tokens"] if name == "max_new_tokens" else difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
        raise UserError(f"{shorten(name)} is not a field of a completion; {hint}")
    try:
        config = CompletionConfig(**body)
    except ValueError as error:
        raise UserError(error) from None
    if config.max_tokens > (most := limits.max_new_tokens):
        raise UserError(f"max_tokens={config.max_tokens} is too many; ask for {most} or fewer")
    if config.num_samples > (most := limits.batch_size):
        raise UserError(f"{config.num_samples} samples of a prompt are too many; ask for {most} or fewer")
    return config


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def parse_prompt(prompt: Any, name: str, sampler: Sampler, truncate: bool) -> Prompt:
    """A prompt that is text or a list of ids. Raises UserError."""
    block_size, vocab_size = sampler.model.config.block_size, sampler.tokenizer.vocab_size
    if isinstance(prompt, str):
        text, ids = prompt, sampler.ids_of(prompt, name, whole=False)
    elif not is_ids(prompt):
        raise UserError(f"{name} is neither text nor a list of ids; send one of these")
    elif not all(0 <= id < vocab_size for id in prompt):
        raise UserError(f"{name} has an id outside of the vocabulary; send ids from 0 to {vocab_size - 1}")
    else:
        text, ids = sampler.tokenizer.decode(prompt), prompt
    if len(ids) > block_size and not truncate:
        raise UserError(
            f"{name} has {len(ids)} tokens, the model reads {block_size}; shorten it, or send truncate=true"
        )
    return Prompt(text, ids[-block_size:])


def merge_outputs(outputs: list[RequestOutput]) -> RequestOutput:
    """All outputs of a sample as one."""
    return outputs[-1]._replace(
        text="".join(output.text for output in outputs),
        tokens=[token for output in outputs for token in output.tokens],
        top_logprobs=[top for output in outputs for top in output.top_logprobs],
        text_offset=0,
    )


def choice_json(index: int, output: RequestOutput, prefix: str, logprobs: bool, tokenizer: Any) -> dict:
    """One of an answer's choices, whose text begins with `prefix`."""
    choice = {"index": index, "text": prefix + output.text, "logprobs": None}
    if logprobs:
        texts = [token.text for token in output.tokens]
        offsets = accumulate(map(len, texts), initial=output.text_offset)
        choice["logprobs"] = {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in output.tokens],
            "top_logprobs": [
                {token_name(id, tokenizer): logprob for id, logprob in top} for top in output.top_logprobs
            ],
            "text_offset": list(offsets)[:-1],
        }
    return {**choice, "finish_reason": output.finish_reason}


def token_name(id: int, tokenizer: Any) -> str:
    """A token's text or, if it is not whole characters, its bytes as in OpenAI's answers."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_json(id: str, model: str, choices: list[dict], usage: dict[str, int] | None = None) -> dict:
    """The body of an answer, or an event of a stream."""
    head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage}


def usage_json(completion: Completion, completion_tokens: int) -> dict[str, int]:
    read = sum(len(prompt.ids) for prompt in completion.prompts)
    total = read + completion_tokens
    return {"prompt_tokens": read, "completion_tokens": completion_tokens, "total_tokens": total}


def error_json(status: int, message: str) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
