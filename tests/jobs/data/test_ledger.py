from collections.abc import Sequence
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

from jobs.data.ledger import DEATHS, Ledger, images_of, settings_of_workers, surviving
from jobs.data.schema import Status
from mgmtn.errors import ConfigError


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


class Died(BaseException):
    """Stands for the end of a process: nothing of the worker is left but what the ledger knows."""


class Fragile:
    """A stage that dies of some images, and by chance as often as it is told."""

    def __init__(self, deadly: str, chance: list[int]) -> None:
        self.deadly, self.chance = deadly, chance

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.chance and self.chance.pop():
            raise Died
        if set(batch["image_id"].to_pylist()) & set(self.deadly):
            raise Died
        return self._rows(batch, "ok")

    def give_up(self, batch: pa.Table) -> pa.Table:
        return self._rows(batch, "crashed")

    def _rows(self, batch: pa.Table, status: str) -> pa.Table:
        return batch.append_column("status", pa.repeat(status, batch.num_rows).cast(pa.string()))


class Handle:
    """A ledger in this process, spoken to as an actor is."""

    def __init__(self) -> None:
        ledger = Ledger()
        for name in ("begin", "end", "refuse", "refusal"):
            setattr(self, name, SimpleNamespace(remote=getattr(ledger, name)))


def worked_on(batch: pa.Table, handle: Handle, *, deadly: str = "", chance: Sequence[int] = ()) -> tuple[str, int]:
    """The images' outcomes, by their first letters, and how many processes it took; each gets the same block again."""
    deaths, left = 0, list(chance)
    while True:
        worker = surviving(Fragile)((deadly, left), handle)
        try:
            rows = worker(batch)
        except Died:
            deaths += 1
            continue
        assert rows["image_id"].equals(batch["image_id"])
        return "".join(status[0] for status in rows["status"].to_pylist()), deaths


@pytest.mark.parametrize(
    ("deadly", "chance", "outcomes", "deaths"),
    [
        ("", (), "oooo", 0),
        ("", (1,), "oooo", 1),  # the block died once, by chance
        ("c", (), "oooc", 1 + DEATHS),
        ("b", (), "ooco", 1 + DEATHS),
        ("bc", (), "oocc", 1 + 2 * DEATHS),
        ("abc", (), "cccc", 1 + 3 * DEATHS),
    ],
)
def test_only_the_image_that_kills_its_process_is_given_up(
    monkeypatch: pytest.MonkeyPatch, deadly: str, chance: Sequence[int], outcomes: str, deaths: int
):
    monkeypatch.setattr("jobs.data.ledger.ray.get", lambda answer: answer)
    batch = pa.table({"image_id": list("aabc"), "uri": list("aabc")})
    handle = Handle()
    assert worked_on(batch, handle, deadly=deadly, chance=chance) == (outcomes, deaths)
    # The same block once more, as when its result was lost with a node: nobody dies for what is known by now.
    again, more = worked_on(batch, handle, deadly=deadly)
    assert again == outcomes
    assert more <= 1


class Misconfigured(Stage):
    """A stage that cannot start, or not work, on its machine."""

    def __init__(self, factor: int) -> None:
        if factor == 0:
            raise ConfigError("no weights")
        super().__init__(factor)

    def __call__(self, batch: pa.Table) -> pa.Table:
        raise ConfigError("no credentials")


@pytest.mark.parametrize(("factor", "said"), [(0, "no weights"), (1, "no credentials")])
def test_what_is_wrong_with_a_workers_settings_reaches_the_driver_as_that(
    monkeypatch: pytest.MonkeyPatch, factor: int, said: str
):
    monkeypatch.setattr("jobs.data.ledger.ray.get", lambda answer: answer)
    handle = Handle()

    def work() -> None:
        try:
            surviving(Misconfigured)((factor,), handle)(pa.table({"image_id": ["a"]}))
        except ConfigError as error:
            raise ray.exceptions.ActorDiedError from error  # as Ray tells the driver, without the error itself

    with pytest.raises(ConfigError, match=said), settings_of_workers(handle):
        work()


def test_an_error_that_is_nobodys_settings_stays_what_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.data.ledger.ray.get", lambda answer: answer)
    with pytest.raises(ray.exceptions.ActorDiedError), settings_of_workers(Handle()):
        raise ray.exceptions.ActorDiedError
