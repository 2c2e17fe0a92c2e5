import gzip
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.inventory import take_inventory
from jobs.data.object_store import ObjectInfo
from jobs.data.s3_inventory import read_report
from mgmtn.errors import ConfigError

ODD_KEYS = ("a b+c%20d.jpg", "ünï/日本 🙂.png", 'a,"b"\nc.jpg', "~x*(!)'.gif", "x" * 1020 + ".jpg")
CSV_COLUMNS = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"
PARQUET_COLUMNS = {
    "ETag": "e_tag",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "VersionId": "version_id",
}


def row(key: str, **more: Any) -> dict[str, Any]:
    return {
        "Bucket": "photos",
        "Key": key,
        "VersionId": "v",
        "IsLatest": True,
        "IsDeleteMarker": False,
        "Size": 7,
        "LastModifiedDate": "2026-01-02T03:04:05.000Z",
        "ETag": hashlib.md5(key.encode()).hexdigest(),
    } | more


def csv_file(rows: list[dict[str, Any]], *, encode=quote_plus) -> bytes:
    """As Amazon writes it: no header, everything quoted, the key percent-encoded."""

    def cell(name: str, value: Any) -> str:
        if name == "Key":
            return f'"{encode(value)}"'
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return '""' if value is None else f'"{text}"'

    return gzip.compress("".join(",".join(cell(*item) for item in row.items()) + "\n" for row in rows).encode())


def parquet_file(rows: list[dict[str, Any]]) -> bytes:
    columns = {PARQUET_COLUMNS.get(name, name.lower()): [row[name] for row in rows] for name in rows[0]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def write_report(folder: Path, *files: bytes, format: str, columns: str = CSV_COLUMNS, **more: Any) -> str:
    """A report as Amazon lays it out, copied to a local folder."""
    named = {f"data/{number}.{'csv.gz' if format == 'CSV' else 'parquet'}": data for number, data in enumerate(files)}
    for name, data in named.items():
        (folder / "data").mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    listed = [
        {"key": f"reports/photos/daily/{name}", "size": len(data), "MD5checksum": hashlib.md5(data).hexdigest()}
        for name, data in named.items()
    ]
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::reports",
        "version": "2016-11-30",
        "creationTimestamp": "1767322800000",
        "fileFormat": format,
        "fileSchema": columns,
        "files": listed,
    } | more
    dated = folder / "2026-01-02T03-00Z"
    dated.mkdir()
    (dated / "manifest.json").write_text(json.dumps(manifest))
    return str(dated / "manifest.json")


def expected(rows: list[dict[str, Any]]) -> list[ObjectInfo]:
    return [ObjectInfo(f"s3://photos/{row['Key']}", row["ETag"], row["Size"]) for row in rows]


@pytest.mark.parametrize("encode", [quote_plus, quote])
def test_a_csv_report_gives_every_key_as_it_is(tmp_path, encode):
    rows = [row(key) for key in ODD_KEYS]
    uri = write_report(tmp_path, csv_file(rows[:2], encode=encode), csv_file(rows[2:], encode=encode), format="CSV")
    assert list(read_report(uri)) == expected(rows)


def test_a_parquet_report_gives_every_key_as_it_is(tmp_path):
    rows = [row(key) for key in ODD_KEYS]
    uri = write_report(tmp_path, parquet_file(rows[:2]), parquet_file(rows[2:]), format="Parquet")
    assert list(read_report(uri)) == expected(rows)


@pytest.mark.parametrize("format", ["CSV", "Parquet"])
def test_of_a_bucket_with_versions_the_current_objects_count(tmp_path, format):
    rows = [
        row("a.jpg"),
        row("a.jpg", IsLatest=False, ETag="older"),
        row("b.jpg", IsDeleteMarker=True, ETag=None, Size=None),
        row("b.jpg", IsLatest=False),
        row("folder/", Size=0),
    ]
    uri = write_report(tmp_path, csv_file(rows) if format == "CSV" else parquet_file(rows), format=format)
    assert list(read_report(uri)) == expected(rows[:1])


def test_a_bucket_without_versions_has_fewer_columns(tmp_path):
    rows = [{name: value for name, value in row(key).items() if name in ("Bucket", "Key", "ETag")} for key in "ab"]
    uri = write_report(tmp_path, csv_file(rows), format="CSV", columns="Bucket, Key, ETag")
    assert [info.size for info in read_report(uri)] == [None, None]


def test_an_inventory_of_a_report_has_its_images_and_asks_nobody(tmp_path):
    rows = [row("a.jpg"), row("b.PNG"), row("notes.txt")]
    uri = write_report(tmp_path, csv_file(rows), format="CSV")
    table = take_inventory(uri)
    assert set(table["uri"].to_pylist()) == {"s3://photos/a.jpg", "s3://photos/b.PNG"}
    assert set(table["etag"].to_pylist()) == {row["ETag"] for row in rows[:2]}
    assert take_inventory(uri, all_files=True).num_rows == 3


def test_a_file_that_is_not_the_reports_is_refused(tmp_path):
    uri = write_report(tmp_path, csv_file([row("a.jpg")]), format="CSV")
    (tmp_path / "data" / "0.csv.gz").write_bytes(csv_file([row("b.jpg")]))
    with pytest.raises(ConfigError, match=r"0\.csv\.gz' has MD5"):
        take_inventory(uri)
    (tmp_path / "data" / "0.csv.gz").unlink()
    with pytest.raises(ConfigError, match=r"0\.csv\.gz' cannot be read: no such file"):
        take_inventory(uri)


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        (b"", {"fileFormat": "ORC"}, "its format is 'ORC'"),
        (csv_file([row("a.jpg")]), {"fileSchema": "Bucket, Key"}, "has no etag, only"),
        (b"no gzip", {}, "cannot be read"),
        (csv_file([row("a.jpg", Size="large")]), {}, "cannot be read: .*large"),
        (csv_file([row("%ff.jpg")], encode=str), {}, "cannot be read: .*utf-8"),
    ],
)
def test_a_report_that_makes_no_sense_is_named(tmp_path, data, more, message):
    uri = write_report(tmp_path, data, format="CSV", **more)
    with pytest.raises(ConfigError, match=message):
        take_inventory(uri)


@pytest.mark.parametrize("text", ["{}", "[]", '{"fileFormat": "CSV"}', "{"])
def test_another_manifest_is_no_report(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="as the manifest of an S3 Inventory report"):
        take_inventory(str(tmp_path / "manifest.json"))


@pytest.mark.integration
def test_a_report_in_a_bucket_is_read_from_there(s3_folder, tmp_path):
    import boto3

    from jobs.data.s3_store import split

    data = csv_file([row(key) for key in ODD_KEYS])
    local = write_report(tmp_path, data, format="CSV")
    manifest = json.loads(Path(local).read_text())
    bucket, prefix = split(s3_folder)
    manifest["files"][0]["key"] = f"{prefix}/photos/daily/data/0.csv.gz"
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=bucket, Key=manifest["files"][0]["key"], Body=data)
    key = f"{prefix}/photos/daily/2026-01-02T03-00Z/manifest.json"
    client.put_object(Bucket=bucket, Key=key, Body=json.dumps(manifest).encode())
    assert take_inventory(f"s3://{bucket}/{key}").num_rows == len(ODD_KEYS)
