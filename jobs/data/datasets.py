"""Labelled image collections as one table of uri, split and 40 labels, whoever published them.

To add a format: write a reader and list it in `read_dataset`.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.data.object_store import canonical_uri, join, local_copy, parent, resolve
from jobs.data.official_files import SPLITS, is_there, read_celeba, read_lfwa
from mgmtn.attributes import ATTRIBUTES, attribute_name
from mgmtn.errors import ConfigError, FetchError

UNKNOWN = -1  # a label that nobody gave

DATASET_SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("uri", pa.string()),
        ("split", pa.string()),
        ("labels", pa.list_(pa.int8(), len(ATTRIBUTES))),
    ]
)


def read_dataset(dataset: str) -> pa.Table:
    """Read a labelled collection.

    Args:
        dataset: a folder or S3 prefix with `labels.csv` (columns `image` relative to the folder, the 40 names as 0, 1
            or empty, `split`), or with CelebA's or LFWA's official files; or a `.csv` or `.parquet` file with `uri`,
            labels and optionally `split`. A path in a file is relative to the file's folder.

    Returns:
        A table of `DATASET_SCHEMA`: labels are 0, 1, or -1 where unknown.

    Raises:
        ConfigError: nothing of these is there, or a column or value is wrong, by name.
    """
    uri = canonical_uri(dataset)
    if uri.endswith((".csv", ".parquet")):
        frame = _read_frame(uri)
        return _table(
            frame,
            image=_column(frame, "uri", dataset),
            uri_of=lambda name: resolve(name, folder=parent(uri)),
            source=dataset,
        )
    if is_there(join(uri, "labels.csv")):
        frame = _read_frame(join(uri, "labels.csv"))
        return _table(
            frame, image=_column(frame, "image", dataset), uri_of=lambda name: join(uri, name), source=dataset
        )
    official = read_celeba(uri) or read_lfwa(uri)
    if official is not None:
        frame, pictures = official.frame, official.pictures
        return _table(frame, image=frame["image"], uri_of=lambda name: join(pictures, name), source=dataset)
    raise ConfigError(
        f"dataset: {dataset!r} holds neither labels.csv nor CelebA's list_attr_celeba.txt nor LFWA's lfw_att_40.mat"
    )


def _read_frame(uri: str) -> pd.DataFrame:
    try:
        path = local_copy(uri)
        if uri.endswith(".parquet"):
            return pq.read_table(path).to_pandas()
        return pd.read_csv(path, dtype={"image": str, "uri": str})  # 000001 is a name, not a number
    except (FetchError, ValueError, pa.ArrowInvalid) as error:
        raise ConfigError(f"dataset: {uri!r} cannot be read: {error}") from error


def _column(frame: pd.DataFrame, name: str, source: str) -> pd.Series:
    if name not in frame.columns:
        raise ConfigError(f"dataset: {source!r} has no column {name!r}; its columns: {', '.join(frame.columns[:50])}")
    return frame[name]


def _table(frame: pd.DataFrame, *, image: pd.Series, uri_of: Callable[[str], str], source: str) -> pa.Table:
    given = frame["split"] if "split" in frame.columns else pd.Series(["train"] * len(frame))
    splits = given.astype(object).fillna("").astype(str)
    strange = sorted(set(splits) - set(SPLITS))
    if strange:
        raise ConfigError(f"dataset: {source!r} has split {strange[0]!r}; known: {', '.join(SPLITS)}")
    if image.isna().any() or (image == "").any():
        raise ConfigError(f"dataset: {source!r}: a row has no {image.name}")
    names = [str(name) for name in image]
    labels = _labels(frame, source)
    flat = pa.array(labels.ravel(), pa.int8())
    return pa.table(
        {
            "image": names,
            "uri": [uri_of(name) for name in names],
            "split": splits.tolist(),
            "labels": pa.FixedSizeListArray.from_arrays(flat, len(ATTRIBUTES)),
        },
        schema=DATASET_SCHEMA,
    )


def _labels(frame: pd.DataFrame, source: str) -> np.ndarray:
    """int8, shape `(N, 40)`. An attribute without a column is unknown throughout."""
    labels = np.full((len(frame), len(ATTRIBUTES)), UNKNOWN, np.int8)
    found = 0
    for column in frame.columns:
        try:
            index = ATTRIBUTES.index(attribute_name(str(column)))
        except KeyError:
            continue
        given = frame[column]
        values = pd.to_numeric(given, errors="coerce")
        # Lists that write -1 for "no" are about: taken for unknown, they would teach that everything is true.
        wrong = given.notna() & ~values.isin((0, 1))
        if wrong.any():
            raise ConfigError(f"dataset: {source!r}, column {column!r}: {given[wrong].iloc[0]} is not 0, 1 or empty")
        labels[:, index] = values.fillna(UNKNOWN).to_numpy()
        found += 1
    if found == 0:
        raise ConfigError(f"dataset: {source!r} has no column named as an attribute ({ATTRIBUTES[0]}, ...)")
    return labels
