"""List the files of a label table, one URI a line, for any engine that reads Parquet: `mgmtn files LABELS`."""

import sys
from collections.abc import Sequence

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from jobs.data.snapshots import LabelTable
from jobs.settings import Place, Settings, run_program
from mgmtn.errors import ConfigError


class FilesSettings(Settings):
    """Settings of `mgmtn files`."""

    labels: CliPositionalArg[Place] = Field(description="the label table: a folder or an S3 prefix")
    snapshot: PositiveInt | None = Field(None, description="number of the snapshot to list; the current one if not set")


def run(settings: FilesSettings) -> None:
    """Print the URI of each file of the snapshot.

    Raises:
        ConfigError: if there is no label table, or no such snapshot.
    """
    table = LabelTable(settings.labels)
    snapshot = table.at(settings.snapshot) if settings.snapshot else table.current()
    if snapshot is None:
        raise ConfigError(f"LABELS {settings.labels!r}: there is no label table")
    sys.stdout.writelines(f"{uri}\n" for uri in table.files(snapshot))


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(FilesSettings, run, argv, prog="mgmtn files", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
