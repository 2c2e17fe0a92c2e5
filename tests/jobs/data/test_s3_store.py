"""S3Store against a real server on the loopback, and against one that misbehaves."""

import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from jobs.data import s3_client, s3_store
from jobs.data.buckets import ImageIds
from jobs.data.inventory import take_inventory
from jobs.data.object_store import ObjectStore, join, local_copy, open_store
from jobs.data.parts import write_part
from jobs.data.s3_store import S3Store
from jobs.data.snapshots import LabelTable, SnapshotConflict, next_snapshot
from mgmtn.errors import ConfigError, FetchError, ImageTooLarge

pytestmark = pytest.mark.integration

ODD_KEYS = ("a b+c%20d.jpg", "ünï/日本.png", "a//b.jpg", "q?x=1&y#z.jpg", "'\"\\.webp")
STORE: ObjectStore = S3Store()


def put(uri: str, data: bytes = b"abc") -> str:
    """Store an object without our own code; its URI."""
    bucket, key = s3_store.split(uri)
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data)
    return uri


def test_a_prefix_is_listed_over_many_pages(bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    uris = [put(f"{bucket}/photos/{number}.jpg") for number in range(8)]
    assert boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))["IsTruncated"]
    assert [info.uri for info in STORE.list(f"{bucket}/photos")] == uris


def test_a_prefix_is_a_folder_first(bucket):
    for key in ("photos/a.jpg", "photos-old/b.jpg", "2024-01.jpg", "2024-02.jpg", "empty/"):
        put(f"{bucket}/{key}", b"" if key.endswith("/") else b"x")
    assert [info.uri for info in STORE.list(f"{bucket}/photos")] == [f"{bucket}/photos/a.jpg"]
    assert [info.uri for info in STORE.list(f"{bucket}/photos/")] == [f"{bucket}/photos/a.jpg"]
    assert len(list(STORE.list(f"{bucket}/2024-"))) == 2
    assert len(list(STORE.list(bucket))) == 4
    with pytest.raises(ConfigError, match="nothing under this prefix"):
        list(STORE.list(f"{bucket}/typo"))
    assert list(STORE.list(f"{bucket}/typo", missing_ok=True)) == []


@pytest.mark.parametrize("key", ODD_KEYS)
def test_a_key_is_taken_as_it_is(bucket, key):
    put(f"{bucket}/{key}", key.encode())
    [info] = STORE.list(bucket)
    assert info == STORE.stat(f"{bucket}/{key}")
    assert STORE.get(info.uri, etag=info.etag, max_bytes=100) == key.encode()


def test_what_is_wrong_with_one_object_is_its_own_fault(bucket):
    uri = put(f"{bucket}/a.jpg")
    etag = STORE.stat(uri).etag
    put(uri, b"abcd")
    with pytest.raises(FetchError, match="changed since"):
        STORE.get(uri, etag=etag)
    with pytest.raises(ImageTooLarge, match="4 bytes, more than 3"):
        STORE.get(uri, max_bytes=3)
    with pytest.raises(FetchError, match="no such object"):
        STORE.get(f"{bucket}/gone.jpg")
    assert STORE.stat(f"{bucket}/gone.jpg") is None


@pytest.mark.parametrize(
    "use",
    [
        lambda: STORE.get("s3://no-such-bucket/a.jpg"),
        lambda: STORE.stat("s3://no-such-bucket/a.jpg"),
        lambda: list(STORE.list("s3://no-such-bucket/photos", missing_ok=True)),
        lambda: STORE.put_if_absent("s3://no-such-bucket/a", b""),
        lambda: STORE.put_file(Path(__file__), "s3://no-such-bucket/a"),
        lambda: STORE.delete("s3://no-such-bucket/a"),
    ],
)
def test_a_bucket_that_is_not_there_stops_the_run(s3_environment, use: Callable[[], object]):
    with pytest.raises(ConfigError, match="no-such-bucket"):
        use()


def test_nobody_at_the_endpoint_stops_the_run(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ConfigError, match="Could not connect"):
        STORE.get("s3://photos/a.jpg")


