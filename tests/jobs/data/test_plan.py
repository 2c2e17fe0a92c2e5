import pyarrow as pa
import pytest

from jobs.data.plan import DUE_SCHEMA, PLAN_COLUMNS, Plan, make_plan
from jobs.data.schema import INVENTORY_SCHEMA, image_id

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
    rows = label_rows({"/p/closed/a.jpg": 1, "/p/closed too/b.jpg": 1})
    partial = inventory().replace_schema_metadata({"mgmtn.unreadable": '["/p/closed"]'})
    plan = make_plan(partial, rows, model_id="m1")
    assert plan.dropped.to_pylist() == [image_id("/p/closed too/b.jpg")]


def test_a_limit_leaves_the_rest_of_the_table_alone(label_rows):
    rows = label_rows({"a": 1, "b": 1, "c": 1})
    plan = make_plan(inventory(a="v2", b="v2", c="v2", d="v1"), rows, model_id="m1", limit=2)
    assert plan.due["image_id"].to_pylist() == sorted(map(image_id, "abcd"))[:2]
    assert plan.planned["new"] + plan.planned["changed"] == 2
    assert plan.kept == 3 - plan.planned["changed"]
    assert plan.planned["deleted"] == 0


def test_the_plan_needs_only_some_columns_as_a_stream(label_rows):
    rows = label_rows({"a": 1, "b": 2}).select(PLAN_COLUMNS)
    plan = make_plan(inventory(a="v2", b="v1"), rows.to_reader(max_chunksize=1), model_id="m1")
    assert reasons(plan) == {"a": ("changed", 1)}
