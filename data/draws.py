"""Which windows of the ids a step trains on: functions of seed and step, so that nothing is stored."""

import math

import numpy as np


def random_starts(seed: int, step: int, count: int, end: int, purpose: int = 0) -> np.ndarray:
    """`count` random numbers below `end`, (count,): a function of the arguments, not of earlier draws.

    Philox is a counter-based generator ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011).
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, purpose, step])
    return np.random.Generator(philox).integers(0, end, size=count)


def epoch_starts(seed: int, first: int, count: int, length: int, T: int) -> np.ndarray:
    """Where samples first, first + 1, ... start, of T tokens and a target, among `length` ids: (count,).

    Each epoch cuts the text into windows, at places of its own, and takes each window once, in an order of
    its own: sample n is window n % windows of epoch n // windows, so that nothing is stored.
    """
    windows = max(1, (length - 1) // T - 1)  # one less than fit: it leaves T + 1 or more places for the first
    numbers = first + np.arange(count)
    starts = np.empty(count, np.int64)
    for epoch in np.unique(numbers // windows):
        here = numbers // windows == epoch
        keys = np.random.SeedSequence((seed, int(epoch))).generate_state(7, np.uint64)
        offset = int(keys[6]) % (length - windows * T)
        starts[here] = shuffled(numbers[here] % windows, windows, keys[:6]) * T + offset
    return starts


def shuffled(places: np.ndarray, end: int, keys: np.ndarray) -> np.ndarray:
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
