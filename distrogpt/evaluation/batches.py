"""Run questions in batches, distributed over the ranks."""

from collections.abc import Callable, Sequence

import numpy as np

from distrogpt.errors import UserError
from distrogpt.runtime import Runtime, progress_bar

StopCheck = Callable[[], bool] | None  # None: never


class EvaluationStopped(UserError):
    """A rank requested a stop, or could not read its data."""


def map_batches(
    compute: Callable[[list[int]], np.ndarray],
    lengths: Sequence[int],
    width: int,
    batch_size: int,
    runtime: Runtime,
    stop_requested: StopCheck,
) -> np.ndarray:
    """The results (N, width) of compute(indices), which returns integers (B, width), in batches of samples of
    similar length. All ranks run equally many batches; a surplus one repeats another and is discarded. Raises
    EvaluationStopped if stop_requested, which has to return the same on all ranks."""
    results = np.zeros((len(lengths), width), np.int64)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # the largest first: memory fails early
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    numbers = range(runtime.rank, len(batches) + runtime.rank, runtime.world_size)
    with progress_bar(0, len(numbers), runtime, " batches", "evaluating questions") as advance:
        for number in numbers:
            if stop_requested is not None and stop_requested():
                raise EvaluationStopped("stopped by a signal; run the evaluation again")
            batch = batches[number % len(batches)]
            rows = compute(batch)
            if number < len(batches):
                results[batch] = rows
            advance()
    return runtime.sum_over_ranks(results)
