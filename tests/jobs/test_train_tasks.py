from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from jobs import train_tasks
from jobs.data.batches import Batch
from jobs.data.made_faces import write_made_table
from jobs.data.training_table import Samples
from jobs.train_tasks import AttributeTask, MaskTask, Source, started_from, validation_cut
from mgmtn.attributes import ATTRIBUTES, GROUPS
from mgmtn.checkpoint import Card, Checkpoint
from mgmtn.errors import ConfigError, FetchError
from mgmtn.mask_net import MaskNet, MaskNetSettings
from mgmtn.network import MGMTN, NetworkSettings

SIZE, MASK = 64, 64
TINY_MASKS = MaskNetSettings(decoder_channels=(16, 8, 8, 8, 8), resolution=32)
TINY = NetworkSettings(backbone="mobilenetv3_small_050", image_size=SIZE, width=16, mask_net=TINY_MASKS)


def table(folder: Path) -> tuple[str]:
    """42 pictures, six of them without a face."""
    return (str(write_made_table(folder / "data", count=42, image_size=SIZE)),)


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


@pytest.mark.parametrize("flat", ["aaa", "person50", "zzz"])
def test_of_a_flat_collection_beside_folders_of_people_some_are_held_out(flat):
    people = [f"person{i // 5}x/{i}.jpg" for i in range(500)]
    names = np.array([f"{flat}/{i:06d}.jpg" for i in range(1000)] + people)
    chosen = validation_cut(names, 0.1)
    assert 60 < chosen[:1000].sum() < 140
    of_people = chosen[1000:].reshape(100, 5)
    np.testing.assert_array_equal(of_people.all(axis=1), of_people.any(axis=1))
    assert of_people.any()


def test_labels_alone_are_those_of_the_samples(tmp_path):
    source = Source(table(tmp_path), 0.3, 40)
    for labels, samples in zip(source.load_labels(), source.load(), strict=True):
        np.testing.assert_array_equal(labels, samples.labels)


def test_the_two_sides_are_all_samples(tmp_path):
    train, held_out = Source(table(tmp_path), 0.3, 0).load()
    assert sorted([*train.names, *held_out.names]) == [f"{i:06d}.jpg" for i in range(42)]
    assert 0 < len(held_out) < len(train)


def test_a_cut_that_leaves_one_side_empty_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"validation: 0\.01 of 2 samples holds out 0"):
        Source(table(tmp_path), 0.01, 2).load()


def test_the_test_split_is_never_looked_at(tmp_path):
    """Whatever is held out, for calibration and early stopping, is of the train split."""
    folder = Path(table(tmp_path)[0])
    rows = pq.read_table(folder / "part-00000.parquet").to_pylist()
    for row in rows[::2]:
        row["split"] = "test"
    pq.write_table(
        pa.Table.from_pylist(rows, schema=pq.read_schema(folder / "part-00000.parquet")), folder / "part-00000.parquet"
    )
    train, held_out = Source((str(folder),), 0.3, 0).load()
    assert sorted([*train.names, *held_out.names]) == [row["image"] for row in rows[1::2]]


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
    source = Source(table(tmp_path), 0.3, 0)
    train, held_out = MaskTask(source, TINY_MASKS, SIZE, MASK).load()
    assert train.found.all()
    assert held_out.found.all()
    assert len(train) + len(held_out) == 36


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


def test_smoothed_labels_ask_for_less_certainty():
    torch.manual_seed(0)
    module, batch = attribute_task().build().eval(), make_batch()
    logits = module(batch.images)
    smooth = attribute_task(label_smoothing=0.2).loss(module, batch)
    wanted = batch.labels * 0.8 + 0.1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    torch.testing.assert_close(smooth, expected)


# Where the weights start.


def checkpoint_of(network: NetworkSettings, *, seed: int = 5) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint.of(MGMTN(network), Card(name="earlier", kind="attributes", network=network))


def test_tensors_of_an_earlier_model_fill_those_that_fit():
    earlier = checkpoint_of(TINY)
    torch.manual_seed(0)
    new = MGMTN(TINY.model_copy(update={"width": 32}))
    before = {name: value.clone() for name, value in new.state_dict().items()}
    started_from(new, earlier)
    given = earlier.tensors()
    filled = {name for name, value in new.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("trunk.") for name in filled)
    for name, value in new.state_dict().items():
        fits = given[name].shape == value.shape
        torch.testing.assert_close(value, given[name] if fits else before[name])
        assert fits or name.startswith(("fuse.", "heads."))


