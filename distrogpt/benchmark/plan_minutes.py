"""bench.py --plan=True with minutes: what train.py would train, and how many steps fit into max_minutes.

train.py measures the speed of some sizes. Here it follows from their MFU, which is given, assumed, or
measured for the sizes that seemed best on this machine. The start, compiling and evaluations take the time
that training/minutes.py expects.
"""

import math
from typing import Any

import numpy as np

from distrogpt import scaling
from distrogpt.data.dataset import open_dataset
from distrogpt.data.meta import GPT2_META
from distrogpt.scaling import Size, Text
from distrogpt.settings import BenchConfig
from distrogpt.training import minutes
from distrogpt.training.schedule import end_seconds
from distrogpt.training.startup import name_run, tokens_per_step, with_changes

STARTING = 10.0  # seconds to load torch and the data, and to measure some sizes
# English web text in GPT-2's tokens
WEB_TEXT = Text(math.inf, 10_000_000, GPT2_META["vocab_size"], 4.5, scaling.WEB_DIFFICULTY)


def text_of(config: BenchConfig, has_data: bool) -> Text:
    """The dataset as scaling.py needs it; without one, unlimited web text. Raises UserError."""
    return minutes.read_text(open_dataset(with_changes(config, block_size=1))) if has_data else WEB_TEXT


def training_seconds(config: BenchConfig, limit: float, on_gpu: bool) -> float:
    """The seconds of `limit` minutes in which training steps run."""
    seconds = 60 * limit * (1 - minutes.EVALUATING) - STARTING - end_seconds(config)
    if on_gpu and config.compile and seconds > 2 * minutes.COMPILING:
        seconds -= minutes.COMPILING
    return max(seconds, 6 * limit)


def sizes_for(config: BenchConfig) -> list[Size]:
    """The sizes among which `minutes` chooses. Raises UserError."""
    if config.init_from not in ("scratch", "auto"):
        raise minutes.has_a_size(config)
    config = name_run(config)
    return minutes.possible_sizes({name: getattr(config, name) for name in config.given})


def choose(
    config: BenchConfig, sizes: list[Size], text: Text, peak: float, mfus: dict[Size, float], on_gpu: bool
) -> BenchConfig:
    """The settings that train.py --minutes chooses on config.n_gpus devices of `peak` FLOP/s, with
    max_minutes. `mfus` has the MFU of some sizes, between which it is interpolated."""
    config = name_run(config)
    given = {name: getattr(config, name) for name in config.given}
    modern = minutes.modern_recipe(config) | {"max_iters": minutes.MAX_ITERS}
    seconds = training_seconds(config, config.minutes, on_gpu)

    def settings(size: Size, tokens: float) -> dict[str, Any]:
        return modern | scaling.recipe(size, text, tokens, config.n_gpus, on_gpu, given) | given

    def tokens_of(size: Size) -> float:
        known = sorted(mfus, key=lambda other: other.parameters(0))
        parameters = [math.log(other.parameters(0)) for other in known]
        mfu = np.interp(math.log(size.parameters(0)), parameters, [mfus[other] for other in known])
        flops = size.flops_per_token(text.vocab_size, settings(size, 0.0)["block_size"])
        return float(seconds * config.n_gpus * peak * mfu / flops)

    best = min(sizes, key=lambda size: scaling.relative_loss(size, text, tokens_of(size)))
    chosen = settings(best, tokens_of(best))
    return with_changes(config, **chosen | {"minutes": None, "max_minutes": config.minutes})


def fit_to_time(config: BenchConfig, seconds: float, tokens_per_second: float) -> BenchConfig:
    """The settings with as many steps as fit into the seconds, and no more than max_iters."""
    steps = round(seconds * tokens_per_second / tokens_per_step(config))
    return with_changes(config, max_iters=max(1, min(config.max_iters, steps)))
