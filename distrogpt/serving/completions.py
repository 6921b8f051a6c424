"""OpenAI's /v1/completions without HTTP: from a request's body to prompts and settings, and back to JSON."""

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
    """The other fields of a body beside its prompt. All but `truncate` are OpenAI's."""

    model: str = setting("", "not read: the server has one")
    max_tokens: int = setting(16, "of each sample", min=1)
    n: int = setting(1, "samples of each prompt", min=1)
    best_of: int | None = setting(None, "samples to generate, of which the n likeliest return", min=1)
    logprobs: int | None = setting(
        None, "N: also those of the N likeliest tokens, beside the own", min=0, max=20
    )
    echo: bool = setting(False, "return the prompt, too")
    stream: bool = setting(False, "send server-sent events")
    user: str = setting("", "not read")
    truncate: bool = setting(False, "drop the beginning of a prompt that is too long")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_samples = self.best_of or self.n
        if self.num_samples < self.n:
            raise ValueError(f"best_of={self.best_of} is below n={self.n}; make it as many or more")
        if self.stream and self.num_samples > self.n:
            raise ValueError("the best samples are known at the end only; leave out best_of or stream")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of a prompt's tokens are not supported; leave out echo")


FIELDS = ("prompt", "stream_options", *(field.name for field in fields(CompletionConfig)), *SAMPLING)


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    settings: SampleConfig


class Completion(NamedTuple):
    """A body that was checked."""

    config: CompletionConfig
    prompts: list[Prompt]
    include_usage: bool  # at the end of a stream
    id: str


def parse_completion(body: dict[str, Any], sampler: Sampler, limits: ServeConfig) -> Completion:
    """Check the fields of a body. Raises UserError."""
    prompts, options = body.pop("prompt", ""), body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise UserError("stream_options is not a JSON object; leave it out")
    has_seed = "seed" in body
    config, settings = parse_settings(body, limits)
    if not isinstance(prompts, list) or is_ids(prompts):
        prompts = [prompts]
    most = limits.batch_size + limits.queue
    if not 1 <= len(prompts) <= most:
        raise UserError(f"{len(prompts)} prompts; send 1 to {most} at once")
    parsed = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
        text, ids = parse_prompt(prompt, name, sampler, config.truncate)
        if number and not has_seed:  # equal prompts get different texts
            settings = replace(settings, seed=settings.seed + 1)
        parsed.append(Prompt(text, ids, settings))
    return Completion(config, parsed, bool(options.get("include_usage")), f"cmpl-{secrets.token_hex(12)}")


def parse_settings(body: dict[str, Any], limits: ServeConfig) -> tuple[CompletionConfig, SampleConfig]:
    """The fields beside the prompt. Raises UserError."""
    for name in NOT_SUPPORTED:
        if body.pop(name, None):
            raise UserError(f"{name} is not supported; leave it out")
    for name in body.keys() - set(FIELDS):
        near = "max_tokens" if name == "max_new_tokens" else near_name(name, FIELDS)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(FIELDS)}"
        raise UserError(f"{shorten(name)} is not a field of a completion; {hint}")
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
        raise UserError("stop has over 16 texts, or one of over 200 characters; send fewer or shorter ones")
    if config.max_tokens > (most := limits.max_new_tokens):
        raise UserError(f"max_tokens={config.max_tokens} is too many; ask for {most} or fewer")
    if config.num_samples > (most := limits.batch_size):
        raise UserError(f"{config.num_samples} samples of a prompt are too many; ask for {most} or fewer")
    return config, settings


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def parse_prompt(prompt: Any, name: str, sampler: Sampler, truncate: bool) -> tuple[str, list[int]]:
    """The text and the ids of a prompt that is either of them. Raises UserError."""
    block_size, vocab_size = sampler.model.config.block_size, sampler.tokenizer.vocab_size
    if isinstance(prompt, str):
        text, ids = prompt, sampler.ids_of(prompt, name)
    elif not is_ids(prompt):
        raise UserError(f"{name} is neither text nor a list of ids; send one of these")
    elif not all(0 <= id < vocab_size for id in prompt):
        raise UserError(f"{name} has an id outside of the vocabulary; send ids from 0 to {vocab_size - 1}")
    else:
        text, ids = sampler.tokenizer.decode(prompt), prompt
    if len(ids) > block_size and not truncate:
        hint = "shorten it, or send truncate=true"
        raise UserError(f"{name} has {len(ids)} tokens, the model reads {block_size}; {hint}")
    return text, ids[-block_size:]


def choice_json(index: int, output: RequestOutput, completion: Completion, tokenizer: Any) -> dict[str, Any]:
    """One of an answer's choices, or of an event. The first output of a choice follows the echoed prompt."""
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
    """A token's text or, if it is not whole characters, its bytes as in OpenAI's answers."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_json(
    completion: Completion, model: str, choices: list[Any], num_tokens: int | None = None
) -> dict[str, Any]:
    """The body of an answer, or an event of a stream; with num_tokens, it has the usage."""
    usage = None
    if num_tokens is not None:
        read = sum(len(prompt.ids) for prompt in completion.prompts)
        usage = {"prompt_tokens": read, "completion_tokens": num_tokens, "total_tokens": read + num_tokens}
    head = {"id": completion.id, "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage}
