"""From an image to the model's square: where things land, what the borders hold, and that sizes do not matter."""

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from mgmtn.images import (
    EYE_DISTANCE,
    EYE_HEIGHT,
    align_face,
    centre_transform,
    face_transform,
    five_points,
    sharpness,
    transform_points,
    warp_face,
)
from mgmtn.landmarks import MediaPipeSettings

IMAGE = astronaut()


@pytest.fixture(scope="module")
def landmarks():
    return MediaPipeSettings().build().find([IMAGE])[0].landmarks[0].astype(np.float64)


def scaled(image: np.ndarray, points: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """The image and its points at another size."""
    resized = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return resized, (points + 0.5) * factor - 0.5


def turned(image: np.ndarray, points: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """The image and its points, turned about the face."""
    turn = cv2.getRotationMatrix2D(tuple(points.mean(0)), degrees, 1.0)
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, turn, size, borderMode=cv2.BORDER_REFLECT), transform_points(points, turn)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(first.astype(int) - second).mean())


def test_the_five_points_are_eyes_nose_and_mouth_corners_image_left_first(landmarks):
    left_eye, right_eye, nose, left_mouth, right_mouth = five_points(landmarks)
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < nose[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_eyes_come_to_their_place_in_the_square(landmarks):
    left, right = transform_points(five_points(landmarks), face_transform(landmarks, size=200))[:2]
    middle = (left + right) / 2 + 0.5
    np.testing.assert_allclose(middle, [100, EYE_HEIGHT * 200], atol=6)
    assert np.linalg.norm(right - left) == pytest.approx(EYE_DISTANCE * 200, rel=0.15)
    assert abs(right[1] - left[1]) < 2


@pytest.mark.parametrize("degrees", [0, 30, 90, 180, -135])
def test_a_known_similarity_is_recovered(degrees):
    """Points that are a turned, scaled and shifted template come back to the template, to the last digit."""
    template = np.zeros((68, 2))
    for indices, place in ((slice(36, 42), (-0.5, 0)), (slice(42, 48), (0.5, 0)), (30, (0, 0.571))):
        template[indices] = place
    template[48], template[54] = (-0.414, 1.157), (0.414, 1.157)
    angle = np.deg2rad(degrees)
    turn = 37.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = template @ turn.T + [310.0, 120.0]
    landed = transform_points(five_points(points), face_transform(points, size=128))
    expected = five_points(template) * EYE_DISTANCE * 128 + [63.5, EYE_HEIGHT * 128 - 0.5]
    np.testing.assert_allclose(landed, expected, atol=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4.3])
@pytest.mark.parametrize("margin", [3, 16])
def test_the_middle_of_a_square_with_margin_is_the_square_without(landmarks, factor, margin):
    image, points = scaled(IMAGE, landmarks, factor)
    alone = align_face(image, points, size=64)
    middle = align_face(image, points, size=64, margin=margin)[margin:-margin, margin:-margin]
    apart = np.abs(alone.astype(int) - middle)
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.002


@pytest.mark.parametrize("degrees", [15, 90, 180])
def test_a_turned_face_comes_out_upright(landmarks, degrees):
    upright = align_face(IMAGE, landmarks, size=96)[16:80, 16:80]
    image, points = turned(IMAGE, landmarks, degrees)
    assert difference(align_face(image, points, size=96)[16:80, 16:80], upright) < 4
    assert difference(align_face(image, landmarks, size=96)[16:80, 16:80], upright) > 10


@pytest.mark.parametrize("factor", [0.7, 2, 5])
def test_a_face_looks_the_same_at_every_size_of_its_image(landmarks, factor):
    image, points = scaled(IMAGE, landmarks, factor)
    assert difference(align_face(image, points, size=64), align_face(IMAGE, landmarks, size=64)) < 3


def test_fine_stripes_average_to_grey_instead_of_aliasing(landmarks):
    stripes = np.zeros((2048, 2048, 3), np.uint8)
    stripes[:, ::2] = 255
    points = landmarks * 4  # a face of some 370 pixels between square and square
    face = align_face(stripes, points, size=64)
    assert face.std() < 8
    assert face.mean() == pytest.approx(127, abs=3)
    sampled = cv2.warpAffine(stripes, face_transform(points, size=64), (64, 64))
    assert sampled.std() > 40  # what plain bilinear sampling makes of them


@pytest.mark.parametrize("factor", [1.0, 3.0, 4.5])
@pytest.mark.parametrize("degrees", [0, 20])
@pytest.mark.parametrize("index", [8, 30, 36, 54])
def test_a_dot_on_a_landmark_lands_where_transform_points_says(landmarks, factor, degrees, index):
    canvas = np.zeros((int(512 * factor), int(512 * factor), 3), np.uint8)
    _, points = turned(IMAGE, (landmarks + 0.5) * factor - 0.5, degrees)
    transform = face_transform(points, size=128)
    x, y = points[index]
    columns, rows = np.meshgrid(np.arange(canvas.shape[1]), np.arange(canvas.shape[0]))
    width = 2.0 / np.hypot(*transform[0, :2])  # two pixels of the square
    canvas[:] = np.rint(255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2)))[..., None]
    seen = warp_face(canvas, transform, size=128)[..., 0].astype(float)
    grid = np.stack(np.meshgrid(np.arange(128), np.arange(128)), axis=-1)
    centroid = (grid * seen[..., None]).sum((0, 1)) / seen.sum()
    np.testing.assert_allclose(centroid, transform_points(points[index : index + 1], transform)[0], atol=0.1)


