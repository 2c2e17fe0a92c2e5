from pathlib import Path

import pandas as pd
import pytest

from jobs.data.datasets import DATASET_SCHEMA, read_dataset
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import ConfigError


def write(folder: Path, text: str, name: str = "labels.csv") -> str:
    (folder / name).write_text(text)
    return str(folder)


def label(row: dict, name: str) -> int:
    return row["labels"][ATTRIBUTES.index(name)]


def test_a_folder_with_labels_becomes_rows_of_uri_split_and_labels(tmp_path):
    text = "image,5_o_Clock_Shadow,Smiling,split\na/one.jpg,0,1,train\ntwo.jpg,,0,test\n"
    table = read_dataset(write(tmp_path, text))
    assert table.schema == DATASET_SCHEMA
    one, two = table.to_pylist()
    assert (one["image"], one["uri"], one["split"]) == ("a/one.jpg", str(tmp_path / "a/one.jpg"), "train")
    assert (label(one, "five_o_clock_shadow"), label(one, "smiling")) == (0, 1)
    assert (label(two, "five_o_clock_shadow"), label(two, "smiling")) == (-1, 0)
    assert one["labels"].count(-1) == 38  # no column, nobody knows


def test_without_a_split_everything_is_for_training(tmp_path):
    assert read_dataset(write(tmp_path, "image,Male\na.jpg,1\n"))["split"].to_pylist() == ["train"]


def test_names_that_look_like_numbers_stay_names(tmp_path):
    assert read_dataset(write(tmp_path, "image,Male\n000001,1\n"))["image"].to_pylist() == ["000001"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("image,Male,split\na.jpg,2,train\n", "'Male': 2 is not 0, 1 or empty"),
        ("image,Male,split\na.jpg,-1,train\n", "'Male': -1 is not 0, 1 or empty"),
        ("image,Male,split\na.jpg,0.5,train\n", "'Male': 0.5 is not 0, 1 or empty"),
        ("image,Male,split\na.jpg,yes,train\n", "'Male': yes is not 0, 1 or empty"),
        ("image,Male,split\na.jpg,1,holdout\n", "split 'holdout'; known: train, validation, test"),
        ("image,Male,split\na.jpg,1,\n", "split ''"),
        ("file,Male\na.jpg,1\n", "no column 'image'; its columns: file, Male"),
        ("image,Height\na.jpg,1\n", "no column named as an attribute"),
        ("image,Male\n,1\n", "a row has no image"),
        ("", "cannot be read"),
    ],
)
def test_what_is_wrong_with_the_labels_is_named(tmp_path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        read_dataset(write(tmp_path, text))


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither labels\.csv nor CelebA's"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_list_with_uris_is_a_dataset(tmp_path, suffix):
    frame = pd.DataFrame({"uri": ["near.jpg", "/far/b.jpg", "s3://bucket/c.jpg"], "young": [1, 0, None]})
    path = tmp_path / f"list.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    rows = read_dataset(str(path)).to_pylist()
    assert [row["uri"] for row in rows] == [str(tmp_path / "near.jpg"), "/far/b.jpg", "s3://bucket/c.jpg"]
    assert [label(row, "young") for row in rows] == [1, 0, -1]


def test_a_list_without_uri_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no column 'uri'"):
        read_dataset(write(tmp_path, "image,Male\na.jpg,1\n", "list.csv") + "/list.csv")


@pytest.mark.parametrize("name", ["absent.csv", "absent.parquet", "torn.parquet"])
def test_a_list_that_cannot_be_read_is_refused(tmp_path, name):
    write(tmp_path, "PAR1 and no more", "torn.parquet")
    with pytest.raises(ConfigError, match=name):
        read_dataset(str(tmp_path / name))
