"""What the label job asks of an S3 server, on each server that `s3_endpoint` names: yours too."""

import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig

from jobs.data import request_rate, s3_client, s3_listing, s3_store
from jobs.data.inventory import take_inventory
from jobs.data.object_store import join, open_store
from jobs.data.request_rate import RetryReason
from jobs.data.s3_store import S3Store
from mgmtn.errors import ConfigError, FetchError

pytestmark = pytest.mark.integration

STORE = S3Store()
ODD_KEYS = (
    "a b+c%20d.jpg",
    "ünï/日本 🙂.png",
    "a//b.jpg",
    "q?x=1&y#z.jpg",
    "'\"\\<>.webp",
    " lead.jpg",
    "~tilde*(!).gif",
    "x" * 900 + ".jpeg",
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(s3_client, "FIRST_PAUSE", 0.005)
    # The client is made anew for new variables, and with it the rate.
    monkeypatch.setenv("AWS_SDK_UA_APP_ID", hashlib.sha256(os.urandom(8)).hexdigest()[:12])


@pytest.fixture
def put(s3_folder: str) -> Callable[..., str]:
    """`put(uri, data)` stores an object without our own code, and without a proxy; its URI."""
    client = boto3.session.Session().client("s3")

    def put_object(uri: str, data: bytes = b"abc") -> str:
        bucket, key = s3_store.split(uri)
        client.put_object(Bucket=bucket, Key=key, Body=data)
        return uri

    return put_object


def test_odd_keys_are_listed_found_and_read_as_they_are(s3_folder, put):
    uris = {put(join(s3_folder, key), key.encode()) for key in ODD_KEYS}
    found = list(STORE.list(s3_folder))
    assert {info.uri for info in found} == uris
    assert set(STORE.list(s3_folder, ordered=False)) == set(found)
    for info in found:
        assert STORE.stat(info.uri) == info
        assert STORE.get(info.uri, etag=info.etag) == info.uri.removeprefix(f"{s3_folder}/").encode()
    assert set(take_inventory(s3_folder)["uri"].to_pylist()) == uris


@pytest.mark.parametrize("threads", [1, 4])
def test_a_listing_by_many_threads_misses_nothing_and_repeats_nothing(s3_folder, put, monkeypatch, threads):
    monkeypatch.setattr(s3_listing, "PAGE_KEYS", 5)
    names = [f"2024/img_{number:05}.jpg" for number in range(30)] + [f"é{number}.png" for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        uris = sorted(pool.map(put, [join(s3_folder, name) for name in [*names, "a.jpg", "~.jpg"]]))
    bucket, prefix = s3_store.split(s3_folder)
    assert sorted(info.uri for info in s3_listing.list_in_parallel(bucket, f"{prefix}/", threads=threads)) == uris
    assert [info.uri for info in STORE.list(s3_folder)] == uris


@pytest.mark.parametrize("writers", [2, 8])
def test_of_writers_at_once_one_creates_the_object(s3_folder, writers):
    for number in range(2):
        uri = join(s3_folder, f"_snapshots/{number}.json")
        start = threading.Barrier(writers)

        def write(writer: int, uri: str = uri, start: threading.Barrier = start) -> bool:
            start.wait()
            return STORE.put_if_absent(uri, b"writer %d" % writer)

        with ThreadPoolExecutor(writers) as pool:
            created = list(pool.map(write, range(writers)))
        assert created.count(True) == 1
        assert STORE.get(uri) == b"writer %d" % created.index(True)
        assert not STORE.put_if_absent(uri, b"late")


def test_an_object_that_changed_is_not_read_for_the_old_one(s3_folder, put, monkeypatch):
    monkeypatch.setattr(s3_store, "RANGE_BYTES", 4)
    uri = put(join(s3_folder, "a.jpg"), b"one version")
    info = STORE.stat(uri)
    assert info is not None
    with STORE.open(uri) as file:
        assert file.read(5) == b"one v"
        put(uri, b"two version")
        with pytest.raises(FetchError, match="changed since"):
            file.read()
    with pytest.raises(FetchError, match="changed since"):
        STORE.get(uri, etag=info.etag)
    with pytest.raises(FetchError, match="changed since"):
        STORE.get(uri, etag="no\nheader, but a list may say so")


def test_a_large_file_goes_in_parts_and_comes_in_ranges(s3_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_store, "UPLOAD", TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    monkeypatch.setattr(s3_store, "RANGE_BYTES", 1 << 20)
    content = os.urandom(6 << 20)
    (tmp_path / "part").write_bytes(content)
    uri = join(s3_folder, "part.parquet")
    STORE.put_file(tmp_path / "part", uri)
    [info] = STORE.list(s3_folder)
    assert info == STORE.stat(uri)
    assert info.size == len(content)
    with STORE.open(uri) as file:
        assert file.read() == content
        file.seek(1_000_000)
        assert file.read(3_000_000) == content[1_000_000:4_000_000]


def test_what_is_deleted_is_gone(s3_folder, put):
    uri = put(join(s3_folder, "a.jpg"))
    STORE.delete(uri)
    STORE.delete(uri)
    assert STORE.stat(uri) is None
    assert list(STORE.list(s3_folder, missing_ok=True)) == []
    with pytest.raises(FetchError, match="no such object"):
        STORE.get(uri)


def test_a_wrong_key_stops_the_run_and_is_not_told(s3_folder, s3_endpoint, monkeypatch):
    if s3_endpoint.name == "moto":
        pytest.skip("moto checks no keys")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-print-this")
    for use in (lambda: STORE.get(join(s3_folder, "a.jpg")), lambda: list(STORE.list(s3_folder))):
        with pytest.raises(ConfigError) as caught:
            use()
        assert "never-print-this" not in str(caught.value)


def test_a_store_holds_no_key(s3_folder, s3_endpoint):
    store = open_store(s3_folder)
    store.put_if_absent(join(s3_folder, "a"), b"")
    held = f"{pickle.dumps(store)!r} {store!r}"
    assert s3_endpoint.variables.get("AWS_SECRET_ACCESS_KEY", os.environ.get("AWS_SECRET_ACCESS_KEY", " ")) not in held


Harm = Callable[..., bool]


def first_time(harm: Harm) -> Harm:
    """Do harm to a request that was not made before."""
    known = set()

    def harm_once(handler: Any, request: Any) -> bool:
        new = request not in known
        known.add(request)
        return new and harm(handler, request)

    return harm_once


def slow_down(handler, request) -> bool:
    handler.answer(503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
    return True


def fail(handler, request) -> bool:
    handler.answer(500)
    return True


def deny(handler, request) -> bool:
    handler.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
    return True


def reset(handler, request) -> bool:
    handler.close_connection = True
    return True


def cut_short(handler, request) -> bool:
    if request.method != "GET" or request.query:
        return False
    handler.answer(200, b"half", headers={"Content-Length": "1000", "ETag": '"e"'})
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (slow_down, RetryReason.THROTTLED),
        (fail, RetryReason.SERVER_ERROR),
        (deny, RetryReason.ACCESS_DENIED),
        (reset, RetryReason.CONNECTION),
        (cut_short, RetryReason.BROKEN_BODY),
    ],
)
def test_passing_trouble_costs_time_and_nothing_else(put, s3_folder, s3_proxy, harm, reason, monkeypatch):
    monkeypatch.setattr(request_rate, "LOWEST", 200.0)
    monkeypatch.setattr(s3_store, "BODY_PAUSE", 0.001)
    before = request_rate.retries[reason]
    s3_proxy.harm = first_time(harm)
    uris = [join(s3_folder, f"{number}.jpg") for number in range(6)]
    assert STORE.put_if_absent(uris[0], uris[0].encode())
    for uri in uris[1:]:
        put(uri, uri.encode())
    assert [info.uri for info in STORE.list(s3_folder)] == uris
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(STORE.get, uris)) == [uri.encode() for uri in uris]
    assert request_rate.retries[reason] > before


def test_a_refusal_that_lasts_is_believed(put, s3_folder, s3_proxy, monkeypatch):
    uris = [put(join(s3_folder, f"{number}.jpg")) for number in range(10)]
    s3_proxy.harm = deny
    monkeypatch.setattr(s3_client, "DENIALS", 4)
    s3_proxy.seen.clear()
    for uri in uris:
        with pytest.raises(FetchError, match="permission denied"):
            STORE.get(uri)
    assert s3_proxy.count("GET") == len(uris) + 4


def test_what_is_not_there_is_asked_for_once(s3_folder, s3_proxy):
    with pytest.raises(FetchError, match="no such object"):
        STORE.get(join(s3_folder, "gone.jpg"))
    assert s3_proxy.count("GET") == 1
