"""Loading settings from flags, environment and TOML, and the endings of a program."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import CliPositionalArg

from jobs.outcomes import ErrorBudgetExceeded, GateRefused, LeaseHeld
from jobs.settings import Settings, flags_of, load, print_summary, run_program
from mgmtn.errors import CheckpointError, ConfigError, FetchError, MgmtnError


class FanSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["fan"] = "fan"
    weights: Path | None = Field(None, description="file of the weights")
    threshold: float = Field(0.5, ge=0, le=1, description="score below which a face is dropped")


class SampleSettings(Settings):
    inputs: CliPositionalArg[list[str]] = Field(description="a folder or an image")
    output: str = Field(description="label table")
    faces: Literal["detect", "whole-image"] = Field("detect", description="how faces are found")
    batch_size: int = Field(64, gt=0, description="faces per forward pass")
    dry_run: bool = Field(False, description="only print the plan")
    columns: tuple[str, ...] = Field((), description="columns to keep")
    fan: FanSettings = Field(default_factory=FanSettings, description="the FAN detector")


class RangeSettings(Settings):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _in_order(self) -> "RangeSettings":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class GroupSettings(BaseModel):
    rate: float = 0.1
    deep_name: str = ""


class Flagged(Settings):
    count: int = 1
    names: tuple[str, ...] = ()
    flag: bool = True
    group: GroupSettings = Field(default_factory=GroupSettings)


ROOT = Path(__file__).parents[2]
NEEDED = ["photos", "--output", "labels"]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in ("MGMTN_BATCH_SIZE", "MGMTN_OUTPUT", "MGMTN_INPUTS"):
        monkeypatch.delenv(name, raising=False)


def sample(*arguments: str) -> SampleSettings:
    return load(SampleSettings, arguments, prog="mgmtn sample", description="A sample.")


def complaints(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr of a refused command line."""
    with pytest.raises(SystemExit) as ending:
        sample(*arguments)
    assert ending.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_flags_win_over_the_environment_which_wins_over_the_file(monkeypatch, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('output = "file"\nbatch_size = 1\n[fan]\nthreshold = 0.1\nweights = "file.pth"\n')
    arguments = ["photos", "--config", str(config)]
    assert sample(*arguments).batch_size == 1
    monkeypatch.setenv("MGMTN_BATCH_SIZE", "2")
    monkeypatch.setenv("MGMTN_FAN__THRESHOLD", "0.2")
    assert sample(*arguments).batch_size == 2
    settings = sample(*arguments, "--batch-size", "3", "--fan.threshold", "0.3")
    assert (settings.batch_size, settings.output) == (3, "file")
    assert settings.fan == FanSettings(threshold=0.3, weights=Path("file.pth"))


def test_a_required_positional_may_come_from_the_file_or_the_environment(monkeypatch, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('inputs = ["a, b.jpg"]\noutput = "o"\n')
    assert sample("--config", str(config)).inputs == ["a, b.jpg"]
    monkeypatch.setenv("MGMTN_INPUTS", "x,y")
    assert sample("--output", "o").inputs == ["x", "y"]


@pytest.mark.parametrize("name", ["holiday, 2020", "[draft]", '"quoted"', "{x}", "12", "null", " spaced ", "写真"])
def test_names_of_inputs_arrive_as_they_were_typed(name):
    assert sample(name, "second", "--output", "o").inputs == [name, "second"]


def test_flags_and_positionals_come_in_any_order():
    assert sample("a", "--output", "o", "b", "--dry-run", "c").inputs == ["a", "b", "c"]


def test_a_list_flag_takes_commas_and_repeats():
    assert sample(*NEEDED, "--columns", "uri,young", "--columns", "status").columns == ("uri", "young", "status")


def test_all_errors_are_told_at_once_each_with_its_setting_value_and_origin(capsys, monkeypatch, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('batchsize = 7\n[fan]\nthreshold = "high"\n')
    monkeypatch.setenv("MGMTN_BATCH_SIZE", "many")
    lines = complaints(capsys, "--config", str(config), "--faces", "find", "--outputs=x")
    told = "\n".join(lines)
    assert lines[0] == "mgmtn sample: 7 settings are wrong (see mgmtn sample --help)"
    assert len(lines) == 8
    assert "--outputs=x: unknown argument; did you mean --output?" in told
    assert "INPUTS: required; give it here, as MGMTN_INPUTS, or as `inputs` in the --config file" in told
    assert "--output: required" in told
    assert "--faces: 'find': Input should be 'detect' or 'whole-image'" in told
    assert "MGMTN_BATCH_SIZE (--batch-size): 'many': Input should be a valid integer" in told
    assert f"batchsize in {config} (--batchsize): 7: no such setting; did you mean batch_size?" in told
    assert f"fan.threshold in {config} (--fan.threshold): 'high': Input should be a valid number" in told


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--batch-size", "0"], "--batch-size: '0': Input should be greater than 0"),
        (["--fan.threshold", "2"], "--fan.threshold: '2': Input should be less than or equal to 1"),
        (["--fan.weight", "w"], "--fan.weight: unknown argument; did you mean --fan.weights?"),
        (["--fan", "not json"], "--fan: 'not json': Input should be a valid dictionary"),
        (["--batch-size"], "argument --batch-size: expected one argument"),
        (["--config", "none.toml"], "--config 'none.toml': there is no such file"),
    ],
)
def test_a_wrong_flag_is_named(capsys, arguments, complaint):
    assert complaint in "\n".join(complaints(capsys, *NEEDED, *arguments))


@pytest.mark.parametrize("content", [b"output = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_named(capsys, tmp_path, content):
    config = tmp_path / "run.toml"
    config.write_bytes(content)
    assert f"--config {str(config)!r}: " in "\n".join(complaints(capsys, *NEEDED, "--config", str(config)))


def test_a_rule_between_settings_is_told_in_its_own_words(capsys):
    with pytest.raises(SystemExit, match="2"):
        load(RangeSettings, ["--low", "5"], prog="mgmtn range")
    assert capsys.readouterr().err.splitlines()[1] == "  low 5 is above high 1"


def test_help_lists_every_setting_with_description_and_default_in_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        sample("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: mgmtn sample INPUTS... [settings]\n\nA sample.")
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for entry in (
        "INPUTS a folder or an image (required)",
        "--output TEXT label table (required)",
        "--batch-size N faces per forward pass (default: 64)",
        "--dry-run, --no-dry-run only print the plan (default: False)",
        "--columns TEXT,... columns to keep (default: none)",
        "fan options: the FAN detector",
        "--fan.weights PATH file of the weights (default: none)",
        "--fan.threshold X score below which a face is dropped (default: 0.5)",
        "Flags win over the environment, which wins over the file.",
    ):
        assert entry in words


def test_settings_are_frozen_closed_and_blind_to_the_environment_when_built_directly(monkeypatch):
    monkeypatch.setenv("MGMTN_BATCH_SIZE", "2")
    settings = SampleSettings(inputs=["a"], output="o")
    assert settings.batch_size == 64
    with pytest.raises(ValidationError, match="frozen"):
        settings.batch_size = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="batchsize"):
        SampleSettings(inputs=["a"], output="o", batchsize=3)


def program(run, *arguments: str) -> int:
    return run_program(SampleSettings, run, [*NEEDED, *arguments], prog="mgmtn sample")


def test_the_summary_is_the_last_line_of_stdout_and_the_log_goes_to_stderr(capsys):
    def run(settings):
        logging.getLogger("jobs.sample").info("done=%d\nmore", 3)
        logging.getLogger("jobs.sample").debug("detail=1")
        return {
            "images": np.int64(3),
            "ece": np.float32(0.5),
            "scores": np.arange(2),
            "f1": float("nan"),
            "at": Path("o"),
        }

    assert program(run) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"images": 3, "ece": 0.5, "scores": [0, 1], "f1": None, "at": "o"}
    [line] = captured.err.splitlines()
    assert "level=INFO logger=jobs.sample done=3\\nmore" in line
    assert program(run, "--verbose") == 0
    assert "detail=1" in capsys.readouterr().err


def test_a_summary_without_a_json_form_fails_loudly():
    with pytest.raises(Exception, match="a summary cannot hold a object"):
        print_summary({"what": object()})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no such model 'x'"), 2),
        (CheckpointError("damaged"), 2),
        (GateRefused("prevalence moved"), 3),
        (ErrorBudgetExceeded("9 of 10 failed"), 4),
        (LeaseHeld("held by r1"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_ending_that_was_foreseen_is_one_line_and_its_exit_code(capsys, error, code):
    def run(settings):
        raise error

    assert program(run) == code
    captured = capsys.readouterr()
    assert captured.err == f"mgmtn sample: {str(error) or 'interrupted'}\n"
    assert captured.out == ""


def test_a_refused_run_still_prints_its_summary(capsys):
    def run(settings):
        raise ErrorBudgetExceeded("too many", summary={"images": 9})

    assert program(run) == 4
    assert json.loads(capsys.readouterr().out) == {"images": 9}


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), FetchError("escaped"), MgmtnError("of no kind")])
def test_what_was_not_foreseen_keeps_its_traceback(error):
    def run(settings):
        raise error

    with pytest.raises(type(error), match=str(error)):
        program(run)