def test_no_credentials_stop_the_run(s3_environment, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(ConfigError, match="NoCredentialsError"):
        STORE.get("s3://photos/a.jpg")


def test_a_profile_that_is_not_there_stops_the_run(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "typo")
    with pytest.raises(ConfigError, match=r"S3 settings: .*typo"):
        list(STORE.list("s3://photos"))


def test_one_of_many_writers_creates_an_object(bucket):
    uri = f"{bucket}/_snapshots/1.json"
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: STORE.put_if_absent(uri, b"%d" % number), range(8)))
    assert created.count(True) == 1
    assert STORE.get(uri) == b"%d" % created.index(True)


def test_a_file_is_put_read_in_parts_and_deleted(bucket, tmp_path):
    content = os.urandom(300_000)
    (tmp_path / "part").write_bytes(content)
    uri = f"{bucket}/labels/part"
    STORE.put_file(tmp_path / "part", uri)
    with STORE.open(uri) as file:
        assert file.seek(-10, os.SEEK_END) == 299_990
        assert file.read() == content[-10:]
        file.seek(5)
        assert file.read(7) == content[5:12]
        assert file.tell() == 12
        assert file.read() == content[12:]
        assert file.read() == b""
    STORE.delete(uri)
    STORE.delete(uri)
    with pytest.raises(FetchError, match="no such object"):
        STORE.open(uri)


def test_a_local_copy_is_fetched_once_for_each_version(bucket, monkeypatch):
    uri = put(f"{bucket}/models/model.safetensors", b"one")
    path = local_copy(uri)
    assert path.read_bytes() == b"one"
    assert path.name == "model.safetensors"
    put(uri, b"two")
    assert local_copy(uri).read_bytes() == b"two"
    fetched: list[str] = []
    monkeypatch.setattr(S3Store, "open", lambda self, uri: fetched.append(uri))
    assert local_copy(uri).read_bytes() == b"two"
    assert fetched == []


def test_a_local_copy_of_the_wrong_content_is_refused_and_not_kept(bucket, tmp_path):
    uri = put(f"{bucket}/model", b"abc")
    with pytest.raises(ConfigError, match="content is not the one"):
        local_copy(uri, sha256="0" * 64)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_an_inventory_of_prefixes_lists_and_objects(bucket):
    for key in ("photos/a.jpg", "photos/b.png", "photos/notes.md"):
        put(f"{bucket}/{key}")
    put(f"{bucket}/lists/night.csv", f"uri\n../odd.jpg\n{bucket}/photos/a.jpg\ngone.jpg\n".encode())
    put(f"{bucket}/lists/../odd.jpg")
    rows = {row["uri"]: row for row in take_inventory([f"{bucket}/photos", f"{bucket}/lists/night.csv"]).to_pylist()}
    keys = ("photos/a.jpg", "photos/b.png", "lists/../odd.jpg", "lists/gone.jpg")
    assert set(rows) == {f"{bucket}/{key}" for key in keys}
    assert rows[f"{bucket}/lists/gone.jpg"]["etag"] is None
    assert rows[f"{bucket}/photos/a.jpg"]["etag"] == STORE.stat(f"{bucket}/photos/a.jpg").etag
    assert take_inventory(f"{bucket}/photos/notes.md").num_rows == 1
    with pytest.raises(ConfigError, match="nothing under"):
        take_inventory(f"{bucket}/typo.jpg")


def test_a_label_table_lives_in_a_bucket(bucket, label_rows):
    table = LabelTable(f"{bucket}/labels/")
    assert table.current() is None
    rows = label_rows({"a": 2, "b": "no_face", "c": 1})
    part = write_part(rows, store=STORE, labels_uri=table.uri, model_id="m1", run_id="r1")
    first = table.commit(next_snapshot(None, files=[part], run_id="r1", model_id="m1", inventory_digest="d"))
    with pytest.raises(SnapshotConflict):
        table.commit(first)
    kept = table.carry_over(first, drop_ids=ImageIds.few(rows["image_id"].to_pylist()[:1]), run_id="r2")
    table.commit(next_snapshot(first, files=kept, run_id="r2", model_id="m1", inventory_digest="d"))
    assert [snapshot.number for snapshot in table.history()] == [1, 2]
    assert table.files(first) == (join(f"{bucket}/labels", part.path),)
    assert table.read(first, columns=["uri"]).read_all().num_rows == 4
    [path] = table.local_files(table.current())
    assert pq.read_table(path).num_rows == 3
    STORE.delete(table.files(first)[0])
    third = next_snapshot(table.current(), files=[part], run_id="r3", model_id="m1", inventory_digest="d")
    with pytest.raises(ConfigError, match="is missing"):
        table.commit(third)


