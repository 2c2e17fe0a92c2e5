import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.object_store import (
    LocalStore,
    canonical_uri,
    join,
    local_copy,
    new_file,
    new_files,
    parent,
    relative,
    resolve,
)
from mgmtn.errors import ConfigError, FetchError, ImageTooLarge

STORE = LocalStore()
SOURCES = str(Path(__file__).parents[3])
# Whatever a Linux file may be called, short of bytes that are not UTF-8.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 255
)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_nobody(code: str, *arguments: object) -> str:
    """What a child process prints that may not read everything, as root may."""
    drop = "import os, sys\nif os.getuid() == 0:\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    command = [sys.executable, "-c", drop + code, *map(str, arguments)]
    # The folder of the sources may be closed to nobody; imports are done by then.
    preload = "import jobs.data.inventory\nfrom jobs.data.object_store import LocalStore\n"
    command[2] = preload + command[2]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": SOURCES}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_is_listed_at_any_depth_in_a_stable_order(tmp_path):
    for name in ("b/2.jpg", "b/1.jpg", "a.jpg", "b/c/3.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    found = list(STORE.list(str(tmp_path)))
    assert [relative(info.uri, folder=str(tmp_path)) for info in found] == ["a.jpg", "b/1.jpg", "b/2.jpg", "b/c/3.jpg"]
    assert [info.size for info in found] == [5, 7, 7, 9]
    assert found == list(STORE.list(str(tmp_path) + "/"))


def test_links_to_files_are_followed_and_links_to_folders_are_reported(tmp_path, caplog):
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.jpg").write_bytes(b"abc")
    (tmp_path / "link.jpg").symlink_to("album/a.jpg")
    (tmp_path / "loop").symlink_to(".")
    found = {Path(info.uri).name: info.size for info in STORE.list(str(tmp_path))}
    assert found == {"a.jpg": 3, "link.jpg": 3}
    assert "not_followed" in caplog.text
    assert "loop" in caplog.text


def test_what_cannot_be_read_is_still_listed(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert [(info.etag, info.size) for info in STORE.list(str(tmp_path))] == [(None, None)] * 2


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        list(STORE.list(str(tmp_path / "typo")))
    assert list(STORE.list(str(tmp_path / "typo"), missing_ok=True)) == []


def test_an_unreadable_folder_is_reported_and_not_passed_over(open_folder):
    (open_folder / "a.jpg").write_bytes(b"a")
    (open_folder / "closed").mkdir(mode=0o000)
    code = """
found = []
names = [info.uri for info in LocalStore().list(sys.argv[1], unreadable=found.append)]
print(names == [sys.argv[1] + "/a.jpg"], found == [sys.argv[1] + "/closed"])
from mgmtn.errors import ConfigError
for folder, options in ((sys.argv[1], {}), (sys.argv[1] + "/closed", {"unreadable": found.append})):
    try:
        list(LocalStore().list(folder, **options))
    except ConfigError as error:
        print(error)
"""
    told = as_nobody(code, open_folder)
    assert told.startswith("True True\n")
    assert told.count("closed': cannot list this folder: Permission denied") == 2


def test_a_forbidden_file_is_that_images_fault(open_folder):
    (open_folder / "a.jpg").write_bytes(b"a")
    (open_folder / "a.jpg").chmod(0o000)
    code = """
from mgmtn.errors import FetchError
try:
    LocalStore().get(sys.argv[1])
except FetchError as error:
    print(error.status, error)
"""
    assert "fetch_error cannot open" in (told := as_nobody(code, open_folder / "a.jpg"))
    assert "Permission denied" in told


def test_the_bytes_come_back_with_their_etag(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    info = STORE.stat(str(path))
    assert info is not None
    assert STORE.get(str(path), etag=info.etag, max_bytes=3) == b"abc"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jpg", "no such file"),
        ("", "not a plain file"),
        ("pipe.jpg", "not a plain file"),
        ("a\0b", "null byte"),
    ],
)
def test_what_is_no_readable_file_is_a_fetch_error(tmp_path, name, message):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(FetchError, match=message):
        STORE.get(f"{tmp_path}/{name}")


def test_a_name_that_is_too_long_is_a_fetch_error(tmp_path):
    with pytest.raises(FetchError, match="name too long"):
        STORE.get(f"{tmp_path}/{'x' * 300}.jpg")


def test_a_file_that_changed_after_the_inventory_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    info = STORE.stat(str(path))
    path.write_bytes(b"abcd")
    with pytest.raises(FetchError, match="changed since"):
        STORE.get(str(path), etag=info.etag)


def test_a_file_over_the_limit_is_too_large(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageTooLarge, match="1099511627776 bytes, more than 10"):
        STORE.get(str(tmp_path / "a.jpg"), max_bytes=10)


def test_one_of_many_writers_creates_an_object(tmp_path):
    uri = str(tmp_path / "new" / "lease.json")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda n: STORE.put_if_absent(uri, b"%d" % n), range(8)))
    assert created.count(True) == 1
    assert STORE.get(uri) == b"%d" % created.index(True)
    assert os.listdir(tmp_path / "new") == ["lease.json"]


