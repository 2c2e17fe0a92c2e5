import shlex
from pathlib import Path

import pytest
import safetensors.torch
import torch

from jobs.data.made_faces import write_made_table
from jobs.data.object_store import file_sha256
from jobs.settings import load
from jobs.train import NewNetworkSettings, TrainAttributesSettings, TrainMasksSettings, main, run_attributes
from jobs.train_state import Best, Progress
from jobs.train_tasks import AttributeTask
from jobs.training import TrainSettings
from jobs.training_log import TIME_PARTS
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.network import MGMTN, NetworkSettings

SIZE = 64


# Settings and exit codes.


@pytest.mark.parametrize("argv", [[], ["faces"], ["--data", "d"]])
def test_without_the_word_for_what_to_train_it_says_how(argv, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("usage: mgmtn train masks|attributes")


def test_help_is_a_result(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: mgmtn train")
    assert main(["masks", "--help"]) == 0
    assert "--optimisation.learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["masks", "attributes"])
def test_every_wrong_setting_is_named_at_once(what, capsys):
    flags = ["--validation", "1.5", "--workers", "0", "--optimisation.epochs", "0", "--augment.colour", "2"]
    assert main([what, *flags]) == 2
    problems = capsys.readouterr().err
    for name in ("data", "output", "validation", "workers", "optimisation.epochs", "augment.colour"):
        assert name in problems, problems


def test_several_tables_are_separated_by_commas():
    masks = load(TrainMasksSettings, ["--data", "a,b", "--output", "o"], prog="train")
    attributes = load(TrainAttributesSettings, ["--data", "a", "--output", "o"], prog="train")
    assert (masks.data, attributes.data) == (("a", "b"), ("a",))
    assert (masks.name, attributes.name) == ("aml", "mgmtn")


def test_data_that_is_no_training_table_stops_before_ray_starts(tmp_path, capsys):
    for what in ("masks", "attributes"):
        assert main([what, "--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
        assert "not a finished training table" in capsys.readouterr().err


def test_a_table_of_another_geometry_is_refused(tmp_path, capsys):
    data = write_made_table(tmp_path / "data", count=3, image_size=96)
    assert main(["attributes", "--data", str(data), "--output", str(tmp_path / "run")]) == 2
    assert "network.image_size: 128, but" in capsys.readouterr().err


def test_learned_masks_need_a_mask_network(tmp_path, capsys):
    data = write_made_table(tmp_path / "data", count=3, image_size=SIZE)
    command = ["attributes", "--data", str(data), "--output", str(tmp_path / "run"), "--network.image-size", str(SIZE)]
    assert main(command) == 2
    assert "mask_model: learned masks need AML's checkpoint" in capsys.readouterr().err
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16)
    attributes = Checkpoint.of(MGMTN(network), Card(name="other", kind="attributes", network=network))
    assert main([*command, "--mask-model", str(attributes.save(tmp_path / "other"))]) == 2
    assert "predicts attributes, not masks" in capsys.readouterr().err


def test_places_may_be_paths_of_this_machine_or_in_s3():
    settings = TrainAttributesSettings(data=(Path("/a"), "s3://b/c"), output=Path("/d"), mask_model="s3://b/m")
    assert (settings.data, settings.output, settings.mask_model) == (("/a", "s3://b/c"), "/d", "s3://b/m")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--workers", "2", "--min-workers", "3"], "min_workers: 3 are more than workers: 2"),
        (["--workers", "8", "--optimisation.batch-size", "4"], "optimisation.batch_size: 4 faces are too few"),
    ],
)
def test_workers_must_fit_each_other_and_the_batch(flags, problem, capsys):
    assert main(["attributes", "--data", "d", "--output", "o", *flags]) == 2
    assert problem in capsys.readouterr().err


def test_an_earlier_model_that_is_not_there_stops_before_ray_starts(tmp_path, capsys):
    data = write_made_table(tmp_path / "data", count=3, image_size=SIZE)
    command = ["masks", "--data", str(data), "--output", str(tmp_path / "run")]
    assert main([*command, "--init", str(tmp_path / "nothing")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gone.pt", "."])
def test_trunk_weights_that_are_not_there_stop_before_ray_starts(tmp_path, capsys, name):
    data = write_made_table(tmp_path / "data", count=9, image_size=SIZE)
    command = ["attributes", "--data", str(data), "--output", str(tmp_path / "run"), "--network.masks", "ones"]
    assert main([*command, "--network.image-size", str(SIZE), "--trunk-weights", str(tmp_path / name)]) == 2
    assert "trunk_weights: " in capsys.readouterr().err


def test_a_card_tells_what_training_started_from_and_its_command(tmp_path, monkeypatch):
    data = write_made_table(tmp_path / "data", count=20, image_size=SIZE)
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16, masks="ones")
    earlier = Checkpoint.of(MGMTN(network), Card(name="earlier", kind="attributes", network=network))

    def train_nothing(settings: TrainSettings, task: AttributeTask) -> tuple[Progress, Best]:  # and no Ray
        _, held_out = task.load()
        best = Best(0, task.build().state_dict(), torch.zeros(len(held_out.labels), len(ATTRIBUTES)))
        figures = {"score": 0.5, "images_per_second": 1.0} | {f"{part}_seconds": 0.0 for part in TIME_PARTS}
        return Progress(samples=20, epochs=[figures], best=best), best

    monkeypatch.setattr("jobs.train.train", train_nothing)
    trunk = tmp_path / "trunk.safetensors"
    safetensors.torch.save_file(MGMTN(network).trunk.net.state_dict(), trunk)
    summary = run_attributes(
        TrainAttributesSettings(
            data=(data,),
            output=tmp_path / "run",
            init=earlier.save(tmp_path / "earlier"),
            trunk_weights=trunk,
            freeze=2,
            network=NewNetworkSettings(**network.model_dump(exclude={"mask_net"})),
            validation=0.2,
        )
    )
    card = Checkpoint.load(summary["checkpoint"]).card
    assert card.training["init"]["model_id"] == earlier.card.model_id
    assert card.training["trunk_weights"] == {"file": trunk.name, "sha256": file_sha256(trunk)}
    assert card.training["settings"]["pretrained"] is False
    words = shlex.split(card.training["command"])
    assert words[:3] == ["mgmtn", "train", "attributes"]
    again = load(TrainAttributesSettings, words[3:], prog="mgmtn train attributes")
    assert (again.trunk_weights, again.freeze, again.network.masks) == (str(trunk), 2, "ones")
