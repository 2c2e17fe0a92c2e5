"""Small files into large ones: which, how many, and that no row changes on the way."""

import os

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.data import compaction
from jobs.data.compaction import choose_lots, range_bounds, rewrite
from jobs.data.parts import FileFacts
from jobs.data.schema import SORT_KEYS, TABLE_SCHEMA
from jobs.data.snapshots import LabelTable, next_snapshot
from mgmtn.errors import ConfigError


def fact(rows: int, *, ids: tuple[str, str] = ("0", "f"), model_id: str = "m1", name: str = "") -> FileFacts:
    return FileFacts(
        path=f"{model_id}-{rows}-{ids}{name}",
        model_id=model_id,
        run_id="r1",
        rows=rows,
        bytes=1,
        sha256="",
        min_image_id=ids[0],
        max_image_id=ids[1],
        images={"ok": rows},
        faces=rows,
    )


def lots(*files: FileFacts, rows_per_file: int = 100, all_files: bool = False) -> list[tuple[list[int], int]]:
    """Rows of the chosen files, and into how many they go."""
    snapshot = next_snapshot(None, files=files, run_id="r1", model_id="m1", inventory_digest="d")
    found = choose_lots(snapshot, rows_per_file=rows_per_file, all_files=all_files)
    return [([file.rows for file in lot.files], lot.files_after) for lot in found]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((10, 20, 90), [([10, 20], 1)]),
        ((10, 50, 200), []),  # half of a file's rows is not small
        ((10,), []),
        ((), []),
        ((49, 49, 49, 49), [([49, 49, 49, 49], 2)]),
        ((49, 49, 40), [([49, 49, 40], 1)]),
    ],
)
def test_small_files_are_chosen_where_there_are_several(rows, expected):
    files = [fact(count, name=str(number)) for number, count in enumerate(rows)]
    assert [(sorted(chosen), after) for chosen, after in lots(*files)] == [(sorted(c), n) for c, n in expected]


def test_the_files_of_two_models_are_two_lots():
    files = [fact(1, name="a"), fact(2, name="b"), fact(3, model_id="m2", name="a"), fact(4, model_id="m2", name="b")]
    assert lots(*files, fact(5, model_id="m3")) == [([1, 2], 1), ([3, 4], 1)]


def test_all_files_are_chosen_until_none_overlaps_another():
    one, two, over = fact(90, ids=("0", "7")), fact(80, ids=("8", "f")), fact(70, ids=("7", "9"))
    assert lots(one, two, over, all_files=True) == [([90, 70, 80], 2)]
    assert lots(one, two, all_files=True) == []
    assert lots(one, two, fact(10, ids=("g", "h")), all_files=True) == []


def test_ranges_are_equally_wide_and_as_many_as_asked_for():
    assert range_bounds(1) == ()
    assert range_bounds(4) == ("40000000", "80000000", "c0000000")
    assert len(set(range_bounds(5000))) == 4999


@pytest.fixture
def table(tmp_path, add_night) -> LabelTable:
    """Thirty nights of one image each with one to three faces, and a hundred images of the first."""
    uri = str(tmp_path / "labels")
    add_night(uri, {f"first/{number}": 1 + number % 3 for number in range(100)} | {"n": "no_face"}, run_id="r0")
    for number in range(30):
        add_night(uri, {f"night/{number}": 1 + number % 3}, run_id=f"r{number + 1}")
    return LabelTable(uri)


def rows_of(table: LabelTable, files: object) -> pa.Table:
    rows = table.read_files(files, columns=TABLE_SCHEMA.names).read_all()
    return rows.sort_by(list(SORT_KEYS)).combine_chunks()


def test_every_row_is_there_once_in_few_files_that_follow_each_other(table, monkeypatch, tmp_path):
    monkeypatch.setattr(compaction, "_RANGE_ROWS", 20)
    current = table.current()
    [lot] = choose_lots(current, rows_per_file=100, all_files=True)
    (tmp_path / "scratch").mkdir()
    written = rewrite(table, lot, run_id="r-compact", scratch=tmp_path / "scratch")
    assert len(current.files) == 31
    assert len(written) == 3
    assert rows_of(table, written).equals(rows_of(table, current.files))
    for facts in written:
        stored = pq.ParquetFile(f"{table.uri}/{facts.path}")
        ids = stored.read(["image_id", "face_index"]).to_pylist()
        assert ids == sorted(ids, key=lambda row: (row["image_id"], row["face_index"]))
        assert stored.metadata.num_row_groups > 1  # a range each
        assert (facts.min_image_id, facts.max_image_id) == (ids[0]["image_id"], ids[-1]["image_id"])
        assert facts.path.startswith("model=m1/run=r-compact/part-")
        assert sum(facts.images.values()) == len(pc.unique(stored.read(["image_id"])["image_id"]))
    assert written[0].max_image_id < written[1].min_image_id
    assert written[1].max_image_id < written[2].min_image_id
    assert not list((tmp_path / "scratch").iterdir())


def test_counts_by_status_and_attribute_stay(table):
    current = table.current()
    [lot] = choose_lots(current, rows_per_file=10_000)
    written = rewrite(table, lot, run_id="r-compact")
    after = next_snapshot(current, files=written, run_id="r-compact", model_id="m1", inventory_digest="d")
    assert (after.rows, after.images, after.faces) == (current.rows, current.images, current.faces)
    counts = [file.labels.positives["young"] for file in current.files]
    assert sum(counts) == written[0].labels.positives["young"] == current.faces


@pytest.mark.parametrize("harm", ["bit", "gone"])
def test_a_damaged_or_missing_file_is_named_and_not_copied(table, harm):
    [lot] = choose_lots(table.current(), rows_per_file=10_000)
    victim = f"{table.uri}/{lot.files[3].path}"
    if harm == "bit":
        with open(victim, "r+b") as file:
            file.seek(100)
            byte = file.read(1)
            file.seek(100)
            file.write(bytes([byte[0] ^ 1]))
    else:
        os.unlink(victim)
    with pytest.raises(ConfigError, match=lot.files[3].path):
        rewrite(table, lot, run_id="r-compact")


def test_a_scratch_folder_that_cannot_be_written_is_named(table, tmp_path):
    [lot] = choose_lots(table.current(), rows_per_file=10_000)
    with pytest.raises(ConfigError, match="nowhere"):
        rewrite(table, lot, run_id="r-compact", scratch=tmp_path / "nowhere")
