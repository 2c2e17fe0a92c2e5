"""What a run publishes, and in how much memory: everything is labelled already, so no Ray here."""

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from jobs.data import snapshots
from jobs.data.parts import FileFacts, write_part
from jobs.data.plan import PlanLimits, make_plan
from jobs.data.run import Run, commit, commit_deletions
from jobs.data.schema import INVENTORY_SCHEMA, TABLE_SCHEMA, image_id
from jobs.data.snapshots import LabelTable, Snapshot, next_snapshot
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

URIS = sorted((f"/corpus/{number}.jpg" for number in range(240)), key=image_id)
SMALL = PlanLimits(images_per_bucket=20)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    tiny = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)
    return Checkpoint.of(MGMTN(tiny), Card(name="tiny", kind="attributes", network=tiny))


@pytest.fixture
def table(tmp_path: Path) -> LabelTable:
    return LabelTable(str(tmp_path / "labels"))


def shares(uris: Sequence[str], *, layout: str) -> Iterator[list[str]]:
    """Images of a file each: a range of image_ids, as labelling in order leaves them, or from all over."""
    yield from (
        ([*uris[start : start + 17]] for start in range(0, len(uris), 17))
        if layout == "ranges"
        else ([*uris[start::9]] for start in range(9))
    )


def write(table: LabelTable, rows: pa.Table, *, run_id: str, model_id: str) -> FileFacts:
    return write_part(rows, store=table.store, labels_uri=table.uri, model_id=model_id, run_id=run_id)


def run_over(table: LabelTable, uris: Sequence[str], checkpoint: Checkpoint, **more: str) -> Run:
    """A run whose inventory is these images."""
    rows = [{"image_id": image_id(uri), "uri": uri, "etag": "v1", "size": 10} for uri in uris]
    current = table.current()
    plan = make_plan(
        pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA),
        table.read(current, columns=TABLE_SCHEMA.names),
        model_id=checkpoint.card.model_id,
        known=sum(current.images.values()) if current else 0,
        limits=SMALL,
    )
    return Run("r2", table, current, checkpoint, "digest", plan)


def rows_of(table: LabelTable) -> list[tuple[str, int, str]]:
    rows = table.read(table.current(), columns=["uri", "face_index", "model_id"]).read_all().to_pylist()
    return sorted((row["uri"], row["face_index"], row["model_id"]) for row in rows)


def commit_first(table: LabelTable, parts: Sequence[pa.Table]) -> Snapshot:
    files = [write(table, part, run_id="r1", model_id="m1") for part in parts]
    return table.commit(next_snapshot(None, files=files, run_id="r1", model_id="m1", inventory_digest="d"))


@pytest.mark.parametrize("old", ["ranges", "all over"])
@pytest.mark.parametrize("new", ["ranges", "all over"])
@pytest.mark.parametrize("labelled", [0, 60, 220])
def test_a_commit_leaves_the_old_rows_but_for_those_written_or_gone(
    table, checkpoint, label_rows, monkeypatch, old, new, labelled
):
    monkeypatch.setattr(snapshots, "_LOT_ROWS", 50)
    faces = {uri: random.Random(uri).choice([1, 2, 3, "no_face"]) for uri in URIS}
    first = commit_first(table, [label_rows({uri: faces[uri] for uri in some}) for some in shares(URIS, layout=old)])
    there = random.Random(labelled).sample(URIS, 220)
    redone = sorted(there[:labelled], key=image_id)
    replaced = set(URIS) - set(there) | set(redone)
    model_id = checkpoint.card.model_id
    files = [
        write(table, label_rows(dict.fromkeys(some, 1), model_id=model_id), run_id="r2", model_id=model_id)
        for some in shares(redone, layout=new)
        if some
    ]
    before, job = rows_of(table), run_over(table, there, checkpoint)
    snapshot = commit(job, files, limits=SMALL)
    untouched = [row for row in before if row[0] not in replaced]
    assert rows_of(table) == sorted([*untouched, *((uri, 0, model_id) for uri in redone)])
    assert sum(snapshot.images.values()) == 220
    # Only files that lost a row were written again.
    whole = [file for file in first.files if not replaced & set(uris_of(table, file))]
    assert [file for file in snapshot.files if file in first.files] == whole


