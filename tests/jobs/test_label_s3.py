"""The label job against S3: photographs, table and model in buckets. The server is moto's; nothing else is replaced."""

import json
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import torch

from jobs import demo, query
from jobs.data.snapshots import LabelTable
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

pytestmark = pytest.mark.integration


def test_a_corpus_in_s3_is_labelled_into_a_table_in_s3_by_a_model_in_s3(bucket: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=64)
    model = Checkpoint.of(MGMTN(network), Card(name="random", kind="attributes", network=network))
    demo.run(demo.DemoSettings(output=tmp_path / "photos"))
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for path in model.save(tmp_path / "model").iterdir():
        client.upload_file(str(path), name, f"models/random/{path.name}")
    for path in (tmp_path / "photos").iterdir():
        client.upload_file(str(path), name, f"photos/a b+c%20ü/{path.name}")
    client.put_object(Bucket=name, Key="photos/notes.txt", Body=b"not an image")

    # A process of its own: the cluster that it starts has the environment's S3.
    command = [sys.executable, "-m", "jobs.label", f"{bucket}/photos/", "--output", f"{bucket}/labels"]
    done = subprocess.run([*command, "--model", f"{bucket}/models/random"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["images"] == {"decode_error": 1, "no_face": 6, "ok": 3}
    assert "never-print-this" not in done.stderr

    files = ["--output", f"{bucket}/found.csv", "--format", "csv", "--sheet", f"{bucket}/found.png"]
    assert query.main([f"{bucket}/labels", "face_index >= 0", *files]) == 0
    assert client.get_object(Bucket=name, Key="found.csv")["Body"].read().count(b"\n") > 1
    assert client.get_object(Bucket=name, Key="found.png")["Body"].read().startswith(b"\x89PNG")

    table = LabelTable(f"{bucket}/labels")
    current = table.current()
    assert current is not None
    uris = {uri for batch in table.read(current, columns=["uri"]) for uri in batch["uri"].to_pylist()}
    assert f"{bucket}/photos/a b+c%20ü/collage.jpg" in uris
    assert len(uris) == 10
