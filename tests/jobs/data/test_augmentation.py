import numpy as np
import pytest
import torch

from jobs.data.augmentation import OPERATIONS, AugmentSettings, augmented, random_numbers
from jobs.data.batches import Batch, centre

SIZE, MARGIN, MASK = 64, 8, 64
STORED = SIZE + 2 * MARGIN
OFF = AugmentSettings(flip=False, rotation=0, scale=0, shift=0, colour=0, soften=0, erase=0)
MOVED = AugmentSettings(flip=True, rotation=25, scale=0.2, shift=0.1, colour=0, soften=0, erase=0)


def change(batch: Batch, augment: AugmentSettings, *, seed: int = 0) -> Batch:
    numbers = random_numbers(len(batch), augment, torch.Generator().manual_seed(seed))
    images, masks = augmented(batch.images, batch.masks, image_size=SIZE, augment=augment, numbers=numbers)
    return Batch(images, masks, batch.labels, batch.known)


def square(count: int = 16) -> Batch:
    """Faces with a bright rectangle under the first mask."""
    images, masks = torch.zeros(count, 3, STORED, STORED), torch.zeros(count, 8, MASK, MASK)
    images[:, :, 24:56, 20:44] = 255
    cell = STORED / MASK
    masks[:, 0, round(24 / cell) : round(56 / cell), round(20 / cell) : round(44 / cell)] = 1
    return Batch(images, masks, torch.zeros(count, 40), torch.ones(count, 40, dtype=torch.bool))


def noise(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, STORED, STORED), generator=generator).float()
    masks = torch.randint(0, 2, (count, 8, MASK, MASK), generator=generator).float()
    return Batch(images, masks, torch.zeros(count, 40), torch.ones(count, 40, dtype=torch.bool))


def test_augmentation_switched_off_is_the_centre():
    batch = noise()
    plain, off = centre(batch, image_size=SIZE), change(batch, OFF)
    torch.testing.assert_close(off.images, plain.images, atol=0.02, rtol=0)
    torch.testing.assert_close(off.masks, plain.masks, atol=1e-4, rtol=0)


def test_masks_stay_over_what_they_mark():
    before = square()
    after = change(before, MOVED)
    bright, marked = after.images[:, 0] > 127, after.masks[:, 0] > 0.5  # both 64 x 64 over the same square
    both, either = (bright & marked).sum((1, 2)), (bright | marked).sum((1, 2))
    assert (both / either).min() > 0.85
    assert not torch.equal(after.images[0], centre(before, image_size=SIZE).images[0])


def test_half_of_the_faces_are_mirrored():
    after = change(square(), OFF.model_copy(update={"flip": True}))
    columns = torch.arange(SIZE, dtype=torch.float32)
    centres = (after.images[:, 0].sum(1) @ columns) / after.images[:, 0].sum((1, 2))
    # The rectangle is at columns 12 to 36 of the square, or at 28 to 52 of the mirrored one.
    assert sorted({round(value) for value in centres.tolist()}) == [24, 40]


@pytest.mark.parametrize("part", [{"colour": 0.4}, {"soften": 1.0}, {"erase": 1.0}])
def test_looks_change_without_moving_masks_or_leaving_the_pixel_range(part):
    before = square()
    after = change(before, OFF.model_copy(update=part))
    plain = centre(before, image_size=SIZE)
    assert not torch.allclose(after.images, plain.images, atol=1)
    torch.testing.assert_close(after.masks, plain.masks, atol=1e-4, rtol=0)
    assert 0 <= after.images.min() <= after.images.max() <= 255.01


def test_a_faces_changes_do_not_depend_on_its_batch():
    batch, augment = noise(6), AugmentSettings(randaugment=2, erase=1, soften=1)
    numbers = random_numbers(6, augment, torch.Generator().manual_seed(0))
    work = {"image_size": SIZE, "augment": augment}
    together = augmented(batch.images.clone(), batch.masks, numbers=numbers, **work)
    alone = augmented(batch.images[4:].clone(), batch.masks[4:], numbers=numbers[4:], **work)
    torch.testing.assert_close(together[0][4:], alone[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(together[1][4:], alone[1])


def test_randaugment_moves_masks_with_faces():
    augment = OFF.model_copy(update={"randaugment": 3, "magnitude": 12})
    before = square(64)
    after = change(before, augment)
    plain = centre(before, image_size=SIZE)
    moved = (after.masks[:, 0] - plain.masks[:, 0]).abs().sum((1, 2)) > 30
    assert 0.3 < moved.float().mean() < 1  # of fourteen operations, five move pixels
    bright, marked = after.images[moved, 0], after.masks[moved, 0] > 0.5
    lit = (bright * marked).sum((1, 2)) / marked.sum((1, 2)) - (bright * ~marked).sum((1, 2)) / (~marked).sum((1, 2))
    # However its colours changed, the marked part stands out from the rest, all of it (solarized: darker).
    assert (lit.abs() > 60).float().mean() > 0.9


def numbers_for(name: str, *, negative: bool = False) -> torch.Tensor:
    """Random numbers of one face for which RandAugment chooses one operation."""
    numbers = torch.full((1, 18), 0.5)
    numbers[0, 16:] = torch.tensor([(OPERATIONS.index(name) + 0.5) / len(OPERATIONS), 0.9 if negative else 0.1])
    return numbers


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_randaugment_keeps_the_pixel_range_and_does_something(name):
    augment = OFF.model_copy(update={"randaugment": 1, "magnitude": 20})
    batch = noise(1)
    plain = centre(batch, image_size=SIZE)
    images, masks = augmented(
        batch.images / 2 + 30, batch.masks, image_size=SIZE, augment=augment, numbers=numbers_for(name)
    )
    assert 0 <= images.min() <= images.max() <= 255
    changed = (images - (plain.images / 2 + 30)).abs().mean() > 1
    assert changed == (name != "identity")
    moves = name.startswith(("shear", "translate", "rotate"))
    assert moves == (not torch.allclose(masks, plain.masks, atol=1e-3))


def test_operations_move_as_far_as_torchvisions():
    """translate_x at full strength: 150/331 of the side, the sign choosing the direction."""
    augment = OFF.model_copy(update={"randaugment": 1, "magnitude": 15})
    batch = square(1)
    columns = torch.arange(SIZE, dtype=torch.float32)
    work = {"image_size": SIZE, "augment": augment}
    left, _ = augmented(batch.images, batch.masks, numbers=numbers_for("translate_x"), **work)
    right, _ = augmented(batch.images, batch.masks, numbers=numbers_for("translate_x", negative=True), **work)
    centres = [float((image[0, 0].sum(0) @ columns) / image[0, 0].sum()) for image in (left, right)]
    assert centres[1] - 24 == pytest.approx(SIZE * 150 / 331 / 2, abs=1.5)
    assert centres[0] < 24


def test_random_numbers_grow_with_the_operations_only():
    plain = random_numbers(4, AugmentSettings(), torch.Generator().manual_seed(0))
    more = random_numbers(4, AugmentSettings(randaugment=2), torch.Generator().manual_seed(0))
    assert plain.shape == (4, 16)
    assert more.shape == (4, 20)
    assert np.all((more.numpy() >= 0) & (more.numpy() < 1))
