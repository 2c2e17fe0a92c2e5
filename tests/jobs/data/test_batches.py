import numpy as np
import pytest
import torch

from jobs.data.augmentation import AugmentSettings
from jobs.data.batches import Batch, as_batch, centre, epoch_order, plain_batches, step_seed, training_batches
from jobs.data.training_table import Samples
from mgmtn.masks import pack_masks

SIZE, MARGIN, MASK = 64, 8, 64
STORED = SIZE + 2 * MARGIN
OFF = AugmentSettings(flip=False, rotation=0, scale=0, shift=0, colour=0, soften=0, erase=0)


def make_samples(count: int) -> Samples:
    """Faces that are numbered: attribute k of sample i is bit k of i, or unknown for k = 39."""
    rng = np.random.default_rng(1)
    labels = (np.arange(count)[:, None] >> np.minimum(np.arange(40), 30) & 1).astype(np.int8)
    labels[:, 39] = -1
    return Samples(
        names=np.array([f"{i}.jpg" for i in range(count)]),
        faces=rng.integers(0, 256, (count, STORED, STORED, 3), dtype=np.uint8),
        masks=np.stack(
            [np.frombuffer(pack_masks(mask), np.uint8) for mask in rng.random((count, 8, MASK, MASK)) < 0.5]
        ),
        labels=labels,
        found=np.ones(count, bool),
    )


def numbers(batch: Batch) -> list[int]:
    return (batch.labels[:, :30] @ (2.0 ** torch.arange(30))).int().tolist()


def batches(samples: Samples, augment: AugmentSettings = OFF, **changes: int) -> list[Batch]:
    work = {"image_size": SIZE, "mask_size": MASK, "batch_size": 4, "seed": 0, "epoch": 0} | changes
    return list(training_batches(samples, augment=augment, **work))


def test_an_epochs_order_is_that_of_its_seed_and_number():
    order = epoch_order(50, seed=3, epoch=1)
    assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(order, epoch_order(50, seed=3, epoch=1))
    assert order.tolist() != epoch_order(50, seed=3, epoch=2).tolist()
    assert order.tolist() != epoch_order(50, seed=4, epoch=1).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_together_see_each_sample_of_the_steps_once(world):
    samples = make_samples(30)
    shares = [batches(samples, batch_size=8, rank=rank, world=world) for rank in range(world)]
    assert [len(share) for share in shares] == [3] * world  # 30 samples hold three steps of 8
    order = epoch_order(30, seed=0, epoch=0)
    seen = [number for step in zip(*shares, strict=True) for batch in step for number in numbers(batch)]
    assert seen == order[:24].tolist()


def test_what_a_face_looks_like_does_not_depend_on_the_number_of_workers():
    samples, augment = make_samples(12), AugmentSettings(randaugment=1)
    (alone,) = batches(samples, augment, batch_size=12)
    shares = [batches(samples, augment, batch_size=12, rank=rank, world=3)[0] for rank in range(3)]
    torch.testing.assert_close(torch.cat([share.images for share in shares]), alone.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cat([share.masks for share in shares]), alone.masks)


def test_an_epoch_goes_on_at_any_step():
    samples, augment = make_samples(20), AugmentSettings()
    whole, rest = batches(samples, augment), batches(samples, augment, first_step=3)
    assert len(rest) == 2
    for one, two in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("count", [4, 30])
def test_batches_made_ahead_are_the_same(count):
    samples, augment = make_samples(count), AugmentSettings()
    plain, ahead = batches(samples, augment), batches(samples, augment, loaders=2)
    assert [numbers(batch) for batch in ahead] == [numbers(batch) for batch in plain]
    assert all(torch.equal(one.images, two.images) for one, two in zip(plain, ahead, strict=True))


def test_an_error_of_a_thread_that_makes_batches_is_not_lost():
    torn = make_samples(8)
    torn = torn.__class__(torn.names, torn.faces, torn.masks[:, :-1], torn.labels, torn.found)
    with pytest.raises(ValueError, match=r"reshape|broadcast"):
        batches(torn, loaders=1)


def test_each_step_of_each_worker_has_a_seed_of_its_own():
    seeds = {
        step_seed(seed, epoch=epoch, step=step, rank=rank)
        for seed in range(3)
        for epoch in range(3)
        for step in range(3)
        for rank in range(3)
    }
    assert len(seeds) == 81


def test_a_batch_is_split_into_parts_as_equal_as_can_be():
    parts = as_batch(make_samples(7), mask_size=MASK).split(3)
    assert [numbers(part) for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert len(as_batch(make_samples(2), mask_size=MASK).split(5)) == 2


def test_the_same_seed_gives_the_same_batches_and_another_one_others():
    samples, augment = make_samples(8), AugmentSettings()
    first, again, other = batches(samples, augment), batches(samples, augment), batches(samples, augment, seed=1)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.masks, two.masks)
    assert not torch.equal(first[0].images, other[0].images)


def test_an_epoch_later_the_same_face_looks_different():
    samples, augment = make_samples(1), AugmentSettings()
    first, later = (batches(samples, augment, batch_size=1, epoch=epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first.images, later.images)


def test_the_centre_is_the_stored_pixels():
    samples = make_samples(2)
    plain = centre(as_batch(samples, mask_size=MASK), image_size=SIZE)
    middle = samples.faces[:, MARGIN:-MARGIN, MARGIN:-MARGIN].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(plain.images.numpy(), middle)


def test_plain_batches_hold_every_sample_in_order():
    parts = list(plain_batches(make_samples(10), image_size=SIZE, mask_size=MASK, batch_size=4))
    assert [len(part.images) for part in parts] == [4, 4, 2]
    assert [number for part in parts for number in numbers(part)] == list(range(10))
    assert parts[0].masks.shape == (4, 8, MASK, MASK)


def test_unknown_labels_are_marked():
    batch = as_batch(make_samples(4), mask_size=MASK)
    assert batch.known[:, :39].all()
    assert not batch.known[:, 39].any()
    assert (batch.labels[:, 39] == 0).all()


def test_a_batch_moves_whole():
    moved = as_batch(make_samples(2), mask_size=MASK).to(torch.device("cpu"))
    assert moved.images.is_contiguous(memory_format=torch.channels_last)
    assert numbers(moved) == [0, 1]
