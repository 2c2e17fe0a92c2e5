"""A label table as somebody sees it who has the command line and DuckDB, and none of our code."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from deploy.rehearsal.processes import ROOT
from jobs.data.s3_store import split


class Table:
    """The table at a URI."""

    def __init__(self, labels: str, *, environment: Mapping[str, str], client: Any) -> None:
        """
        Args:
            labels: a folder or an S3 prefix.
            environment: of the commands, to reach the store.
            client: of S3.
        """
        self.labels, self._environment, self._client = labels, environment, client

    def history(self) -> list[dict[str, Any]]:
        """The snapshots, the oldest first."""
        return [json.loads(line) for line in self._mgmtn("snapshots", self.labels, "--format", "json")]

    def parents(self) -> dict[int, int | None]:
        """The parent of each snapshot by its number, as the files in the bucket say."""
        bucket, prefix = split(self.labels)
        keys = [f"{prefix}/_snapshots/{row['number']:020d}.json" for row in self.history()]
        files = [json.loads(self._client.get_object(Bucket=bucket, Key=key)["Body"].read()) for key in keys]
        return {file["number"]: file["parent"] for file in files}

    def rows(self, folder: Path) -> pa.Table:
        """All rows of the current snapshot, in the order of image and face, by plain DuckDB.

        Args:
            folder: to copy the files of a bucket to, which DuckDB reads only with an extension.
        """
        folder.mkdir()
        local = [self._copied(uri, folder) for uri in self._mgmtn("files", self.labels)]
        files = duckdb.read_parquet(local, hive_partitioning=False)
        return files.order("image_id, face_index").to_arrow_table()

    def _copied(self, uri: str, folder: Path) -> str:
        if not uri.startswith("s3://"):
            return uri
        bucket, key = split(uri)
        path = folder / key.replace("/", "_")
        self._client.download_file(bucket, key, str(path))
        return str(path)

    def _mgmtn(self, *words: str) -> list[str]:
        command = [sys.executable, "-m", "jobs.cli", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=dict(self._environment), stdout=subprocess.PIPE, text=True, check=True, timeout=300
        )
        return done.stdout.splitlines()
