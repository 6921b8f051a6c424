"""train.py --minutes=N: choose the model and its training so that this machine learns most in that time.

The machine is measured: a few training steps of some sizes. The rest follows the rules of scaling.py, whose
constants were fitted to runs of many sizes, times and texts. Settings that the user gives are kept, and the
others are chosen around them.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import run_config_file
from distrogpt import scaling
from distrogpt.data.dataset import Dataset, open_dataset
from distrogpt.data.meta import DATA
from distrogpt.data.tokenizer import tokenizer_of
from distrogpt.errors import UserError
from distrogpt.runtime import Runtime, activity
from distrogpt.scaling import Size, Text
from distrogpt.settings import TrainConfig
from distrogpt.training.batches import MicroBatch
from distrogpt.training.distributed import distribute
from distrogpt.training.optim import make_optimizers
from distrogpt.training.run_directory import restarted_run
from distrogpt.training.schedule import end_seconds
from distrogpt.training.startup import (
    check_ranks,
    inherit_settings,
    new_model_config,
    tokens_per_step,
    with_changes,
)
from model import GPT

log = logging.getLogger("distrogpt")

FIRST = Size(4, 4, 128)  # the size that is measured first
MEASURING = 0.005  # of the minutes, to measure a size; at least half a second, at most two
MEASURING_LIMIT = 0.1  # of the minutes; after them, no further size is measured
COMPILING, COMPILED = 45.0, 1.6  # on a GPU, the seconds that torch.compile takes, and the gain in speed
EVALUATING = 0.05  # of the minutes, for all evaluations together
SAMPLE = 1 << 20  # tokens whose difficulty is measured
MAX_ITERS = 10**9  # the time ends a run, not its steps
TOO_LARGE = 1e9  # seconds of a step for which memory is too small


def has_a_size(config: TrainConfig) -> UserError:
    """The error if init_from names a model."""
    reason = f"minutes chooses the size of a new model, but init_from={config.init_from} has a size"
    return UserError(f"{reason}; give --max_minutes={config.minutes:g} instead")


def modern_recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings of config/modern.py."""
    return run_config_file(DATA.parent / "config" / "modern.py", asdict(config))


def size_of(config: TrainConfig) -> Size:
    return Size(config.n_layer, config.n_head, config.n_embd)


def possible_sizes(given: dict[str, Any]) -> list[Size]:
    """The sizes of scaling.py that suit what is given, with the layers, heads and width that are given."""
    sizes = []
    for size in scaling.SIZES:
        width = given.get("n_embd", size.n_embd)
        heads = given.get("n_head", scaling.heads_of(width))
        sizes.append(Size(given.get("n_layer", size.n_layer), heads, width))
    kv_heads = given.get("n_kv_head") or 1
    possible = [
        size
        for size in dict.fromkeys(sizes)
        if size.n_embd % (2 * size.n_head) == 0 and size.n_head % kv_heads == 0  # rotary needs pairs
    ]
    return possible or sizes[:1]  # GPTConfig reports the mistake


@activity("reading the text")
def read_text(data: Dataset) -> Text:
    """What scaling.py needs to know of a dataset: all of its tokens, and a sample of the largest part."""
    splits = ("train", "val" if "val" in data.parts[0].streams else "train")
    tokens, val_tokens = (sum(len(part.streams[split]) for part in data.parts) for split in splits)
    stream = max(data.parts, key=lambda part: part.weight).streams["train"]
    ids = stream.windows(np.array([0]), min(SAMPLE, len(stream)))[0]
    bytes_per_token, difficulty = 1.0, None
    with suppress(UserError):  # GPT-2's tokenizer, if it is not here and cannot be downloaded
        if data.meta["tokenizer"]:
            sample = tokenizer_of(data.meta).decode_bytes(ids.tolist())
            bytes_per_token, difficulty = len(sample) / len(ids), scaling.difficulty_of(sample)
    return Text(tokens, val_tokens, data.meta["vocab_size"], bytes_per_token, difficulty)


