"""The photographs of `make demo`."""

import pytest

from jobs.demo import COLLAGE, PHOTOGRAPHS, TORN, DemoSettings, run
from mgmtn.errors import DecodeError
from mgmtn.images import ImageLimits, decode_image
from mgmtn.landmarks import MediaPipeSettings


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "photos"
    assert run(DemoSettings(output=folder)) == {"photographs": len(PHOTOGRAPHS) + 2, "output": str(folder)}
    return folder


def decoded(path):
    return decode_image(path.read_bytes(), limits=ImageLimits())


def test_the_portraits_and_the_collage_hold_the_faces_and_the_rest_none(photos):
    names = [*PHOTOGRAPHS, COLLAGE]
    found = MediaPipeSettings().build().find([decoded(photos / name) for name in names])
    faces = {name: len(of_image) for name, of_image in zip(names, found, strict=True) if len(of_image)}
    assert faces == {"astronaut.png": 1, "admiral.jpg": 1, COLLAGE: 2}


def test_the_torn_file_is_damaged(photos):
    with pytest.raises(DecodeError, match="truncated"):
        decoded(photos / TORN)


def test_gathering_again_leaves_every_file_as_it_was(photos):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in photos.iterdir()}
    run(DemoSettings(output=photos))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in photos.iterdir()} == before
