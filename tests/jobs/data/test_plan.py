import gc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.plan import DUE_SCHEMA, Plan, PlanLimits, known_columns, make_plan
from jobs.data.schema import INVENTORY_SCHEMA, image_id
from mgmtn.errors import ConfigError

NOTHING = dict.fromkeys(("new", "changed", "new_model", "retry", "relabel", "deleted"), 0)


def inventory(**etags: str | None) -> pa.Table:
    rows = [{"image_id": image_id(uri), "uri": uri, "etag": etag, "size": 1} for uri, etag in etags.items()]
    return pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA).sort_by("image_id")


def reasons(plan: Plan) -> dict[str, tuple[str, int]]:
    return {row["uri"]: (row["reason"], row["attempts"]) for row in plan.due.to_pylist()}


@pytest.fixture
def nothing_yet(label_rows) -> pa.Table:
    return label_rows({})


def test_everything_is_new_to_an_empty_table(nothing_yet):
    plan = make_plan(inventory(a="v1", b=None), nothing_yet, model_id="m1")
    assert reasons(plan) == {"a": ("new", 1), "b": ("new", 1)}
    assert plan.due.schema.equals(DUE_SCHEMA)
    assert plan.planned == NOTHING | {"new": 2}
    assert (plan.kept, len(plan.dropped)) == (0, 0)


def test_nothing_is_due_when_nothing_has_changed(label_rows):
    plan = make_plan(inventory(a="v1", b="v1", c="v1"), label_rows({"a": 3, "b": 1, "c": "no_face"}), model_id="m1")
    assert plan.due.num_rows == 0
    assert plan.due.schema.equals(DUE_SCHEMA)
    assert (plan.planned, plan.kept) == (NOTHING, 3)


def test_an_image_with_another_etag_is_due_once_however_many_faces_it_had(label_rows):
    plan = make_plan(inventory(a="v2", b="v1"), label_rows({"a": 3, "b": 2}), model_id="m1")
    assert reasons(plan) == {"a": ("changed", 1)}
    assert (plan.planned, plan.kept) == (NOTHING | {"changed": 1}, 1)


def test_another_model_makes_every_image_due(label_rows):
    plan = make_plan(inventory(a="v1", b="v2"), label_rows({"a": 1, "b": 1}, attempts=2), model_id="m2")
    assert reasons(plan) == {"a": ("new_model", 1), "b": ("changed", 1)}


@pytest.mark.parametrize("status", ["fetch_error", "model_error", "crashed"])
def test_a_transient_outcome_is_tried_three_times(label_rows, status):
    for attempts, expected in [(1, {"a": ("retry", 2)}), (2, {"a": ("retry", 3)}), (3, {})]:
        plan = make_plan(inventory(a="v1"), label_rows({"a": status}, attempts=attempts), model_id="m1")
        assert reasons(plan) == expected


@pytest.mark.parametrize("status", ["no_face", "decode_error", "unsupported", "too_large", "too_small"])
def test_a_permanent_outcome_is_not_tried_again(label_rows, status):
    assert make_plan(inventory(a="v1"), label_rows({"a": status}), model_id="m1").due.num_rows == 0


def test_a_permanent_outcome_ends_with_the_image_or_the_model(label_rows):
    rows = label_rows({"a": "decode_error"})
    assert reasons(make_plan(inventory(a="v2"), rows, model_id="m1")) == {"a": ("changed", 1)}
    assert reasons(make_plan(inventory(a="v1"), rows, model_id="m2")) == {"a": ("new_model", 1)}


def test_an_image_that_stays_missing_is_retried_and_not_taken_for_changed(label_rows):
    rows = label_rows({"a": "fetch_error"}, etag=None)
    assert reasons(make_plan(inventory(a=None), rows, model_id="m1")) == {"a": ("retry", 2)}
    assert reasons(make_plan(inventory(a="v1"), rows, model_id="m1")) == {"a": ("changed", 1)}


