"""One network, many who ask: their samples are written together, and each begins and ends when it will.

A thread of its own reads the network, and tells in pieces what became certain of each sample.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from decoding import Batch, Choice, sample_token, uniform_draws
from errors import is_out_of_memory
from settings import SampleConfig
from writing import Token, Writer

TELL_EVERY = 0.02  # seconds: screens hardly show more, and each telling costs


class Full(Exception):
    """As many wait as may."""


class News(NamedTuple):
    """What became certain of a sample since the last news of it."""

    sample: int  # its number in the request
    text: str = ""
    tokens: list[Token] = []
    likeliest: list[list[Token]] = []  # for each of these tokens, the likeliest ones at its place
    made: int = 0  # tokens so far, with the one that ended it
    ended: str | None = None  # why: stop, length, or error, which `text` says then
    score: float = 0.0  # the mean log-likelihood of its tokens, when it has ended


class Request:
    """A prompt that is to go on in asked.num_samples samples."""

    def __init__(
        self, prompt: list[int], asked: SampleConfig, tell: Callable[[News], None], likeliest: int = 0
    ) -> None:
        """`tell` is called in the engine's thread. With asked.show_probs, chances are told too, and those of
        so many `likeliest` tokens at each place."""
        self.prompt, self.asked, self.tell, self.likeliest = prompt, asked, tell, likeliest
        choices = (asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty)
        self.choice = Choice(*choices)
        self.draws = uniform_draws(asked.seed, asked.num_samples, asked.max_new_tokens).numpy()
        self.gone = False  # nobody waits for it any more


class Sample:
    """A row of the batch: who asked for it, what is written there, and how much of that was told."""

    def __init__(self, request: Request, number: int, tokenizer: Any) -> None:
        asked = request.asked
        self.request, self.number, self.draws = request, number, request.draws[number]  # (max_new_tokens,)
        self.writer = Writer(tokenizer, asked.stop, tokenizer.end_of_text if asked.stop_at_end else None)
        self.likeliest: list[list[Token]] = []  # as the writer's tokens
        self.made, self.told, self.told_at = 0, 0, 0.0
        self.ended: str | None = None
        penalised = request.choice.repetition_penalty != 1
        self.seen = torch.zeros(tokenizer.vocab_size if penalised else 0, dtype=torch.bool)  # (V,) or (0,)
        if penalised:
            self.seen[request.prompt] = True

    def add(self, id: int, logprob: float, likeliest: list[Token]) -> None:
        """Take the next token."""
        before = len(self.writer.tokens)
        self.writer.add(id, logprob)
        self.likeliest += [likeliest] * (len(self.writer.tokens) - before)  # none of <|endoftext|>
        self.made += 1
        if len(self.seen):
            self.seen[id] = True
        if self.writer.ended:
            self.ended = "stop"
        elif self.made == len(self.draws):
            self.writer.close()
            self.ended = "length"

    def news(self) -> News:
        """What became certain since the last call."""
        tokens = self.writer.take_tokens()
        likeliest = self.likeliest[self.told : self.told + len(tokens)]
        self.told += len(tokens)
        score = self.writer.score if self.ended else 0.0
        text = self.writer.take_text()
        return News(self.number, text, tokens, likeliest, self.made, self.ended, score)


class Engine:
    """A queue, first come, first served, and a thread that writes up to `rows` samples at once.

    A sample's text is that of sample.py with the same settings, whatever is written beside it.
    """

    def __init__(self, sampler: Any, rows: int, queue: int) -> None:
        """`sampler` is a sample.Sampler; `queue` requests may wait."""
        self.model, self.tokenizer, self.rows, self.queue = sampler.model, sampler.tokenizer, rows, queue
        self.waiting: deque[Request] = deque()
        self.samples: list[Sample] = []  # as the rows of the batch
        self.batch = Batch(self.model, rows)
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Take them all, or none and raise Full. The samples of each have to fit into the rows."""
        with self.changed:
            free = max(0, self.rows - len(self.samples))
            if len(self.waiting) + len(requests) > self.queue + free:
                raise Full
            self.waiting.extend(requests)
            self.changed.notify()

    def close(self) -> None:
        """End the thread. What is not written yet is lost."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def work(self) -> None:
        """The thread: as long as there is something to write, a token more of each sample."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.samples or self.waiting or self.closed)
                if self.closed:
                    return
            try:
                with torch.no_grad():
                    self.remove_ended()
                    self.begin()
                    if self.samples:
                        self.write_on()
                self.tell()
            except Exception as error:  # those who wait must know, and others can still be served
                self.fail(error)

    def remove_ended(self) -> None:
        for row in reversed(range(len(self.samples))):
            if self.samples[row].ended or self.samples[row].request.gone:
                self.batch.leave(row)
                last = self.samples.pop()
                if row < len(self.samples):
                    self.samples[row] = last

    def begin(self) -> None:
        """Let in those whose turn it is, as far as there is room."""
        begun: list[Request] = []
        room = self.rows - len(self.samples)
        with self.changed:
            while self.waiting and (self.waiting[0].gone or self.waiting[0].asked.num_samples <= room):
                request = self.waiting.popleft()
                if not request.gone:
                    begun.append(request)
                    room -= request.asked.num_samples
        begun.sort(key=lambda request: request.asked.num_samples)
        self.samples += [
            Sample(request, n, self.tokenizer) for request in begun for n in range(request.asked.num_samples)
        ]
        for copies in sorted({request.asked.num_samples for request in begun}):
            alike = [request.prompt for request in begun if request.asked.num_samples == copies]
            self.batch.join([torch.tensor(prompt) for prompt in alike], copies)

    def write_on(self) -> None:
        """A token more of each of B samples."""
        logits = self.batch.read()[:, : self.tokenizer.vocab_size]  # (B, V)
        ids = self.choose(logits)  # (B, 1)
        self.batch.add(ids)
        logprobs, likeliest = [0.0] * len(ids), [[]] * len(ids)
        if any(sample.request.asked.show_probs for sample in self.samples):
            chances = logits.float().log_softmax(dim=-1)
            logprobs = chances.gather(1, ids)[:, 0].tolist()
            most = max(sample.request.likeliest for sample in self.samples)
            values, places = chances.topk(min(most, chances.size(-1)))  # (B, most)
            best = zip(places.tolist(), values.tolist(), strict=True)
            likeliest = [
                list(self.named(*row))[: sample.request.likeliest]
                for sample, row in zip(self.samples, best, strict=True)
            ]
        for sample, id, *more in zip(self.samples, ids[:, 0].tolist(), logprobs, likeliest, strict=True):
            sample.add(id, *more)

    def named(self, ids: list[int], logprobs: list[float]) -> Iterator[Token]:
        """These tokens with their texts."""
        return (Token(self.tokenizer.decode([id]), id, lp) for id, lp in zip(ids, logprobs, strict=True))

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next ids (B, 1), of each sample by its own settings."""
        groups: dict[Choice, list[int]] = {}
        for row, sample in enumerate(self.samples):
            groups.setdefault(sample.request.choice, []).append(row)
        draws = np.array([[sample.draws[sample.made]] for sample in self.samples])  # (B, 1)
        ids = torch.empty(len(draws), 1, dtype=torch.long, device=logits.device)
        for choice, rows in groups.items():
            seen = torch.stack([self.samples[row].seen for row in rows]).to(logits.device)
            some = torch.from_numpy(draws[rows]).to(logits.device)
            ids[rows] = sample_token(logits[rows], choice, some, seen if seen.numel() else None)
        return ids

    def tell(self) -> None:
        """News of those that have begun, have ended, or were not told for a while."""
        now = time.monotonic()
        for sample in self.samples:
            if sample.ended or sample.made == 1 or now - sample.told_at >= TELL_EVERY:
                sample.told_at = now
                sample.request.tell(sample.news())

    def fail(self, error: Exception) -> None:
        """End what is being written, with the reason, and be ready for more."""
        reason = (
            "out of memory; ask for fewer samples at once" if is_out_of_memory(error) else "internal error"
        )
        if not is_out_of_memory(error):
            traceback.print_exc()
        for sample in self.samples:
            sample.request.tell(News(sample.number, reason, ended="error"))
        self.samples, self.batch = [], None  # the old one's memory first
        self.batch = Batch(self.model, self.rows)
