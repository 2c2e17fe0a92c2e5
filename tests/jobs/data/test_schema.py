import pyarrow as pa

from jobs.data.schema import FAILED, STATUSES, TABLE_SCHEMA, TRANSIENT, image_id
from mgmtn.attributes import ATTRIBUTES


def test_the_columns_are_the_documented_ones_in_their_order():
    before = {
        "image_id": "string",
        "uri": "string",
        "etag": "string",
        "size": "int64",
        "width": "int32",
        "height": "int32",
        "status": "string",
        "error": "string",
        "attempts": "int16",
        "face_index": "int16",
        "face_count": "int16",
        "box_x1": "float",
        "box_y1": "float",
        "box_x2": "float",
        "box_y2": "float",
        "detection_score": "float",
        "sharpness": "float",
        "face_size": "float",
    }
    found = [(field.name, str(field.type)) for field in TABLE_SCHEMA]
    assert found[:18] == list(before.items())
    assert TABLE_SCHEMA.field(18).equals(pa.field("landmarks", pa.list_(pa.float32(), 136)))
    assert found[19:59] == [(name, "float") for name in ATTRIBUTES]
    assert found[59:] == [
        ("labels", "uint64"),
        ("model_id", "string"),
        ("run_id", "string"),
        ("labelled_at", "timestamp[us, tz=UTC]"),
    ]
    assert (found[19][0], found[58][0]) == ("five_o_clock_shadow", "young")


def test_the_schema_names_the_order_of_the_label_bits():
    assert TABLE_SCHEMA.metadata[b"mgmtn.attributes"].decode().split(",") == list(ATTRIBUTES)


def test_the_statuses_are_the_documented_ones():
    assert STATUSES == (
        "ok",
        "no_face",
        "fetch_error",
        "decode_error",
        "unsupported",
        "too_large",
        "too_small",
        "model_error",
        "crashed",
    )
    assert {"fetch_error", "model_error", "crashed"} == TRANSIENT
    assert TRANSIENT | {"decode_error", "unsupported"} == FAILED


def test_an_image_id_is_the_same_on_every_day_and_machine():
    assert image_id("s3://photos/ä b.jpg") == "217b6cdb4d02f5766f8cbea67483640f"  # b2sum -l 128
    assert image_id("s3://photos/a.jpg") != image_id("s3://photos/A.jpg")
