"""S3, and what speaks its protocol, by boto3: objects in, objects out, and whose fault it is when that fails."""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import urllib3.exceptions
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as botocore_errors

from jobs.data.object_store import ObjectInfo, is_s3
from jobs.data.request_rate import RetryReason, count_retry
from jobs.data.s3_client import client, code_of, named
from jobs.data.s3_listing import list_in_order, list_in_parallel
from mgmtn.errors import ConfigError, FetchError, ImageTooLarge

# The client repeats requests; a body that breaks off or stalls after its headers is asked for again here.
BODY_ATTEMPTS: Final = 3
BODY_PAUSE: Final = 0.4  # seconds, doubled each time
RANGE_BYTES: Final = 8 << 20  # of a large object, so much in each GET
RANGE_THREADS: Final = 8
# OpenStack Swift looks for the object before it takes the new one's bytes: of 8 writers at once, up to 8 were told that
# theirs is the one. The newest stays. Each of them then waits, and looks whose it is.
SETTLE_SECONDS: Final = 1.0
# One PUT up to here: a writer that is killed leaves no parts of an upload behind, which nobody sees and somebody pays.
UPLOAD: Final = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=16 << 20, max_concurrency=4)

_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_EXISTS: Final = frozenset({"412", "PreconditionFailed"})
_SWIFT_HEADER: Final = "x-openstack-request-id"
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


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`, the key exactly as written; it may be empty."""
    assert is_s3(uri), uri
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


@dataclass(frozen=True)
class S3Store:
    """All buckets that the process may reach. An etag is S3's, without its quotes."""

    def list(
        self,
        uri: str,
        *,
        unreadable: Callable[[str], None] | None = None,
        missing_ok: bool = False,
        ordered: bool = True,
    ) -> Iterator[ObjectInfo]:
        """Objects, in key order where `ordered`.

        `s3://b/photos` is the folder `photos/` if that holds anything, else every key that begins so, as in `s3://b/2024-`.
        """
        bucket, key = split(uri)
        list_keys = list_in_order if ordered else list_in_parallel
        found = False
        for prefix in dict.fromkeys([f"{key}/" if key and not key.endswith("/") else key, key]):
            for info in list_keys(bucket, prefix):
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
        return ObjectInfo(uri, found["ETag"].strip('"'), found["ContentLength"], found["LastModified"])

    def get(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        return _read(uri, etag=etag, max_bytes=max_bytes)

    def open(self, uri: str) -> BinaryIO:
        info = self.stat(uri)
        if info is None:
            raise FetchError(f"no such object: {uri!r}")
        return io.BufferedReader(_S3File(info), buffer_size=1)

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        bucket, key = split(uri)
        started = time.monotonic()
        try:
            answer = client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except botocore_errors.ClientError as error:
            repeated = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
            if code_of(error) not in _EXISTS:
                raise ConfigError(f"cannot write {uri!r}: {named(error)}") from error
            # A repeated request may meet the object that its own first try has made.
            return bool(repeated) and _holds(uri, data)
        except botocore_errors.BotoCoreError as error:
            raise ConfigError(f"cannot write {uri!r}: {named(error)}") from error
        if _SWIFT_HEADER not in answer["ResponseMetadata"]["HTTPHeaders"]:
            return True
        # Other writers that were told the same began before this one had ended.
        time.sleep(max(SETTLE_SECONDS, 4 * (time.monotonic() - started)))
        return _holds(uri, data)

    def put_file(self, path: Path, uri: str) -> None:
        bucket, key = split(uri)
        try:
            client().upload_file(str(path), bucket, key, Config=UPLOAD)
        except (botocore_errors.ClientError, botocore_errors.BotoCoreError, S3UploadFailedError) as error:
            raise ConfigError(f"cannot write {uri!r}: {named(error)}") from error

    def delete(self, uri: str) -> None:
        bucket, key = split(uri)
        try:
            client().delete_object(Bucket=bucket, Key=key)
        except (botocore_errors.ClientError, botocore_errors.BotoCoreError) as error:
            raise ConfigError(f"cannot delete {uri!r}: {named(error)}") from error


class _S3File(io.RawIOBase):
    """An object as a seekable file: a ranged GET for each read, several at once for a large one."""

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
        data = _read_range(self._info, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        """The rest in one read; the inherited method would ask for 8 KB at a time."""
        data = bytearray(max(0, (self._info.size or 0) - self._at))
        self.readinto(data)
        return bytes(data)


def _holds(uri: str, data: bytes) -> bool:
    try:
        return _read(uri, etag=None) == data
    except FetchError as error:
        raise ConfigError(f"cannot tell whether {uri!r} was written: {error}") from error


def _read_range(info: ObjectInfo, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of an object, in as many GETs at once as it takes; all are of the same version."""
    starts = range(start, end, RANGE_BYTES)

    def read(at: int) -> bytes:
        return _read(info.uri, etag=info.etag, Range=f"bytes={at}-{min(at + RANGE_BYTES, end) - 1}")

    if len(starts) == 1:
        return read(start)
    with ThreadPoolExecutor(min(len(starts), RANGE_THREADS), thread_name_prefix="range") as pool:
        return b"".join(pool.map(read, starts))


