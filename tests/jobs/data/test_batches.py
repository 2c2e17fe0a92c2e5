import numpy as np
import pytest
import torch

from jobs.data.batches import (
    AugmentSettings,
    Batch,
    as_batch,
    augmented,
    centre,
    epoch_order,
    plain_batches,
    training_batches,
)
from jobs.data.training_table import Samples
from mgmtn.masks import pack_masks

SIZE, MARGIN, MASK = 64, 8, 64
STORED = SIZE + 2 * MARGIN
OFF = AugmentSettings(flip=False, rotation=0, scale=0, shift=0, colour=0, soften=0, erase=0)
MOVED = AugmentSettings(flip=True, rotation=25, scale=0.2, shift=0.1, colour=0, soften=0, erase=0)


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


def augment_square(augment: AugmentSettings, *, seed: int = 0) -> tuple[Batch, Batch]:
    """Sixteen faces with a bright rectangle under the first mask, before and after."""
    images, masks = torch.zeros(16, 3, STORED, STORED), torch.zeros(16, 8, MASK, MASK)
    images[:, :, 24:56, 20:44] = 255
    cell = STORED / MASK
    masks[:, 0, round(24 / cell) : round(56 / cell), round(20 / cell) : round(44 / cell)] = 1
    before = Batch(images, masks, torch.zeros(16, 40), torch.ones(16, 40, dtype=torch.bool))
    generator = torch.Generator().manual_seed(seed)
    return before, augmented(before, image_size=SIZE, augment=augment, generator=generator)


def test_an_epochs_order_is_that_of_its_seed_and_number():
    order = epoch_order(50, seed=3, epoch=1)
    assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(order, epoch_order(50, seed=3, epoch=1))
    assert order.tolist() != epoch_order(50, seed=3, epoch=2).tolist()
    assert order.tolist() != epoch_order(50, seed=4, epoch=1).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_workers_together_see_each_sample_of_the_global_batches_once(world):
    samples = make_samples(30)
    shares = [batches(samples, batch_size=8 // world, rank=rank, world=world) for rank in range(world)]
    assert [len(share) for share in shares] == [3] * world  # 30 samples hold three batches of 8
    order = epoch_order(30, seed=0, epoch=0)
    seen = [number for step in zip(*shares, strict=True) for batch in step for number in numbers(batch)]
    assert seen == order[:24].tolist()


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


def test_augmentation_switched_off_is_the_centre():
    batch = as_batch(make_samples(4), mask_size=MASK)
    plain = centre(batch, image_size=SIZE)
    off = augmented(batch, image_size=SIZE, augment=OFF, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(off.images, plain.images, atol=0.02, rtol=0)
    torch.testing.assert_close(off.masks, plain.masks, atol=1e-4, rtol=0)
    assert torch.equal(off.labels, plain.labels)
    assert torch.equal(off.known, plain.known)


def test_the_centre_is_the_stored_pixels():
    samples = make_samples(2)
    plain = centre(as_batch(samples, mask_size=MASK), image_size=SIZE)
    middle = samples.faces[:, MARGIN:-MARGIN, MARGIN:-MARGIN].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(plain.images.numpy(), middle)


def test_masks_stay_over_what_they_mark():
    before, after = augment_square(MOVED)
    bright, marked = after.images[:, 0] > 127, after.masks[:, 0] > 0.5  # both 64 x 64 over the same square
    both, either = (bright & marked).sum((1, 2)), (bright | marked).sum((1, 2))
    assert (both / either).min() > 0.85
    assert not torch.equal(after.images[0], centre(before, image_size=SIZE).images[0])


def test_half_of_the_faces_are_mirrored():
    _, after = augment_square(OFF.model_copy(update={"flip": True}))
    columns = torch.arange(SIZE, dtype=torch.float32)
    centres = (after.images[:, 0].sum(1) @ columns) / after.images[:, 0].sum((1, 2))
    # The rectangle is at columns 12 to 36 of the square, or at 28 to 52 of the mirrored one.
    assert sorted({round(value) for value in centres.tolist()}) == [24, 40]


@pytest.mark.parametrize("part", [{"colour": 0.4}, {"soften": 1.0}, {"erase": 1.0}])
def test_looks_change_without_moving_masks_or_leaving_the_pixel_range(part):
    before, after = augment_square(OFF.model_copy(update=part))
    plain = centre(before, image_size=SIZE)
    assert not torch.allclose(after.images, plain.images, atol=1)
    torch.testing.assert_close(after.masks, plain.masks, atol=1e-4, rtol=0)
    assert 0 <= after.images.min() <= after.images.max() <= 255.01


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
