import hashlib
import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.object_store import LocalStore
from jobs.data.parts import FileFacts, conform, part_directory, read_facts, read_parts, write_part
from jobs.data.schema import TABLE_SCHEMA, image_id
from mgmtn.errors import ConfigError

STORE = LocalStore()
IMAGES = {"a": 2, "b": "no_face", "c": 1, "d": "fetch_error", "e": "fetch_error"}


def write(table: pa.Table, labels: Path, *, thresholds_id: str | None = "t1") -> FileFacts:
    return write_part(
        table, store=STORE, labels_uri=str(labels), model_id="m1", run_id="r1", thresholds_id=thresholds_id
    )


def test_the_facts_are_those_of_the_file(label_rows, tmp_path):
    facts = write(label_rows(IMAGES), tmp_path)
    path = tmp_path / facts.path
    assert facts.path == f"model=m1/run=r1/part-{facts.sha256[:32]}.parquet"
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.bytes == path.stat().st_size
    assert (facts.rows, facts.faces) == (6, 3)
    assert facts.images == {"ok": 2, "no_face": 1, "fetch_error": 2}
    assert (facts.min_image_id, facts.max_image_id) == (min(map(image_id, "abcde")), max(map(image_id, "abcde")))
    assert facts == FileFacts.model_validate_json(facts.model_dump_json())


def test_the_file_is_read_by_plain_duckdb_sorted_and_whole(label_rows, tmp_path):
    facts = write(label_rows(IMAGES), tmp_path)
    read = duckdb.sql(f"SELECT * FROM read_parquet(['{tmp_path / facts.path}'], hive_partitioning = false)")
    rows = read.to_arrow_table().to_pylist()
    assert list(rows[0]) == TABLE_SCHEMA.names
    keys = [(row["image_id"], row["face_index"]) for row in rows]
    assert keys == sorted(keys)
    [face] = [row for row in rows if row["uri"] == "c"]
    assert (face["young"], face["labels"], len(face["landmarks"])) == (0.25, 2**39 + 1, 136)
    [failed] = [row for row in rows if row["uri"] == "d"]
    assert (failed["landmarks"], failed["labels"], failed["young"], failed["error"]) == (None, None, None, "why")


def test_a_reader_can_skip_what_it_does_not_need(label_rows, tmp_path):
    facts = write(label_rows(IMAGES), tmp_path)
    path = str(tmp_path / facts.path)
    metadata = pq.read_metadata(path)
    ids = metadata.row_group(0).column(0)
    assert (ids.path_in_schema, ids.compression, ids.has_offset_index, ids.has_column_index) == (
        "image_id",
        "ZSTD",
        True,
        True,
    )
    assert [(sorting.column_index, sorting.descending) for sorting in metadata.row_group(0).sorting_columns] == [
        (0, False),
        (TABLE_SCHEMA.get_field_index("face_index"), False),
    ]
    probe = "SELECT bloom_filter_excludes FROM parquet_bloom_probe(?, 'image_id', ?)"
    assert duckdb.execute(probe, [path, image_id("a")]).fetchall() == [(False,)]
    assert duckdb.execute(probe, [path, image_id("never seen")]).fetchall() == [(True,)]


def test_a_file_tells_its_schema_and_thresholds(label_rows, tmp_path):
    metadata = pq.read_schema(tmp_path / write(label_rows(IMAGES), tmp_path).path).metadata
    assert metadata[b"mgmtn.schema_version"] == b"1"
    assert metadata[b"mgmtn.thresholds_id"] == b"t1"
    assert metadata[b"mgmtn.attributes"].startswith(b"five_o_clock_shadow,")


def test_equal_rows_are_one_file(label_rows, tmp_path):
    table = label_rows(IMAGES)
    first, again = write(table, tmp_path), write(table.take(list(range(table.num_rows))[::-1]), tmp_path)
    assert first == again
    assert os.listdir(tmp_path / "model=m1/run=r1") == [Path(first.path).name]
    assert write(label_rows(IMAGES, width=7), tmp_path) != first


@pytest.mark.parametrize("thresholds_id", [None, "t1"])
def test_the_facts_can_be_told_from_the_file_alone(label_rows, tmp_path, thresholds_id):
    facts = write(label_rows(IMAGES), tmp_path, thresholds_id=thresholds_id)
    assert read_facts(facts.path, store=STORE, labels_uri=str(tmp_path)) == facts


def test_a_damaged_file_is_not_taken_for_a_finished_one(label_rows, tmp_path):
    facts = write(label_rows(IMAGES), tmp_path)
    os.truncate(tmp_path / facts.path, facts.bytes - 1)
    with pytest.raises(ConfigError, match="not what its name says"):
        read_facts(facts.path, store=STORE, labels_uri=str(tmp_path))


def test_a_damaged_file_of_the_table_is_named(label_rows, tmp_path):
    facts = write(label_rows(IMAGES), tmp_path)
    uri = str(tmp_path / facts.path)
    os.truncate(uri, facts.bytes - 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_parts([uri], store=STORE, columns=["uri"]))
    os.unlink(uri)
    with pytest.raises(ConfigError, match="no such file"):
        list(read_parts([uri], store=STORE, columns=["uri"]))


def test_rows_are_read_in_the_order_of_their_files(label_rows, tmp_path):
    paths = [str(tmp_path / write(label_rows({uri: 1}), tmp_path).path) for uri in "ca"]
    batches = list(read_parts(paths, store=STORE, columns=["uri", "young"]))
    assert [batch.to_pydict() for batch in batches] == [
        {"uri": ["c"], "young": [0.25]},
        {"uri": ["a"], "young": [0.25]},
    ]


def test_wider_types_are_narrowed_and_long_errors_cut(label_rows):
    table = label_rows({"a": 1, "b": "crashed"}, error="é" * 1000)
    wide = table.cast(
        pa.schema(
            [
                field.with_type({"float": pa.float64(), "int16": pa.int64()}.get(str(field.type), field.type))
                for field in table.schema
            ]
        )
    )
    wide = wide.set_column(18, "landmarks", table["landmarks"].cast(pa.list_(pa.float64())))
    conformed = conform(wide)
    assert conformed.schema.equals(TABLE_SCHEMA)
    assert set(conformed["error"].to_pylist()) == {"é" * 256}
    assert conformed["landmarks"].null_count == 1


def test_a_column_of_nulls_alone_gets_its_type(label_rows):
    table = label_rows({"a": "no_face"})
    index = table.schema.get_field_index("landmarks")
    assert conform(table.set_column(index, "landmarks", pa.nulls(1))).schema.equals(TABLE_SCHEMA)


@pytest.mark.parametrize("columns", [{"status": "fine"}, {"attempts": None}, {"uri": None}])
def test_rows_that_break_the_schema_are_a_bug(label_rows, columns):
    with pytest.raises(AssertionError):
        conform(label_rows({"a": 1}, **columns))


def test_rows_of_another_model_are_a_bug(label_rows, tmp_path):
    with pytest.raises(AssertionError, match="another model"):
        write(label_rows({"a": 1}, model_id="m2"), tmp_path)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a=b", "a b", ".hidden", "ä", "x" * 129])
def test_an_id_that_cannot_name_a_folder_is_refused(name):
    with pytest.raises(ConfigError, match="model_id"):
        part_directory(name, "r1")
    with pytest.raises(ConfigError, match="run_id"):
        part_directory("m1", name)
