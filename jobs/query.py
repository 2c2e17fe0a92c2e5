"""Find faces by their attributes in a label table's current snapshot.

  mgmtn query LABELS "smiling and not eyeglasses and young > 0.8"

An attribute's name alone is its label, under the thresholds of the model; in a comparison it is the probability. Every
other column can be used too, in DuckDB's syntax. The faces come ordered by uri and face_index.
"""

import functools
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from duckdb import DuckDBPyConnection
from PIL import Image
from pydantic import Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg

from jobs.data.expressions import EXAMPLE, VIEW, Condition, known_column, translate
from jobs.data.faces_view import (
    columns_of,
    identifier,
    open_faces,
    rows_of,
    select_faces,
    select_sql,
    table_text,
    write_rows,
)
from jobs.data.object_store import file_place, is_s3, local_path, new_file, open_store, parent
from jobs.data.snapshots import LabelTable
from jobs.settings import FilePlace, Place, Settings, run_program
from mgmtn.attributes import ATTRIBUTES
from mgmtn.drawing import contact_sheet, crop_face, placeholder
from mgmtn.errors import ConfigError, ImageError

log = logging.getLogger(__name__)

TABLE_LIMIT: Final = 20
SHEET_LIMIT: Final = 400
_SHEET_COLUMNS: Final = ("uri", "etag", "face_index", "status", "error", "box_x1", "box_y1", "box_x2", "box_y2")
_TILE: Final = 180


class QuerySettings(Settings):
    """What to look for, and how to show it."""

    labels: CliPositionalArg[Place] = Field(description="label table: a folder or an s3:// prefix")
    expression: CliPositionalArg[str] = Field("", description=f"condition on a face, as {EXAMPLE!r}; empty: every row")
    limit: int | None = Field(None, ge=0, description=f"rows at most; 0: no limit; unset: {TABLE_LIMIT} in a table")
    columns: tuple[str, ...] = Field(
        (), description="columns to show, separated by commas; '*': all; unset: uri, face_index and what is asked for"
    )
    format: Literal["table", "csv", "json", "parquet"] = Field("table", description="json: one object a line")
    output: FilePlace | None = Field(
        None, description="file for csv, json or parquet in place of stdout, local or s3://"
    )
    sheet: FilePlace | None = Field(
        None,
        description=f"also draw the faces found on a contact sheet, .png, .jpg or .webp; {SHEET_LIMIT} at most. The "
        "captions give the attributes of --columns, or else those of the expression",
    )
    sql: str | None = Field(None, description="a SELECT over the view `faces` in place of an expression")
    snapshot: int | None = Field(None, ge=1, description="number of an earlier snapshot; unset: the current one")

    @field_validator("sheet")
    @classmethod
    def _is_picture(cls, place: str | None) -> str | None:
        if place is not None and Path(place).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError("name a .png, .jpg or .webp file")
        return place

    @field_validator("sheet", "output")
    @classmethod
    def _is_file_in_a_folder(cls, place: str | None) -> str | None:
        if place is not None:
            uri = file_place(place)
            if not is_s3(uri) and not os.path.isdir(parent(local_path(uri))):
                raise ValueError(f"there is no folder {str(Path(place).parent)!r}")
        return place

    @model_validator(mode="after")
    def _agree(self) -> "QuerySettings":
        if self.sql is not None and self.expression.strip():
            raise ValueError(f"EXPRESSION {self.expression!r} and --sql {self.sql!r}: give one of them")
        if self.output is not None and self.format == "table":
            raise ValueError(f"--output {self.output!r}: a file needs --format csv, json or parquet")
        return self


def run(settings: QuerySettings) -> None:
    """Print the rows that are asked for, and draw their contact sheet.

    Raises:
        ConfigError: if there is no such table or snapshot, or the query cannot be answered.
    """
    if settings.format == "parquet" and settings.output is None and sys.stdout.isatty():
        raise ConfigError("--format parquet is binary: give --output FILE, or send stdout to a file")
    connection = open_faces(_files(settings))
    shown, drawn, counted, attributes = _queries(connection, settings)
    if settings.format == "table":
        _print_table(connection, _limited(shown, _limit(settings)), counted=counted)
    else:
        query = _limited(shown, _limit(settings))
        write_rows(connection, query, file_format=settings.format, output=settings.output)
    if settings.sheet is not None:
        most = min(_limit(settings) or SHEET_LIMIT, SHEET_LIMIT)
        faces = rows_of(connection, _limited(drawn, most))
        _save_sheet(faces, place=settings.sheet, attributes=attributes)


def _files(settings: QuerySettings) -> tuple[Path, ...]:
    table = LabelTable(settings.labels)
    snapshot = table.current() if settings.snapshot is None else table.at(settings.snapshot)
    if snapshot is None:
        raise ConfigError(
            f"{settings.labels!r}: there is no label table with a snapshot yet; "
            f"`mgmtn label INPUT --output {settings.labels}` makes one"
        )
    return table.local_files(snapshot)


