"""Read, list and write files by URI, the same way in a folder and in S3.

A URI is an absolute local path or `s3://bucket/key`; the key is taken as it is, never percent-decoded. A local name
that is not UTF-8, which no Parquet string can hold, is written as a percent-encoded `file://` URI.

To add a store: write its class with the methods of `ObjectStore`, and choose it by its scheme in `open_store`.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, Protocol
from urllib.parse import quote, unquote_to_bytes

from jobs.data.scratch import scratch_folder
from mgmtn.errors import ConfigError, FetchError, ImageTooLarge

log = logging.getLogger(__name__)

CHUNK: Final = 1 << 20
# What link(2) says on file systems without hard links.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a store.

    `etag` changes with the content; `size` is in bytes. Both are None for what is listed but cannot be looked up,
    such as a link that leads nowhere. `modified_at` is when it was written, in UTC, where the store said so.
    """

    uri: str
    etag: str | None
    size: int | None
    modified_at: datetime | None = field(default=None, compare=False)


class ObjectStore(Protocol):
    """One kind of storage. Stores hold no open connection: they may be sent to another process."""

    def list(
        self,
        uri: str,
        *,
        unreadable: Callable[[str], None] | None = None,
        missing_ok: bool = False,
        ordered: bool = True,
    ) -> Iterator[ObjectInfo]:
        """Everything under a folder or prefix, at any depth, each once.

        Args:
            uri: a folder, or a prefix in S3.
            unreadable: called with each folder inside that may not be read; without it such a folder is an error.
            missing_ok: a folder or prefix that does not exist counts as empty; a bucket must exist.
            ordered: in a stable order; without it a store may list several parts at once.

        Raises:
            ConfigError: if there is no such folder, prefix or bucket, or it cannot be read.
        """

    def stat(self, uri: str) -> ObjectInfo | None:
        """The object's etag and size; None if there is no such object.

        Raises:
            FetchError: if it cannot be looked up.
            ConfigError: if the store itself cannot be used: no such bucket, no credentials, no connection.
        """

    def get(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        """The object's bytes.

        Args:
            uri: the object.
            etag: the content that is wanted; anything else counts as changed.
            max_bytes: refuse a larger object before it is read.

        Raises:
            FetchError: if it is missing, forbidden, changed, not a plain file, or cannot be read in time.
            ImageTooLarge: if it has more than `max_bytes` bytes.
            ConfigError: if the store itself cannot be used.
        """

    def open(self, uri: str) -> BinaryIO:
        """The object as a seekable file, of which only the parts that are read are fetched. Raises as `get` does."""

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        """Create an object in one step; False, and nothing changes, if there is one already.

        Raises:
            ConfigError: if it cannot be written.
        """

    def put_file(self, path: Path, uri: str) -> None:
        """Copy a local file into the store; it appears whole or not at all.

        Raises:
            ConfigError: if it cannot be written.
        """

    def delete(self, uri: str) -> None:
        """Delete an object; nothing happens if there is none. Raises `ConfigError` if that is forbidden."""


def is_s3(uri: str) -> bool:
    """True for `s3://...`."""
    return uri.startswith("s3://")


def canonical_uri(text: str) -> str:
    """The one spelling of a place: an `s3://` URI as it is, a local path made absolute, `~` expanded, links left alone.

    Raises:
        ConfigError: for any other scheme, an S3 URI without a bucket, or nothing (which would be the working folder).
    """
    if not text.strip():
        raise ConfigError(f"{text!r}: an empty path; name a folder or s3://bucket/key")
    if is_s3(text):
        if not text.removeprefix("s3://").split("/")[0]:
            raise ConfigError(f"{text!r}: no bucket in this S3 URI")
        return text
    if _scheme(text) not in ("", "file"):
        raise ConfigError(f"{text!r}: no store for {_scheme(text)}://; use a local path or s3://bucket/key")
    return _uri_of(local_path(text))


def _scheme(text: str) -> str:
    """`s3` of `s3://bucket`; empty for a path, even one like `a/b://c`."""
    scheme, separator, _ = text.partition("://")
    return scheme if separator and scheme.isalnum() else ""


def local_path(uri: str) -> str:
    """The absolute path that a local URI names, `~` expanded."""
    if uri.startswith("file://"):
        return os.path.abspath(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))
    return os.path.abspath(os.path.expanduser(uri))


