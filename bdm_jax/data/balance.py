"""Classes alike often in an epoch, as Kolors balances the concepts of its first phase."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

MOST = 100  # times a record in an epoch


def repeats(classes: Sequence[Hashable], seed: int = 0, most: int = MOST) -> np.ndarray:
    """How often each record is wanted in an epoch so that all classes are alike often, (N,) int64, each at least 1.

    Every class gets as many as the largest has: its records in turn, the last ones chosen by `seed`. A record comes at
    most `most` times, so that a class of few is not learnt by heart; it stays rarer then.
    """
    counts, order = Counter(classes), np.random.default_rng(seed).permutation(len(classes))
    wanted = max(counts.values(), default=0)
    found, seen = np.zeros(len(classes), np.int64), Counter()
    for index in order:
        one = classes[index]
        whole, rest = divmod(wanted, counts[one])
        found[index] = min(most, whole + (seen[one] < rest))
        seen[one] += 1
    return found
