"""Continuous batching: one thread decodes a running batch; requests of other threads join and leave it."""

import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch

from distrogpt.errors import is_out_of_memory
from distrogpt.inference.decoder import DecodingBatch
from distrogpt.inference.detokenizer import Detokenizer, Token
from distrogpt.inference.sampling import SamplingParams, sample_token, uniform_noise
from distrogpt.settings import SampleConfig

EMIT_INTERVAL = 0.05  # seconds; faster updates are hard to see, and each output costs CPU time
INTERNAL_ERROR = "internal error; see the traceback in the output of serve.py"
TopLogprobs = list[tuple[int, float]]  # the most likely ids of a position, and their log-probabilities


class RequestOutput(NamedTuple):
    """The new text and tokens of a sample since its last output."""

    index: int  # of the sample within its completion
    text: str = ""
    tokens: list[Token] = []
    top_logprobs: list[TopLogprobs] = []  # of the positions of these tokens
    text_offset: int = 0  # characters before these tokens
    num_tokens: int = 0  # so far, including the end token
    finish_reason: str | None = None  # stop, length, or error (then `text` is its message)
    score: float = 0.0  # mean log-likelihood of its tokens so far
    first: bool = False  # whether it is the first output of the sample


@dataclass(eq=False)
class EngineRequest:
    """A prompt, of which settings.num_samples samples are generated."""

    prompt: list[int]
    settings: SampleConfig  # outputs have log-probabilities if show_probs
    emit: Callable[[RequestOutput], None]  # called in the engine's thread
    stream: bool = False  # emit text while it is generated
    top_logprobs: int = 0  # N: of the N most likely tokens and the sampled one
    first_index: int = 0  # of its first sample within the completion
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.n = self.settings.num_samples
        self.params = SamplingParams.from_settings(self.settings)
        self.uniforms = uniform_noise(self.settings.seed, self.n, self.settings.max_new_tokens).numpy()