def uris_of(table: LabelTable, file: FileFacts) -> list[str]:
    return table.read_files([file], columns=["uri"]).read_all()["uri"].to_pylist()


def test_deletions_alone_are_a_snapshot_of_the_old_models_rows(table, checkpoint, label_rows):
    first = commit_first(table, [label_rows(dict.fromkeys(some, 1)) for some in shares(URIS, layout="ranges")])
    snapshot = commit_deletions(run_over(table, URIS[5:], checkpoint), limits=SMALL)
    assert rows_of(table) == sorted((uri, 0, "m1") for uri in URIS[5:])
    assert (snapshot.number, snapshot.model_id, snapshot.models) == (2, "m1", {"m1": len(URIS) - 5})
    assert {reason: count for reason, count in snapshot.planned.items() if count} == {"deleted": 5}
    assert (snapshot.inventory_digest, snapshot.pace) == (first.inventory_digest, None)
    assert len([file for file in snapshot.files if file not in first.files]) == 1


@pytest.mark.bench
def test_a_switch_of_models_needs_the_memory_of_a_bucket(tmp_path, capsys):
    """The commit of a million images that another model labelled, in eight buckets, against one that holds all their
    ids."""
    peaks = {}
    for way in ("all ids", "by bucket"):
        ended = subprocess.run(
            [sys.executable, "-c", _SWITCH, str(tmp_path), way], capture_output=True, text=True, check=True
        )
        peaks[way], kept, seconds = ended.stdout.split()
        assert kept == "0"
        with capsys.disabled():
            print(f"\n{way}: peak of Arrow's memory {float(peaks[way]):.0f} MB, {seconds} s", end="")
    ratio = float(peaks["by bucket"]) / float(peaks["all ids"])
    with capsys.disabled():
        print(f"\nby bucket / all ids: {ratio:.2f}")
    assert ratio < 0.3


# Files of the ids alone, which is all that is read of a file whose every image is superseded.
_SWITCH = """
import bisect, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq
from jobs.data import snapshots
from jobs.data.buckets import ImageIds, bucket_bounds
from jobs.data.parts import FileFacts
from jobs.data.snapshots import LabelTable, Snapshot, next_snapshot
from jobs.data.schema import image_id

IMAGES, ROWS, snapshots._LOT_ROWS = 1_000_000, 10_000, 50_000
table, way = LabelTable(sys.argv[1]), sys.argv[2]
path = Path(sys.argv[1], "ids.parquet")
if not path.exists():
    ids = pa.array(image_id(str(number)) for number in range(IMAGES))
    pq.write_table(pa.table({"image_id": ids.sort()}), path, row_group_size=ROWS)
files = []
source = pq.ParquetFile(path)
for number in range(IMAGES // ROWS):
    ids = source.read_row_group(number)
    name = f"part-{number}.parquet"
    pq.write_table(ids, Path(sys.argv[1], name))
    first, last = ids["image_id"][0].as_py(), ids["image_id"][-1].as_py()
    files.append(
        FileFacts(path=name, model_id="m", run_id="r", rows=ROWS, bytes=1, sha256="", min_image_id=first,
                  max_image_id=last, images={"ok": ROWS}, faces=ROWS)
    )
del ids, source
started = time.monotonic()
before = next_snapshot(None, files=files, run_id="r", model_id="m", inventory_digest="d")
batches = table.read_files(files, columns=("image_id",))
if way == "all ids":
    dropped = pa.concat_arrays([batch["image_id"] for batch in batches]).unique().sort()
    kept = []
    for file in files:
        start = bisect.bisect_left(range(len(dropped)), file.min_image_id, key=lambda at: dropped[at].as_py())
        stop = bisect.bisect_right(range(len(dropped)), file.max_image_id, key=lambda at: dropped[at].as_py())
        ids = table.read_files([file], columns=["image_id"]).read_all()["image_id"]
        if not pc.all(pc.is_in(ids, value_set=dropped[start:stop])).as_py():
            kept.append(file)
else:
    bounds = bucket_bounds(IMAGES, rows_per_bucket=150_000)
    dropped = ImageIds.of(batches, folder=Path(sys.argv[1], "staged"), bounds=bounds)
    kept = table.carry_over(before, drop_ids=dropped, run_id="r2")
print(pa.default_memory_pool().max_memory() / 1e6, len(kept), round(time.monotonic() - started, 1))
"""
