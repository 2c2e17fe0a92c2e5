from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from jobs.data.batches import Batch
from jobs.data.training_table import TRAINING_SCHEMA, Description, Samples, encode_face
from jobs.settings import load
from jobs.train import (
    AttributeTask,
    MaskTask,
    Source,
    TrainAttributesSettings,
    TrainMasksSettings,
    main,
    validation_cut,
)
from jobs.train_loop import OptimisationSettings, append_log, parameter_groups, rate_at
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.masks import pack_masks
from mgmtn.network import MGMTN, NetworkSettings

SIZE, MASK = 64, 64
TINY_MASKS = MaskNetSettings(decoder_channels=(16, 8, 8, 8, 8), resolution=32)
TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16, mask_net=TINY_MASKS)
OPTIMISATION = OptimisationSettings(learning_rate=0.01, trunk_rate=0.5)


def write_table(folder: Path, count: int, *, image_size: int = SIZE) -> Path:
    """A training table of noise: every third picture has no face."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [
        {
            "image": f"{i:03d}.jpg",
            "split": "train",
            "status": "ok" if i % 3 else "no_face",
            "face_found": bool(i % 3),
            "face": encode_face(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)),
            "masks": pack_masks(rng.random((8, MASK, MASK)) < 0.5),
            "labels": [i % 2] * 40,
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SCHEMA), folder / "part-00000.parquet")
    counts = {"images": count, "faces": count, "no_face": 0, "failed": 0, "splits": {"train": count}}
    geometry = {"image_size": image_size, "margin": 0, "mask_size": MASK}
    Description(dataset="noise", detector="mediapipe", **geometry, **counts).save(folder)
    return folder


def make_samples(labels: np.ndarray) -> Samples:
    count = len(labels)
    return Samples(
        names=np.array([f"{i}.jpg" for i in range(count)]),
        faces=np.zeros((count, SIZE, SIZE, 3), np.uint8),
        masks=np.zeros((count, 8 * MASK * MASK // 8), np.uint8),
        labels=labels.astype(np.int8),
        found=np.ones(count, bool),
    )


def make_batch(count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.rand(count, 3, SIZE, SIZE, generator=generator) * 255,
        masks=(torch.rand(count, 8, MASK, MASK, generator=generator) < 0.5).float(),
        labels=(torch.rand(count, 40, generator=generator) < 0.5).float(),
        known=torch.ones(count, 40, dtype=torch.bool),
    )


def attribute_task(source: Source | None = None, **changes: Any) -> AttributeTask:
    parts: dict[str, Any] = {
        "source": source or Source((), 0.1, 0),
        "network": TINY,
        "mask_checkpoint": None,
        "pretrained": False,
        "loss_kind": "bce",
        "positive_weight": None,
        "image_size": SIZE,
        "mask_size": MASK,
    }
    return AttributeTask(**(parts | changes))


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
    assert (masks.data, attributes.data) == ((Path("a"), Path("b")), (Path("a"),))
    assert (masks.name, attributes.name) == ("aml", "mgmtn")


def test_data_that_is_no_training_table_stops_before_ray_starts(tmp_path, capsys):
    for what in ("masks", "attributes"):
        assert main([what, "--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 2
        assert "not a finished training table" in capsys.readouterr().err


def test_a_table_of_another_geometry_is_refused(tmp_path, capsys):
    data = write_table(tmp_path / "data", 3, image_size=96)
    assert main(["attributes", "--data", str(data), "--output", str(tmp_path / "run")]) == 2
    assert "network.image_size: 128, but" in capsys.readouterr().err


def test_learned_masks_need_a_mask_network(tmp_path, capsys):
    data = write_table(tmp_path / "data", 3)
    command = ["attributes", "--data", str(data), "--output", str(tmp_path / "run"), "--network.image-size", str(SIZE)]
    assert main(command) == 2
    assert "mask_model: learned masks need AML's checkpoint" in capsys.readouterr().err
    network = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16)
    attributes = Checkpoint.of(MGMTN(network), Card(name="other", kind="attributes", network=network))
    assert main([*command, "--mask-model", str(attributes.save(tmp_path / "other"))]) == 2
    assert "predicts attributes, not masks" in capsys.readouterr().err


# What is held out.


def test_the_same_names_are_held_out_in_any_order():
    names = np.array([f"{i:04d}.jpg" for i in range(1000)])
    chosen = validation_cut(names, 0.1)
    assert 60 < chosen.sum() < 140
    shuffled = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(validation_cut(names[shuffled], 0.1), chosen[shuffled])


def test_nobody_is_on_both_sides():
    names = np.array([f"person{i // 5}/{i}.jpg" for i in range(500)])
    chosen = validation_cut(names, 0.2)
    assert 0 < chosen.sum() < 500
    people = chosen.reshape(100, 5)
    np.testing.assert_array_equal(people.all(axis=1), people.any(axis=1))


def test_a_few_folders_are_no_people():
    names = np.array([f"part{i // 500}/{i}.jpg" for i in range(1000)])
    chosen = validation_cut(names, 0.1).reshape(2, 500)
    assert (chosen.sum(axis=1) > 0).all()
    assert not chosen.all(axis=1).any()


def test_the_two_sides_are_all_samples(tmp_path):
    train, held_out = Source((write_table(tmp_path / "data", 40),), 0.3, 0).load()
    assert sorted([*train.names, *held_out.names]) == [f"{i:03d}.jpg" for i in range(40)]
    assert 0 < len(held_out) < len(train)


def test_a_cut_that_leaves_one_side_empty_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"validation: 0\.01 of 2 samples holds out 0"):
        Source((write_table(tmp_path / "data", 40),), 0.01, 2).load()


# Schedule and optimiser.


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [rate_at(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_short_trainings_have_a_rate_too():
    assert rate_at(0, 1, 0.0) == 1.0
    assert rate_at(0, 0, 0.5) == 1.0
    assert rate_at(500, 100, 0.1) == pytest.approx(0)


def test_every_parameter_that_learns_is_in_one_group():
    module = MGMTN(TINY)
    assert module.mask_net is not None
    module.mask_net.requires_grad_(False)
    groups = parameter_groups(module, OPTIMISATION)
    given = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in given}) == len(given)
    assert {id(p) for p in given} == {id(p) for p in module.parameters() if p.requires_grad}


def test_the_trunk_learns_slower_and_vectors_do_not_decay():
    module = MGMTN(TINY)
    trunk = {id(parameter) for parameter in module.trunk.parameters()}
    for group in parameter_groups(module, OPTIMISATION):
        assert len({(id(parameter) in trunk, parameter.ndim > 1) for parameter in group["params"]}) == 1
        assert group["lr"] == (0.005 if id(group["params"][0]) in trunk else 0.01)
        assert ("weight_decay" in group) == (group["params"][0].ndim < 2)
    assert len(parameter_groups(module, OPTIMISATION)) == 4
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), OPTIMISATION)) == 1


def test_the_log_has_one_header(tmp_path):
    for epoch in range(2):
        append_log(tmp_path / "run" / "log.csv", {"epoch": epoch, "loss": 0.5})
    assert (tmp_path / "run" / "log.csv").read_text().split() == ["epoch,loss", "0,0.5", "1,0.5"]


# The tasks.


def test_mask_metrics_are_intersections_over_unions():
    task = MaskTask(Source((), 0.1, 0), TINY_MASKS, SIZE, MASK)
    results = torch.zeros(2, 8, 2)
    results[:, :, 1] = 10
    results[0, 0, 0], results[1, 0, 0] = 10, 5  # summed over faces before the division
    metrics = task.metrics(results, make_samples(np.zeros((2, 40))))
    assert metrics["iou_mouth"] == pytest.approx(0.75)
    assert metrics["iou_hair"] == 0
    assert metrics["score"] == pytest.approx(0.75 / 8)
    assert list(metrics) == ["score", *(f"iou_{group}" for group in GROUPS)]


def test_masks_are_learnt_from_faces_only(tmp_path):
    source = Source((write_table(tmp_path / "data", 40),), 0.3, 0)
    train, held_out = MaskTask(source, TINY_MASKS, SIZE, MASK).load()
    assert train.found.all()
    assert held_out.found.all()
    assert len(train) + len(held_out) == 26


def test_a_mask_task_has_a_loss_and_counts_cells():
    task = MaskTask(Source((), 0.1, 0), TINY_MASKS, SIZE, MASK)
    module = task.build()
    task.loss(module, make_batch()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    counted = task.validate(module, make_batch())
    assert counted.shape == (2, 8, 2)
    assert (counted[..., 0] <= counted[..., 1]).all()


def test_attribute_accuracy_is_over_the_labels_that_are_known():
    labels = np.full((4, 40), -1)
    labels[:, 0] = [1, 1, 0, 0]
    labels[:2, 1] = [1, 0]
    results = torch.full((4, 40), 3.0)  # says yes to everything
    metrics = attribute_task().metrics(results, make_samples(labels))
    assert metrics["score"] == pytest.approx(0.5)  # half of the first two attributes; the others count for nothing
    expected = (np.log1p(np.exp(-3)) + np.log1p(np.exp(3))) / 2
    assert metrics["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_perfect_answers_score_one():
    labels = np.random.default_rng(0).integers(0, 2, (6, 40))
    metrics = attribute_task().metrics(torch.from_numpy(labels * 20.0 - 10), make_samples(labels))
    assert metrics["score"] == 1
    assert metrics["validation_loss"] < 1e-3


def test_a_given_mask_network_is_built_in_and_stays_as_it_is():
    torch.manual_seed(1)
    checkpoint = Checkpoint.of(MaskNet(TINY_MASKS), Card(name="aml", kind="masks", network=TINY_MASKS))
    module = attribute_task(mask_checkpoint=checkpoint).build()
    for name, value in module.mask_net.state_dict().items():
        assert torch.equal(value, checkpoint.tensors()[name]), name
    assert not any(parameter.requires_grad for parameter in module.mask_net.parameters())


def test_landmark_masks_reach_the_network_when_it_is_made_for_them():
    batch = make_batch()
    drawn = attribute_task(network=TINY.model_copy(update={"masks": "landmarks"}))
    module = drawn.build().eval()
    other = Batch(batch.images, 1 - batch.masks, batch.labels, batch.known)
    assert not torch.equal(drawn.validate(module, batch), drawn.validate(module, other))


def test_positive_weights_raise_the_loss_of_missed_positives():
    torch.manual_seed(0)
    module, batch = attribute_task().build().eval(), make_batch()
    plain = attribute_task().loss(module, batch)
    weighted = attribute_task(positive_weight=(3.0,) * len(ATTRIBUTES)).loss(module, batch)
    focal = attribute_task(loss_kind="focal").loss(module, batch)
    assert weighted > plain > focal
