"""An ordered map over threads with bounded look-ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def map_ahead(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    """Yields `function(item)` for every item, in order; at most two results per thread are pending."""
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also if the consumer stops early
            for future in pending:
                future.cancel()
