"""How fast this process asks a store, and how often it has had to ask again.

The rate is free until the store asks for less; from then on it follows AIMD (Chiu and Jain, 1989): halved when the
store throttles, raised a little by each answer that comes. Every process keeps its own rate: a hundred workers find
their share of the store's limit without knowing of each other.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Final

log = logging.getLogger(__name__)

LOWEST: Final = 0.5  # requests per second
DECREASE: Final = 0.5
INCREASE: Final = 2.0  # requests per second more, in each second in which all that the rate allows are answered
# Requests in flight when the store began to throttle all come back refused: one reason to slow down, not fifty.
ONE_REFUSAL_SECONDS: Final = 1.0


class RetryReason(StrEnum):
    """Why a request is repeated: the values of the label `reason` of `mgmtn_s3_retries_total`."""

    THROTTLED = "throttled"  # SlowDown, 503, 429
    SERVER_ERROR = "server_error"  # other 5xx
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    BROKEN_BODY = "broken_body"
    ACCESS_DENIED = "access_denied"  # some stores refuse what they allow, while they are under load
    CONFLICT = "conflict"  # another conditional write of the same key is under way


# This process's retries since it started. `listen` tells of each as it happens.
retries: Counter[RetryReason] = Counter()
_listeners: list[Callable[[RetryReason], None]] = []
_counting: Final = threading.Lock()


def listen(callback: Callable[[RetryReason], None]) -> None:
    """Have every later retry of this process reported: from the thread that retries, so the callback must be quick."""
    if callback not in _listeners:
        _listeners.append(callback)


def count_retry(reason: RetryReason) -> None:
    """Count a request that is about to be repeated."""
    with _counting:
        retries[reason] += 1
    for callback in tuple(_listeners):
        callback(reason)


class RequestRate:
    """Paces the requests of all threads of a process.

    Args:
        clock: seconds, never going back.
        sleep: waits that many seconds.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.limit: float | None = None  # requests per second; None while the store has never throttled
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = 0.0  # when the next request may leave
        self._slowed = float("-inf")
        self._second = clock()  # start of the second that is being counted
        self._sent = 0
        self._measured = 0.0  # requests sent in the last whole second

    def wait(self) -> None:
        """Return when the next request may leave."""
        with self._lock:
            now = self._clock()
            leaves = max(now, self._next) if self.limit else now
            if self.limit:
                self._next = leaves + 1 / self.limit
            self._count(now)
        if leaves > now:
            self._sleep(leaves - now)

    def throttled(self) -> None:
        """The store asked for fewer requests: halve the rate, once for all refusals that belong together."""
        with self._lock:
            now = self._clock()
            if now - self._slowed < ONE_REFUSAL_SECONDS:
                return
            self._slowed = now
            elapsed = max(now - self._second, 1e-3)
            sent = max(self._measured, self._sent / elapsed if elapsed > 0.1 else self._sent)
            self.limit = max(LOWEST, DECREASE * min(sent, self.limit or sent))
            limit = self.limit
        log.info("event=store_throttles requests_per_second=%.1f", limit)

    def answered(self) -> None:
        """The store served a request: allow a little more."""
        with self._lock:
            if self.limit:
                self.limit += INCREASE / self.limit

    def _count(self, now: float) -> None:
        elapsed = now - self._second
        if elapsed >= 1:
            self._measured = self._sent / elapsed
            self._second, self._sent = now, 0
        self._sent += 1
