"""List a prefix of a bucket by several threads at once.

S3 gives a thousand keys a request, in order, and says nothing about what lies ahead. So one thread starts at the
beginning; each idle thread takes the second half of another's range of keys, halved by the characters of the key where
that one is, and starts there. A half that is empty costs one request and says where the keys are not.
"""

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from botocore import exceptions as botocore_errors

from jobs.data.object_store import ObjectInfo
from jobs.data.s3_client import client, named
from mgmtn.errors import ConfigError

THREADS: Final = 16
PAGE_KEYS: Final = 1000  # the most that S3 gives at once
# Pages that wait for who reads the listing: then the threads wait too.
_PAGES_AHEAD: Final = 64
# Halves in a row that were found empty: what is left of all ranges is not worth more requests.
_EMPTY_HALVES: Final = 200
_POLL_SECONDS: Final = 0.05
_LAST: Final = 0x10FFFF
_ASCII_END: Final = 0x7F
_SURROGATES: Final = range(0xD800, 0xE000)


def list_in_order(bucket: str, prefix: str) -> Iterator[ObjectInfo]:
    """Objects in key order, a page after the other.

    Raises:
        ConfigError: if the bucket cannot be listed.
    """
    token: str | None = None
    while True:
        page = _page(bucket, prefix, token=token)
        yield from _objects(page, bucket)
        token = page.get("NextContinuationToken")
        if not page.get("IsTruncated") or token is None:
            return


def list_in_parallel(bucket: str, prefix: str, *, threads: int = THREADS) -> Iterator[ObjectInfo]:
    """Objects in no order, each once.

    Raises:
        ConfigError: if the bucket cannot be listed.
    """
    # The keys of a directory bucket come in no order.
    if bucket.endswith("--x-s3"):
        yield from list_in_order(bucket, prefix)
        return
    listing = _Listing(bucket, prefix)
    yield from listing.read_page(listing.ranges[0])
    if listing.ranges[0].truncated:
        yield from listing.read_rest(threads)


def between(low: str, high: str | None, *, prefix: str) -> str | None:
    """A key about half way between two, in the order of code points, which is S3's of UTF-8; None if it finds none.

    Args:
        low: a key with the prefix; the answer is greater.
        high: a key with the prefix that the answer is smaller than; None where the prefix ends.
    """
    if high is not None and low >= high:
        return None
    start = len(prefix)
    common = start
    while high is not None and common < min(len(low), len(high)) and low[common] == high[common]:
        common += 1
    for at in range(common, len(low) + 1):
        left = ord(low[at]) if at < len(low) else 0x1F
        # Few keys leave ASCII: a range without an end is first halved inside it.
        right = _ASCII_END if left < _ASCII_END - 1 else _LAST
        if at == common and high is not None:
            right = ord(high[at])
        if right - left >= 2:
            return low[:at] + _character((left + right) // 2)
    return None


def _character(code: int) -> str:
    return chr(_SURROGATES.stop if code in _SURROGATES else code)


def _page(bucket: str, prefix: str, *, token: str | None = None, after: str | None = None) -> dict[str, Any]:
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS}
    if token is not None:
        request["ContinuationToken"] = token
    elif after is not None:
        request["StartAfter"] = after
    try:
        answer: dict[str, Any] = client().list_objects_v2(**request)
    except (botocore_errors.ClientError, botocore_errors.BotoCoreError) as error:
        raise ConfigError(f"cannot list 's3://{bucket}/{prefix}': {named(error)}") from error
    return answer


def _objects(page: dict[str, Any], bucket: str) -> list[ObjectInfo]:
    return [
        ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["ETag"].strip('"'), entry["Size"], entry["LastModified"])
        for entry in page.get("Contents", ())
        # Consoles make empty objects named `folder/` to show a folder.
        if not (entry["Key"].endswith("/") and entry["Size"] == 0)
    ]


@dataclass
class _Range:
    """Keys after `at`, up to and with `end`; None is the prefix's end."""

    at: str | None
    end: str | None
    token: str | None = None
    truncated: bool = True  # there is, or may be, another page
    pages: int = 0


class _Listing:
    """What the threads of one listing share."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.ranges = [_Range(None, None)]
        self.stopped = threading.Event()
        self._changed = threading.Condition()
        self._pages: queue.Queue[list[ObjectInfo]] = queue.Queue(_PAGES_AHEAD)
        self._free: list[_Range] = []
        self._empty_halves = 0

    def read_page(self, part: _Range) -> list[ObjectInfo]:
        """The next page of a range, less what lies behind its end."""
        page = _page(self.bucket, self.prefix, token=part.token, after=part.at)
        keys = [entry["Key"] for entry in page.get("Contents", ())]
        with self._changed:
            # Another thread may have taken the second half meanwhile.
            end = part.end
            inside = [key for key in keys if end is None or key <= end]
            part.at = inside[-1] if inside else part.at
            part.token = page.get("NextContinuationToken")
            more = bool(page.get("IsTruncated")) and part.token is not None
            # A page that ends with the range's last key leaves nothing to ask for.
            part.truncated = more and len(inside) == len(keys) and (end is None or part.at != end)
            part.pages += 1
            self._empty_halves = 0 if inside else self._empty_halves + 1
            self._changed.notify_all()
        if len(inside) < len(keys):
            page["Contents"] = page["Contents"][: len(inside)]
        return _objects(page, self.bucket)

    def read_rest(self, threads: int) -> Iterator[ObjectInfo]:
        """What follows the first page."""
        self._free = list(self.ranges)
        with ThreadPoolExecutor(threads, thread_name_prefix="listing") as pool:
            workers = [pool.submit(self._work) for _ in range(threads)]
            try:
                while not (all(worker.done() for worker in workers) and self._pages.empty()):
                    with contextlib.suppress(queue.Empty):
                        yield from self._pages.get(timeout=_POLL_SECONDS)
                for worker in workers:
                    worker.result()
            finally:
                self.stopped.set()

    def _work(self) -> None:
        done = False
        try:
            while (part := self._take()) is not None:
                while part.truncated and not self.stopped.is_set():
                    self._give(self.read_page(part))
                with self._changed:
                    self.ranges.remove(part)
                    self._changed.notify_all()
            done = True
        finally:
            if not done:
                self.stopped.set()

    def _give(self, page: list[ObjectInfo]) -> None:
        while not self.stopped.is_set():
            try:
                self._pages.put(page, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue

    def _take(self) -> _Range | None:
        """A range to list: one that nobody has, or half of another's; None when the listing is at its end."""
        with self._changed:
            while self.ranges and not self.stopped.is_set():
                if self._free:
                    return self._free.pop()
                half = self._halve() if self._empty_halves < _EMPTY_HALVES else None
                if half is not None:
                    return half
                self._changed.wait(_POLL_SECONDS)
        return None

    def _halve(self) -> _Range | None:
        # The range that has been split least often comes first: `ranges` is kept in that order.
        for part in self.ranges:
            if not (part.truncated and part.pages and part.at is not None):
                continue
            middle = between(part.at, part.end, prefix=self.prefix)
            if middle is not None:
                half = _Range(middle, part.end)
                part.end = middle
                self.ranges.remove(part)
                self.ranges += [part, half]
                return half
        return None
