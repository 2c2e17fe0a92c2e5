from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.buckets import MAX_BUCKETS, Buckets, bucket_bounds, buckets_of_files, stage
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
