"""What tests of every part share: real photographs with labels, a Ray cluster on this machine, and S3 servers.

The S3 suite runs on moto, and on OpenStack Swift where that can be started. To run it on a store of your own:

    MGMTN_TEST_S3_ENDPOINT=https://s3.example.com MGMTN_TEST_S3_BUCKET=scratch pytest -m integration tests/integration

with keys, profile or role as boto3 takes them, and `default` as the endpoint for the one that boto3 is set to. The
tests write under a new prefix of that bucket and delete what they wrote; without the variable they make a bucket each.
"""

import contextlib
import http.client
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import pytest

from deploy.rehearsal.processes import NotRunning
from deploy.rehearsal.store import S3Endpoint, endpoint, swift_running

ROOT = Path(__file__).parents[1]
OWN_ENDPOINT = os.environ.get("MGMTN_TEST_S3_ENDPOINT")
OWN_BUCKET = os.environ.get("MGMTN_TEST_S3_BUCKET")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of labelled photographs beside the repository, which is too large to be a part of it."""
    folder = (ROOT / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip("the labelled photographs, ../shared/data, are not on this machine")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine, one for all tests: each start takes seconds."""
    from jobs.cluster import ClusterSettings, joined

    with joined(ClusterSettings(num_cpus=2, object_store_gb=0.3)):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server of this process: moto, which checks no keys."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """moto as the environment's S3, with keys that must never be seen; its URL."""
    for name, value in _moto(s3_server).variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("MGMTN_CACHE", str(tmp_path / "cache"))
    return s3_server


@pytest.fixture
def bucket(s3_environment: str) -> str:
    """The URI of a new, empty bucket in moto."""
    return _new_bucket()


def _new_bucket() -> str:
    name = f"photos-{uuid.uuid4().hex[:12]}"
    # A session of its own: boto3's default one keeps the first keys that it saw.
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session", params=["own"] if OWN_ENDPOINT else ["swift", "moto"])
def s3_endpoint(request: pytest.FixtureRequest) -> Iterator[S3Endpoint]:
    """The S3 servers that the suite runs on, one after the other."""
    if request.param == "moto":
        yield _moto(request.getfixturevalue("s3_server"))
    elif request.param == "swift":
        with contextlib.ExitStack() as stack:
            try:
                swift = stack.enter_context(swift_running(ROOT / "build" / "swift"))
            except NotRunning as reason:
                pytest.skip(str(reason))
            yield swift
    else:
        url = None if OWN_ENDPOINT == "default" else OWN_ENDPOINT
        yield S3Endpoint("own", url, {"AWS_ENDPOINT_URL": url} if url else {})


@pytest.fixture(scope="session")
def s3_bucket(s3_endpoint: S3Endpoint) -> Iterator[str]:
    """The URI of a bucket on that server: a new one, or yours."""
    if s3_endpoint.name == "own" and OWN_BUCKET:
        yield f"s3://{OWN_BUCKET}"
        return
    with pytest.MonkeyPatch.context() as environment:
        for name, value in s3_endpoint.variables.items():
            environment.setenv(name, value)
        client = boto3.session.Session().client("s3")
        uri = _new_bucket()
    yield uri
    client.delete_bucket(Bucket=urlsplit(uri).netloc)


@pytest.fixture
def s3_folder(
    s3_endpoint: S3Endpoint, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[str]:
    """The URI of a prefix with nothing under it, on a server that the environment names; deleted in the end."""
    for name, value in s3_endpoint.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MGMTN_CACHE", str(tmp_path / "cache"))
    client = boto3.session.Session().client("s3")  # before the test changes the environment
    name, prefix = urlsplit(s3_bucket).netloc, uuid.uuid4().hex[:12]
    yield f"{s3_bucket}/{prefix}"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix):
        for entry in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=entry["Key"])


@pytest.fixture
def s3_proxy(s3_folder: str, s3_endpoint: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator["S3Proxy"]:
    """What stands between the environment's S3 and its server: it counts the requests, and can do them harm."""
    url = urlsplit(s3_endpoint.url or "")
    if url.scheme != "http":
        pytest.skip("the requests are counted by a proxy, which needs a server at http://")
    with S3Proxy(url.hostname or "", url.port or 80) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield proxy
        proxy.shutdown()
        thread.join()


def _moto(url: str) -> S3Endpoint:
    return endpoint("moto", url, "AKIAVERYVISIBLE", "never-print-this")


@dataclass(frozen=True)
class S3Request:
    """A request that passed the proxy: `path` is /bucket/key, decoded; a list of keys has a `query`, an object none."""

    method: str
    path: str
    query: str


class S3Proxy(ThreadingHTTPServer):
    """Passes requests on to a server.

    `harm` may answer a request itself: it then returns True.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.host, self.port = host, port
        self.seen: list[S3Request] = []
        self.harm: Callable[[_Passing, S3Request], bool] = lambda handler, request: False
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def count(self, method: str, *, suffix: str = "") -> int:
        """Requests for objects whose key ends so."""
        return sum(seen.method == method and not seen.query and seen.path.endswith(suffix) for seen in self.seen)

    @contextlib.contextmanager
    def counted(self, request: S3Request) -> Iterator[None]:
        with self._lock:
            self.seen.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class _Passing(BaseHTTPRequestHandler):
    server: S3Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        request = S3Request(self.command, unquote(url.path), url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.counted(request):
            if not self.server.harm(self, request):
                self.pass_on(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def pass_on(self, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too, which is part of what is signed
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.answer(answer.status, data, headers=kept | {"Content-Length": length})

    def answer(self, status: int, data: bytes = b"", *, headers: dict[str, str] | None = None) -> None:
        """Answer the client; the body has the length that `headers` say, if they do."""
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


_OF_THE_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})
