import io
import logging
import sys

import pytest

from jobs.telemetry import LOG_INTERVAL, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, "jobs.telemetry")


@pytest.mark.usefixtures("no_terminal")
def test_without_a_terminal_progress_is_a_line_at_intervals(caplog):
    with progress_bar("label", total=100, unit="images") as progress:
        progress.advance(10)
        assert caplog.messages == []  # not yet
        progress.started -= 2 * LOG_INTERVAL
        progress.last_line -= LOG_INTERVAL
        progress.advance(30, "failed=2")
        progress.advance(10)  # again too early
    [line] = caplog.messages
    assert line.startswith("progress=label done=40 total=100 rate=2.0/s eta=30s failed=2")
    assert progress.done == 50


@pytest.mark.usefixtures("no_terminal")
def test_nothing_done_has_no_time_left(caplog):
    with progress_bar("label", total=100, unit="images") as progress:
        progress.last_line -= LOG_INTERVAL
        progress.set(0)
    assert "eta=unknown" in caplog.messages[0]


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("label", total=8, unit="images") as progress:
        progress.advance(3)
        progress.set(8, "faces=5")
    shown = terminal.getvalue()
    assert "8/8" in shown
    assert "images/s faces=5" in shown
