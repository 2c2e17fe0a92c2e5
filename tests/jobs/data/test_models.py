from pathlib import Path

import boto3
import pytest
import torch

from jobs.data.models import resolve_model
from mgmtn.checkpoint import CARD_FILE, WEIGHTS_FILE, Card, Checkpoint
from mgmtn.errors import CheckpointError
from mgmtn.network import MGMTN, NetworkSettings

TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64, width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    checkpoint = Checkpoint.of(MGMTN(TINY), Card(name="tiny", kind="attributes", network=TINY))
    return checkpoint.save(tmp_path_factory.mktemp("model"))


def test_a_local_folder_is_a_model(folder):
    assert resolve_model(str(folder)) == Checkpoint.load(folder)


def test_a_model_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*absent"):
        resolve_model(str(tmp_path / "absent"))


@pytest.mark.integration
def test_a_model_in_s3_is_the_same_model(folder, bucket):
    client = boto3.client("s3")
    for name in (CARD_FILE, WEIGHTS_FILE):
        client.upload_file(str(folder / name), bucket.removeprefix("s3://"), f"models/tiny/{name}")
    assert resolve_model(f"{bucket}/models/tiny") == Checkpoint.load(folder)
    assert resolve_model(f"{bucket}/models/tiny/") == Checkpoint.load(folder)


@pytest.mark.integration
def test_a_model_that_is_not_in_the_bucket_is_named(bucket):
    with pytest.raises(CheckpointError, match=f"no checkpoint at '{bucket}/absent'"):
        resolve_model(f"{bucket}/absent")