def test_what_lies_outside_the_image_repeats_its_border(landmarks):
    left, top = np.floor(landmarks.min(0)).astype(int)
    image = np.ascontiguousarray(IMAGE[top:, left:])
    face = align_face(image, landmarks - [left, top], size=128)
    assert (face[:20, :20] == face[0, 0]).all()
    whole = align_face(IMAGE, landmarks, size=128)
    assert difference(face[70:90, 55:75], whole[70:90, 55:75]) < 0.1


@pytest.mark.parametrize("offset", [(-1000, 0), (5000, 0), (0, -700), (3000, 9000)])
def test_a_face_off_the_image_is_the_nearest_border(landmarks, offset):
    for factor in (1, 4):
        face = align_face(IMAGE, landmarks * factor + offset, size=64)
        assert face.shape == (64, 64, 3)
    beyond_corner = align_face(IMAGE, landmarks + np.full(2, 5000), size=64)
    assert (beyond_corner == beyond_corner[0, 0]).all()
    assert difference(beyond_corner[:1, :1], IMAGE[-1:, -1:]) < 3


def test_a_panorama_wider_than_32767_pixels_is_no_special_case(landmarks):
    panorama = np.zeros((512, 40_000, 3), np.uint8)
    panorama[:, 39_000:39_512] = IMAGE
    for size in (64, 256):
        expected = align_face(IMAGE, landmarks, size=size)
        inner = slice(size // 4, -size // 4)
        found = align_face(panorama, landmarks + np.array([39_000, 0]), size=size)
        assert np.abs(found[inner, inner].astype(int) - expected[inner, inner]).max() <= 1


@pytest.mark.parametrize(
    "points",
    [
        np.full((68, 2), 250.0),
        np.zeros((68, 2)),
        np.linspace([100, 100], [400, 100], 68),
        np.linspace([100, 100], [100, 400], 68),
        np.random.default_rng(0).normal(250, 1e-6, (68, 2)),
        np.random.default_rng(0).uniform(-1e5, 1e5, (68, 2)),
        np.random.default_rng(0).uniform(-1e9, 1e9, (68, 2)),
    ],
    ids=["one place", "zeros", "level line", "upright line", "nearly one place", "wide", "absurd"],
)
def test_points_that_are_no_face_still_give_a_square(points):
    face = align_face(IMAGE, points, size=64, margin=4)
    assert (face.shape, face.dtype) == ((72, 72, 3), np.uint8)


def test_points_in_one_place_keep_the_images_own_scale():
    face = align_face(IMAGE, np.full((68, 2), 250.0), size=64)
    assert difference(face, IMAGE[250 - 39 : 250 + 25, 250 - 32 : 250 + 32]) < 15


@pytest.mark.parametrize("shape", [(300, 300), (300, 500), (501, 299), (20, 30)])
@pytest.mark.parametrize("margin", [0, 8])
def test_the_centre_of_an_image_comes_to_the_centre_of_the_square(shape, margin):
    image = np.zeros((*shape, 3), np.uint8)
    transform = centre_transform(image, size=128, margin=margin)
    centre = np.array([[(shape[1] - 1) / 2, (shape[0] - 1) / 2]])
    np.testing.assert_allclose(transform_points(centre, transform), [[63.5 + margin] * 2], atol=1e-9)
    side = min(shape)
    corner = centre - side / 2  # of the largest centred square
    np.testing.assert_allclose(transform_points(corner, transform), [[margin - 0.5] * 2], atol=1e-9)


def test_an_image_of_the_squares_size_is_its_own_square():
    image = np.ascontiguousarray(IMAGE[:128, :128])
    np.testing.assert_array_equal(warp_face(image, centre_transform(image, size=128), size=128), image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (16, 16)])
def test_tiny_images_give_a_square_too(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    assert (warp_face(image, centre_transform(image, size=64), size=64) == 77).all()
    assert (align_face(image, np.random.default_rng(0).uniform(0, 300, (68, 2)), size=64) == 77).all()


def test_the_image_is_left_as_it_was_and_may_be_read_only(landmarks):
    image = IMAGE.copy()
    image.flags.writeable = False
    for factor in (0.4, 1):
        align_face(image, landmarks * factor, size=64)
    np.testing.assert_array_equal(image, IMAGE)


def test_a_blurred_face_is_less_sharp(landmarks):
    face = align_face(IMAGE, landmarks, size=128)
    assert sharpness(cv2.GaussianBlur(face, (0, 0), 4)) < 20 < sharpness(face)
    assert sharpness(np.full((128, 128, 3), 90, np.uint8)) == 0
