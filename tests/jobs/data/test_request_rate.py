import pytest

from jobs.data import request_rate
from jobs.data.request_rate import LOWEST, RequestRate, RetryReason, count_retry, listen


class Time:
    """Seconds that pass only when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def rate(time: Time) -> RequestRate:
    return RequestRate(clock=time.clock, sleep=time.sleep)


def ask(rate: RequestRate, time: Time, *, seconds: float, latency: float = 0.01) -> float:
    """Ask one request after the other, all answered; requests per second."""
    start, count = time.now, 0
    while time.now < start + seconds:
        rate.wait()
        time.sleep(latency)
        rate.answered()
        count += 1
    return count / (time.now - start)


def test_nobody_waits_before_the_store_throttles(rate, time):
    assert ask(rate, time, seconds=3) == pytest.approx(100, rel=0.02)
    assert rate.limit is None


def test_a_store_that_throttles_is_asked_half_as_often(rate, time):
    ask(rate, time, seconds=3)
    rate.throttled()
    assert rate.limit == pytest.approx(50, rel=0.05)
    assert ask(rate, time, seconds=1) == pytest.approx(51, rel=0.05)


def test_refusals_of_one_moment_count_once(rate, time):
    ask(rate, time, seconds=3)
    for _ in range(50):
        rate.throttled()
        time.sleep(0.01)
    assert rate.limit == pytest.approx(50, rel=0.05)
    time.sleep(1)
    rate.throttled()
    assert rate.limit < 30


def test_the_rate_recovers_by_so_many_requests_a_second_each_second(rate, time):
    ask(rate, time, seconds=3)
    rate.throttled()
    before = rate.limit
    ask(rate, time, seconds=10)
    assert rate.limit - before == pytest.approx(10 * request_rate.INCREASE, rel=0.15)


def test_a_store_that_serves_nobody_is_still_asked_now_and_then(rate, time):
    for _ in range(40):
        rate.wait()
        time.sleep(1)
        rate.throttled()
    assert rate.limit == LOWEST


def test_clients_of_a_store_with_a_limit_come_to_stay_near_it(time):
    """Sixteen workers that know nothing of each other and a store that serves 100 requests a second."""
    rates = [RequestRate(clock=time.clock, sleep=lambda _: None) for _ in range(16)]
    for rate in rates:
        rate.limit = 20.0
    served = refused = 0
    for second in range(300):
        wanted = [rate.limit for rate in rates]
        share = min(1.0, 100 / sum(wanted))
        for rate, requests in zip(rates, wanted, strict=True):
            for _ in range(round(requests)):
                rate.wait()
            for _ in range(round(requests * share)):
                rate.answered()
            if share < 1:
                rate.throttled()
            if second >= 100:
                served += requests * share
                refused += requests * (1 - share)
        time.sleep(1.01)
    assert 60 < served / 200 <= 100.5
    assert refused / (served + refused) < 0.15


def test_retries_are_counted_and_told():
    told = []
    listen(told.append)
    listen(told.append)
    before = request_rate.retries[RetryReason.THROTTLED]
    try:
        count_retry(RetryReason.THROTTLED)
    finally:
        request_rate._listeners.remove(told.append)
    assert told == [RetryReason.THROTTLED]
    assert request_rate.retries[RetryReason.THROTTLED] == before + 1