class Sample:
    """A row of the batch: one sample of a request, and its text so far."""

    def __init__(self, request: EngineRequest, number: int, tokenizer: Any) -> None:
        settings = request.settings
        end = tokenizer.end_of_text if settings.stop_at_end else None
        self.request, self.index = request, request.first_index + number
        self.uniforms = request.uniforms[number]  # (max_new_tokens,)
        self.detokenizer = Detokenizer(tokenizer, settings.stop, end)
        self.seen = set(request.prompt)  # ids that a repetition penalty applies to
        self.top_logprobs: list[TopLogprobs] = []  # of tokens that are not emitted yet
        self.text_offset, self.emitted_at = 0, 0.0
        self.finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far, including the end token."""
        return len(self.detokenizer.logprobs)

    def append(self, id: int, logprob: float, top_logprobs: TopLogprobs) -> None:
        """Append the next token."""
        if id != self.detokenizer.end_token:
            self.top_logprobs.append(top_logprobs)
        self.detokenizer.add(id, logprob)
        self.seen.add(id)
        if self.detokenizer.finished:
            self.finish_reason = "stop"
        elif self.num_tokens == len(self.uniforms):
            self.detokenizer.finish()
            self.finish_reason = "length"

    def emit(self) -> None:
        """Emit the text and tokens that became final since the last call."""
        tokens, text = self.detokenizer.pop_tokens(), self.detokenizer.pop_text()
        top, self.top_logprobs = self.top_logprobs[: len(tokens)], self.top_logprobs[len(tokens) :]
        progress = (self.text_offset, self.num_tokens, self.finish_reason, self.detokenizer.score)
        first = not self.emitted_at
        self.text_offset += sum(len(token.text) for token in tokens)
        self.emitted_at = time.monotonic()
        self.request.emit(RequestOutput(self.index, text, tokens, top, *progress, first))

    def fail(self, message: str) -> None:
        """Finish with an error."""
        self.finish_reason = "error"
        self.request.emit(RequestOutput(self.index, message, finish_reason="error"))


class Engine:
    """A first-come, first-served queue of requests, and a batch of at most `rows` samples. The texts equal
    those of sample.py with the same settings."""

    def __init__(self, sampler: Any, rows: int, queue: int, make_batch: Callable = DecodingBatch) -> None:
        """`sampler` is a Sampler; `queue` is the largest number of waiting requests."""
        self.model, self.tokenizer, self.rows, self.queue = sampler.model, sampler.tokenizer, rows, queue
        self.make_batch, self.emit_interval = make_batch, EMIT_INTERVAL
        self.waiting: deque[EngineRequest] = deque()
        self.samples: list[Sample] = []  # as the rows of the batch
        self.batch: DecodingBatch | None = make_batch(self.model, rows)
        self.changed, self.closed = threading.Condition(), False

    def submit(self, requests: list[EngineRequest]) -> bool:
        """Queue all requests, each of at most `rows` samples; or none if closed or if the queue is full.
        Returns whether they were queued."""
        with self.changed:
            self.waiting = deque(request for request in self.waiting if not request.cancelled)
            free = self.rows - len(self.samples)
            totals = accumulate(request.n for request in [*self.waiting, *requests])
            starting = sum(total <= free for total in totals)  # requests that need not wait
            accepted = not self.closed and len(self.waiting) + len(requests) <= self.queue + starting
            if accepted:
                self.waiting.extend(requests)
                self.changed.notify()
            return accepted

    def close(self) -> None:
        """Make `run` return. Signal handlers may call this."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def run(self) -> None:
        """Decode until the engine is closed; then report an error to all unfinished requests."""
        while not self.closed:
            with self.changed:
                # with a timeout, as Windows otherwise does not deliver Ctrl-C
                self.changed.wait_for(lambda: self.samples or self.waiting or self.closed, timeout=1)
            message = None
            try:
                with torch.no_grad():
                    self.remove_finished()
                    self.admit()
                    if self.samples:
                        self.step()
            except Exception as error:  # is reported to clients; later requests are served
                message = error_message(error)
            if message:  # outside of the except block, which keeps the old batch alive
                self.fail_all(message)
                self.samples, self.batch = [], None
                try:
                    self.batch = self.make_batch(self.model, self.rows)
                except Exception as error:  # without memory for a new batch, the server stops
                    error_message(error)
                    self.close()
        for request in self.waiting:
            self.start(request)
        self.fail_all("the server is shutting down; try again later")

    def start(self, request: EngineRequest) -> None:
        self.samples += [Sample(request, number, self.tokenizer) for number in range(request.n)]

    def fail_all(self, message: str) -> None:
        for sample in self.samples:
            if not sample.finish_reason:
                sample.fail(message)

    def remove_finished(self) -> None:
        for row in reversed(range(len(self.samples))):
            if self.samples[row].finish_reason or self.samples[row].request.cancelled:
                self.batch.remove_sequence(row)
                self.samples[row] = self.samples[-1]  # the last one takes its place
                self.samples.pop()

    def admit(self) -> None:
        """Start the next requests, as long as they fit into the batch."""
        admitted: list[EngineRequest] = []
        with self.changed:
            self.waiting = deque(request for request in self.waiting if not request.cancelled)
            free = self.rows - len(self.samples)
            while self.waiting and self.waiting[0].n <= free:
                admitted.append(self.waiting.popleft())
                free -= admitted[-1].n
            admitted.sort(key=lambda request: request.n)
            for request in admitted:
                self.start(request)
        for n, requests in groupby(admitted, key=lambda request: request.n):
            self.batch.add_sequences([torch.tensor(request.prompt) for request in requests], n)

    def step(self) -> None:
        """Decode one token of each of B samples, and emit outputs that are due."""
        logits = self.batch.next_logits()[:, : self.tokenizer.vocab_size]  # (B, V)
        ids = self.sample_tokens(logits)  # (B, 1)
        self.batch.append(ids)
        steps = zip(ids[:, 0].tolist(), *self.logprobs(logits, ids), strict=True)
        for sample, step in zip(self.samples, steps, strict=True):
            try:
                sample.append(*step)
                due = sample.num_tokens == 1 or time.monotonic() - sample.emitted_at >= self.emit_interval
                if sample.finish_reason or (sample.request.stream and due):
                    sample.emit()
            except Exception as error:  # the other samples are not affected
                sample.fail(error_message(error))

    def sample_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Sample the next ids (B, 1), each with the settings of its request."""
        groups: dict[SamplingParams, list[int]] = defaultdict(list)
        for row, sample in enumerate(self.samples):
            groups[sample.request.params].append(row)
        uniforms = torch.tensor([[sample.uniforms[sample.num_tokens]] for sample in self.samples])  # (B, 1)
        uniforms = uniforms.to(logits.device)
        ids = torch.empty(uniforms.shape, dtype=torch.long, device=logits.device)  # (B, 1)
        for params, rows in groups.items():
            seen = None  # marks the ids that the samples contain: (rows, V)
            if params.repetition_penalty != 1:
                seen = torch.zeros(len(rows), logits.size(1), dtype=torch.bool)
                for mask, row in zip(seen, rows, strict=True):
                    mask[list(self.samples[row].seen)] = True
                seen = seen.to(logits.device)
            if len(groups) == 1:  # without copying
                return sample_token(logits, params, uniforms, seen)
            ids[rows] = sample_token(logits[rows], params, uniforms[rows], seen)
        return ids

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor) -> tuple[list[float], list[TopLogprobs]]:
        """The log-probability of each sample's id, and the most likely ids with theirs, as requested."""
        requests = [sample.request for sample in self.samples]
        if not any(request.settings.show_probs for request in requests):
            return [0.0] * len(ids), [[] for _ in ids]
        logprobs = logits.float().log_softmax(dim=-1)  # (B, V)
        most = max(request.top_logprobs for request in requests)
        values, indices = logprobs.topk(min(most, logprobs.size(-1)))  # (B, most)
        pairs = [list(zip(*row, strict=True)) for row in zip(indices.tolist(), values.tolist(), strict=True)]
        top = [row[: request.top_logprobs] for row, request in zip(pairs, requests, strict=True)]
        own = logprobs.gather(1, ids)[:, 0].tolist()
        for most_likely, id, logprob in zip(top, ids[:, 0].tolist(), own, strict=True):
            if id not in dict(most_likely):
                most_likely.append((id, logprob))
        return own, top


def error_message(error: Exception) -> str:
    """The message for clients. The traceback of a bug goes to stderr."""
    if is_out_of_memory(error):
        return "out of memory; request fewer samples at once"
    traceback.print_exception(error)
    return INTERNAL_ERROR
