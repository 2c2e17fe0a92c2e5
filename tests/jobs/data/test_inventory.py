import csv
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data import image_lists, inventory
from jobs.data.inventory import inventory_digest, take_inventory, unreadable_folders, write_inventory
from jobs.data.plan import make_plan
from jobs.data.schema import INVENTORY_SCHEMA, TABLE_SCHEMA, image_id
from mgmtn.errors import ConfigError

ODD_NAMES = (
    "ünï cödé.JPG",
    "a b+c%20d.png",
    "日本.webp",
    "x" * 200 + ".tiff",
    "'quoted\",.gif",
    "#1.bmp",
    " lead.jpeg",
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of odd names, some files beside, and a folder inside."""
    folder = tmp_path / "photos"
    (folder / "album").mkdir(parents=True)
    for name in (*ODD_NAMES, "album/one.jpg", "notes.txt", "clip.mp4"):
        (folder / name).write_bytes(name.encode())
    return folder


def names(table: pa.Table, *, folder: Path) -> set[str]:
    return {os.path.relpath(uri, folder) for uri in table["uri"].to_pylist()}


def test_a_folder_gives_its_images_whatever_they_are_called(photos):
    table = take_inventory(str(photos))
    assert table.schema.equals(INVENTORY_SCHEMA)
    assert names(table, folder=photos) == {*ODD_NAMES, "album/one.jpg"}
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows] == sorted(image_id(row["uri"]) for row in rows)
    assert all(row["size"] == os.path.getsize(row["uri"]) and row["etag"] for row in rows)


def test_every_file_counts_where_that_is_asked_for(photos):
    assert names(take_inventory([str(photos)], all_files=True), folder=photos) >= {"notes.txt", "clip.mp4"}


def test_a_single_file_is_an_image_whatever_its_suffix(photos):
    assert names(take_inventory(str(photos / "clip.mp4")), folder=photos) == {"clip.mp4"}


def test_an_image_that_several_inputs_name_is_there_once(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = [str(photos), "photos/album", str(photos / "album" / "one.jpg"), "photos/../photos/"]
    assert take_inventory(inputs).equals(take_inventory(str(photos)))


def test_a_folder_without_images_is_an_empty_inventory(tmp_path):
    table = take_inventory(str(tmp_path))
    assert table.num_rows == 0
    assert table.schema.equals(INVENTORY_SCHEMA)


def write_list(path: Path, uris: list[str]) -> str:
    if path.suffix == ".txt":
        path.write_text("".join(f"{uri}\n" for uri in uris))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["uri", "split"], *([uri, "7"] for uri in uris)])
    else:
        pq.write_table(pa.table({"split": [7] * len(uris), "uri": uris}), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_a_list_is_relative_to_its_own_folder(photos, suffix, monkeypatch):
    monkeypatch.chdir("/")
    uris = [*ODD_NAMES, str(photos / "album" / "one.jpg"), "clip.mp4"]
    table = take_inventory(write_list(photos / f"list{suffix}", uris))
    assert names(table, folder=photos) == {*ODD_NAMES, "album/one.jpg", "clip.mp4"}
    assert table["etag"].null_count == 0
    [row] = [row for row in table.to_pylist() if row["uri"].endswith("one.jpg")]
    assert [row] == take_inventory(str(photos / "album")).to_pylist()


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
@pytest.mark.parametrize("uris", [["gone.jpg"], ["x" * 300 + ".jpg", "gone.jpg"]], ids=["missing", "too-long"])
def test_a_listed_image_that_is_not_there_keeps_its_row(photos, suffix, uris):
    rows = take_inventory(write_list(photos / f"list{suffix}", uris)).to_pylist()
    assert {row["uri"] for row in rows} == {str(photos / uri) for uri in uris}
    assert all(row["etag"] is None and row["size"] is None for row in rows)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_an_empty_list_is_an_empty_inventory(photos, suffix):
    assert take_inventory(write_list(photos / f"list{suffix}", [])).num_rows == 0


def test_a_text_list_may_come_from_another_system(photos):
    (photos / "list.txt").write_bytes("\ufeffuri\r\nclip.mp4\r\n\r\nalbum/one.jpg".encode())
    assert names(take_inventory(str(photos / "list.txt")), folder=photos) == {"clip.mp4", "album/one.jpg"}


def test_versions_in_a_list_are_taken_as_they_are(photos):
    (photos / "list.csv").write_text("size,uri,etag\n5,clip.mp4,abc\n,album/one.jpg,\n7,001,def\n")
    rows = {Path(row["uri"]).name: row for row in take_inventory(str(photos / "list.csv")).to_pylist()}
    assert (rows["clip.mp4"]["etag"], rows["clip.mp4"]["size"]) == ("abc", 5)
    assert (rows["001"]["etag"], rows["001"]["size"]) == ("def", 7)
    assert rows["one.jpg"]["size"] == 13


@given(names=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0/\r\n"), min_size=1), max_size=8))
def test_no_listed_name_vanishes(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("lists")
    names = [name for name in names if name not in (".", "..") and name.strip()]
    table = take_inventory(write_list(folder / "list.parquet", names))
    assert set(table["uri"].to_pylist()) == {str(folder / name) for name in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,split\na.jpg,1\n", "no column 'uri', only \\['image', 'split'\\]"),
        ("uri,etag\n,x\n", "image 1: a row has no uri"),
        ("uri\na.jpg\ngs://x/y.jpg\n", "image 2: 'gs://x/y.jpg': no store for gs://"),
        ("uri,size\na.jpg,large\n", "cannot be read.*large"),
        ("", "cannot be read"),
    ],
)
def test_a_list_that_makes_no_sense_is_named(tmp_path, content, message):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ConfigError, match=f"list\\.csv': .*{message}"):
        take_inventory(str(tmp_path / "list.csv"))


def test_a_list_that_is_not_what_its_suffix_says_is_named(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"uri\n")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    for name in ("list.parquet", "list.txt"):
        with pytest.raises(ConfigError, match=f"{name}': cannot be read"):
            take_inventory(str(tmp_path / name))


def test_all_inputs_that_are_not_there_are_named_at_once(photos):
    with pytest.raises(ConfigError, match=r"typo'.*no such folder.*gs://b.*s3:///k") as caught:
        take_inventory([str(photos), str(photos / "typo"), "gs://b/x", "s3:///k"])
    assert str(caught.value).count(";") >= 2


def test_the_digest_tells_inventories_apart(photos):
    before = inventory_digest(take_inventory(str(photos)))
    assert before == inventory_digest(take_inventory([str(photos / "album"), str(photos)]))
    (photos / "album" / "one.jpg").write_bytes(b"changed")
    changed = inventory_digest(take_inventory(str(photos)))
    (photos / "album" / "one.jpg").unlink()
    removed = inventory_digest(take_inventory(str(photos)))
    assert len({before, changed, removed}) == 3


def test_the_digest_does_not_depend_on_how_the_table_is_held(photos):
    table = take_inventory(str(photos))
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert inventory_digest(pieces) == inventory_digest(table)


def test_folders_that_may_not_be_listed_are_remembered(photos, monkeypatch):
    walk = os.walk

    def walk_with_a_closed_folder(root: str, **options: object) -> object:
        error = PermissionError(13, "Permission denied", f"{root}/album")
        options["onerror"](error)  # type: ignore[operator]
        return walk(root)

    monkeypatch.setattr(os, "walk", walk_with_a_closed_folder)
    assert unreadable_folders(take_inventory(str(photos))) == (str(photos / "album"),)


def read_back(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def test_a_written_inventory_is_the_one_in_memory(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(inventory, "_BATCH_ROWS", 3)
    uris = [str(photos / name) for name in ODD_NAMES]
    inputs = [write_list(photos / "list.parquet", [*uris, *uris[:2], "gone.jpg"]), str(photos)]
    table = take_inventory(inputs)
    folder = write_inventory(inputs, tmp_path / "inventory")
    assert read_back(folder).equals(table)
    assert inventory_digest(folder) == inventory_digest(table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inventory", "photos"]
    # As a plan reads it.
    plan = make_plan(folder, TABLE_SCHEMA.empty_table(), model_id="m1")
    assert plan.planned["new"] == table.num_rows


def test_a_written_inventory_may_be_empty(tmp_path):
    (tmp_path / "photos").mkdir()
    folder = write_inventory(str(tmp_path / "photos"), tmp_path / "inventory")
    assert read_back(folder).equals(take_inventory(str(tmp_path / "photos")))
    assert inventory_digest(folder) == inventory_digest(INVENTORY_SCHEMA.empty_table())


def test_a_written_inventory_of_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"typo'.*no such folder"):
        write_inventory(str(tmp_path / "typo"), tmp_path / "inventory")


@pytest.mark.parametrize("write", [False, True], ids=["in-memory", "written"])
def test_of_two_versions_the_first_named_counts(tmp_path, write):
    for name in ("first", "second"):
        (tmp_path / f"{name}.csv").write_text("uri,etag\n" + "".join(f"/p/{n}.jpg,{name}\n" for n in range(50)))
    inputs = [str(tmp_path / "first.csv"), str(tmp_path / "second.csv")]
    table = read_back(write_inventory(inputs, tmp_path / "out")) if write else take_inventory(inputs)
    assert table["etag"].to_pylist() == ["first"] * 50
    assert take_inventory(inputs[::-1])["etag"].to_pylist() == ["second"] * 50


def test_other_columns_of_a_list_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(image_lists, "_READ_BYTES", 2_000)
    rows = [f'/p/{number}.jpg,"""{number:x}""",{number}\n' for number in range(1000)] + ["/p/last.jpg,x,a word\n"]
    (tmp_path / "list.csv").write_text("uri,etag,note\n" + "".join(rows))
    table = take_inventory(str(tmp_path / "list.csv"))
    assert table.num_rows == 1001
    assert set(table["etag"].to_pylist()) == {f"{number:x}" for number in range(1000)} | {"x"}