def test_a_store_holds_and_tells_no_secret(bucket, caplog):
    caplog.set_level(logging.INFO)
    store = open_store(bucket)
    store.put_if_absent(f"{bucket}/a", b"")
    with pytest.raises(FetchError) as caught:
        store.get(f"{bucket}/gone")
    told = f"{store!r} {caught.value} {caplog.text} {pickle.dumps(store)!r}"
    assert "AKIAVERYVISIBLE" not in told
    assert "never-print-this" not in told
    assert pickle.loads(pickle.dumps(store)) == store


def test_a_process_has_one_client_for_its_settings(s3_environment, monkeypatch):
    with ThreadPoolExecutor(8) as pool:
        clients = set(map(id, pool.map(lambda _: s3_client.client(), range(16))))
    assert len(clients) == 1
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert id(s3_client.client()) not in clients


class BadServer(ThreadingHTTPServer):
    """Answers every request by `answer`; counts them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests = 0
        self.answer: Callable[[_Handler], None] = _throttle


class _Handler(BaseHTTPRequestHandler):
    server: BadServer

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests += 1
        self.server.answer(self)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def _throttle(handler: _Handler) -> None:
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    handler.send_response(503)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _forbid(handler: _Handler) -> None:
    handler.send_response(403)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _break_off(handler: _Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.send_header("ETag", '"e"')
    handler.end_headers()
    handler.wfile.write(b"half")
    handler.close_connection = True


def _lose_the_answer(handler: _Handler) -> None:
    """Keep what is PUT, but let the first answer be lost on its way."""
    status = 500 if handler.server.requests == 1 else 412 if handler.command == "PUT" else 200
    body = b"mine" if status == 200 else b""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.send_header("ETag", '"e"')
    handler.end_headers()
    handler.wfile.write(body)


def _mend(handler: _Handler) -> None:
    if handler.server.requests < 3:
        _break_off(handler)
        return
    handler.send_response(200)
    handler.send_header("Content-Length", "5")
    handler.send_header("ETag", '"e"')
    handler.end_headers()
    handler.wfile.write(b"whole")


@pytest.fixture
def bad_server(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    server = BadServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(s3_store.time, "sleep", lambda _: None)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_throttling_that_outlasts_the_retries_is_that_images_outcome(bad_server):
    with pytest.raises(FetchError, match="SlowDown"):
        STORE.get("s3://photos/a.jpg")
    assert bad_server.requests == 2


def test_a_refusal_without_a_body_is_that_images_outcome(bad_server):
    bad_server.answer = _forbid
    with pytest.raises(FetchError, match="permission denied"):
        STORE.get("s3://photos/a.jpg")
    with pytest.raises(FetchError, match="permission denied"):
        STORE.stat("s3://photos/a.jpg")


def test_a_body_that_breaks_off_is_asked_for_again(bad_server):
    bad_server.answer = _mend
    assert STORE.get("s3://photos/a.jpg") == b"whole"
    assert bad_server.requests == 3


def test_a_body_that_always_breaks_off_is_a_fetch_error(bad_server):
    bad_server.answer = _break_off
    with pytest.raises(FetchError, match="broke off 3 times"):
        STORE.get("s3://photos/a.jpg", etag="e")
    assert bad_server.requests == 3


@pytest.mark.parametrize("data", [b"mine", b"another's"])
def test_a_repeated_write_knows_its_own_object_again(bad_server, data):
    bad_server.answer = _lose_the_answer
    assert STORE.put_if_absent("s3://photos/lease", data) is (data == b"mine")
    assert bad_server.requests == 3


def test_a_server_that_does_not_answer_in_time_is_a_fetch_error(bad_server, monkeypatch):
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    over = threading.Event()
    bad_server.answer = lambda _: over.wait(10)
    try:
        with pytest.raises(FetchError, match="timed out"):
            STORE.get("s3://photos/a.jpg")
    finally:
        over.set()