def _uri_of(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return file_uri(path)
    return path


def file_uri(path: str) -> str:
    """`file://` and a path of any bytes, percent-encoded: how an image is named whose path is not UTF-8."""
    return "file://" + quote(os.fsencode(path))


def join(folder: str, *names: str) -> str:
    """A URI under a folder's URI."""
    return "/".join([folder.rstrip("/"), *names])


def parent(uri: str) -> str:
    """The folder or prefix that holds an object."""
    return uri.rpartition("/")[0] or "/"


def resolve(text: str, *, folder: str) -> str:
    """The canonical URI of a name that may be relative to a folder's URI."""
    if _scheme(text) or text.startswith(("/", "~/")):
        return canonical_uri(text)
    return join(folder, text) if is_s3(folder) else canonical_uri(os.path.join(local_path(folder), text))


def relative(uri: str, *, folder: str) -> str:
    """The name of an object inside a folder, such as `_snapshots/1.json`.

    Raises:
        ValueError: if the object is not inside the folder.
    """
    prefix = folder.rstrip("/") + "/"
    if not uri.startswith(prefix):
        raise ValueError(f"{uri!r} is not inside {folder!r}")
    return uri[len(prefix) :]


def open_store(uri: str) -> ObjectStore:
    """The store that a URI lives in. Nothing is read or connected yet."""
    if is_s3(uri):
        # Imported here: boto3 takes a third of a second that local runs need not wait for.
        from jobs.data.s3_store import S3Store

        return S3Store()
    return LocalStore()


@contextlib.contextmanager
def new_files(folder: str, *, last: str = "", within: Path | None = None) -> Iterator[Path]:
    """A folder of this machine to write files in, which replace those of the same names under a URI in the end.

    Args:
        folder: URI, with or without a slash at its end.
        last: name of the file that is put after all others, and so says that they are there.
        within: where there is room for them until then; None for TMPDIR.

    Raises:
        ConfigError, FetchError: the store does not take them.
    """
    with scratch_folder("files", within=within) as temporary:
        yield temporary
        paths = (path for path in temporary.rglob("*") if path.is_file())
        for path in sorted(paths, key=lambda path: (path.name == last, path)):
            uri = join(folder, path.relative_to(temporary).as_posix())
            open_store(uri).put_file(path, uri)


@contextlib.contextmanager
def new_file(uri: str, *, within: Path | None = None) -> Iterator[Path]:
    """A path of this machine to write to; what is there in the end replaces the object. See `new_files`."""
    folder = parent(uri)
    with new_files(folder, within=within) as temporary:
        yield temporary / relative(uri, folder=folder)


def file_place(text: str) -> str:
    """The canonical URI of a file that a user names.

    Raises:
        ConfigError: as `canonical_uri`, or a slash at its end makes it a folder.
    """
    uri = canonical_uri(text)
    if text.endswith("/"):
        raise ConfigError(f"{text!r}: this names a folder, not a file")
    return uri


def local_copy(uri: str, *, sha256: str | None = None) -> Path:
    """The object as a local file: a local one itself, one of S3 from the cache (`MGMTN_CACHE`, else `~/.cache/mgmtn`).

    Args:
        uri: the object.
        sha256: the hex digest that its content must have.

    Raises:
        ConfigError: if there is no such object, or its content is another.
        FetchError: if it cannot be read.
    """
    store = open_store(uri)
    info = store.stat(uri)
    if info is None:
        raise ConfigError(f"{uri!r}: there is no such file")
    path = Path(local_path(uri)) if isinstance(store, LocalStore) else _cached(info, store)
    if sha256 is not None and file_sha256(path) != sha256:
        if not isinstance(store, LocalStore):
            path.unlink(missing_ok=True)
        raise ConfigError(f"{uri!r}: its content is not the one with SHA-256 {sha256}")
    return path


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached(info: ObjectInfo, store: ObjectStore) -> Path:
    root = os.environ.get("MGMTN_CACHE") or os.path.expanduser("~/.cache/mgmtn")
    version = hashlib.sha256(f"{info.uri}\n{info.etag}".encode()).hexdigest()[:32]
    # The name is kept, for it tells a reader what the file is; a key may be longer than a file's name may be.
    path = Path(root, version, info.uri.rpartition("/")[2][-100:])
    if not path.is_file():
        with store.open(info.uri) as source, _writing(str(path)), _temporary(str(path)) as temporary:
            with open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, 16 * CHUNK)
            os.replace(temporary, path)
    return path


