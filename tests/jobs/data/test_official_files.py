"""CelebA and LFWA as their authors and torchvision lay them out, a few pictures long."""

import importlib.util
from pathlib import Path

import boto3
import numpy as np
import pytest
import scipy.io

from jobs.data.datasets import read_dataset
from mgmtn.attributes import ATTRIBUTES
from mgmtn.errors import ConfigError

CELEBA_NAMES = ["5_o_Clock_Shadow", *("_".join(map(str.capitalize, name.split("_"))) for name in ATTRIBUTES[1:])]
CELEBA_LAYOUTS = [
    ("", "", "img_align_celeba"),
    ("celeba/", "celeba/", "celeba/img_align_celeba"),  # torchvision's, its root given
    ("Anno/", "Eval/", "Img/img_align_celeba"),
    ("CelebA/Anno/", "CelebA/Eval/", "CelebA/Img/img_align_celeba"),
    ("Anno/", "Eval/", "Img/img_celeba"),  # the pictures as they were found
]


def put(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def celeba(folder: Path, labels: str = "", splits: str = "", pictures: str = "img_align_celeba") -> Path:
    rows = [" ".join(["-1", "1"] * 20), " ".join(["1", "-1"] * 20), " ".join(["-1"] * 40)]
    lines = [f"{number:06d}.jpg  {row}" for number, row in enumerate(rows, start=1)]
    put(folder / f"{labels}list_attr_celeba.txt", "\n".join(["3", " ".join(CELEBA_NAMES) + " ", *lines, ""]))
    put(folder / f"{labels}identity_CelebA.txt", "000001.jpg 2880\n")
    put(folder / f"{splits}list_eval_partition.txt", "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n")
    put(folder / pictures / "000001.jpg")
    return folder


@pytest.mark.parametrize(("labels", "splits", "pictures"), CELEBA_LAYOUTS)
def test_the_official_lists_of_celeba_are_a_dataset_in_each_layout(tmp_path, labels, splits, pictures):
    rows = read_dataset(str(celeba(tmp_path, labels, splits, pictures))).to_pylist()
    assert [row["image"] for row in rows] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert [row["uri"] for row in rows] == [str(tmp_path / pictures / f"00000{n}.jpg") for n in (1, 2, 3)]
    assert [row["split"] for row in rows] == ["train", "validation", "test"]
    assert [row["labels"] for row in rows] == [[0, 1] * 20, [1, 0] * 20, [0] * 40]


@pytest.mark.integration
def test_celeba_in_a_bucket_is_a_dataset(bucket, tmp_path):
    folder, s3 = celeba(tmp_path, "celeba/", "celeba/", "celeba/img_align_celeba"), boto3.client("s3")
    for path in folder.rglob("*.*"):
        s3.upload_file(str(path), bucket.removeprefix("s3://"), f"sets/{path.relative_to(folder)}")
    rows = read_dataset(f"{bucket}/sets").to_pylist()
    assert rows[1]["uri"] == f"{bucket}/sets/celeba/img_align_celeba/000002.jpg"
    assert rows[1]["labels"] == [1, 0] * 20


def test_celeba_without_its_partition_is_refused(tmp_path):
    (celeba(tmp_path) / "list_eval_partition.txt").unlink()
    with pytest.raises(ConfigError, match=r"list_attr_celeba\.txt' is there, but not .*list_eval_partition"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize("partition", ["000001.jpg 0\n000002.jpg 1\n", "000001.jpg 0\n000002.jpg 1\n000003.jpg 3\n"])
def test_a_picture_of_celeba_without_a_split_is_named(tmp_path, partition):
    put(celeba(tmp_path) / "list_eval_partition.txt", partition)
    with pytest.raises(ConfigError, match=r"'000003\.jpg' no split"):
        read_dataset(str(tmp_path))


def test_an_archive_that_was_not_unpacked_is_named_before_any_work(tmp_path):
    (celeba(tmp_path) / "img_align_celeba/000001.jpg").rename(tmp_path / "img_align_celeba.zip")
    with pytest.raises(ConfigError, match=r"no picture '000001\.jpg' .*img_align_celeba.*must be unpacked"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize("content", ["", "3\n"], ids=["empty", "no header"])
def test_a_label_list_of_celeba_that_is_none_is_named(tmp_path, content):
    put(celeba(tmp_path) / "list_attr_celeba.txt", content)
    with pytest.raises(ConfigError, match="list_attr_celeba"):
        read_dataset(str(tmp_path))


LFWA_NAMES = ["AJ_Cook/AJ_Cook_0001.jpg", "Bono/Bono_0001.jpg", "Bono/Bono_0002.jpg"]
LFWA_CELLS = [name.replace("/", "\\") for name in LFWA_NAMES]
LFWA_LABELS = np.array([[0, 1] * 20, [1, 0] * 20, [1] * 40], np.uint8)
TRAIN, TEST = np.array([[1], [3]]), np.array([[2]])  # MATLAB counts from 1


def cells(texts: list[str]) -> np.ndarray:
    """A column of MATLAB cells."""
    return np.array([[text] for text in texts], object)


def lfwa(folder: Path, pictures: str = "lfw", *, train: np.ndarray = TRAIN, **variables: np.ndarray) -> Path:
    """The two files as MATLAB before 7.3 writes them, and the first picture."""
    content = {"name": cells(LFWA_CELLS), "AttrName": cells(CELEBA_NAMES), "label": LFWA_LABELS} | variables
    put(folder / pictures / LFWA_NAMES[0])
    scipy.io.savemat(folder / "lfw_att_40.mat", content)
    scipy.io.savemat(folder / "indices_train_test.mat", {"indices_img_train": train, "indices_img_test": TEST})
    return folder


def expect_lfwa(folder: Path, pictures: Path) -> None:
    rows = read_dataset(str(folder)).to_pylist()
    assert [row["image"] for row in rows] == LFWA_NAMES
    assert [row["uri"] for row in rows] == [str(pictures / name) for name in LFWA_NAMES]
    assert [row["split"] for row in rows] == ["train", "test", "train"]
    assert [row["labels"] for row in rows] == LFWA_LABELS.tolist()


@pytest.mark.parametrize("pictures", ["lfw", "lfw-deepfunneled", "lfw_funneled", "CropImages_bg", "."])
def test_the_official_files_of_lfwa_are_a_dataset(tmp_path, pictures):
    expect_lfwa(lfwa(tmp_path, pictures), tmp_path / pictures)


def test_the_root_above_the_files_of_lfwa_will_do(tmp_path):
    lfwa(tmp_path / "LFWA", "lfw")
    expect_lfwa(tmp_path, tmp_path / "LFWA/lfw")


def test_names_with_spaces_are_names_of_attributes_too(tmp_path):
    lfwa(tmp_path, AttrName=cells([name.replace("_", " ") for name in CELEBA_NAMES]))
    expect_lfwa(tmp_path, tmp_path / "lfw")


def write_hdf5(path: Path, **variables: np.ndarray) -> None:
    """A file of MATLAB 7.3: HDF5 behind a header, arrays transposed, cells as references to codes of characters."""
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        store = file.create_group("#refs#")
        for name, value in variables.items():
            if value.dtype == object:
                texts = [np.array([[ord(char)] for char in text], np.uint16) for text in value.ravel()]
                stored = [store.create_dataset(f"{name}{k}", data=text).ref for k, text in enumerate(texts)]
                file[name] = np.array([stored], h5py.ref_dtype)
            else:
                file[name] = value.T
    with path.open("r+b") as raw:
        raw.write(header_of_7_3())


def header_of_7_3() -> bytes:
    return b"MATLAB 7.3 MAT-file, Platform: PCWIN64".ljust(116) + bytes(8) + b"\x00\x02IM"


def test_the_files_as_matlab_7_3_wrote_them_are_a_dataset(tmp_path):
    pytest.importorskip("h5py")
    lfwa(tmp_path)
    write_hdf5(
        tmp_path / "lfw_att_40.mat",
        name=cells(LFWA_CELLS),
        AttrName=cells(CELEBA_NAMES),
        label=LFWA_LABELS.astype(np.float64),
    )
    write_hdf5(
        tmp_path / "indices_train_test.mat",
        indices_img_train=TRAIN.astype(np.float64),
        indices_img_test=TEST.astype(np.float64),
    )
    expect_lfwa(tmp_path, tmp_path / "lfw")


def test_without_h5py_a_file_of_matlab_7_3_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (lfwa(tmp_path) / "lfw_att_40.mat").write_bytes(header_of_7_3() + bytes(384))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lfw_att_40\.mat' is of MATLAB 7\.3.*pip install h5py"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "variables", "problem"),
    [
        (TRAIN, {"label": LFWA_LABELS[:2]}, r"label has shape \(2, 40\), but there are 3 names and 40 attributes"),
        (TRAIN, {"label": LFWA_LABELS + 1}, "2 is not 0, 1 or empty"),
        (np.array([[1], [4]]), {}, "indices_img_train names picture 4 of 3"),
        (np.array([[0], [1]]), {}, "indices_img_train names picture 0 of 3"),
        (np.array([[1], [2], [3]]), {}, r"'Bono/Bono_0001\.jpg' into both splits"),
        (np.array([[1]]), {}, r"'Bono/Bono_0002\.jpg' no split"),
    ],
)
def test_what_is_wrong_with_the_files_of_lfwa_is_named(tmp_path, train, variables, problem):
    with pytest.raises(ConfigError, match=problem):
        read_dataset(str(lfwa(tmp_path, train=train, **variables)))


def test_a_variable_that_is_missing_is_named(tmp_path):
    scipy.io.savemat(lfwa(tmp_path) / "indices_train_test.mat", {"indices_img_train": TRAIN})
    with pytest.raises(ConfigError, match=r"indices_train_test\.mat' lacks a variable: 'indices_img_test'"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["lfw_att_40.mat", "indices_train_test.mat"])
@pytest.mark.parametrize("content", [b"", b"not MATLAB's" * 100], ids=["empty", "other"])
def test_a_file_that_is_not_matlabs_is_named(tmp_path, name, content):
    (lfwa(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}' cannot be read as a MATLAB file"):
        read_dataset(str(tmp_path))


def test_lfwa_without_its_splits_or_pictures_is_refused(tmp_path):
    lfwa(tmp_path)
    (tmp_path / "lfw" / LFWA_NAMES[0]).unlink()
    with pytest.raises(ConfigError, match=r"no picture 'AJ_Cook/AJ_Cook_0001\.jpg' in .*lfw-deepfunneled"):
        read_dataset(str(tmp_path))
    (tmp_path / "indices_train_test.mat").unlink()
    with pytest.raises(ConfigError, match=r"lfw_att_40\.mat' is there, but not .*indices_train_test"):
        read_dataset(str(tmp_path))
