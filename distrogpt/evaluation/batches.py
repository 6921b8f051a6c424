"""Questions in batches that the ranks share."""

from collections.abc import Callable, Sequence

import numpy as np

from distrogpt.runtime import Runtime


def never() -> bool:
    """The stop_requested of an evaluation that is not interrupted."""
    return False


def map_batches(
    compute: Callable[[list[int]], np.ndarray],
    lengths: Sequence[int],
    width: int,
    batch_size: int,
    runtime: Runtime,
    stop_requested: Callable[[], bool] = never,
) -> np.ndarray | None:
    """compute(indices), integers (B, width), in batches of samples of similar length: (N, width).

    All ranks compute equally often; a batch too many is a repeated one and does not count. Returns None if
    stop_requested, which has to return the same on all ranks.
    """
    results = np.zeros((len(lengths), width), np.int64)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # what takes most memory comes first
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    for number in range(runtime.rank, len(batches) + runtime.rank, runtime.world_size):
        if stop_requested():
            return None
        batch = batches[number % len(batches)]
        rows = compute(batch)
        if number < len(batches):
            results[batch] = rows
    return runtime.sum_over_ranks(results)
