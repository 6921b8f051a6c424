"""The windows that a training step reads: pure functions of seed and step, so that no order is stored."""

import math
from collections.abc import Sequence

import numpy as np

WEIGHT_UNITS = 1 << 20  # weights of a mixture are multiples of 1 / WEIGHT_UNITS, so that sums are exact


def random_starts(seed: int, step: int, count: int, end: int, purpose: int = 0) -> np.ndarray:
    """`count` random numbers below `end`, (count,), which depend on the arguments alone.

    Philox is a counter-based generator ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011).
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, purpose, step])
    return np.random.Generator(philox).integers(0, end, size=count)


def epoch_starts(seed: int, first: int, count: int, length: int, T: int, part: int = 0) -> np.ndarray:
    """Starts of the samples first, first + 1, ..., of T tokens and a target, among `length` ids: (count,).
    Each epoch cuts the text into windows at its own offset, and reads each once in its own order."""
    windows = windows_per_epoch(length, T)
    order, offsets = epoch_order(seed, first, count, windows, part)
    return order * T + (offsets % np.uint64(length - windows * T)).astype(np.int64)


def windows_per_epoch(length: int, T: int) -> int:
    """The number of windows of T tokens and a target in an epoch of `length` ids."""
    return max(1, (length - 1) // T - 1)  # one less than fit, so that the offset has T + 1 values or more


def epoch_order(seed: int, first: int, count: int, size: int, part: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` items the samples first, first + 1, ... are: each item once per epoch, in an order that
    depends on the epoch and the `part` of a mixture; and a random 64-bit number per epoch: both (count,)."""
    samples = first + np.arange(count)
    order, offsets = np.empty(count, np.int64), np.empty(count, np.uint64)
    for epoch in np.unique(samples // size):
        in_epoch = samples // size == epoch
        entropy = (seed, int(epoch), part) if part else (seed, int(epoch))
        keys = np.random.SeedSequence(entropy).generate_state(7, np.uint64)
        order[in_epoch] = feistel_permutation(samples[in_epoch] % size, size, keys[:6])
        offsets[in_epoch] = keys[6]
    return order, offsets


def interleave(first: int, count: int, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The part of a mixture of each of the samples first, first + 1, ..., and its number among the part's own
    samples: (count,), (count,).

    Of the first n samples, floor(n·W/D) are the first part's, if W/D is its weight: sample n is one of them
    if that number rises after it. The rest goes to the other parts in the same way (Bresenham, "Algorithm for
    computer control of a digital plotter", 1965).
    """
    samples = first + np.arange(count)  # as numbered among the parts that are left
    which, within = np.empty(count, np.int64), np.empty(count, np.int64)
    left = np.arange(count)
    for part, weight in enumerate(weights[:-1]):
        W = min(max(round(weight / sum(weights[part:]) * WEIGHT_UNITS), 1), WEIGHT_UNITS - 1)
        before = samples * W // WEIGHT_UNITS
        mine = (samples + 1) * W // WEIGHT_UNITS > before
        which[left[mine]], within[left[mine]] = part, before[mine]
        left, samples = left[~mine], (samples - before)[~mine]
    which[left], within[left] = len(weights) - 1, samples
    return which, within


def feistel_permutation(indices: np.ndarray, end: int, keys: np.ndarray) -> np.ndarray:
    """The positions of some of the numbers 0..end-1 after a shuffle of all of them by the keys: (N,).

    A Feistel network permutes the numbers below the next 4^bits, one round per key; a result that is not
    below `end` goes in again ("Ciphers with Arbitrary Finite Domains", Black and Rogaway, 2002).
    """
    bits = np.uint64(max(1, math.ceil(int(end - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(bits)) - 1)
    x = indices.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> bits, x[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        x[outside] = (left << bits) | right
        outside = x >= end
    return x.astype(np.int64)
