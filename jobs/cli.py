"""`mgmtn COMMAND ...`: hands the rest of the command line to `jobs.COMMAND`, which is imported only then."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

COMMANDS: Final[dict[str, str]] = {
    "label": "label every face of an image collection: images -> label table",
    "prepare": "make a training table from images and their labels",
    "train": "train the mask network or the attribute network",
    "ablation": "train a network in several arms and seeds, and compare them",
    "evaluate": "measure a model on labelled faces",
    "query": "find faces by their attributes in a label table",
    "report": "describe a label table in one HTML page, with samples",
    "snapshots": "list the committed states of a label table",
    "submit": "run a command on a Ray cluster, and end as it did",
    "restore": "make an earlier snapshot of a label table the current one",
    "compact": "put a label table's small files together",
    "vacuum": "delete what a label table no longer needs",
    "smoke": "check that this installation works",
    "lint": "check Kubernetes manifests without a cluster",
    "files": "list the files of a label table's snapshot, for any Parquet reader",
}
_USAGE_ERROR: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except BrokenPipeError:
        from jobs.settings import leave_closed_pipe  # as in `mgmtn --help | head -1`

        return leave_closed_pipe()


def _dispatch(arguments: Sequence[str]) -> int:
    command, *rest = arguments or [""]
    if command in ("-h", "--help", "help"):
        print(_help(), flush=True)
        return 0
    if command == "--version":
        print(f"mgmtn {_version()}", flush=True)
        return 0
    if command not in COMMANDS:
        print(_unknown(command), file=sys.stderr)
        return _USAGE_ERROR
    code: int = importlib.import_module(f"jobs.{command}").main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mgmtn COMMAND ...",
            "",
            "Label every face of an image collection with 40 attributes, into Parquet.",
            "",
            "commands:",
            *lines,
            "",
            "mgmtn COMMAND --help lists every setting of a command; mgmtn --version prints the version.",
        ]
    )


def _unknown(command: str) -> str:
    if not command:
        return _help()
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; the commands are {', '.join(COMMANDS)}"
    return f"mgmtn: unknown command {command!r}{hint}"


def _version() -> str:
    try:
        return version("mgmtn")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
