"""Pictures for people: that what is drawn is where it should be, and that odd input draws too."""

import numpy as np
import pytest
from PIL import Image

from mgmtn.attributes import GROUPS
from mgmtn.drawing import GROUP_COLOURS, contact_sheet, crop_face, draw_faces, overlay_masks, placeholder
from mgmtn.landmarks import Faces

GREY = np.full((120, 160, 3), 128, np.uint8)


def one_face(box: tuple[float, float, float, float]) -> Faces:
    points = np.linspace(box[:2], box[2:], 68, dtype=np.float32)
    return Faces(boxes=np.array([box], np.float32), scores=np.ones(1, np.float32), landmarks=points[None])


def changed(image: Image.Image, original: np.ndarray) -> np.ndarray:
    """Where pixels differ, bool `(H, W)`."""
    return (np.asarray(image) != original).any(axis=-1)


def test_box_and_points_are_drawn_where_they_are_and_the_image_is_left_alone():
    before = GREY.copy()
    drawn = changed(draw_faces(GREY, one_face((40, 50, 100, 110))), GREY)
    assert drawn[50, 40:101].all()
    assert drawn[50:111, 100].all()
    assert drawn[80, 70]
    assert not drawn[:, 110:].any()
    np.testing.assert_array_equal(before, GREY)


def test_no_face_draws_nothing():
    assert not changed(draw_faces(GREY, Faces.none()), GREY).any()


@pytest.mark.parametrize("box", [(-20, -20, 400, 400), (0, 0, 0, 0), (150, 110, 140, 100), (-50, -50, -10, -10)])
def test_a_box_that_leaves_the_image_or_is_empty_draws_too(box):
    assert draw_faces(GREY, one_face(box)).size == (160, 120)


def test_each_mask_colours_its_own_place_beside_a_legend():
    masks = np.zeros((8, 8, 8), bool)
    masks[0, :2, :2] = True
    masks[1, 6:, 6:] = True
    picture = overlay_masks(np.full((128, 128, 3), 128, np.uint8), masks)
    pixels = np.asarray(picture).astype(int)
    for place, group in (((8, 8), "mouth"), ((120, 120), "ear")):
        mixed = np.array(GROUP_COLOURS[group]) * 140 / 255 + 128 * 115 / 255
        np.testing.assert_allclose(pixels[place], mixed, atol=2)
    np.testing.assert_array_equal(pixels[64, 64], (128, 128, 128))
    legend = np.asarray(picture)[:, 128:]
    for colour in GROUP_COLOURS.values():
        assert (legend == colour).all(axis=-1).any()


def test_a_mask_of_the_whole_face_does_not_hide_a_smaller_one():
    masks = np.ones((8, 8, 8), np.float32)
    masks[:-1] = 0
    masks[0, :4] = 1.0
    pixels = np.asarray(overlay_masks(np.zeros((64, 64, 3), np.uint8), masks)).astype(int)
    mouth, whole = np.array(GROUP_COLOURS["mouth"]), np.array(GROUP_COLOURS["object"])
    assert np.abs(pixels[8, 8] - mouth).sum() < np.abs(pixels[8, 8] - whole).sum()


def test_masks_of_another_number_are_refused():
    with pytest.raises(ValueError, match=rf"\(7, 8, 8\), expected \({len(GROUPS)}, h, w\)"):
        overlay_masks(GREY, np.zeros((7, 8, 8), bool))


def test_a_sheet_lays_tiles_out_in_rows_and_keeps_their_shape():
    red, wide = np.full((50, 50, 3), (255, 0, 0), np.uint8), np.full((20, 80, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([red, red, wide], ["a", "b", "c"], columns=2, tile_size=100)
    pixels = np.asarray(sheet)
    red_rows, red_columns = np.nonzero((pixels == (255, 0, 0)).all(axis=-1))
    assert (red_rows.max() - red_rows.min() + 1, red_columns.max() - red_columns.min() + 1) == (100, 206)
    blue_rows, blue_columns = np.nonzero((pixels == (0, 0, 255)).all(axis=-1))
    assert (blue_rows.max() - blue_rows.min() + 1, blue_columns.max() - blue_columns.min() + 1) == (25, 100)
    assert blue_rows.min() > red_rows.max()


@pytest.mark.parametrize(
    "caption", ["", "写真 émigré 😀", "torn\udcff\x00\x1b[31m", "x" * 5000, "line\n" * 30, "\u202eright to left"]
)
def test_any_caption_can_be_drawn(caption):
    plain = contact_sheet([GREY], [""], tile_size=100)
    sheet = contact_sheet([GREY], [caption], tile_size=100)
    assert sheet.width == plain.width
    assert placeholder(caption, size=100).size == (100, 100)


def test_a_caption_is_cut_to_its_tile():
    pixels = np.asarray(contact_sheet([GREY, GREY], ["m" * 200, ""], tile_size=100))
    second_tile = pixels[107:, 112:]
    assert (second_tile == 255).all()


@pytest.mark.parametrize(("tiles", "captions"), [([], []), ([GREY], []), ([GREY], ["a", "b"])])
def test_a_sheet_wants_one_caption_a_tile(tiles, captions):
    with pytest.raises(ValueError, match=f"{len(tiles)} tiles and {len(captions)} captions"):
        contact_sheet(tiles, captions)


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        ((60, 40, 80, 60), (34, 34, 3)),
        ((0, 0, 20, 20), (27, 27, 3)),
        ((140, 100, 180, 140), (34, 34, 3)),
        ((500, 500, 510, 510), (120, 160, 3)),
        ((10, 10, 10, 10), (120, 160, 3)),
    ],
)
def test_a_face_is_cut_out_with_its_margin_and_within_the_image(box, shape):
    assert crop_face(GREY, box).shape == shape


def test_a_placeholder_says_why():
    blank, told = (np.asarray(placeholder(reason)) for reason in ("", "fetch_error: no such file"))
    assert len(np.unique(blank)) == 1
    assert (told != blank).any()
