"""CelebA and LFWA as their authors publish them, or as torchvision lays CelebA out: labels, splits, where pictures lie.

To add a collection: write a reader like these two and list it in `jobs.data.datasets`.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from jobs.data.object_store import join, local_copy, open_store
from mgmtn.errors import ConfigError, FetchError

SPLITS: Final = ("train", "validation", "test")

# The authors' folders (Anno, Eval, Img) or none, as torchvision has it; in each case the first that is there.
_CELEBA_ROOTS: Final = ("", "celeba", "CelebA")
_CELEBA_LABELS: Final = ("list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
_CELEBA_SPLITS: Final = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
_CELEBA_PICTURES: Final = ("img_align_celeba", "Img/img_align_celeba", "img_celeba", "Img/img_celeba")

_LFWA_ROOTS: Final = ("", "lfwa", "LFWA", "LFWA+")
_LFWA_LABELS: Final = ("lfw_att_40.mat", "Anno/lfw_att_40.mat")
_LFWA_SPLITS: Final = ("indices_train_test.mat", "Anno/indices_train_test.mat")
_LFWA_PICTURES: Final = ("lfw", "lfw-deepfunneled", "lfw_funneled", "lfw-funneled", "CropImages_bg", "images", "")


@dataclass(frozen=True)
class OfficialFiles:
    """A published collection.

    Attributes:
        frame: columns `image`, `split` (train, validation, test) and the attributes as the authors spell them, 0 or 1.
        pictures: URI of the folder that `image` is relative to.
    """

    frame: pd.DataFrame
    pictures: str


def read_celeba(folder: str) -> OfficialFiles | None:
    """Read CelebA's lists; None if the folder does not hold them.

    The label list is a count, a header, then rows of a file name and 40 times -1 or 1; the partition gives each name
    0 (train), 1 (validation) or 2 (test).

    Raises:
        ConfigError: a list or the pictures are missing, or a list cannot be read.
    """
    roots = [join(folder, name) if name else folder for name in _CELEBA_ROOTS]
    found = next(((root, uri) for root in roots if (uri := _first(root, _CELEBA_LABELS)) is not None), None)
    if found is None:
        return None
    root, labels = found
    frame = pd.DataFrame(_read_list(labels, skiprows=1)).replace(-1, 0).rename_axis("image").reset_index()
    partition = _required(root, _CELEBA_SPLITS, labels)
    parts = _read_list(partition, header=None, names=["image", "part"], dtype=str)
    split_of = dict(zip(parts["image"], parts["part"].map(dict(zip("012", SPLITS, strict=True))), strict=True))
    frame["split"] = frame["image"].map(split_of)
    missing = frame["image"][frame["split"].isna()]
    if len(missing):
        raise ConfigError(f"dataset: {partition!r} gives {missing.iloc[0]!r} no split of 0, 1 or 2")
    return OfficialFiles(frame, _pictures(root, _CELEBA_PICTURES, frame["image"]))


def read_lfwa(folder: str) -> OfficialFiles | None:
    r"""Read LFWA's two MATLAB files; None if the folder does not hold the first.

    `lfw_att_40.mat`: `name` (N cells, `AJ_Cook\AJ_Cook_0001.jpg`), `AttrName` (40 cells), `label` (N x 40, 0 or 1).
    `indices_train_test.mat`: `indices_img_train` and `indices_img_test`, which count pictures from 1.

    Raises:
        ConfigError: a file or the pictures are missing, or a file does not hold what it should.
    """
    roots = [join(folder, name) if name else folder for name in _LFWA_ROOTS]
    found = next(((root, uri) for root in roots if (uri := _first(root, _LFWA_LABELS)) is not None), None)
    if found is None:
        return None
    root, labels = found
    content = _read_mat(labels, cells=("name", "AttrName"), arrays=("label",))
    names, attributes, values = content["name"], content["AttrName"], content["label"]
    if values.shape != (len(names), len(attributes)):
        raise ConfigError(
            f"dataset: {labels!r}: label has shape {values.shape}, but there are {len(names)} names and "
            f"{len(attributes)} attributes"
        )
    frame = pd.DataFrame(values, columns=attributes)
    frame.insert(0, "image", [name.replace("\\", "/") for name in names])
    frame["split"] = _lfwa_splits(_required(root, _LFWA_SPLITS, labels), frame["image"])
    return OfficialFiles(frame, _pictures(root, _LFWA_PICTURES, frame["image"]))


def _lfwa_splits(uri: str, images: Sequence[str]) -> np.ndarray:
    keys = {"train": "indices_img_train", "test": "indices_img_test"}
    content = _read_mat(uri, arrays=tuple(keys.values()))
    splits = np.full(len(images), "", object)
    for split, key in keys.items():
        indices = content[key].astype(np.int64).ravel() - 1
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(images)):
            wrong = indices[(indices < 0) | (indices >= len(images))][0] + 1
            raise ConfigError(f"dataset: {uri!r}: {key} names picture {wrong} of {len(images)}")
        if (splits[indices] != "").any():
            raise ConfigError(f"dataset: {uri!r} puts {images[indices[splits[indices] != ''][0]]!r} into both splits")
        splits[indices] = split
    if (splits == "").any():
        raise ConfigError(f"dataset: {uri!r} gives {images[int(np.argmax(splits == ''))]!r} no split")
    return splits


def _first(root: str, names: Sequence[str]) -> str | None:
    return next((uri for uri in (join(root, name) for name in names) if is_there(uri)), None)


def _required(root: str, names: Sequence[str], beside: str) -> str:
    found = _first(root, names)
    if found is None:
        raise ConfigError(f"dataset: {beside!r} is there, but not {' or '.join(join(root, name) for name in names)}")
    return found


def _pictures(root: str, folders: Sequence[str], images: Sequence[str]) -> str:
    """The folder of the pictures: the first of those known that holds the list's first picture."""
    if not len(images):
        return join(root, folders[0])
    for folder in (join(root, name) if name else root for name in folders):
        if is_there(join(folder, images[0])):
            return folder
    known = ", ".join(name or "." for name in folders)
    raise ConfigError(f"dataset: no picture {images[0]!r} in {root!r}, folder {known}; archives must be unpacked")


