"""OpenAI's /v1/completions, without the network of wires: what a body asks for, and what is answered."""

import difflib
import secrets
import time
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from configurator import Settings, setting, shorten
from distrogpt.errors import UserError
from distrogpt.serving.engine import RequestOutput
from distrogpt.settings import SampleConfig

NOT_SERVED = ("logit_bias", "suffix", "presence_penalty", "frequency_penalty")
ALIKE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "stop_at_end")


@dataclass
class CompletionConfig(Settings):
    """What may stand in a body beside its prompt. The defaults are OpenAI's; the second half is our own."""

    model: str = setting("", "any: there is one")
    max_tokens: int = setting(16, "of each sample", min=1)
    n: int = setting(1, "samples of each prompt", min=1)
    best_of: int | None = setting(None, "so many are written, and the n likeliest of them told", min=1)
    temperature: float = setting(1.0, "as in sample.py, whose limits hold for this and the others")
    top_p: float = setting(1.0, "as in sample.py")
    seed: int | None = setting(None, "None is another one each time")
    stop: tuple[str, ...] = setting((), "texts before which a sample ends")
    logprobs: int | None = setting(
        None, "the chance of each token, and so many of the likeliest in its place", min=0, max=20
    )
    echo: bool = setting(False, "the prompt before the text")
    stream: bool = setting(False, "what is certain as soon as it is")
    user: str = setting("", "who asks; not read")

    top_k: int | None = setting(None, "as in sample.py")
    min_p: float = setting(0.0, "as in sample.py")
    repetition_penalty: float = setting(1.0, "as in sample.py")
    stop_at_end: bool = setting(True, "a sample ends at the end-of-text token")
    truncate: bool = setting(False, "a prompt that is too long loses its begin, and is not refused")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < self.n:
            raise ValueError(f"best_of={self.copies} is below n={self.n}; make it as many or more")
        if self.stream and self.copies > self.n:
            raise ValueError("a stream cannot tell the best while all are written; leave out best_of")
        if len(self.stop) > 16 or any(len(stop) > 200 for stop in self.stop):
            raise ValueError(
                "stop has over 16 texts, or one of over 200 characters; send fewer or shorter ones"
            )
        if self.echo and self.logprobs is not None:
            raise ValueError("chances of a prompt's own tokens are not served; leave out echo")

    @property
    def copies(self) -> int:
        """Samples that are written of each prompt."""
        return self.best_of or self.n


class Prompt(NamedTuple):
    text: str
    ids: list[int]


class Completion(NamedTuple):
    """A body that was read."""

    config: CompletionConfig
    prompts: list[Prompt]
    asked: SampleConfig  # what is written of each; of its num_samples, the config.n likeliest are told
    tells_usage: bool  # at the end of a stream


def read_body(body: Any, sampler: Any, most_tokens: int, most_samples: int, most_prompts: int) -> Completion:
    """What a body asks for, where null is as if it were not there. Raises UserError."""
    if not isinstance(body, dict):
        raise UserError('the body is no JSON object; send {"prompt": "..."}')
    body = {name: value for name, value in body.items() if value is not None}
    given, options = body.pop("prompt", ""), body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise UserError("stream_options is no JSON object; leave it out")
    for name in NOT_SERVED:
        if body.pop(name, None):
            raise UserError(f"{name} is not served; leave it out")
    names = ["prompt", *(field.name for field in fields(CompletionConfig))]
    for name in set(body) - set(names):
        near = "max_tokens" if name == "max_new_tokens" else nearest(name, names)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(names)}"
        raise UserError(f"{shorten(name)} is no setting of a completion; {hint}")
    try:
        config = CompletionConfig(**body)
        asked = SampleConfig(
            **{name: getattr(config, name) for name in ALIKE},
            num_samples=config.copies,
            max_new_tokens=config.max_tokens,
            seed=secrets.randbits(31) if config.seed is None else config.seed,
            show_probs=config.logprobs is not None or config.copies > config.n,
        )
    except ValueError as error:
        raise UserError(error) from None
    if config.max_tokens > most_tokens:
        raise UserError(f"max_tokens={config.max_tokens} is too many; ask for {most_tokens} or fewer")
    if config.copies > most_samples:
        raise UserError(f"{config.copies} samples of a prompt are too many; ask for {most_samples} or fewer")
    several = given if isinstance(given, list) and not is_ids(given) else [given]
    if not 1 <= len(several) <= most_prompts:
        raise UserError(f"{len(several)} prompts; send 1 to {most_prompts} at once")
    names = [f"prompt {n}" for n in range(1, len(several) + 1)] if len(several) > 1 else ["the prompt"]
    prompts = [
        prompt_of(one, name, sampler, config.truncate) for one, name in zip(several, names, strict=True)
    ]
    return Completion(config, prompts, asked, bool(options.get("include_usage")))


def nearest(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is int for part in value)


def prompt_of(given: Any, name: str, sampler: Any, truncate: bool) -> Prompt:
    """A prompt that is text or a list of ids. Raises UserError."""
    block_size, vocab_size = sampler.model.config.block_size, sampler.tokenizer.vocab_size
    if isinstance(given, str):
        text, ids = given, sampler.ids_of(given, name, whole=False)
    elif not is_ids(given):
        raise UserError(f"{name} is neither text nor a list of ids; send one of these")
    elif not all(0 <= id < vocab_size for id in given):
        raise UserError(f"{name} has an id that is none of the model's; send ids from 0 to {vocab_size - 1}")
    else:
        text, ids = sampler.tokenizer.decode(given), given
    if len(ids) > block_size and not truncate:
        raise UserError(
            f"{name} has {len(ids)} tokens, the model reads {block_size}; shorten it, or send truncate=true"
        )
    return Prompt(text, ids[-block_size:])


def joined(parts: list[RequestOutput]) -> RequestOutput:
    """All news of a sample as one."""
    tokens = [token for part in parts for token in part.tokens]
    likeliest = [place for part in parts for place in part.likeliest]
    return parts[-1]._replace(text="".join(part.text for part in parts), tokens=tokens, likeliest=likeliest)


def choice_json(
    number: int, news: RequestOutput, config: CompletionConfig, sampler: Any, begin: str = "", offset: int = 0
) -> dict[str, Any]:
    """What became certain of a sample, as OpenAI's clients know it. `begin` stands before it; its tokens
    follow `offset` characters."""
    logprobs = None
    if config.logprobs is not None:
        offsets = []
        for token in news.tokens:
            offsets.append(offset)
            offset += len(token.text)
        logprobs = {
            "tokens": [token.text for token in news.tokens],
            "token_logprobs": [token.logprob for token in news.tokens],
            "top_logprobs": [
                {name_of(id, sampler): logprob for id, logprob in place} for place in news.likeliest
            ],
            "text_offset": offsets,
        }
    return {"index": number, "text": begin + news.text, "logprobs": logprobs, "finish_reason": news.ended}


def name_of(id: int, sampler: Any) -> str:
    """A token's text, or as in OpenAI's answers its bytes where these are no whole characters."""
    data = sampler.tokenizer.decode_bytes([id])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def answer(
    id: str, model: str, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
) -> dict[str, Any]:
    """The body of an answer, or a part of a streamed one."""
    head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage}


def usage(done: Completion, made: int) -> dict[str, int]:
    """How many tokens were read and made."""
    read = sum(len(prompt.ids) for prompt in done.prompts)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def failure(status: int, why: str) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}
