"""What tests of every part share: real photographs with labels, and a Ray cluster on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of labelled photographs beside the repository, which is too large to be a part of it."""
    folder = (ROOT / ".." / "shared" / "data").resolve()
    if not folder.is_dir():
        pytest.skip("the labelled photographs, ../shared/data, are not on this machine")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray cluster of two CPUs on this machine, one for all tests: each start takes seconds."""
    from jobs.cluster import ClusterSettings, joined

    with joined(ClusterSettings(num_cpus=2, object_store_gb=0.3)):
        yield
