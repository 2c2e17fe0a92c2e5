"""Arms and seeds as runs, and the table that compares them; the trainings themselves are tested elsewhere."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs import ablation
from jobs.ablation import AblationSettings, RunFailed, as_markdown, is_measured, merged, planned_runs
from jobs.settings import load
from jobs.train import TrainAttributesSettings
from mgmtn.attributes import GROUPS
from mgmtn.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def metrics(accuracy: float) -> dict[str, object]:
    return {"mean_accuracy": accuracy, "groups": {"accuracy": dict.fromkeys(GROUPS, accuracy / 100)}}


def test_settings_of_an_arm_go_over_the_common_ones_at_any_depth() -> None:
    common = {"freeze": 2, "network": {"width": 64, "levels": [4]}}
    assert merged(common, {"network": {"width": 8}}) == {"freeze": 2, "network": {"width": 8, "levels": [4]}}
    assert common["network"] == {"width": 64, "levels": [4]}


def test_every_arm_is_trained_with_every_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    settings = AblationSettings(
        output=tmp_path,
        data=(Path("data"),),
        test=(Path("data"),),
        common={"optimisation": {"epochs": 2}},
        arms={"plain": {"network": {"head": "plain"}}, "masks": {}},
        seeds=(3, 4),
    )
    runs = planned_runs(settings)
    assert [(job.arm, job.seed) for job in runs] == [("plain", 3), ("masks", 3), ("plain", 4), ("masks", 4)]
    assert len({job.folder for job in runs}) == 4
    assert runs[0].settings["optimisation"] == {"epochs": 2, "seed": 3}
    assert "network" not in runs[1].settings


def test_the_table_gives_spread_and_difference_from_the_first_arm() -> None:
    results = {"plain": [metrics(80.0), metrics(81.0)], "masks": [metrics(82.0), metrics(83.5)]}
    text = as_markdown(results, command="the command")
    assert "| plain | 2 | 80.50 | 80.00 to 81.00 | +0.00 |" in text
    assert "| masks | 2 | 82.75 | 82.00 to 83.50 | +2.25 |" in text
    assert "`the command`" in text


def test_a_run_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    settings = AblationSettings(
        output=tmp_path, data=(tmp_path / "none",), test=(tmp_path / "none",), arms={"only": {}}, seeds=(0, 1)
    )
    with pytest.raises(RunFailed, match=r"only.seed-0: jobs\.train ended with 2, see .*log\.txt.*only.seed-1"):
        ablation.run(settings)
    assert "is not a finished training table" in (tmp_path / "only" / "seed-0" / "log.txt").read_text()


def test_a_run_that_was_made_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    settings = AblationSettings(
        output=tmp_path, data=(tmp_path / "none",), test=(tmp_path / "none",), arms={"only": {}}
    )
    with pytest.raises(RunFailed):
        ablation.run(settings)
    with pytest.raises(ConfigError, match=r"output: '.*only.seed-0' was made with other settings"):
        ablation.run(settings.model_copy(update={"common": {"freeze": 2}}))


def test_a_run_that_was_measured_on_other_pictures_is_measured_again(tmp_path: Path) -> None:
    settings = AblationSettings(output=tmp_path, data=("data",), test=("two words", "b"), arms={"only": {}}, seeds=(0,))
    [job] = planned_runs(settings)
    assert not is_measured(job, test=settings.test)
    job.metrics.parent.mkdir(parents=True)
    command = "mgmtn evaluate --model m --data 'two words,b' --split test --output o"
    job.metrics.write_text(json.dumps(metrics(80) | {"command": command}))
    assert is_measured(job, test=settings.test)
    assert not is_measured(job, test=("two words",))


def test_the_runs_folder_must_be_a_local_one() -> None:
    with pytest.raises(ValidationError, match="local folder"):
        AblationSettings(output=Path("s3://b/runs"), data=("s3://b/d",), test=("s3://b/d",), arms={"only": {}})


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("ablation-*.toml")), ids=lambda path: path.stem)
def test_each_arm_of_a_committed_ablation_is_a_training_that_can_be_loaded(config: Path, tmp_path: Path) -> None:
    settings = load(AblationSettings, ["--config", str(config)], prog="ablation")
    for job in planned_runs(settings):
        TrainAttributesSettings(**job.settings, output=tmp_path)
