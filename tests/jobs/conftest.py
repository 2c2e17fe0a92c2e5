"""Label rows, a label table and an S3 server for the tests of the programs and their data."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import boto3
import pyarrow as pa
import pytest

from jobs.data.schema import TABLE_SCHEMA, image_id
from mgmtn.attributes import ATTRIBUTES

Rows = Callable[..., pa.Table]


@pytest.fixture
def label_rows() -> Rows:
    """`label_rows({uri: face count or status}, **columns)`: rows as a run would write them, in no particular order."""
    return _label_rows


def _label_rows(images: Mapping[str, int | str], **columns: Any) -> pa.Table:
    rows = [row | columns for uri, outcome in images.items() for row in _rows_of(uri, outcome)]
    return pa.Table.from_pylist(rows[::-1], schema=TABLE_SCHEMA)


def _rows_of(uri: str, outcome: int | str) -> list[dict[str, Any]]:
    image = {
        "image_id": image_id(uri),
        "uri": uri,
        "etag": "v1",
        "size": 10,
        "status": "ok",
        "attempts": 1,
        "face_index": -1,
        "face_count": 0,
        "model_id": "m1",
        "run_id": "r1",
        "labelled_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    if isinstance(outcome, str):
        return [image | {"status": outcome, "error": None if outcome == "no_face" else "why"}]
    face = {
        "width": 100,
        "height": 80,
        "box_x1": 1.5,
        "landmarks": [0.5] * 136,
        "labels": 2**39 + 1,
    } | dict.fromkeys(ATTRIBUTES, 0.25)
    return [image | face | {"face_index": index, "face_count": outcome} for index in range(outcome)]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> str:
    """The server as the environment's S3, with keys that must never be seen; its URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAVERYVISIBLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-print-this")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MGMTN_CACHE", str(tmp_path / "cache"))
    return s3_server


@pytest.fixture
def bucket(s3_environment: str) -> str:
    """The URI of a new, empty bucket."""
    name = f"photos-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