def is_there(uri: str) -> bool:
    """True if there is a file or object of that URI.

    Raises:
        ConfigError: it cannot be looked up.
    """
    try:
        return open_store(uri).stat(uri) is not None
    except FetchError as error:
        raise ConfigError(f"dataset: {error}") from error


def _copy(uri: str) -> Path:
    try:
        return local_copy(uri)
    except FetchError as error:
        raise ConfigError(f"dataset: {uri!r} cannot be read: {error}") from error


def _read_list(uri: str, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(_copy(uri), sep=r"\s+", **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"dataset: {uri!r} cannot be read: {error}") from error


def _read_mat(uri: str, *, cells: Sequence[str] = (), arrays: Sequence[str] = ()) -> dict[str, Any]:
    """Variables of a MATLAB file: cells of text as lists of str, the others as arrays of MATLAB's shape.

    Raises:
        ConfigError: it is no MATLAB file, or lacks a variable.
    """
    import scipy.io  # here, for it is slow to import and only this needs it

    path, wanted = _copy(uri), (*cells, *arrays)
    try:
        try:
            content = scipy.io.loadmat(path, variable_names=wanted)
            found = {name: content[name] for name in wanted}
            return found | {name: [str(cell.item()) for cell in found[name].ravel()] for name in cells}
        except NotImplementedError:  # scipy's answer to version 7.3, which is HDF5: the authors' files are
            return _read_hdf5(path, cells=cells, arrays=arrays, uri=uri)
    except KeyError as error:
        raise ConfigError(f"dataset: {uri!r} lacks a variable: {error}") from error
    except (OSError, ValueError, TypeError, scipy.io.matlab.MatReadError) as error:
        raise ConfigError(f"dataset: {uri!r} cannot be read as a MATLAB file: {error}") from error


def _read_hdf5(path: Path, *, cells: Sequence[str], arrays: Sequence[str], uri: str) -> dict[str, Any]:
    if importlib.util.find_spec("h5py") is None:
        raise ConfigError(f"dataset: {uri!r} is of MATLAB 7.3, for which h5py is needed: pip install h5py")
    import h5py

    with h5py.File(path, "r") as file:
        # MATLAB stores columns first, so that all is transposed; a cell is a reference to an array of UTF-16 codes.
        found: dict[str, Any] = {name: np.asarray(file[name]).T for name in arrays}
        for name in cells:
            codes = (np.asarray(file[reference]) for reference in np.asarray(file[name]).ravel())
            found[name] = ["".join(map(chr, code.ravel())) for code in codes]
    return found
