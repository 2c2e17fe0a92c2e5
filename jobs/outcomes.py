"""Endings of a program that are neither success nor a bug, each with the exit code that a scheduler acts on.

| code | meaning |
|---|---|
| 0 | done, or nothing to do |
| 1 | unexpected error, with its traceback |
| 2 | wrong settings or usage |
| 3 | a quality gate refused to publish |
| 4 | error budget exceeded |
| 75 | another run holds the lease (`EX_TEMPFAIL`: the same command may work later) |
| 130 | interrupted |
"""

from collections.abc import Callable
from typing import Any, Final

from mgmtn.errors import CheckpointError, ConfigError, MgmtnError

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


class Refused(MgmtnError):
    """The work was done, or not started, and its result is not published.

    `summary` is what the program would have returned: it is printed all the same, so that a refused run can be read.
    """

    exit_code: int

    def __init__(self, message: str, *, summary: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.summary = summary


class GateRefused(Refused):
    """A quality gate refused to publish."""

    exit_code = 3


class ErrorBudgetExceeded(Refused):
    """More images failed than the settings allow."""

    exit_code = 4


class LeaseHeld(Refused):
    """Another run is writing the same table."""

    exit_code = 75


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What several checks of the settings give; what is wrong with any of them is told at once.

    Raises:
        ConfigError, CheckpointError: the only thing that is wrong, or one that names all.
    """
    results, wrong = [], []
    for check in checks:
        try:
            results.append(check())
        except (ConfigError, CheckpointError) as error:
            wrong.append(error)
    if len(wrong) > 1:
        raise ConfigError("; ".join(map(str, wrong)))
    if wrong:
        raise wrong[0]
    return results


def exit_code_of(error: MgmtnError) -> int | None:
    """The exit code that an error asks for; None where its escape is a bug of ours, to be shown with its traceback."""
    if isinstance(error, Refused):
        return error.exit_code
    return EXIT_USAGE if isinstance(error, ConfigError | CheckpointError) else None