def test_a_relabel_makes_the_rest_due_too(label_rows):
    rows = label_rows({"a": 1, "b": "fetch_error", "c": "no_face"})
    plan = make_plan(inventory(a="v1", b="v1", c="v1", d="v1"), rows, model_id="m1", relabel=True)
    assert reasons(plan) == {"a": ("relabel", 2), "b": ("retry", 2), "c": ("relabel", 2), "d": ("new", 1)}
    assert plan.planned == NOTHING | {"relabel": 2, "retry": 1, "new": 1}


def test_an_image_that_left_leaves_the_table_unless_it_is_to_be_kept(label_rows):
    rows = label_rows({"a": 1, "gone": 2, "gone too": "crashed"})
    plan = make_plan(inventory(a="v1"), rows, model_id="m1")
    assert plan.dropped.to_pylist() == sorted([image_id("gone"), image_id("gone too")])
    assert (plan.planned["deleted"], plan.kept) == (2, 1)
    plan = make_plan(inventory(a="v1"), rows, model_id="m1", deletions="keep")
    assert (plan.dropped.to_pylist(), plan.planned["deleted"], plan.kept) == ([], 0, 3)


def test_images_in_a_folder_that_may_not_be_listed_are_not_taken_for_deleted(label_rows):
    rows = label_rows({"/p/closed/a.jpg": 1, "/p/closed too/b.jpg": 1, "file:///p/closed/caf%E9.jpg": 1})
    partial = inventory().replace_schema_metadata({"mgmtn.unreadable": '["/p/closed"]'})
    plan = make_plan(partial, rows, model_id="m1")
    assert plan.dropped.to_pylist() == [image_id("/p/closed too/b.jpg")]


def test_a_folder_for_temporary_files_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    limits = PlanLimits(folder=tmp_path / "file" / "temporary")
    message = r"plan\.folder: no folder can be made in '.*/file/temporary'"
    with pytest.raises(ConfigError, match=message), limits.scratch("plan"):
        pass


def test_a_limit_leaves_the_rest_of_the_table_alone(label_rows):
    rows = label_rows({"a": 1, "b": 1, "c": 1})
    plan = make_plan(inventory(a="v2", b="v2", c="v2", d="v1"), rows, model_id="m1", limit=2)
    assert plan.due["image_id"].to_pylist() == sorted(map(image_id, "abcd"))[:2]
    assert plan.planned["new"] + plan.planned["changed"] == 2
    assert plan.kept == 3 - plan.planned["changed"]
    assert plan.planned["deleted"] == 0


def test_the_plan_needs_only_some_columns_as_a_stream(label_rows):
    listed = inventory(a="v2", b="v1")
    rows = label_rows({"a": 1, "b": 2}).select(known_columns(listed))
    assert "uri" not in rows.column_names
    plan = make_plan(listed, rows.to_reader(max_chunksize=1), model_id="m1")
    assert reasons(plan) == {"a": ("changed", 1)}


def test_uris_are_needed_only_where_a_folder_may_not_be_listed():
    partial = inventory().replace_schema_metadata({"mgmtn.unreadable": '["/p/closed"]'})
    assert set(known_columns(partial)) - set(known_columns(inventory())) == {"uri"}


def test_of_an_image_that_two_models_labelled_our_rows_count(label_rows):
    both = [label_rows({"a": 2, "b": "fetch_error"}), label_rows({"a": 1, "c": 1}, model_id="m2", etag="v2")]
    listed = inventory(a="v1", b="v1", c="v2")
    for rows in (pa.concat_tables(both), pa.concat_tables(both[::-1])):
        plan = make_plan(listed, rows, model_id="m1")
        assert reasons(plan) == {"b": ("retry", 2), "c": ("new_model", 1)}
        assert (plan.known, plan.kept) == (3, 1)


@pytest.fixture
def night(label_rows) -> tuple[pa.Table, pa.Table]:
    """An inventory of 300 images, and a table of 330, with every reason among them."""
    names = [f"s3://b/{number:03d}.jpg" for number in range(330)]
    listed = {name: "v2" if number % 7 == 0 else "v1" for number, name in enumerate(names[30:])}
    labelled = label_rows(dict.fromkeys(names[:250], 2)), label_rows(dict.fromkeys(names[250:290], "crashed"))
    other = label_rows(dict.fromkeys(names[290:310], 1), model_id="m0")
    return inventory(**listed), pa.concat_tables([*labelled, other])


