"""A dataset in a bucket, prepared into the bucket, and read again from there."""

import json
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import torch

from jobs import demo, evaluate
from jobs.data.training_table import Description, load_samples
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = pytest.mark.integration


def prepared(bucket: str) -> dict[str, object]:
    """In a process of its own: the workers of a Ray that runs already know no keys of the bucket."""
    command = [sys.executable, "-m", "jobs.prepare", f"{bucket}/set", "--output", f"{bucket}/data"]
    command += ["--image-size", "64", "--margin", "8", "--workers", "1", "--rows-per-file", "2"]
    command += ["--mediapipe.levels", "0", "--cluster.num-cpus", "1", "--cluster.object-store-gb", "0.3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def test_a_table_is_made_and_read_in_a_bucket(bucket: str, tmp_path: Path):
    s3, name = boto3.client("s3"), bucket.removeprefix("s3://")
    demo.run(demo.DemoSettings(output=tmp_path))
    for picture in ("admiral.jpg", "cat.png"):
        s3.upload_file(str(tmp_path / picture), name, f"set/{picture}")
    labels = b"image,Smiling\nadmiral.jpg,1\ncat.png,\ngone.jpg,0\n"
    s3.put_object(Bucket=name, Key="set/labels.csv", Body=labels)
    summary = prepared(bucket)
    assert summary == {"images": 3, "faces": 1, "no_face": 1, "failed": 1, "output": f"{bucket}/data"}
    assert Description.load(f"{bucket}/data").images == 3
    samples = load_samples((f"{bucket}/data",), split="train")
    assert samples.names.tolist() == ["admiral.jpg", "cat.png"]
    assert samples.found.tolist() == [True, False]

    # One file gone, one kept: the first is made again.
    kept = s3.head_object(Bucket=name, Key="data/part-00001.parquet")["LastModified"]
    s3.delete_object(Bucket=name, Key="data/part-00000.parquet")
    assert prepared(bucket) == summary
    assert s3.head_object(Bucket=name, Key="data/part-00001.parquet")["LastModified"] == kept
    assert load_samples((f"{bucket}/data",), split="train").names.tolist() == ["admiral.jpg", "cat.png"]

    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    model = Checkpoint.of(MGMTN(network), Card(name="random", kind="attributes", network=network))
    arguments = ["--model", str(model.save(tmp_path / "model")), "--data", f"{bucket}/data", "--split", "train"]
    assert evaluate.main([*arguments, "--output", f"{bucket}/report/"]) == 0
    pages = s3.list_objects_v2(Bucket=name, Prefix="report/")["Contents"]
    assert {page["Key"] for page in pages} >= {"report/metrics.json", "report/metrics.md", "report/reliability.png"}
    metrics = json.loads(s3.get_object(Bucket=name, Key="report/metrics.json")["Body"].read())
    assert metrics["images"] == 3

    with pytest.raises(ConfigError, match="not a finished training table"):
        Description.load(f"{bucket}/elsewhere")
