"""Group masks of a real face, and of faces that leave the square or are none."""

import numpy as np
import pytest
from skimage.data import astronaut

from mgmtn.attributes import GROUPS
from mgmtn.images import face_transform, transform_points
from mgmtn.landmarks import MIRRORED_68, MediaPipeSettings
from mgmtn.masks import draw_masks, pack_masks, unpack_masks

SIZE = 128


@pytest.fixture(scope="module")
def landmarks():
    """A real face's landmarks in pixels of its aligned square."""
    points = MediaPipeSettings().build().find([astronaut()])[0].landmarks[0]
    return transform_points(points, face_transform(points, size=SIZE))


@pytest.fixture(scope="module")
def masks(landmarks):
    return draw_masks(landmarks, crop_size=SIZE)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of each mask."""
    return (first & second).sum((1, 2)) / (first | second).sum((1, 2))


def cell(point: np.ndarray, *, mask_size: int = 64) -> tuple[int, int]:
    """Row and column of the mask cell that holds a point of the square."""
    x, y = np.floor((np.asarray(point) + 0.5) * mask_size / SIZE).astype(int)
    return int(y), int(x)


def mask_of(masks: np.ndarray, group: str) -> np.ndarray:
    return masks[GROUPS.index(group)]


@pytest.mark.parametrize("mask_size", [16, 29, 64, 227])
def test_there_is_one_mask_a_group(landmarks, mask_size):
    masks = draw_masks(landmarks, crop_size=SIZE, mask_size=mask_size)
    assert (masks.shape, masks.dtype) == ((8, mask_size, mask_size), bool)


def test_every_group_of_a_standard_face_has_cells_and_none_but_object_has_most(masks):
    share = masks.mean((1, 2))
    assert (share > 0.01).all()
    assert (share[: GROUPS.index("object")] < 0.7).all()


@pytest.mark.parametrize(
    ("group", "inside"),
    [
        ("mouth", [48, 54, 51, 57, 62]),
        ("nose", [27, 30, 31, 35]),
        ("eyes", [36, 39, 42, 45, 19, 24]),
        ("lower_face", [8, 6, 10, 33]),
    ],
)
def test_masks_stand_in_the_order_of_groups_each_over_its_own_landmarks(masks, landmarks, group, inside):
    for index in inside:
        assert mask_of(masks, group)[cell(landmarks[index])]


def test_small_groups_do_not_reach_each_other(masks, landmarks):
    assert not mask_of(masks, "mouth")[cell(landmarks[30])]
    assert not mask_of(masks, "eyes")[cell(landmarks[57])]
    assert not mask_of(masks, "nose")[cell(landmarks[8])]
    assert not mask_of(masks, "lower_face")[cell(landmarks[27])]


def test_cheeks_lie_beside_the_nose_below_the_eyes(masks, landmarks):
    for eye, lip, jaw in ((41, 48, 3), (46, 54, 13)):
        assert mask_of(masks, "cheeks")[cell(landmarks[[eye, lip, jaw]].mean(0))]
    assert not mask_of(masks, "cheeks")[cell(landmarks[30])]


def test_ears_lie_outside_the_jaw_on_both_sides(masks, landmarks):
    unit = np.linalg.norm(landmarks[42:48].mean(0) - landmarks[36:42].mean(0))
    for jaw, outward in ((landmarks[1], -1), (landmarks[15], 1)):
        assert mask_of(masks, "ear")[cell(jaw + np.array([outward * 0.25 * unit, 0]))]
    assert not mask_of(masks, "ear")[cell(landmarks[30])]


def test_hair_is_above_and_beside_the_face_but_not_on_it(masks, landmarks):
    hair = mask_of(masks, "hair")
    assert hair[0].mean() > 0.3
    for index in [*range(17, 68), 8, 4, 12]:
        assert not hair[cell(landmarks[index])]
    assert hair[cell(landmarks[0] - [15, 0])]
    assert hair[cell(landmarks[16] + [15, 0])]
    assert not hair[cell(landmarks[8])[0] + 3 :].any()


def test_the_lower_face_goes_on_to_the_lower_border(masks):
    assert mask_of(masks, "lower_face")[-1].any()


def test_object_is_the_union_of_the_others(masks):
    np.testing.assert_array_equal(mask_of(masks, "object"), np.delete(masks, GROUPS.index("object"), 0).any(0))


def test_a_mirrored_face_has_mirrored_masks(landmarks):
    aside = landmarks + np.array([9.0, 0.0])
    mirrored = aside[MIRRORED_68].copy()
    mirrored[:, 0] = SIZE - 1 - mirrored[:, 0]
    masks, found = draw_masks(aside, crop_size=SIZE), draw_masks(mirrored, crop_size=SIZE)
    assert (overlap(found, masks[..., ::-1]) > 0.93).all()
    assert overlap(found, masks)[GROUPS.index("nose")] < 0.5


@pytest.mark.parametrize("factor", [0.5, 2, 1.7734375])
def test_masks_do_not_depend_on_the_size_of_the_square(landmarks, masks, factor):
    points = (landmarks + 0.5) * factor - 0.5
    np.testing.assert_array_equal(draw_masks(points, crop_size=round(SIZE * factor)), masks)


def test_masks_of_another_resolution_show_the_same_places(landmarks, masks):
    fine = draw_masks(landmarks, crop_size=SIZE, mask_size=256)
    coarse = fine.reshape(8, 64, 4, 64, 4).mean((2, 4)) > 0.5
    assert (overlap(coarse, masks) > 0.75).all()  # outlines are drawn with the cells that they touch


def test_masks_move_with_the_face(landmarks, masks):
    moved = draw_masks(landmarks + np.array([8.0, 0.0]), crop_size=SIZE)
    inner = [GROUPS.index(group) for group in ("mouth", "nose", "eyes")]
    np.testing.assert_array_equal(moved[inner, :, 4:], masks[inner, :, :-4])


@pytest.mark.parametrize("shift", [(-60, 0), (60, 0), (0, -70), (0, 70), (-100, 100), (1000, 1000), (-1e7, 1e7)])
@pytest.mark.parametrize("factor", [1, 3, 1e6])
def test_a_face_that_leaves_the_square_draws_what_is_left_of_it(landmarks, shift, factor):
    masks = draw_masks(landmarks * factor + shift, crop_size=SIZE)
    np.testing.assert_array_equal(masks[-1], masks[:-1].any(0))


def test_a_face_far_below_the_square_has_no_mouth_in_it(landmarks):
    assert not mask_of(draw_masks(landmarks + np.array([0, 1000]), crop_size=SIZE), "mouth").any()


@pytest.mark.parametrize("points", [np.zeros((68, 2)), np.full((68, 2), 64.0), np.linspace([0, 0], [127, 127], 68)])
def test_landmarks_that_are_no_face_draw_too(points):
    assert draw_masks(points, crop_size=SIZE).shape == (8, 64, 64)


def test_landmarks_are_left_as_they_were(landmarks):
    before = landmarks.copy()
    draw_masks(landmarks, crop_size=SIZE)
    np.testing.assert_array_equal(landmarks, before)


@pytest.mark.parametrize("mask_size", [1, 7, 29, 64])
def test_packing_is_undone_by_unpacking(mask_size):
    masks = np.random.default_rng(0).random((8, mask_size, mask_size)) < 0.5
    packed = pack_masks(masks)
    assert len(packed) == mask_size * mask_size
    unpacked = unpack_masks(packed, mask_size=mask_size)
    assert unpacked.dtype == bool
    np.testing.assert_array_equal(unpacked, masks)


@pytest.mark.parametrize("length", [0, 64 * 64 - 1, 64 * 64 + 1, 29 * 29])
def test_bytes_of_another_size_are_not_taken_for_masks(length):
    with pytest.raises(ValueError, match="reshape"):
        unpack_masks(bytes(length))