@dataclass
class Chooser:
    """Finds the size that learns most in the time that is left, given the speed of some sizes. The clock and
    the measurements of rank 0 count, so that all ranks choose the same."""

    config: TrainConfig
    meta: dict[str, Any]
    text: Text
    runtime: Runtime
    training_step: Callable[..., Any]  # train.py's
    deadline: float  # by time.perf_counter()
    seconds_per_token: dict[Size, float] = field(default_factory=dict)  # of the sizes that were measured
    largest_batch: dict[Size, int] = field(default_factory=dict)  # of sizes for which memory was too small

    def __post_init__(self) -> None:
        self.given = {name: getattr(self.config, name) for name in self.config.given}
        self.sizes = possible_sizes(self.given)
        self.recipe = modern_recipe(self.config)

    def from_rank_0(self, value: float) -> float:
        return self.runtime.all_reduce_sum(value if self.runtime.is_main else 0.0)[0]

    def settings(self, size: Size, tokens: float) -> TrainConfig:
        """Those of the modern recipe and of scaling.py for this size, and those that are given."""
        on_gpu, ranks = self.runtime.device.type == "cuda", self.runtime.world_size
        chosen = self.recipe | scaling.recipe(size, self.text, tokens, ranks, on_gpu, self.given)
        while chosen["batch_size"] > self.largest_batch.get(size, math.inf):
            chosen["batch_size"] = math.ceil(chosen["batch_size"] / 2)
            chosen["gradient_accumulation_steps"] *= 2
        return with_changes(self.config, **chosen | self.given)

    def speed(self, size: Size) -> float:
        """Seconds per token, measured or interpolated. Sizes smaller or larger than all that were measured
        are taken to reach as many FLOP/s as the nearest of these."""
        measured = sorted(self.seconds_per_token, key=lambda s: s.parameters(0))
        vocab_size = self.text.vocab_size
        *known, wanted = (math.log(s.flops_per_token(vocab_size, 256)) for s in (*measured, size))
        nearest = min(max(wanted, known[0]), known[-1])
        seconds = np.interp(nearest, known, np.log([self.seconds_per_token[s] for s in measured]))
        return math.exp(seconds + wanted - nearest)

    def tokens(self, size: Size) -> float:
        """How many tokens this size can train on in the time that is left."""
        limit = 60 * self.config.minutes
        seconds = self.from_rank_0(self.deadline - time.perf_counter()) - EVALUATING * limit
        seconds -= end_seconds(self.config)
        return self.tokens_in(max(seconds, 0.1 * limit), self.speed(size))

    def tokens_in(self, seconds: float, speed: float) -> float:
        """How many tokens are trained on in these seconds. `speed` is in seconds per token, not compiled."""
        if self.runtime.device.type == "cuda" and self.config.compile and seconds > 2 * COMPILING:
            seconds, speed = seconds - COMPILING, speed / COMPILED
        return seconds / speed

    def best(self) -> Size:
        """The best size. It and the next larger one have been measured, if the time was enough for that, and
        all that seemed best before."""
        size: Size | None = FIRST if FIRST in self.sizes else self.sizes[0]
        begin, limit = time.perf_counter(), MEASURING_LIMIT * 60 * self.config.minutes
        self.measure(size)
        if self.from_rank_0(time.perf_counter() - begin) < limit / 4:
            self.measure(size)  # again: the first steps of a process are slower
        while size:
            losses = [scaling.relative_loss(size, self.text, self.tokens(size)) for size in self.sizes]
            best = int(self.from_rank_0(losses.index(min(losses))))
            near = self.sizes[best : best + 2]
            size = next((size for size in near if size not in self.seconds_per_token), None)
            if self.from_rank_0(time.perf_counter() - begin) > limit:
                break
            if size:
                self.measure(size)
        return self.sizes[best]

    def measure(self, size: Size) -> None:
        """Time training steps of a size, with smaller batches if memory is too small."""
        tokens = self.tokens(size) if self.seconds_per_token else 0.0
        while True:
            config = self.settings(size, tokens)
            try:
                seconds = self.seconds_per_step(config)
            except torch.OutOfMemoryError:
                seconds = TOO_LARGE
            if seconds == TOO_LARGE:
                torch.cuda.empty_cache()  # not before: the exception holds the tensors
                self.largest_batch[size] = config.batch_size // 2
                if self.largest_batch[size] and "batch_size" not in self.given:
                    continue
            self.seconds_per_token[size] = seconds / (tokens_per_step(config))
            return

    def seconds_per_step(self, config: TrainConfig) -> float:
        """The median time of some steps on random tokens, not compiled."""
        model = GPT(new_model_config(config, self.meta))
        replica = distribute(model, with_changes(config, compile=False), self.runtime)
        optimizers, scaler = make_optimizers(model, config, self.runtime), self.runtime.grad_scaler()
        shape = (config.batch_size, config.block_size + 1)
        ids = torch.randint(self.text.vocab_size, shape, device=self.runtime.device)
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), config.seed)
        batches = [batch] * (config.gradient_accumulation_steps // self.runtime.world_size)
        times: list[float] = []
        enough = min(max(0.5, MEASURING * 60 * self.config.minutes), 2.0)
        while len(times) < 2 or self.from_rank_0(sum(times)) < enough:
            begin = time.perf_counter()
            self.training_step(replica, optimizers, scaler, batches, config.grad_clip, self.runtime)
            times.append(time.perf_counter() - begin)
        return self.from_rank_0(statistics.median(times[1:]))


def evaluations(config: TrainConfig, text: Text, steps: int, speed: float) -> dict[str, Any]:
    """Settings of evaluations that take EVALUATING of the time: of all of val if that can be done three
    times, else of as many batches as can be evaluated ten times. `speed` is in seconds per token."""
    seconds = EVALUATING * 60 * config.minutes
    whole = text.val_tokens * speed / 3  # a third of a training step, as there is no backward pass
    batch = config.batch_size * config.block_size * speed / 3
    batches, number = 0, int(seconds / whole)
    if number < 3:
        batches, number = max(1, int(seconds / 10 / batch)), 10
    interval = math.ceil(steps / (min(number, 20) - 1))  # one is at the start
    return {"eval_splits": "val", "eval_iters": batches, "eval_interval": max(1, interval)}


def check_settings(config: TrainConfig, runtime: Runtime) -> None:
    """Raises UserError if the settings cannot be chosen around those that are given."""
    if config.init_from not in ("scratch", "auto"):
        raise has_a_size(config)
    given = {"gradient_accumulation_steps": runtime.world_size}  # any number that the ranks can share
    check_ranks(config if given.keys() & config.given else with_changes(config, **given), runtime)


def choose_settings(
    config: TrainConfig, runtime: Runtime, training_step: Callable[..., Any], started: float
) -> TrainConfig:
    """The settings with max_minutes instead of minutes: those that are given, and the best others for this
    text and this machine, the same on all ranks; without minutes, all as it is. The minutes count from
    `started`, by time.perf_counter(). Raises UserError."""
    if config.minutes is None:
        return config
    check_settings(config, runtime)
    if runtime.all_reduce_sum(runtime.is_main and restarted_run(Path(config.out_dir)) is not None)[0]:
        if (config := inherit_settings(config, is_restarted=True)).minutes is None:
            return config
    data = open_dataset(config if "block_size" in config.given else with_changes(config, block_size=1))
    text, deadline = read_text(data), started + 60 * config.minutes
    chooser = Chooser(config, data.meta, text, runtime, training_step, deadline)
    size = chooser.best()
    tokens, speed = chooser.tokens(size), chooser.speed(size)
    chosen = chooser.settings(size, tokens)
    if "max_iters" in chooser.given:
        tokens = min(tokens, chosen.max_iters * tokens_per_step(chosen))
    steps = max(1, round(tokens / tokens_per_step(chosen)))
    speeds = [f"{size} {1 / seconds:,.0f}" for size, seconds in chooser.seconds_per_token.items()]
    log.info(f"measured tokens/s of layers/heads/width: {', '.join(speeds)}")
    for line in choice_lines(chosen, text, tokens, config.minutes):
        log.info(line)
    changes = evaluations(chosen, text, steps, speed)
    changes |= {"log_interval": max(1, steps // 50), "always_save_checkpoint": False, "max_iters": MAX_ITERS}
    limit = {"minutes": None, "max_minutes": config.minutes}
    return with_changes(chosen, **changes | chooser.given | limit)


def choice_lines(config: TrainConfig, text: Text, tokens: float, minutes: float) -> list[str]:
    """Lines about the settings that were chosen: why, and what to expect."""
    size, passes = size_of(config), tokens / text.tokens
    times = f"{passes:,.1f} times the text's {text.tokens:,}" if passes else "each of them once"
    rates = f"muon_lr {config.muon_lr:g}, learning_rate {config.learning_rate:g}"
    decay = f"weight_decay {config.weight_decay:g}" + (f" for {passes:,.1f} passes" if passes else "")
    lines = [
        f"chosen   {size}, which is expected to have the lowest loss after {minutes:g} minutes",
        f"reads    {tokens:,.0f} tokens, {times}",
        f"rates    {rates}, {decay}, dropout {config.dropout:g}",
    ]
    if text.difficulty:
        nats, bits = scaling.expected_loss(size, text, tokens)
        error = scaling.LAW["error"]
        span = f"{nats * (1 - error):.2f} to {nats * (1 + error):.2f}"
        lines.append(f"expects  a val loss of {nats:.2f} ({span}), {bits:.2f} bits per byte")
    return lines
