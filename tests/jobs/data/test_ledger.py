import pyarrow as pa
import pytest

from jobs.data.ledger import Ledger, images_of, surviving
from jobs.data.schema import Status


class Stage:
    """Doubles numbers; stands for a stage of the flow."""

    def __init__(self, factor: int) -> None:
        self.factor = factor


def test_the_ledger_adds_up_what_workers_report():
    ledger = Ledger()
    ledger.add({"ok": 2, "faces": 3})
    ledger.add({"ok": 1, "no_face": 1, "faces": 1})
    assert ledger.outcomes() == {"ok": 3, "no_face": 1, "faces": 4}
    assert ledger.outcomes()[Status.OK] == 3


def test_work_that_was_begun_and_not_ended_is_remembered_until_it_ends():
    ledger = Ledger()
    assert [ledger.begin("a"), ledger.begin("b"), ledger.begin("a")] == [0, 0, 1]
    ledger.end("a")
    assert [ledger.begin("a"), ledger.begin("b")] == [0, 1]


def test_the_rows_of_an_image_stay_together():
    batch = pa.table({"image_id": ["a", "a", "b", "c", "c", "c"], "face": [0, 1, 0, 0, 1, 2]})
    split = pa.concat_tables([batch.slice(0, 1), batch.slice(1)])
    for table in (batch, split, batch.slice(1, 4)):
        images = list(images_of(table))
        assert pa.concat_tables(images).equals(table.combine_chunks())
        assert [len(set(image["image_id"].to_pylist())) for image in images] == [1, 1, 1]
    assert [image.num_rows for image in images_of(batch)] == [2, 1, 3]


def test_a_stage_that_survives_keeps_its_name(monkeypatch: pytest.MonkeyPatch):
    survivor = surviving(Stage)
    assert survivor.__name__ == "Stage"
    assert survivor((3,), None).stage.factor == 3
