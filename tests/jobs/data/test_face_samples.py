"""Which images a report shows; how they are shown is tested with the report."""

import pytest

from jobs.data.face_samples import draw_rows
from jobs.data.snapshots import LabelTable
from mgmtn.errors import ConfigError


@pytest.fixture
def table(tmp_path, add_night) -> LabelTable:
    """Twenty images with one to three faces in two files, some without a face, and a file without any."""
    uri = str(tmp_path / "labels")
    for night in range(2):
        faces = {f"/{night}/{number}": 1 + number % 3 for number in range(10)}
        add_night(uri, faces | {f"/{night}/none": "no_face"}, run_id=f"r{night}")
    add_night(uri, {"/broken": "decode_error"}, run_id="r3")
    return LabelTable(uri)


def drawn(table: LabelTable, *, images: int, seed: int = 0) -> list[list[tuple[str, int]]]:
    found = draw_rows(table, table.current(), images=images, seed=seed)
    return [[(row["uri"], row["face_index"]) for row in rows] for rows in found]


def test_an_image_comes_with_all_its_faces_and_one_without_faces_never(table):
    images = drawn(table, images=12)
    assert len(images) == 12
    for rows in images:
        [uri] = {uri for uri, _ in rows}
        assert [index for _, index in rows] == list(range(1 + int(uri.rpartition("/")[2]) % 3))


def test_no_image_is_drawn_twice(table):
    uris = [rows[0][0] for rows in drawn(table, images=15)]
    assert len(set(uris)) == len(uris)


def test_a_seed_draws_the_same_again_and_another_draws_others(table):
    assert drawn(table, images=8, seed=1) == drawn(table, images=8, seed=1)
    assert drawn(table, images=8, seed=1) != drawn(table, images=8, seed=2)


def test_fewer_come_where_there_are_fewer(tmp_path, add_night):
    uri = str(tmp_path / "labels")
    add_night(uri, {"/a": 1, "/b": "no_face"})
    assert drawn(LabelTable(uri), images=5) == [[("/a", 0)]]
    assert drawn(LabelTable(uri), images=0) == []
    faceless = str(tmp_path / "faceless")
    add_night(faceless, {"/b": "no_face"})
    assert drawn(LabelTable(faceless), images=5) == []


def test_a_file_that_is_gone_is_named(table, tmp_path):
    for path in (tmp_path / "labels").glob("model=*/*/*.parquet"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"part-.*parquet"):
        draw_rows(table, table.current(), images=3, seed=0)