def test_an_object_is_created_once_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "1.json")
    assert STORE.put_if_absent(uri, b"first")
    assert not STORE.put_if_absent(uri, b"second")
    assert STORE.get(uri) == b"first"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write .*file/1\.json"):
        STORE.put_if_absent(str(tmp_path / "file" / "1.json"), b"")


def test_a_file_put_into_a_store_can_be_read_by_others(tmp_path):
    source = tmp_path / "part"
    source.write_bytes(b"rows")
    source.chmod(0o600)
    uri = str(tmp_path / "labels" / "part.parquet")
    before = os.umask(0o022)
    try:
        STORE.put_file(source, uri)
    finally:
        os.umask(before)
    assert STORE.get(uri) == b"rows"
    assert stat.S_IMODE(os.stat(uri).st_mode) == 0o644
    assert os.listdir(tmp_path / "labels") == ["part.parquet"]


def test_new_files_replace_those_of_their_names_and_the_last_says_that_all_are_there(tmp_path, monkeypatch):
    put = []
    monkeypatch.setattr(LocalStore, "put_file", lambda self, path, uri: put.append((uri, path.read_bytes())))
    with new_files("/models/a/", last="card.json") as folder:
        (folder / "logs").mkdir()
        for name in ("card.json", "weights", "logs/events"):
            (folder / name).write_text(name)
        assert put == []
    assert put == [(f"/models/a/{name}", name.encode()) for name in ("logs/events", "weights", "card.json")]


def test_nothing_replaces_a_file_where_its_writing_fails(tmp_path):
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(FileNotFoundError), new_file(str(tmp_path / "page.html")) as path:
        path.with_name("half of it").rename(tmp_path / "gone" / "x")
    assert (tmp_path / "page.html").read_text() == "old"
    with new_file(str(tmp_path / "page.html")) as path:
        path.write_text("new")
    assert (tmp_path / "page.html").read_text() == "new"


def test_deleting_twice_is_deleting(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    STORE.delete(str(tmp_path / "a"))
    STORE.delete(str(tmp_path / "a"))
    assert STORE.stat(str(tmp_path / "a")) is None


@given(name=NAMES, content=st.binary(max_size=5))
def test_any_name_that_is_listed_can_be_read(name, content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(content)
        [info] = STORE.list(folder)
        assert STORE.get(info.uri, etag=info.etag) == content
        assert resolve(name, folder=folder) == info.uri or name.startswith("~/")
        assert canonical_uri(info.uri) == info.uri


def test_a_name_that_is_not_utf_8_gets_a_uri_that_is(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write(b"abc")
    [info] = STORE.list(str(tmp_path))
    assert info.uri == f"file://{tmp_path}/caf%E9.jpg"
    assert STORE.get(info.uri) == b"abc"
    assert canonical_uri(info.uri) == info.uri


@pytest.mark.parametrize("text", ["", " "])
def test_no_place_at_all_is_not_the_working_folder(text):
    with pytest.raises(ConfigError, match="an empty path"):
        canonical_uri(text)


def test_a_place_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert canonical_uri("photos/../a b%20c.jpg") == f"{tmp_path}/a b%20c.jpg"
    assert canonical_uri("~/photos/") == "/home/ada/photos"
    assert canonical_uri("file:///a%20b.jpg") == "/a b.jpg"
    assert canonical_uri("s3://bucket/a//b%20c?.jpg") == "s3://bucket/a//b%20c?.jpg"


@pytest.mark.parametrize("uri", ["gs://bucket/a.jpg", "https://host/a.jpg", "s3:///a.jpg"])
def test_a_uri_of_no_known_store_is_refused(uri):
    with pytest.raises(ConfigError, match=uri.split("/")[0]):
        canonical_uri(uri)


def test_names_in_a_folder_are_joined_and_taken_apart():
    assert join("s3://b/labels/", "_snapshots", "1.json") == "s3://b/labels/_snapshots/1.json"
    assert relative("s3://b/labels/x/y", folder="s3://b/labels") == "x/y"
    assert parent("s3://b/list.csv") == "s3://b"
    assert parent("/list.csv") == "/"
    assert resolve("x y.jpg", folder="s3://b/p") == "s3://b/p/x y.jpg"
    assert resolve("../x.jpg", folder="/a/b") == "/a/x.jpg"
    assert resolve("/x.jpg", folder="s3://b/p") == "/x.jpg"


def test_a_local_file_is_its_own_local_copy_if_its_content_is_right(tmp_path):
    (tmp_path / "m").write_bytes(b"abc")
    right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert local_copy(str(tmp_path / "m"), sha256=right) == tmp_path / "m"
    with pytest.raises(ConfigError, match="content is not the one"):
        local_copy(str(tmp_path / "m"), sha256="0" * 64)
    with pytest.raises(ConfigError, match="no such file"):
        local_copy(str(tmp_path / "typo"))
