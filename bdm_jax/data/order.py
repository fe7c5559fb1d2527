"""Grain's order and generators by position, without its layers: for samples that cost less than those do."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from grain.experimental import index_shuffle

_SMALLEST = 100  # what Grain scales the smallest weight to before it rounds all of them down
_ROUNDS = 4  # of its shuffle
_BLOCK = 2**16  # its smallest


class Order:
    """Which record is at a position of a mixture: what `MapDataset.source(...).shuffle().repeat()` of each part, mixed
    by weight, gives there.

    Args:
        lengths: records of each part.
        weights: of the parts.
        seeds: of their shuffles; each epoch adds one.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seeds: Sequence[int]):
        scale = _SMALLEST / min(weights)
        self._shares = [int(weight * scale) for weight in weights]
        self._lengths, self._seeds = lengths, seeds
        self._shuffled = lru_cache(2 * len(lengths))(shuffled)

    def at(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        """(N,) int64 -> the part of each, and the place in its indices."""
        parts, turns = self._mixed(positions)
        places = []
        for part, turn in zip(parts, turns, strict=True):
            length = self._lengths[part]
            epoch, index = divmod(turn, length)
            seed = (self._seeds[part] + epoch) % 2**32
            if length <= _BLOCK:
                places.append(self._shuffled(length, seed)[index])
            else:
                places.append(index_shuffle(index, max_index=length - 1, seed=seed, rounds=_ROUNDS))
        return parts, places

    def _mixed(self, positions: np.ndarray) -> tuple[list[int], list[int]]:
        """The part of each position, and how many of the part came before. At each part, the positions that are not its
        own are numbered anew for the parts that follow; its own are those where that number does not grow.
        """
        now, after, left = positions, positions + 1, sum(self._shares)
        parts, turns = np.zeros(len(positions), np.int64), np.zeros(len(positions), np.int64)
        open_ = np.ones(len(positions), bool)
        for part, share in enumerate(self._shares):
            others_now, others_after = now * (left - share) // left, after * (left - share) // left
            own = open_ & (now - others_now != after - others_after)
            parts[own], turns[own] = part, (now - others_now)[own]
            open_ &= ~own
            now, after, left = others_now, others_after, left - share
        return parts.tolist(), turns.tolist()


class Generators:
    """The generators that `MapDataset.random_map` with this seed gives its transform; not for several threads."""

    def __init__(self, seed: int):
        bits = np.random.Philox(seed)
        self._bits, self._state, self._generator = bits, bits.state, np.random.Generator(bits)
        self._state["state"]["counter"][:] = 0

    def at(self, position: int) -> np.random.Generator:
        """That of a position, until the next call."""
        self._state["state"]["counter"][3] = position
        self._bits.state = self._state
        return self._generator


def shuffled(length: int, seed: int) -> list[int]:
    """`index_shuffle` of all of at most 2**16 indices, which one by one walk through the whole block in every epoch.

    A cipher permutes the block (SIMON, eprint 2013/404, words of 8 bits); an index is encrypted until it is below
    `length` again (cycle walking, Black and Rogaway 2002). Here all walks double their steps together.
    """
    if length == 1:
        return [0]
    value = np.arange(_BLOCK)
    left, right = value >> 8, value & 255
    keys = seed_sequence(seed, _ROUNDS)
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ _mixed_bits(right) ^ (first & 255)
        right = right ^ _mixed_bits(left) ^ (second & 255)
    encrypted = left << 8 | right
    walk = np.where(value < length, value, encrypted)  # those that have arrived stay
    found = encrypted[:length]
    while (found >= length).any():
        found, walk = walk[found], walk[walk]
    return found.tolist()


def seed_sequence(seed: int, count: int) -> list[int]:
    """What C++'s std::seed_seq makes of one seed, `count` < 7 numbers of 32 bits ([rand.util.seedseq])."""
    word, words = 2**32, [0x8B8B8B8B] * count
    lag = (count - 1) // 2
    p = (count - lag) // 2
    q = p + lag
    steps = max(2, count)
    for k in range(steps + count):
        one, two, here, last = (k + p) % count, (k + q) % count, k % count, (k - 1) % count
        if k < steps:
            mix = words[here] ^ words[one] ^ words[last]
            first = 1664525 * (mix ^ mix >> 27) % word
            second = (first + (1 if k == 0 else here + (seed if k == 1 else 0))) % word
            words[one], words[two] = (words[one] + first) % word, (words[two] + second) % word
        else:
            mix = (words[here] + words[one] + words[last]) % word
            first = 1566083941 * (mix ^ mix >> 27) % word
            second = (first - here) % word
            words[one], words[two] = words[one] ^ first, words[two] ^ second
        words[here] = second
    return words


def _mixed_bits(x: np.ndarray) -> np.ndarray:
    """SIMON's function of words of 8 bits; the turn by 8 bits leaves them as they are."""
    once, twice = (x << 1 | x >> 7) & 255, (x << 2 | x >> 6) & 255
    return once & x ^ twice
