"""Questions in batches that the ranks share."""

from collections.abc import Callable, Sequence

import numpy as np

from distrogpt.errors import UserError
from distrogpt.runtime import Runtime, progress_bar

StopCheck = Callable[[], bool] | None  # None: never


class EvaluationStopped(UserError):
    """A rank requested a stop, or cannot read its data."""


def map_batches(
    compute: Callable[[list[int]], np.ndarray],
    lengths: Sequence[int],
    width: int,
    batch_size: int,
    runtime: Runtime,
    stop_requested: StopCheck,
) -> np.ndarray:
    """compute(indices), integers (B, width), in batches of samples of similar length: (N, width). All ranks
    compute equally often: a batch too many is repeated and does not count. Raises EvaluationStopped if
    stop_requested, which has to return the same on all ranks."""
    results = np.zeros((len(lengths), width), np.int64)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # what takes most memory comes first
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    numbers = range(runtime.rank, len(batches) + runtime.rank, runtime.world_size)
    with progress_bar(0, len(numbers), runtime, " batches", "asks questions") as advance:
        for number in numbers:
            if stop_requested is not None and stop_requested():
                raise EvaluationStopped("stopped by a signal; start it again")
            batch = batches[number % len(batches)]
            rows = compute(batch)
            if number < len(batches):
                results[batch] = rows
            advance()
    return runtime.sum_over_ranks(results)
