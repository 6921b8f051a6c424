"""One network, many who ask: their samples are written together, and each begins and ends when it will.

One thread reads the network, and tells in pieces what became certain of each sample; others ask.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from distrogpt.errors import is_out_of_memory
from distrogpt.inference.decoder import DecodingBatch
from distrogpt.inference.detokenizer import Detokenizer, Token
from distrogpt.inference.sampling import SamplingParams, sample_token, uniform_noise
from distrogpt.settings import SampleConfig

TELL_EVERY = 0.05  # seconds: eyes hardly want more, and each telling wakes others on the same cores


class QueueFull(Exception):
    """As many wait as may."""


class EngineClosed(Exception):
    """Nothing is written any more."""


class RequestOutput(NamedTuple):
    """What became certain of a sample since the last news of it."""

    sample: int  # its number in the request
    text: str = ""
    tokens: list[Token] = []
    likeliest: list[list[tuple[int, float]]] = []  # for each of these, ids and log-probabilities at its place
    made: int = 0  # tokens so far, with the one that ended it
    ended: str | None = None  # why: stop, length, or error, which `text` says then
    score: float = 0.0  # the mean log-likelihood of its tokens, when it has ended


class Request:
    """A prompt that is to go on in asked.num_samples samples."""

    def __init__(
        self,
        prompt: list[int],
        asked: SampleConfig,
        tell: Callable[[RequestOutput], None],
        likeliest: int = 0,
    ) -> None:
        """`tell` is called in the engine's thread. With asked.show_probs, chances are told too, and those of
        so many `likeliest` tokens at each place."""
        self.prompt, self.asked, self.tell, self.likeliest = prompt, asked, tell, likeliest
        self.choice = SamplingParams.from_settings(asked)
        self.draws = uniform_noise(asked.seed, asked.num_samples, asked.max_new_tokens).numpy()
        self.gone = False  # nobody waits for it any more


class Sample:
    """A row of the batch: who asked for it, what is written there, and how much of that was told."""

    def __init__(self, request: Request, number: int, tokenizer: Any) -> None:
        asked = request.asked
        self.request, self.number, self.draws = request, number, request.draws[number]  # (max_new_tokens,)
        self.writer = Detokenizer(tokenizer, asked.stop, tokenizer.end_of_text if asked.stop_at_end else None)
        self.likeliest: list[list[tuple[int, float]]] = []  # as the writer's tokens
        self.told, self.told_at = 0, 0.0
        self.ended: str | None = None
        self.over = False  # and that was told
        self.seen = set(request.prompt)  # ids that a penalty of repetition is for

    @property
    def made(self) -> int:
        """Tokens so far, with the one that ended it."""
        return len(self.writer.logprobs)

    def add(self, id: int, logprob: float, likeliest: list[tuple[int, float]]) -> None:
        """Take the next token."""
        before = len(self.writer.tokens)
        self.writer.add(id, logprob)
        self.likeliest += [likeliest] * (len(self.writer.tokens) - before)  # none of <|endoftext|>
        self.seen.add(id)
        if self.writer.ended:
            self.ended = "stop"
        elif self.made == len(self.draws):
            self.writer.close()
            self.ended = "length"

    def news(self) -> RequestOutput:
        """What became certain since the last call."""
        tokens = self.writer.take_tokens()
        likeliest = self.likeliest[self.told : self.told + len(tokens)]
        self.told += len(tokens)
        score = self.writer.score if self.ended else 0.0
        text = self.writer.take_text()
        return RequestOutput(self.number, text, tokens, likeliest, self.made, self.ended, score)


class Engine:
    """A queue, first come, first served, of which `work` writes up to `rows` samples at once.

    A sample's text is that of sample.py with the same settings, whatever is written beside it.
    """

    def __init__(self, sampler: Any, rows: int, queue: int) -> None:
        """`sampler` is a sample.Sampler; `queue` requests may wait."""
        self.model, self.tokenizer, self.rows, self.queue = sampler.model, sampler.tokenizer, rows, queue
        self.waiting: deque[Request] = deque()
        self.samples: list[Sample] = []  # as the rows of the batch
        self.batch = DecodingBatch(self.model, rows)
        self.changed, self.closed, self.told_all = threading.Condition(), False, threading.Event()

    def submit(self, requests: list[Request]) -> None:
        """Take them all, or none and raise Full; Closed. The samples of each have to fit into the rows."""
        with self.changed:
            if self.closed:
                raise EngineClosed
            self.waiting = deque(request for request in self.waiting if not request.gone)
            free = max(0, self.rows - len(self.samples))
            begins = 0  # of those that come, at once
            for request in [*self.waiting, *requests]:
                free -= request.asked.num_samples
                begins += free >= 0
            if len(self.waiting) + len(requests) > self.queue + begins:
                raise QueueFull
            self.waiting.extend(requests)
            self.changed.notify()

    def close(self) -> None:
        """Let `work` end, and wait until it has told whoever waits."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.told_all.wait()

    def work(self) -> None:
        """Until the engine is closed: a token more of each sample, as long as there is something to write."""
        while not self.closed:
            with self.changed:
                # not for ever, as Windows lets no Ctrl-C through meanwhile
                self.changed.wait_for(lambda: self.samples or self.waiting or self.closed, timeout=1)
            wrong = None
            try:
                with torch.no_grad():
                    self.remove_ended()
                    self.begin()
                    if self.samples:
                        self.write_on()
                self.tell()
            except Exception as error:  # those who wait must know, and others can still be served
                wrong = reason_of(error)
            if wrong:  # here nothing holds the old batch any more
                self.start_anew(wrong)
        for request in self.waiting:
            self.samples += [Sample(request, n, self.tokenizer) for n in range(request.asked.num_samples)]
        self.end(self.samples, "the server ends")
        self.told_all.set()

    def start_anew(self, wrong: str) -> None:
        """End what is being written, for a reason, and be ready for more; or end, where that cannot be."""
        self.end(self.samples, wrong)
        self.samples, self.batch = [], None
        try:
            self.batch = DecodingBatch(self.model, self.rows)
        except Exception as error:
            reason_of(error)
            with self.changed:
                self.closed = True

    def end(self, samples: list[Sample], wrong: str) -> None:
        """Tell whoever waits for these samples what is wrong."""
        for sample in samples:
            if not sample.over:
                sample.ended, sample.over = "error", True
                sample.request.tell(RequestOutput(sample.number, wrong, ended="error"))

    def remove_ended(self) -> None:
        for row in reversed(range(len(self.samples))):
            if self.samples[row].ended or self.samples[row].request.gone:
                self.batch.remove_sequence(row)
                last = self.samples.pop()
                if row < len(self.samples):
                    self.samples[row] = last

    def begin(self) -> None:
        """Let in those whose turn it is, as far as there is room."""
        begun: list[Request] = []
        with self.changed:
            room = self.rows - len(self.samples)
            while self.waiting and (self.waiting[0].gone or self.waiting[0].asked.num_samples <= room):
                request = self.waiting.popleft()
                if not request.gone:
                    begun.append(request)
                    room -= request.asked.num_samples
            begun.sort(key=lambda request: request.asked.num_samples)
            self.samples += [
                Sample(request, n, self.tokenizer)
                for request in begun
                for n in range(request.asked.num_samples)
            ]
        for copies in sorted({request.asked.num_samples for request in begun}):
            alike = [request.prompt for request in begun if request.asked.num_samples == copies]
            self.batch.add_sequences([torch.tensor(prompt) for prompt in alike], copies)

    def write_on(self) -> None:
        """A token more of each of B samples."""
        logits = self.batch.next_logits()[:, : self.tokenizer.vocab_size]  # (B, V)
        ids = self.choose(logits)  # (B, 1)
        self.batch.append(ids)
        logprobs, most = [0.0] * len(ids), max(sample.request.likeliest for sample in self.samples)
        places = values = [()] * len(ids)
        if any(sample.request.asked.show_probs for sample in self.samples):
            chances = logits.float().log_softmax(dim=-1)
            logprobs = chances.gather(1, ids)[:, 0].tolist()
            if most:
                best = chances.topk(min(most, chances.size(-1)))  # (B, most)
                places, values = best.indices.tolist(), best.values.tolist()
        for row, (sample, id) in enumerate(zip(self.samples, ids[:, 0].tolist(), strict=True)):
            wanted = sample.request.likeliest
            likeliest = list(zip(places[row][:wanted], values[row][:wanted], strict=True))
            try:
                sample.add(id, logprobs[row], likeliest)
            except Exception as error:  # of this text alone
                self.end([sample], reason_of(error))

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next ids (B, 1), of each sample by its own settings."""
        groups: dict[SamplingParams, list[int]] = {}
        for row, sample in enumerate(self.samples):
            groups.setdefault(sample.request.choice, []).append(row)
        draws = torch.tensor([[sample.draws[sample.made]] for sample in self.samples])  # (B, 1)
        draws = draws.to(logits.device)
        seen = {choice: self.seen(rows, logits) for choice, rows in groups.items()}
        if len(groups) == 1:
            (choice,) = groups
            return sample_token(logits, choice, draws, seen[choice])
        ids = torch.empty(draws.shape, dtype=torch.long, device=logits.device)
        for choice, rows in groups.items():
            ids[rows] = sample_token(logits[rows], choice, draws[rows], seen[choice])
        return ids

    def seen(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor | None:
        """Which ids stand in the texts of these samples already, (rows, V); None where it makes no matter."""
        if self.samples[rows[0]].request.choice.repetition_penalty == 1:
            return None
        seen = torch.zeros(len(rows), logits.size(1), dtype=torch.bool)
        for number, row in enumerate(rows):
            seen[number, list(self.samples[row].seen)] = True
        return seen.to(logits.device)

    def tell(self) -> None:
        """News of those that have begun, have ended, or were not told for a while."""
        now = time.monotonic()
        for sample in self.samples:
            due = sample.ended or sample.made == 1 or now - sample.told_at >= TELL_EVERY
            if due and not sample.over:
                sample.told_at = now
                try:
                    sample.request.tell(sample.news())
                    sample.over = sample.ended is not None
                except Exception as error:  # of this text alone
                    self.end([sample], reason_of(error))


def reason_of(error: Exception) -> str:
    """What whoever asked is told of an error; what is a bug stands on stderr, too."""
    if is_out_of_memory(error):
        return "out of memory; ask for fewer samples at once"
    traceback.print_exception(error)
    return "internal error"