def test_an_earlier_model_of_which_nothing_fits_is_refused():
    masks = Checkpoint.of(MaskNet(TINY_MASKS), Card(name="aml", kind="masks", network=TINY_MASKS))
    with pytest.raises(ConfigError, match="init: no tensor of aml fits this network"):
        started_from(torch.nn.Linear(2, 2), masks)


def test_without_an_earlier_model_nothing_is_filled():
    module = torch.nn.Linear(2, 2)
    before = module.weight.clone()
    assert started_from(module, None) is module
    assert torch.equal(module.weight, before)


def test_a_trunk_starts_from_a_file_and_an_earlier_model_goes_over_it(tmp_path):
    source, earlier = MGMTN(TINY), checkpoint_of(TINY.model_copy(update={"width": 32}), seed=6)
    path = tmp_path / "trunk.safetensors"
    safetensors.torch.save_file(source.trunk.net.state_dict(), path)
    module = attribute_task(trunk_weights=str(path)).build()
    for name, value in source.trunk.net.state_dict().items():
        torch.testing.assert_close(module.trunk.net.state_dict()[name], value)
    over = attribute_task(trunk_weights=str(path), init=earlier).build()
    torch.testing.assert_close(over.trunk.net.conv_stem.weight, earlier.tensors()["trunk.net.conv_stem.weight"])


def test_a_file_that_is_no_trunk_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trunk_weights: .*nothing\.pt"):
        attribute_task(trunk_weights=str(tmp_path / "nothing.pt")).build()
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"trunk_weights: .*tensors of the trunk"):
        attribute_task(trunk_weights=str(tmp_path / "other.safetensors")).build()


def test_a_frozen_trunk_does_not_learn_and_the_rest_does():
    module = attribute_task(freeze=5).build()
    assert not any(parameter.requires_grad for parameter in module.trunk.net.blocks.parameters())
    assert all(parameter.requires_grad for parameter in module.heads.parameters())


@pytest.mark.parametrize(("backbone", "level"), [("resnet18", 1), ("resnet18", 2), ("mobilenetv3_small_050", 1)])
def test_a_trunk_is_frozen_up_to_a_level_that_is_an_activation_too(backbone, level):
    trunk = attribute_task(network=TINY.model_copy(update={"backbone": backbone}), freeze=level).build().trunk.net
    module = {int(info["reduction"]): info["module"] for info in trunk.feature_info}[2**level]
    frozen = {name for name, parameter in trunk.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in trunk.named_parameters() if name.startswith(f"{module}.")} <= frozen
    first, *_, last = (name for name, _ in trunk.named_parameters())
    assert first in frozen
    assert last not in frozen


def test_weights_that_an_earlier_model_brings_are_not_asked_of_a_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(train_tasks, "load_imagenet_weights", lambda trunk, name: asked.append(name))
    same, other = checkpoint_of(TINY), checkpoint_of(TINY.model_copy(update={"backbone": "resnet18"}))
    attribute_task(pretrained=True, init=same).build()
    assert asked == []
    attribute_task(pretrained=True, init=other).build()  # its heads fit
    assert asked == [TINY.backbone]


def test_weights_that_a_bucket_does_not_give_are_a_wrong_setting(monkeypatch):
    def refuse(uri):
        raise FetchError(f"{uri}: access denied")

    monkeypatch.setattr(train_tasks, "local_copy", refuse)
    with pytest.raises(ConfigError, match=r"trunk_weights: s3://b/w\.pt: access denied"):
        attribute_task(trunk_weights="s3://b/w.pt").build()


def test_a_cut_that_measures_nothing_is_refused(tmp_path, monkeypatch):
    labels = np.full((4, 40), -1)
    unlabelled = make_samples(labels)
    monkeypatch.setattr(Source, "load", lambda self: (unlabelled, unlabelled))
    with pytest.raises(ConfigError, match="validation: none of the 4 samples that it holds out has a label"):
        attribute_task().load()
    faceless = replace(unlabelled, found=np.zeros(4, bool))
    monkeypatch.setattr(Source, "load", lambda self: (unlabelled, faceless))
    with pytest.raises(ConfigError, match="validation: a face was found in none"):
        MaskTask(Source((), 0.1, 0), TINY_MASKS, SIZE, MASK).load()
