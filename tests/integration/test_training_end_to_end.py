"""From labelled pictures to a measured model: prepare, train masks, train attributes, evaluate; for real, small."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import demo, evaluate, prepare, train
from jobs.data.augmentation import AugmentSettings
from jobs.evaluate import EvaluateSettings
from jobs.optimisation import OptimisationSettings
from jobs.prepare import PrepareSettings
from jobs.train import NewNetworkSettings, TrainAttributesSettings, TrainMasksSettings
from jobs.training_log import EPOCHS_FILE
from mgmtn.attributes import ATTRIBUTES
from mgmtn.checkpoint import Checkpoint
from mgmtn.landmarks import MediaPipeSettings
from mgmtn.mask_net import MaskNetSettings

pytestmark = pytest.mark.integration

SIZE = 64
PICTURES = 48


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people's portraits, cropped at random: `male` is false of both, `smiling` of the admiral; one is torn."""
    folder = tmp_path_factory.mktemp("dataset")
    demo.run(demo.DemoSettings(output=folder / "portraits"))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(PICTURES):
        astronaut = number % 2 == 0
        image = Image.open(folder / "portraits" / ("astronaut.png" if astronaut else "admiral.jpg")).convert("RGB")
        left, top = (int(value) for value in rng.integers(0, 30, 2))
        image = image.crop((left, top, image.width - left, image.height - top)).resize((256, 256))
        name = f"images/{number:03d}.jpg"
        image.save(folder / name)
        split = "test" if number >= PICTURES - 8 else "train"
        rows.append(
            {"image": name, "split": split, "Smiling": int(astronaut), "Male": 0, "Eyeglasses": int(not astronaut)}
        )
    (folder / "images/000.jpg").write_bytes((folder / "images/000.jpg").read_bytes()[:500])
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def optimisation(epochs: int) -> OptimisationSettings:
    return OptimisationSettings(epochs=epochs, batch_size=8, learning_rate=3e-3, ema=0.5)


@pytest.mark.usefixtures("local_ray")
def test_pictures_become_a_model_that_tells_two_people_apart(dataset: Path, tmp_path: Path) -> None:
    detector = MediaPipeSettings(levels=0)
    prepared = prepare.run(
        PrepareSettings(
            dataset=str(dataset),
            output=str(tmp_path / "data"),
            image_size=SIZE,
            margin=8,
            workers=1,
            mediapipe=detector,
        )
    )
    assert prepared["images"] == PICTURES
    assert prepared["faces"] == PICTURES - 1
    assert prepared["failed"] == 1
    assert (tmp_path / "data/masks.png").stat().st_size > 1000

    masks = train.run_masks(
        TrainMasksSettings(
            data=(tmp_path / "data",),
            output=tmp_path / "masks",
            network=MaskNetSettings(resolution=32),
            optimisation=optimisation(2),
            validation=0.2,
        )
    )
    assert 0 < masks["score"] <= 1
    assert Checkpoint.load(masks["checkpoint"]).mask_net().settings.resolution == 32

    def attributes(epochs: int) -> dict[str, object]:
        return train.run_attributes(
            TrainAttributesSettings(
                name="tiny",
                data=(tmp_path / "data",),
                output=tmp_path / "attributes",
                mask_model=Path(masks["checkpoint"]),
                network=NewNetworkSettings(image_size=SIZE, dropout=0.0),
                optimisation=optimisation(epochs),
                augment=AugmentSettings(erase=0, colour=0.1),
                validation=0.2,
            )
        )

    first = attributes(4)
    assert first["epochs"] == 4
    again = attributes(4)
    assert again["model_id"] == first["model_id"]  # a finished run is not trained again
    with (tmp_path / "attributes" / EPOCHS_FILE).open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]

    summary = evaluate.run(
        EvaluateSettings(model=str(first["checkpoint"]), data=(tmp_path / "data",), output=tmp_path / "report")
    )
    assert summary["images"] == 8
    card = Checkpoint.load(str(first["checkpoint"])).card
    assert card.attributes == ATTRIBUTES
    assert card.training["data"][0]["images"] == PICTURES
    assert summary["mean_accuracy"] > 60  # smiling, male, eyeglasses: chance is 67 with male always right