def summary(plan: Plan) -> tuple[object, ...]:
    due = plan.due.to_pylist()
    return plan.planned, plan.listed, plan.known, plan.kept, plan.bytes, due, plan.dropped.to_pylist()


@pytest.mark.parametrize("more", [{}, {"limit": 70}, {"deletions": "keep"}, {"relabel": True}], ids=str)
def test_a_plan_is_the_same_however_it_is_cut(night, more):
    listed, labelled = night
    plans = [
        make_plan(listed, labelled, model_id="m1", limits=PlanLimits(images_per_bucket=images), **more)
        for images in (1_000_000, 60, 15)
    ]
    assert [len(plan.due_files) > 1 for plan in plans] == [False, True, True]
    assert summary(plans[1]) == summary(plans[0]) == summary(plans[2])
    assert plans[0].images == min(plans[0].due.num_rows, more.get("limit", 1000))


@pytest.mark.parametrize("order", ["image_id", "uri"])
def test_an_inventory_in_parquet_files_gives_the_same_plan(night, tmp_path, order):
    listed, labelled = night
    ordered = listed.sort_by(order)
    for number in range(3):
        pq.write_table(ordered.slice(100 * number, 100), tmp_path / f"{number}.parquet", row_group_size=40)
    limits = PlanLimits(images_per_bucket=40)
    expected = summary(make_plan(listed, labelled, model_id="m1"))
    assert summary(make_plan(tmp_path, labelled, model_id="m1", limits=limits)) == expected
    pq.write_table(ordered, tmp_path / "0.parquet")
    assert summary(make_plan(tmp_path / "0.parquet", labelled, model_id="m1", limits=limits)) == expected


def test_an_inventory_file_tells_of_folders_that_may_not_be_listed(label_rows, tmp_path):
    partial = inventory(a="v1").replace_schema_metadata({"mgmtn.unreadable": '["/p/closed"]'})
    pq.write_table(partial, tmp_path / "inventory.parquet")
    rows = label_rows({"/p/closed/a.jpg": 1, "/p/b.jpg": 1})
    plan = make_plan(tmp_path / "inventory.parquet", rows, model_id="m1")
    assert plan.dropped.to_pylist() == [image_id("/p/b.jpg")]


@pytest.mark.parametrize("there", [True, False])
def test_an_inventory_that_is_not_there_is_not_taken_for_empty(label_rows, tmp_path, there):
    folder = tmp_path / "inventory"
    if there:
        folder.mkdir()
    with pytest.raises(ConfigError, match=r"inventory .* there is no Parquet file"):
        make_plan(folder, label_rows({"a": 1}), model_id="m1")


def test_due_images_come_in_tables_of_any_size(night):
    plan = make_plan(*night, model_id="m1", limits=PlanLimits(images_per_bucket=20))
    for rows in (1, 17, plan.images, 10_000):
        tables = list(plan.due_tables(rows=rows))
        assert [table.num_rows for table in tables[:-1]] == [rows] * (len(tables) - 1)
        assert 0 < tables[-1].num_rows <= rows
        assert pa.concat_tables(tables).equals(plan.due)


def test_a_plan_takes_its_files_with_it_and_leaves_nothing_else(night, tmp_path):
    plan = make_plan(*night, model_id="m1", limits=PlanLimits(folder=tmp_path / "work", images_per_bucket=20))
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*plan.due_files, *plan.dropped_files}
    del plan
    gc.collect()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_plan_that_fails_leaves_no_files(tmp_path, label_rows):
    limits = PlanLimits(folder=tmp_path / "work")
    with pytest.raises(ConfigError):
        make_plan(tmp_path / "absent.parquet", label_rows({}), model_id="m1", limits=limits)
    assert list((tmp_path / "work").iterdir()) == []
