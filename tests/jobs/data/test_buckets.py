from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.buckets import MAX_BUCKETS, Buckets, ImageIds, bucket_bounds, buckets_of_files, stage
from jobs.data.schema import image_id
from mgmtn.errors import ConfigError

SCHEMA = pa.schema([("image_id", pa.string()), ("number", pa.int64())])
ROWS = pa.table({"image_id": [image_id(str(number)) for number in range(1000)], "number": range(1000)}, schema=SCHEMA)
BOUNDS = bucket_bounds(1000, rows_per_bucket=125)


def rows_of(buckets: Buckets, bucket: int) -> list[tuple[str, int]]:
    query = buckets.sql(bucket)
    return sorted(duckdb.sql(query).fetchall()) if query else []


def assert_buckets_hold_everything_once(buckets: Buckets) -> None:
    found = [rows_of(buckets, bucket) for bucket in range(len(BOUNDS) + 1)]
    expected = sorted(zip(*(column.to_pylist() for column in ROWS.columns), strict=True))
    assert [row for rows in found for row in rows] == expected  # and each bucket's ids before those of the next


def test_bounds_cut_the_ids_into_equal_ranges():
    assert bucket_bounds(0, rows_per_bucket=10) == ()
    assert bucket_bounds(10, rows_per_bucket=10) == ()
    assert bucket_bounds(40, rows_per_bucket=10) == ("400", "800", "c00")
    assert len(bucket_bounds(10**12, rows_per_bucket=1)) == MAX_BUCKETS - 1


def test_every_row_is_in_the_bucket_of_its_id(tmp_path):
    buckets = stage(ROWS.to_batches(max_chunksize=77), schema=SCHEMA, folder=tmp_path / "staged", bounds=BOUNDS)
    assert len(buckets.files) == 8
    assert_buckets_hold_everything_once(buckets)


def test_only_the_wanted_columns_are_kept(tmp_path):
    more = ROWS.append_column("uri", pa.repeat(pa.scalar("long"), 1000))
    buckets = stage(more.to_batches(), schema=SCHEMA, folder=tmp_path / "staged", bounds=())
    assert pq.read_schema(buckets.files[0][0]).names == SCHEMA.names


def test_a_bucket_without_rows_has_no_file(tmp_path):
    one = ROWS.slice(0, 1)
    buckets = stage(one.to_batches(), schema=SCHEMA, folder=tmp_path / "staged", bounds=BOUNDS)
    assert sum(map(len, buckets.files)) == 1
    assert [rows_of(buckets, bucket) for bucket in range(8)].count([]) == 7
    assert stage([], schema=SCHEMA, folder=tmp_path / "nothing", bounds=BOUNDS).files == ((),) * 8


def test_sorted_files_are_read_as_they_lie(tmp_path):
    ordered = ROWS.sort_by("image_id")
    files = [tmp_path / f"it's [{number}].parquet" for number in (0, 1)]
    pq.write_table(ordered.slice(0, 450), files[0], row_group_size=50)
    pq.write_table(ordered.slice(450), files[1], row_group_size=50)
    buckets = buckets_of_files(files, schema=SCHEMA, folder=tmp_path / "staged", bounds=BOUNDS)
    assert {file for some in buckets.files for file in some} == set(files)
    assert buckets.files[0] == (files[0],)
    assert not (tmp_path / "staged").exists()
    assert_buckets_hold_everything_once(buckets)


@pytest.mark.parametrize("statistics", [True, False])
def test_files_in_another_order_are_copied_into_buckets(tmp_path, statistics):
    file = tmp_path / "listing.parquet"
    ordered = ROWS if statistics else ROWS.sort_by("image_id")
    pq.write_table(ordered, file, row_group_size=50, write_statistics=statistics)
    buckets = buckets_of_files([file], schema=SCHEMA, folder=tmp_path / "staged", bounds=BOUNDS)
    assert all(path.is_relative_to(tmp_path / "staged") for some in buckets.files for path in some)
    assert_buckets_hold_everything_once(buckets)


def test_a_file_without_a_column_or_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "list.parquet"
    pq.write_table(ROWS.select(["image_id"]), path)
    with pytest.raises(ConfigError, match=r"list\.parquet' has no column number, only \['image_id'\]"):
        buckets_of_files([path], schema=SCHEMA, folder=tmp_path / "staged", bounds=())
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"list\.parquet.* cannot be read"):
        buckets_of_files([path], schema=SCHEMA, folder=tmp_path / "staged", bounds=())
    with pytest.raises(ConfigError, match=r"absent\.parquet.* cannot be read"):
        buckets_of_files([Path("absent.parquet")], schema=SCHEMA, folder=tmp_path / "staged", bounds=())


def test_a_set_of_ids_is_asked_bucket_by_bucket(tmp_path):
    every = sorted(ROWS["image_id"].to_pylist())
    # Each id twice, and nothing in the second half of the buckets.
    some = [each for each in every if each < "8"][::3]
    batches = pa.table({"image_id": [*some, *reversed(some)]}).to_batches(max_chunksize=50)
    ids = ImageIds.of(batches, folder=tmp_path / "ids", bounds=BOUNDS)
    assert [part.to_pylist() for part in ids.between("", "g")] == [
        [each for each in some if start <= each < stop] for start, stop in zip("0246", "2468", strict=True)
    ]
    assert [each for part in ids.between(some[40], some[90]) for each in part.to_pylist()] == some[40:91]
    asked = pa.chunked_array([every[500:], every[:500]])
    assert ids.hold(asked).to_pylist() == [each in some for each in asked.to_pylist()]
    assert ids.hold(pa.array([some[7]])).to_pylist() == [True]
    assert (ids.any_between(every[1], every[2]), ids.any_between(every[1], every[3])) == (False, True)
    assert not ids.any_between("8", "g")
    assert [file.name for file in ids.files(some[0], some[0])] == ["0000.parquet"]
    assert len(ids.files("200", "9")) == 3


def test_a_set_of_few_ids_may_be_empty():
    assert not ImageIds.few().any_between("", "g")
    assert ImageIds.few(["b", "a", "b"]).hold(pa.array(["a", "c"])).to_pylist() == [True, False]
    assert list(ImageIds.few(["b", "a", "b"]).between("", "g")) == [pa.array(["a", "b"])]
