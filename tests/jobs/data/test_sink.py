import os

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from ray.data.datasource import WriteResult

from jobs.data.schema import TABLE_SCHEMA
from jobs.data.sink import LabelSink
from jobs.data.snapshots import LabelTable, next_snapshot
from mgmtn.errors import ConfigError


@pytest.fixture
def sink(tmp_path) -> LabelSink:
    return LabelSink(str(tmp_path / "labels"), model_id="m1", run_id="r1", thresholds_id="t1")


def test_the_blocks_of_a_task_become_one_sorted_file(sink, label_rows, tmp_path):
    facts = sink.write([label_rows({"a": 2}), label_rows({"b": "no_face"}), label_rows({})], None)
    assert (facts.rows, facts.faces, facts.thresholds_id) == (3, 2, "t1")
    query = "SELECT image_id, face_index FROM read_parquet($1)"
    rows = duckdb.execute(query, [str(tmp_path / "labels" / facts.path)]).fetchall()
    assert rows == sorted(rows)


def test_a_task_without_rows_writes_nothing(sink, label_rows, tmp_path):
    assert sink.write([], None) is None
    assert sink.write([label_rows({})], None) is None
    assert not os.path.exists(tmp_path / "labels")


def test_pandas_blocks_and_ray_tensors_are_rows_too(sink, label_rows):
    table = label_rows({"a": 1})
    assert sink.write([table.to_pandas()], None).faces == 1
    landmarks = ray.data.extensions.ArrowTensorArray.from_numpy(np.full((1, 136), 0.5, np.float32))
    index = table.schema.get_field_index("landmarks")
    again = sink.write([table.set_column(index, "landmarks", landmarks)], None)
    # The same rows, whatever held them: hence the same file.
    assert again == sink.write([table], None)


def test_a_block_of_failures_fits_beside_a_block_of_faces(sink, label_rows):
    failures = label_rows({"b": "crashed"})
    for name in ("landmarks", "labels", "young", "error"):
        failures = failures.set_column(failures.schema.get_field_index(name), name, pa.nulls(1))
    assert sink.write([failures, label_rows({"a": 1})], None).images == {"crashed": 1, "ok": 1}


def test_an_image_that_failed_in_one_face_failed_in_all(sink, label_rows, tmp_path):
    whole, failed = label_rows({"a": 2}), label_rows({"b": 3})
    first = failed.filter(pc.equal(failed["face_index"], 0))
    others = failed.filter(pc.not_equal(failed["face_index"], 0))
    for name, value in {"status": "crashed", "error": "it died"}.items():
        column = pa.repeat(pa.scalar(value, pa.string()), others.num_rows)
        others = others.set_column(others.schema.get_field_index(name), name, column)
    facts = sink.write([whole, first, others], None)
    assert facts.images == {"crashed": 1, "ok": 1}
    assert facts.faces == 2
    columns = "uri, face_index, face_count, status, error, young, labels IS NULL, box_x1 IS NULL, landmarks IS NULL"
    query = f"SELECT {columns} FROM read_parquet($1) ORDER BY uri, face_index"
    rows = duckdb.execute(query, [str(tmp_path / "labels" / facts.path)]).fetchall()
    assert rows == [
        ("a", 0, 2, "ok", None, 0.25, False, False, False),
        ("a", 1, 2, "ok", None, 0.25, False, False, False),
        ("b", -1, 0, "crashed", "it died", None, True, True, True),
    ]


def test_the_driver_learns_the_files_that_were_written(sink, label_rows):
    parts = [sink.write([label_rows({uri: 1})], None) for uri in "ab"]
    sink.on_write_complete(WriteResult(np.int64(2), np.int64(99), [parts[0], None, parts[1], parts[0]]))
    assert sink.files == tuple(sorted(parts, key=lambda part: part.path))


def test_a_failed_write_keeps_what_was_finished(sink, label_rows, tmp_path):
    parts = [sink.write([label_rows({uri: 1})], None) for uri in "ab"]
    (tmp_path / "labels" / "model=m1" / "run=r1" / ".0a1b.tmp").write_bytes(b"torn")
    sink.on_write_failed(RuntimeError("a worker died"))
    assert sink.files == tuple(sorted(parts, key=lambda part: part.path))


def test_a_write_that_failed_at_once_has_no_files(sink):
    sink.on_write_failed(RuntimeError("no node"))
    assert sink.files == ()


def test_an_id_that_cannot_name_a_folder_is_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match="run_id"):
        LabelSink(str(tmp_path), model_id="m1", run_id="a/b")


@pytest.mark.integration
def test_ray_writes_a_table_that_plain_duckdb_reads(local_ray, label_rows, tmp_path):
    rows = label_rows({f"{number}.jpg": number % 3 or "no_face" for number in range(60)})
    sink = LabelSink(str(tmp_path / "labels"), model_id="m1", run_id="r1", rows_per_file=25)
    ray.data.from_arrow([rows.slice(start, 10) for start in range(0, rows.num_rows, 10)]).write_datasink(sink)
    assert 1 < len(sink.files) <= 4
    assert sum(part.rows for part in sink.files) == rows.num_rows == 80
    table = LabelTable(str(tmp_path / "labels"))
    assert table.current() is None
    snapshot = next_snapshot(None, files=sink.files, run_id="r1", model_id="m1", inventory_digest="d")
    committed = table.commit(snapshot)
    assert (committed.images, committed.faces) == ({"no_face": 20, "ok": 40}, 60)
    query = "SELECT * FROM read_parquet($1, hive_partitioning = false) ORDER BY image_id, face_index"
    read = duckdb.sql(query, params=[list(table.files(committed))]).to_arrow_table().cast(TABLE_SCHEMA)
    assert read.equals(rows.sort_by([("image_id", "ascending"), ("face_index", "ascending")]))


@pytest.mark.integration
def test_a_job_that_dies_leaves_its_finished_files(local_ray, label_rows, tmp_path):
    def fail_late(batch: pa.Table) -> pa.Table:
        if "19.jpg" in batch["uri"].to_pylist():
            raise RuntimeError("a bug of ours")
        return batch

    blocks = [label_rows({f"{number}.jpg": 1}) for number in range(20)]
    sink = LabelSink(str(tmp_path / "labels"), model_id="m1", run_id="r1", rows_per_file=1)
    flow = ray.data.from_arrow(blocks).map_batches(fail_late, batch_format="pyarrow", batch_size=None)
    with pytest.raises(ray.exceptions.RayTaskError, match="a bug of ours"):
        flow.write_datasink(sink)
    assert sink.files == sink.finished()
    assert {part.path for part in sink.files} == {
        os.path.relpath(path, tmp_path / "labels") for path in (tmp_path / "labels").rglob("*.parquet")
    }
    assert 0 < len(sink.files) < 20