def _queries(connection: DuckDBPyConnection, settings: QuerySettings) -> tuple[str, str, str, tuple[str, ...]]:
    """The queries for the rows to show, the faces to draw and all rows to count; and the attributes in question."""
    if settings.sql is not None:
        query = select_sql(connection, settings.sql)
        there = list(columns_of(connection, query))
        missing = [name for name in _SHEET_COLUMNS if name not in there] if settings.sheet else []
        if missing:
            raise ConfigError(f"--sheet needs the columns {', '.join(missing)} in the result of --sql")
        columns = _chosen(settings.columns, there=there, otherwise=there)
        return f"SELECT {_names(columns)} FROM ({query})", query, query, _attributes(columns, otherwise=())
    there = list(columns_of(connection, f"FROM {VIEW}"))
    condition = translate(settings.expression, columns=there)
    columns = _chosen(settings.columns, there=there, otherwise=_default_columns(condition))
    attributes = _attributes(columns, otherwise=condition.columns)
    return (
        select_faces(connection, condition, columns=columns),
        select_faces(connection, condition, columns=(*_SHEET_COLUMNS, *attributes)),
        select_faces(connection, condition, columns=("uri",)),
        attributes,
    )


def _default_columns(condition: Condition) -> tuple[str, ...]:
    """Which face, and what was asked about it; `status` where no attribute, and so no face, is asked for."""
    outcome = () if set(condition.columns) & set(ATTRIBUTES) else ("status",)
    named = (name for name in condition.columns if name != "landmarks")
    return tuple(dict.fromkeys(("uri", "face_index", *outcome, *named)))


def _chosen(wanted: Sequence[str], *, there: Sequence[str], otherwise: Sequence[str]) -> tuple[str, ...]:
    if not wanted:
        return tuple(otherwise)
    if tuple(wanted) == ("*",):
        return tuple(there)
    try:
        return tuple(dict.fromkeys(known_column(name.strip(), columns=there) for name in wanted))
    except ConfigError as error:
        raise ConfigError(f"--columns: {error}") from error


def _attributes(columns: Sequence[str], *, otherwise: Sequence[str]) -> tuple[str, ...]:
    """The attributes among columns; among others where there is none, or where all columns were asked for."""
    named = tuple(name for name in columns if name in ATTRIBUTES)
    return named if 0 < len(named) < len(ATTRIBUTES) else tuple(name for name in otherwise if name in ATTRIBUTES)


def _limit(settings: QuerySettings) -> int:
    if settings.limit is not None:
        return settings.limit
    # A file cut short in silence would be taken for the whole answer.
    return TABLE_LIMIT if settings.format == "table" else 0


def _limited(query: str, limit: int) -> str:
    return f"{query} LIMIT {limit}" if limit else query


def _names(columns: Sequence[str]) -> str:
    return ", ".join(map(identifier, columns))


def _print_table(connection: DuckDBPyConnection, query: str, *, counted: str) -> None:
    rows = rows_of(connection, query)
    [total] = rows_of(connection, f"SELECT count(*) AS rows FROM ({counted})")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table_text(rows, columns=list(columns_of(connection, query)), width=width), flush=True)
    more = "" if len(rows) == total["rows"] else " more='--limit 0 shows all'"
    log.info("shown=%d found=%d%s", len(rows), total["rows"], more)


def _save_sheet(faces: Sequence[Mapping[str, Any]], *, place: str, attributes: Sequence[str]) -> None:
    if not faces:
        log.warning("sheet=none reason='no row was found'")
        return
    tiles = [_tile(face) for face in faces]
    sheet = contact_sheet(tiles, [_caption(face, attributes=attributes) for face in faces], tile_size=_TILE)
    try:
        with new_file(file_place(place)) as path:
            sheet.save(path)
    except (OSError, ValueError) as error:  # a WebP has 16,383 pixels at most
        raise ConfigError(f"--sheet {place!r}: cannot be written: {error}") from error
    log.info("sheet=%r faces=%d", place, len(faces))


def _tile(face: Mapping[str, Any]) -> Image.Image:
    """The face as it was labelled, or a grey tile that says why there is none."""
    try:
        image = _read(face["uri"], etag=face["etag"])
    except ImageError as error:
        return placeholder(f"{error.status}: {error}", size=_TILE)
    box = [face[f"box_{corner}"] for corner in ("x1", "y1", "x2", "y2")]
    tile = Image.fromarray(image if None in box else crop_face(image, box))
    tile.thumbnail((_TILE, _TILE))
    return tile


@functools.lru_cache(maxsize=1)  # faces of one image follow each other
def _read(uri: str, *, etag: str | None) -> np.ndarray:
    from mgmtn.images import ImageLimits, decode_image  # OpenCV and scikit-image: for a sheet alone

    limits = ImageLimits()
    return decode_image(open_store(uri).get(uri, etag=etag, max_bytes=limits.max_bytes), limits=limits)


def _caption(face: Mapping[str, Any], *, attributes: Sequence[str]) -> str:
    name = face["uri"].rstrip("/").rpartition("/")[2]
    if face["face_index"] is None or face["face_index"] < 0:
        return f"{name}\n{face['status']}"
    lines = [f"{attribute} {face[attribute]:.2f}" for attribute in attributes if face[attribute] is not None]
    return "\n".join([f"#{face['face_index']} {name}", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return run_program(QuerySettings, run, argv, prog="mgmtn query", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
