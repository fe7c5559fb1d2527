"""Requests to end: SIGTERM and SIGINT are heard between steps, by all processes of a job at the same step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """A function from a step's number to whether the run is asked to end after it; to be called after every step.

    With several processes a signal to one of them is enough. JAX's preemption service hears SIGTERM there and finds a
    step that none has passed; SIGINT is handed on to it.
    """
    if jax.process_count() > 1:

        def terminate(*_):
            os.kill(os.getpid(), signal.SIGTERM)

        before = {signal.SIGINT: signal.signal(signal.SIGINT, terminate)}
        asked = multihost_utils.reached_preemption_sync_point
    else:
        stop: list[bool] = []

        def hear(*_):
            stop.append(True)

        def asked(step):
            return bool(stop)

        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
