"""Listing by many threads: over a bucket of this process, which answers as S3 does, a few keys at a time."""

import bisect
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.data import s3_listing
from jobs.data.s3_listing import between, list_in_order, list_in_parallel
from mgmtn.errors import ConfigError

WRITTEN = datetime(2026, 1, 2, tzinfo=UTC)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


class FakeBucket:
    """Answers `_page` from a list of keys; `slow` seconds after it was asked."""

    def __init__(self, keys: list[str], *, page_keys: int, slow: float = 0.0) -> None:
        self.keys, self.page_keys, self.slow = sorted(keys, key=str.encode), page_keys, slow
        self.requests = self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def page(self, bucket: str, prefix: str, *, token: str | None = None, after: str | None = None) -> dict[str, Any]:
        with self.lock:
            self.requests += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.slow)
        with self.lock:
            self.at_once -= 1
        keys = [key for key in self.keys if key.startswith(prefix)]
        after = token or after
        start = 0 if after is None else bisect.bisect_right(keys, after.encode(), key=str.encode)
        found = keys[start : start + self.page_keys]
        page: dict[str, Any] = {
            "Contents": [{"Key": key, "ETag": '"e"', "Size": 1, "LastModified": WRITTEN} for key in found],
            "IsTruncated": start + len(found) < len(keys),
        }
        return page | ({"NextContinuationToken": found[-1]} if page["IsTruncated"] else {})


def keys_of(listing) -> list[str]:
    return [info.uri.removeprefix("s3://b/") for info in listing]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(KEYS, min_size=1, max_size=60), threads=st.integers(1, 5), page_keys=st.integers(1, 7))
def test_each_key_is_listed_once_whatever_it_is(keys, threads, page_keys, monkeypatch):
    bucket = FakeBucket([f"p/{key}" for key in keys] + ["o", "p", "q/a"], page_keys=page_keys)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    assert sorted(keys_of(list_in_parallel("b", "p/", threads=threads))) == sorted(f"p/{key}" for key in keys)
    assert keys_of(list_in_order("b", "p/")) == [key for key in bucket.keys if key.startswith("p/")]


@pytest.mark.parametrize(
    "keys",
    [
        [f"photos/2024/img_{number:08}.jpg" for number in range(3000)],
        [f"{number % 16:x}/{number:05}.jpg" for number in range(3000)],
        [f"ä/{number:05}.jpg" for number in range(3000)],
    ],
    ids=["numbered", "spread", "not-ascii"],
)
def test_threads_share_a_long_listing(keys, monkeypatch):
    bucket = FakeBucket(keys, page_keys=10, slow=0.002)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    assert sorted(keys_of(list_in_parallel("b", "", threads=8))) == sorted(keys)
    assert bucket.most_at_once > 4
    assert bucket.requests < 2 * 300  # of which 300 are needed


def test_a_listing_of_one_page_is_one_request(monkeypatch):
    bucket = FakeBucket([f"{number}.jpg" for number in range(10)], page_keys=10)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    assert keys_of(list_in_parallel("b", "")) == bucket.keys
    assert bucket.requests == 1


def test_a_bucket_without_order_is_listed_by_one(monkeypatch):
    bucket = FakeBucket([f"{number:02}.jpg" for number in range(30)], page_keys=10)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    assert len(keys_of(list_in_parallel("b--use1-az4--x-s3", ""))) == 30
    assert bucket.requests == 3


def test_who_stops_reading_stops_the_threads(monkeypatch):
    bucket = FakeBucket([f"{number:06}.jpg" for number in range(50_000)], page_keys=10)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    listing = list_in_parallel("b", "", threads=4)
    for _ in range(100):
        next(listing)
    listing.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("listing")]
    assert bucket.requests < 1000


def test_what_breaks_in_a_thread_reaches_the_reader(monkeypatch):
    bucket = FakeBucket([f"{number:06}.jpg" for number in range(1000)], page_keys=10)

    def break_off(*arguments: Any, **options: Any) -> dict[str, Any]:
        if bucket.requests == 20:
            raise ConfigError("cannot list 's3://b/'")
        return bucket.page(*arguments, **options)

    monkeypatch.setattr(s3_listing, "_page", break_off)
    with pytest.raises(ConfigError, match="cannot list"):
        list(list_in_parallel("b", "", threads=4))


@given(prefix=KEYS, low=KEYS, high=st.none() | KEYS)
def test_half_way_lies_between(prefix, low, high):
    low, high = prefix + low, None if high is None else prefix + high
    if high is not None and low > high:
        low, high = high, low
    middle = between(low, high, prefix=prefix)
    if middle is not None:
        assert low != high
        assert low.encode() < middle.encode()
        assert middle.startswith(prefix)
        assert high is None or middle.encode() <= high.encode()


def test_nothing_lies_between_a_key_and_itself():
    assert between("p/(", "p/(", prefix="p/") is None


def test_a_page_that_ends_with_its_ranges_last_key_is_that_ranges_last(monkeypatch):
    bucket = FakeBucket(["a", "b", "c", "d"], page_keys=2)
    monkeypatch.setattr(s3_listing, "_page", bucket.page)
    listing = s3_listing._Listing("b", "")
    listing.ranges[0].end = "b"
    listing.read_page(listing.ranges[0])
    assert not listing.ranges[0].truncated


def test_half_way_is_found_among_usual_keys():
    assert between("img_0001", None, prefix="") is not None
    assert between("p/a", "p/b", prefix="p/") == "p/aO"
    assert between("p/a", "p/z", prefix="p/") == "p/m"