def test_wrong_settings_end_the_program_with_2_and_help_with_0(capsys):
    assert program(dict, "--bogus") == 2
    assert program(dict, "--help") == 0


def test_a_variable_that_sets_nothing_is_warned_of(capsys, monkeypatch):
    monkeypatch.setenv("MGMTN_BATCHSIZE", "9")
    monkeypatch.setenv("MGMTN_CACHE", "/tmp")
    assert program(lambda settings: None) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "unknown_variable=MGMTN_BATCHSIZE" in line
    assert "did you mean MGMTN_BATCH_SIZE?" in line


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom jobs.settings import Settings, run_program\n"
        "def run(settings):\n"
        "    for number in range(100_000):\n        print('row', number)\n"
        "sys.exit(run_program(Settings, run, [], prog='p'))\n"
    )
    command = f"'{sys.executable}' '{script}' | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout.splitlines() == ["row 0", "0"]
    assert ended.stderr == ""


def test_the_flags_of_settings_load_them_again(tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text('count = 3\nnames = ["a", "b"]\n[group]\nrate = 0.5\n')
    given = ["--config", str(file), "--count", "4", "--group.deep-name", "x y", "--no-flag"]
    settings = load(Flagged, given, prog="test")
    flags = flags_of(settings)
    assert flags == ["--config", str(file), "--count", "4", "--no-flag", "--group.deep-name", "x y"]
    assert load(Flagged, flags, prog="test") == settings
    monkeypatch.setenv("MGMTN_NAMES", "c,d")
    told = flags_of(load(Flagged, ["--config", str(file)], prog="test"))
    assert told == ["--config", str(file), "--names", "c,d"]
    assert flags_of(Flagged()) == []
