"""S3, and what speaks its protocol, by boto3.

Endpoint, region, profile, role and keys are boto3's own settings; none of them is kept, printed or sent along. One
client serves all threads of a process and is made there at its first use.
"""

import contextlib
import io
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import urlsplit

import boto3
import urllib3.exceptions
from boto3.exceptions import S3UploadFailedError
from botocore import exceptions as botocore_errors
from botocore.config import Config

from jobs.data.object_store import ObjectInfo, is_s3
from mgmtn.errors import ConfigError, FetchError, ImageTooLarge

CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 30
# boto3 repeats requests; a body that breaks off or stalls after its headers is ours to ask for again.
BODY_ATTEMPTS: Final = 3
# A 409 says that another conditional write of the same key is under way.
CONFLICT_ATTEMPTS: Final = 5

_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_FORBIDDEN: Final = frozenset({"403", "AccessDenied", "Forbidden", "AllAccessDisabled", "InvalidObjectState"})
# The store cannot be used at all, whichever object is asked for.
_UNUSABLE: Final = frozenset(
    {
        "NoSuchBucket",
        "InvalidBucketName",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "AuthorizationHeaderMalformed",
        "RequestTimeTooSkewed",
    }
)
_BROKEN_BODY: Final = (
    botocore_errors.IncompleteReadError,
    botocore_errors.ResponseStreamingError,
    botocore_errors.ReadTimeoutError,
    botocore_errors.FlexibleChecksumError,
    urllib3.exceptions.HTTPError,
    ConnectionError,
)

# How often a request was answered by an error or not at all in this process, by the error's code or class.
request_failures: Counter[str] = Counter()

_clients: dict[int, Any] = {}
_lock: Final = threading.Lock()


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`, the key exactly as written; it may be empty."""
    assert is_s3(uri), uri
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@dataclass(frozen=True)
class S3Store:
    """All buckets that the process may reach. An etag is S3's, without its quotes."""

    def list(
        self, uri: str, *, unreadable: Callable[[str], None] | None = None, missing_ok: bool = False
    ) -> Iterator[ObjectInfo]:
        """Objects in key order.

        `s3://b/photos` is the folder `photos/` if that holds anything, else every key that begins so, as in `s3://b/2024-`.
        """
        bucket, key = split(uri)
        found = False
        for prefix in dict.fromkeys([f"{key}/" if key and not key.endswith("/") else key, key]):
            for info in _list_keys(bucket, prefix):
                found = True
                yield info
            if found:
                return
        if not missing_ok:
            raise ConfigError(f"{uri!r}: there is nothing under this prefix")

    def stat(self, uri: str) -> ObjectInfo | None:
        bucket, key = split(uri)
        if not key:
            return None
        try:
            with _translated(uri):
                found = client().head_object(Bucket=bucket, Key=key)
        except FetchError as error:
            # HEAD answers have no body, hence no code that tells a missing bucket from a missing key.
            if not _is_missing(error):
                raise
            _require_bucket(bucket)
            return None
        return ObjectInfo(uri, found["ETag"].strip('"'), found["ContentLength"])

    def get(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        return _read(uri, etag=etag, max_bytes=max_bytes)

    def open(self, uri: str) -> BinaryIO:
        info = self.stat(uri)
        if info is None:
            raise FetchError(f"no such object: {uri!r}")
        return io.BufferedReader(_S3File(info), buffer_size=1)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = split(uri)
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
                return True
            except botocore_errors.ClientError as error:
                code, repeated = _code(error), error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                if code in ("PreconditionFailed", "412"):
                    # A repeated request may meet the object that its own first try has made.
                    return bool(repeated) and self.get(uri) == data
                if code not in ("ConditionalRequestConflict", "409"):
                    raise ConfigError(f"cannot write {uri!r}: {_named(error)}") from error
                time.sleep(0.1 * 2**attempt)
            except botocore_errors.BotoCoreError as error:
                raise ConfigError(f"cannot write {uri!r}: {_named(error)}") from error
        raise ConfigError(f"cannot write {uri!r}: other writers held it {CONFLICT_ATTEMPTS} times")

    def put_file(self, path: Path, uri: str) -> None:
        bucket, key = split(uri)
        try:
            client().upload_file(str(path), bucket, key)
        except (botocore_errors.ClientError, botocore_errors.BotoCoreError, S3UploadFailedError) as error:
            raise ConfigError(f"cannot write {uri!r}: {_named(error)}") from error

    def delete(self, uri: str) -> None:
        bucket, key = split(uri)
        try:
            client().delete_object(Bucket=bucket, Key=key)
        except (botocore_errors.ClientError, botocore_errors.BotoCoreError) as error:
            raise ConfigError(f"cannot delete {uri!r}: {_named(error)}") from error


class _S3File(io.RawIOBase):
    """An object as a seekable file: one ranged GET a read."""

    def __init__(self, info: ObjectInfo) -> None:
        self._info = info
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._info.size or 0}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._info.size or 0)
        if end <= self._at:
            return 0
        data = _read(self._info.uri, etag=self._info.etag, Range=f"bytes={self._at}-{end - 1}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        """The rest in one GET; the inherited method would ask for 8 KB at a time."""
        data = bytearray(max(0, (self._info.size or 0) - self._at))
        self.readinto(data)
        return bytes(data)


def _read(uri: str, *, etag: str | None, max_bytes: int | None = None, **request: str) -> bytes:
    """GET an object, or a range of it, asking again where its body breaks off."""
    bucket, key = split(uri)
    for attempt in range(1, BODY_ATTEMPTS + 1):
        with _translated(uri):
            answer = client().get_object(Bucket=bucket, Key=key, **request)
        with contextlib.closing(answer["Body"]) as body:
            _check(answer, uri=uri, etag=etag, max_bytes=max_bytes)
            try:
                return bytes(body.read())
            except _BROKEN_BODY as error:
                request_failures[type(error).__name__] += 1
                if attempt == BODY_ATTEMPTS:
                    raise FetchError(f"reading {uri!r} broke off {attempt} times: {_named(error)}") from error
        time.sleep(0.2 * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def client() -> Any:
    """This process's boto3 client, for all its threads; made anew after a fork or new boto3 variables."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = hash((os.getpid(), tuple(settings)))
    with _lock:
        if key not in _clients:
            _clients[key] = _make_client()
        return _clients[key]


