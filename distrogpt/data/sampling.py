"""Which windows of the ids a step trains on: functions of seed and step, so that nothing is stored."""

import math
from collections.abc import Sequence

import numpy as np

WEIGHT_UNITS = 1 << 20  # in such parts of one are weights of a mixture counted, so that sums are exact


def random_starts(seed: int, step: int, count: int, end: int, purpose: int = 0) -> np.ndarray:
    """`count` random numbers below `end`, (count,): a function of the arguments, not of earlier draws.

    Philox is a counter-based generator ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011).
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, purpose, step])
    return np.random.Generator(philox).integers(0, end, size=count)


def epoch_starts(seed: int, first: int, count: int, length: int, T: int, part: int = 0) -> np.ndarray:
    """Where samples first, first + 1, ... start, of T tokens and a target, among `length` ids: (count,).

    Each epoch cuts the text into windows, at places of its own, and takes each window once, in an order of
    its own: sample n is window n % windows of epoch n // windows, so that nothing is stored.
    """
    windows = windows_per_epoch(length, T)
    order, more = epoch_order(seed, first, count, windows, part)
    return order * T + (more % np.uint64(length - windows * T)).astype(np.int64)


def windows_per_epoch(length: int, T: int) -> int:
    """How many windows of T tokens and a target an epoch of `length` ids has."""
    return max(1, (length - 1) // T - 1)  # one less than fit: it leaves T + 1 or more places for the first


def epoch_order(seed: int, first: int, count: int, size: int, part: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` things samples first, first + 1, ... take, each once per epoch, in an order of the
    epoch's own: (count,); and a random number of 64 bits that the samples of an epoch share: (count,).

    `part` of a mixture has orders of its own.
    """
    numbers = first + np.arange(count)
    order, more = np.empty(count, np.int64), np.empty(count, np.uint64)
    for epoch in np.unique(numbers // size):
        here = numbers // size == epoch
        entropy = (seed, int(epoch), part) if part else (seed, int(epoch))
        keys = np.random.SeedSequence(entropy).generate_state(7, np.uint64)
        order[here] = feistel_permutation(numbers[here] % size, size, keys[:6])
        more[here] = keys[6]
    return order, more


def interleave(first: int, count: int, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which part of a mixture samples first, first + 1, ... belong to, and which of the part's own samples
    each of them is: (count,) twice. Nothing is random: of any samples in a row, a part has its weight, which
    is counted in 2^-20, to within as many samples as there are parts.

    Of the first n samples, the first part has n·W/D, rounded down, if W/D is its weight; so sample n is its
    where that number rises after it. What is left goes to the other parts in the same way (Bresenham,
    "Algorithm for computer control of a digital plotter", 1965).
    """
    numbers = first + np.arange(count)  # as the parts from `part` on count them
    which, within = np.empty(count, np.int64), np.empty(count, np.int64)
    left = np.arange(count)
    for part, weight in enumerate(weights[:-1]):
        W = min(max(round(weight / sum(weights[part:]) * WEIGHT_UNITS), 1), WEIGHT_UNITS - 1)
        before = numbers * W // WEIGHT_UNITS
        taken = (numbers + 1) * W // WEIGHT_UNITS > before
        which[left[taken]], within[left[taken]] = part, before[taken]
        left, numbers = left[~taken], (numbers - before)[~taken]
    which[left], within[left] = len(weights) - 1, numbers
    return which, within


def feistel_permutation(places: np.ndarray, end: int, keys: np.ndarray) -> np.ndarray:
    """Where these of the numbers 0..end-1 go when all of them are shuffled by the keys, (N,): each by itself.

    A Feistel network of six rounds permutes the numbers below the next 4^bits; what is not below `end` goes
    in again until it is ("Ciphers with Arbitrary Finite Domains", Black and Rogaway, 2002).
    """
    bits = np.uint64(max(1, math.ceil(int(end - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(bits)) - 1)
    x = places.astype(np.uint64)
    out = np.ones(len(x), bool)
    while out.any():
        left, right = x[out] >> bits, x[out] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        x[out] = (left << bits) | right
        out = x >= end
    return x.astype(np.int64)
