"""When a server for which nobody has work ends by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..serving.tickets import Load


class Idle:
    """Watches whether anything is generated.

    Args:
        seconds: without any request after which it is over.
        clock: the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock = seconds, clock
        self._since, self._requests = clock(), 0

    def is_over(self, load: Load) -> bool:
        """Whether it is over, for what the scheduler has to do at this moment. Requests for health are no work."""
        if load.running or load.waiting or load.counters["requests"] != self._requests:
            self._since, self._requests = self._clock(), load.counters["requests"]
        return self._clock() - self._since >= self._seconds
