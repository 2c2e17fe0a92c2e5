"""The view `faces` over a snapshot's files in DuckDB, and the rows of a query in the format that is asked for."""

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import duckdb
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.data.expressions import VIEW, Condition
from jobs.data.object_store import file_place, is_s3, local_path, new_file
from jobs.data.schema import TABLE_SCHEMA
from jobs.data.scratch import scratch_folder
from mgmtn.errors import ConfigError

FileFormat = Literal["csv", "json", "parquet"]

# image_id and model_id settle the order where a table holds one URI twice.
ORDER: Final = "uri, face_index, image_id, model_id"
_COPY_OPTIONS: Final[dict[FileFormat, str]] = {
    "csv": "FORMAT csv, HEADER",
    "json": "FORMAT json",  # one object a line
    "parquet": "FORMAT parquet, COMPRESSION zstd",
}
_URI_WIDTH: Final = 60
_WIDE: Final = 100_000  # columns: nothing is cut where no terminal limits the line


def open_faces(files: Sequence[Path]) -> duckdb.DuckDBPyConnection:
    """A connection in memory with the view `faces` over Parquet files; of them only the columns in use are read.

    Raises:
        ConfigError: if a file is missing or is not Parquet.
    """
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    if not files:
        connection.register(VIEW, TABLE_SCHEMA.empty_table())
        return connection
    names = ", ".join(quoted(_literal_path(file)) for file in files)
    # The folders' `model=` and `run=` are no columns of the table: `model_id` and `run_id` are.
    attempt(
        connection,
        f"CREATE VIEW {VIEW} AS FROM read_parquet([{names}], hive_partitioning = false, union_by_name = true)",
    )
    return connection


def attempt(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.DuckDBPyConnection:
    """Execute SQL that a user may have written.

    Raises:
        ConfigError: with DuckDB's own words, if it cannot be executed.
    """
    try:
        return connection.execute(sql)
    except duckdb.Error as error:
        raise ConfigError(_first_lines(error)) from error


def columns_of(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, str]:
    """The names and DuckDB types of a query's columns, without running it. Raises `ConfigError` if it cannot be."""
    return {name: kind for name, kind, *_ in attempt(connection, f"DESCRIBE {sql}").fetchall()}


def select_faces(connection: duckdb.DuckDBPyConnection, condition: Condition, *, columns: Sequence[str]) -> str:
    """The query for the rows where a condition holds, in a fixed order.

    Raises:
        ConfigError: if the condition is of another type than true or false, or DuckDB refuses it.
    """
    kind = columns_of(connection, f"SELECT {condition.sql} AS condition FROM {VIEW}")["condition"]
    if kind != "BOOLEAN":
        raise ConfigError(f"the expression gives a {kind}, where true or false is wanted: compare it with something")
    return f"SELECT {', '.join(map(identifier, columns))} FROM {VIEW} WHERE {condition.sql} ORDER BY {ORDER}"


def select_sql(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """A user's own query over the view, checked to be one query that only reads.

    Raises:
        ConfigError: if it is anything else, or DuckDB refuses it.
    """
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise ConfigError(f"--sql: {_first_lines(error)}") from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise ConfigError(f"--sql {sql!r}: one SELECT is wanted")
    query = f"SELECT * FROM (\n{statements[0].query.strip().removesuffix(';')}\n)"
    columns_of(connection, query)
    return query


def rows_of(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """A query's rows as dicts; for few rows. Raises `ConfigError` if DuckDB refuses it."""
    try:
        # By way of Arrow: DuckDB's own conversion of a time with a zone needs pytz.
        return connection.sql(query).to_arrow_table().to_pylist()
    except duckdb.Error as error:
        raise ConfigError(_first_lines(error)) from error


def table_text(rows: Sequence[dict[str, Any]], *, columns: Sequence[str], width: int | None = None) -> str:
    """Rows for a reader: aligned columns, three decimals, lists by their length.

    Args:
        rows: all with the same keys.
        columns: their names, also where there is no row.
        width: of the terminal, characters; None leaves every line as long as it is.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        values = [row[name] for row in rows]
        number = any(isinstance(value, int | float) for value in values)
        table.add_column(name, justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(_cell(name, row[name], shorten=width is not None) for name in columns))
    text = io.StringIO()
    Console(file=text, width=width or _WIDE, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def write_rows(
    connection: duckdb.DuckDBPyConnection, query: str, *, file_format: FileFormat, output: str | None = None
) -> None:
    """Write a query's rows to a file, local or in S3, which appears whole or not at all, or else to stdout.

    Raises:
        ConfigError: if DuckDB refuses the query, or the file cannot be written.
    """
    if file_format == "json":
        query = _for_json(connection, query)
    try:
        with _file_for(output) if output else _shown_on_stdout() as path:
            attempt(connection, f"COPY ({query}) TO {quoted(str(path))} ({_COPY_OPTIONS[file_format]})")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{str(output or tempfile.gettempdir())!r}: cannot write: {error}") from error


def identifier(name: str) -> str:
    """A column's name, quoted for SQL."""
    return '"' + name.replace('"', '""') + '"'


def quoted(text: str) -> str:
    """A text, quoted for SQL."""
    return "'" + text.replace("'", "''") + "'"


def _literal_path(path: Path) -> str:
    # DuckDB would take these for patterns.
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def _for_json(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    """JSON has no nan and no infinity, and a float32 written as a double shows digits that it never had."""
    chosen = []
    for name, kind in columns_of(connection, query).items():
        column = identifier(name)
        if kind in ("FLOAT", "DOUBLE"):
            finite = f"CASE WHEN isfinite({column}) THEN {column} END"
            chosen.append(f"CAST(CAST({finite} AS VARCHAR) AS DOUBLE) AS {column}")
        else:
            chosen.append(column)
    return f"SELECT {', '.join(chosen)} FROM ({query})"


def _file_for(output: str) -> AbstractContextManager[Path]:
    uri = file_place(output)
    # Where the file is to be there is room for it, which TMPDIR need not have.
    return new_file(uri, within=None if is_s3(uri) else Path(local_path(uri)).parent)


@contextmanager
def _shown_on_stdout() -> Iterator[Path]:
    """A path to write to; what is there in the end goes to stdout."""
    with scratch_folder("query") as folder:
        yield folder / "rows"
        sys.stdout.flush()
        with (folder / "rows").open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def _cell(name: str, value: Any, *, shorten: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return f"[{len(value)} values]"
    text = "".join(char if char.isprintable() else "?" for char in str(value))
    # The end of a URI tells images apart.
    return f"…{text[-_URI_WIDTH:]}" if shorten and name == "uri" and len(text) > _URI_WIDTH else text


def _first_lines(error: duckdb.Error) -> str:
    """DuckDB's message without the picture of the query, which is ours and not what the user wrote."""
    return " ".join(str(error).split("\nLINE ")[0].split())