def _read(uri: str, *, etag: str | None, max_bytes: int | None = None, **request: str) -> bytes:
    """GET an object, or a range of it, asking again where its body breaks off."""
    bucket, key = split(uri)
    # A list may hold any text for an etag, a header may not; what comes back is compared in any case.
    if etag is not None and etag.isascii() and etag.isprintable():
        request["IfMatch"] = f'"{etag}"'
    for attempt in range(1, BODY_ATTEMPTS + 1):
        with _translated(uri):
            answer = client().get_object(Bucket=bucket, Key=key, **request)
        with contextlib.closing(answer["Body"]) as body:
            _check(answer, uri=uri, etag=etag, max_bytes=max_bytes)
            try:
                return bytes(body.read())
            except _BROKEN_BODY as error:
                if attempt == BODY_ATTEMPTS:
                    raise FetchError(f"reading {uri!r} broke off {attempt} times: {named(error)}") from error
        count_retry(RetryReason.BROKEN_BODY)
        time.sleep(BODY_PAUSE * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _require_bucket(bucket: str) -> None:
    try:
        client().head_bucket(Bucket=bucket)
    except botocore_errors.ClientError as error:
        # Without leave to look at the bucket, the answer about its object has to do.
        if code_of(error) in _MISSING:
            raise ConfigError(f"'s3://{bucket}': there is no such bucket") from error


def _check(answer: dict[str, Any], *, uri: str, etag: str | None, max_bytes: int | None) -> None:
    found = answer.get("ETag", "").strip('"')
    # Not every server knows If-Match.
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
        code = code_of(error)
        if code in _UNUSABLE:
            raise ConfigError(f"cannot use the store of {uri!r}: {named(error)}") from error
        if code in _MISSING:
            raise FetchError(f"no such object: {uri!r}") from error
        if code in _EXISTS:
            raise FetchError(f"changed since it was inventoried: {uri!r}") from error
        if code in _FORBIDDEN:
            raise FetchError(f"permission denied: {uri!r}: {code}") from error
        raise FetchError(f"cannot read {uri!r}: {named(error)}") from error
    except (botocore_errors.ReadTimeoutError, botocore_errors.ConnectTimeoutError) as error:
        raise FetchError(f"timed out: {uri!r}: {type(error).__name__}") from error
    except (botocore_errors.ConnectionClosedError, botocore_errors.ResponseStreamingError) as error:
        raise FetchError(f"the connection broke: {uri!r}: {type(error).__name__}") from error
    except botocore_errors.ParamValidationError as error:
        raise FetchError(f"S3 has no such name: {uri!r}: {error}") from error
    except botocore_errors.BotoCoreError as error:
        # No credentials, no region, nobody at the endpoint: the same for every object.
        raise ConfigError(f"cannot use the store of {uri!r}: {named(error)}") from error


def _is_missing(error: FetchError) -> bool:
    cause = error.__cause__
    return isinstance(cause, botocore_errors.ClientError) and code_of(cause) in _MISSING