@dataclass(frozen=True)
class LocalStore:
    """Folders of this machine, or mounted on it. An etag is the modification time in ns and the size, in hex."""

    def list(
        self,
        uri: str,
        *,
        unreadable: Callable[[str], None] | None = None,
        missing_ok: bool = False,
        ordered: bool = True,
    ) -> Iterator[ObjectInfo]:
        """Files at any depth, folder by folder in name order. Links to files are followed, links to folders are not."""
        root = local_path(uri)
        if missing_ok and not os.path.lexists(root):
            return
        if not os.path.isdir(root):
            raise ConfigError(f"{uri!r}: there is no such folder")

        def refuse(error: OSError) -> None:
            folder = _uri_of(os.fspath(error.filename))
            if unreadable is None or error.filename == root:
                raise ConfigError(f"{folder!r}: cannot list this folder: {error.strerror}") from error
            unreadable(folder)

        for folder, folders, files in os.walk(root, onerror=refuse):
            folders.sort()
            for name in folders:
                if os.path.islink(os.path.join(folder, name)):
                    log.warning("listing=not_followed link=%r", os.path.join(folder, name))
            for name in sorted(files):
                yield _look_up(os.path.join(folder, name))

    def stat(self, uri: str) -> ObjectInfo | None:
        try:
            found = os.stat(local_path(uri))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise FetchError(f"cannot look up {uri!r}: {_reason(error)}") from error
        return _info(uri, found) if stat.S_ISREG(found.st_mode) else None

    def get(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> bytes:
        with self.open(uri) as file:
            found = os.fstat(file.fileno())
            if etag is not None and etag != _etag(found):
                raise FetchError(f"changed since it was inventoried: {uri!r} has etag {_etag(found)}, not {etag}")
            if max_bytes is not None and found.st_size > max_bytes:
                raise ImageTooLarge(f"{uri!r} has {found.st_size} bytes, more than {max_bytes}")
            try:
                return file.read()
            except OSError as error:
                raise FetchError(f"cannot read {uri!r}: {_reason(error)}") from error

    def open(self, uri: str) -> BinaryIO:
        try:
            # Without O_NONBLOCK a named pipe without a writer would hold a worker for ever.
            descriptor = os.open(local_path(uri), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FetchError(f"no such file: {uri!r}") from error
        except (OSError, ValueError) as error:
            raise FetchError(f"cannot open {uri!r}: {_reason(error)}") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FetchError(f"not a plain file: {uri!r}")
        return os.fdopen(descriptor, "rb")

    def put_if_absent(self, uri: str, data: bytes) -> bool:
        path = local_path(uri)
        with _writing(uri), _temporary(path) as temporary:
            Path(temporary).write_bytes(data)
            return _publish(temporary, path)

    def put_file(self, path: Path, uri: str) -> None:
        target = local_path(uri)
        with _writing(uri), _temporary(target) as temporary:
            shutil.copyfile(path, temporary)
            _sync(temporary)
            os.replace(temporary, target)
            _sync(os.path.dirname(target))

    def delete(self, uri: str) -> None:
        with _writing(uri):
            Path(local_path(uri)).unlink(missing_ok=True)


def _reason(error: OSError | ValueError) -> str:
    # A path with a NUL byte is a ValueError to Python.
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _look_up(path: str) -> ObjectInfo:
    """A listed file; without etag and size where reading it will fail, so that it becomes that image's outcome."""
    try:
        found = os.stat(path)
    except OSError:
        return ObjectInfo(_uri_of(path), None, None)
    plain = stat.S_ISREG(found.st_mode)
    return _info(_uri_of(path), found) if plain else ObjectInfo(_uri_of(path), None, None)


def _info(uri: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(uri, _etag(found), found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


@contextlib.contextmanager
def _writing(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {uri!r}: {error.strerror or error}") from error


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[str]:
    """A name for a temporary file beside `path`, which is removed in the end; the folder is made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # Not by tempfile, whose files only their owner may read. The leading dot hides it from a reader's `*.parquet`.
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _publish(temporary: str, path: str) -> bool:
    """Give a written file its name, unless the name is taken."""
    _sync(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Not atomic for readers, but still for writers: exactly one of them creates the file.
        try:
            with open(path, "xb") as file:
                file.write(Path(temporary).read_bytes())
        except FileExistsError:
            return False
        _sync(path)
    _sync(os.path.dirname(path))
    return True


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