def _make_client() -> Any:
    made = _connect()
    host = urlsplit(made.meta.endpoint_url).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")) or (made.meta.config.s3 or {}).get("addressing_style"):
        return made
    # Servers other than Amazon's seldom have a DNS name for every bucket.
    return _connect(s3={"addressing_style": "path"})


def _connect(**options: Any) -> Any:
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", "6"))
    config = Config(
        # Adaptive: also slows this client down while the store asks for it.
        retries={"mode": os.environ.get("AWS_RETRY_MODE", "adaptive"), "total_max_attempts": attempts},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        **options,
    )
    try:
        made = boto3.session.Session().client("s3", config=config)
    except (botocore_errors.BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 settings: {_named(error)}") from error
    made.meta.events.register("needs-retry.s3", _count_failure)
    return made


def _count_failure(
    response: tuple[Any, dict[str, Any]] | None = None, caught_exception: Exception | None = None, **_: Any
) -> None:
    if caught_exception is not None:
        request_failures[type(caught_exception).__name__] += 1
    elif response is not None and response[0].status_code >= 429:
        request_failures[response[1].get("Error", {}).get("Code", str(response[0].status_code))] += 1


def _list_keys(bucket: str, prefix: str) -> Iterator[ObjectInfo]:
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        for page in pages:
            for entry in page.get("Contents", ()):
                # Consoles make empty objects named `folder/` to show a folder.
                if not (entry["Key"].endswith("/") and entry["Size"] == 0):
                    yield ObjectInfo(f"s3://{bucket}/{entry['Key']}", entry["ETag"].strip('"'), entry["Size"])
    except (botocore_errors.ClientError, botocore_errors.BotoCoreError) as error:
        raise ConfigError(f"cannot list 's3://{bucket}/{prefix}': {_named(error)}") from error


def _require_bucket(bucket: str) -> None:
    try:
        client().head_bucket(Bucket=bucket)
    except botocore_errors.ClientError as error:
        # Without leave to look at the bucket, the answer about its object has to do.
        if _code(error) in _MISSING:
            raise ConfigError(f"'s3://{bucket}': there is no such bucket") from error


def _check(answer: dict[str, Any], *, uri: str, etag: str | None, max_bytes: int | None) -> None:
    found = answer.get("ETag", "").strip('"')
    if etag is not None and found != etag:
        raise FetchError(f"changed since it was inventoried: {uri!r} has etag {found}, not {etag}")
    if max_bytes is not None and answer["ContentLength"] > max_bytes:
        raise ImageTooLarge(f"{uri!r} has {answer['ContentLength']} bytes, more than {max_bytes}")


@contextlib.contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn boto3's errors into ours: one object's fault, or the whole store's."""
    try:
        yield
    except botocore_errors.ClientError as error:
        code = _code(error)
        if code in _UNUSABLE:
            raise ConfigError(f"cannot use the store of {uri!r}: {_named(error)}") from error
        if code in _MISSING:
            raise FetchError(f"no such object: {uri!r}") from error
        if code in _FORBIDDEN:
            raise FetchError(f"permission denied: {uri!r}: {code}") from error
        raise FetchError(f"cannot read {uri!r}: {_named(error)}") from error
    except (botocore_errors.ReadTimeoutError, botocore_errors.ConnectTimeoutError) as error:
        raise FetchError(f"timed out: {uri!r}: {type(error).__name__}") from error
    except (botocore_errors.ConnectionClosedError, botocore_errors.ResponseStreamingError) as error:
        raise FetchError(f"the connection broke: {uri!r}: {type(error).__name__}") from error
    except botocore_errors.ParamValidationError as error:
        raise FetchError(f"S3 has no such name: {uri!r}: {error}") from error
    except botocore_errors.BotoCoreError as error:
        # No credentials, no region, nobody at the endpoint: the same for every object.
        raise ConfigError(f"cannot use the store of {uri!r}: {_named(error)}") from error


def _is_missing(error: FetchError) -> bool:
    cause = error.__cause__
    return isinstance(cause, botocore_errors.ClientError) and _code(cause) in _MISSING


def _code(error: botocore_errors.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _named(error: BaseException) -> str:
    if isinstance(error, botocore_errors.ClientError):
        details = error.response.get("Error", {})
        return f"{details.get('Code', '')}: {details.get('Message', '')}".rstrip(": ")
    return f"{type(error).__name__}: {error}"
