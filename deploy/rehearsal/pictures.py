"""The pictures of the rehearsal: real photographs, each turned and cut another way, in a bucket."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import boto3
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jobs import demo

FACES: Final = ("astronaut.png", "admiral.jpg", demo.COLLAGE)
FACELESS: Final = "coffee.png"
FACELESS_EVERY: Final = 9
WIDTH: Final = 320  # pixels


class Pictures:
    """Numbered pictures under a prefix; written without mgmtn's own code.

    Attributes:
        uris: those that are there.
    """

    def __init__(self, uri: str, *, photographs: Path, variables: dict[str, str]) -> None:
        """
        Args:
            uri: `s3://bucket/prefix/`; the bucket is made.
            photographs: folder for those that the pictures are made from.
            variables: boto3's, to reach the store.
        """
        demo.run(demo.DemoSettings(output=photographs))
        names = (*FACES, FACELESS)
        self._photographs = {name: Image.open(photographs / name).convert("RGB") for name in names}
        self.bucket, _, self.prefix = uri.removeprefix("s3://").partition("/")
        self.client = client_of(variables)
        self.client.create_bucket(Bucket=self.bucket)
        self.uris: set[str] = set()

    def put(self, numbers: range, *, version: int = 0) -> None:
        """Write pictures, or other ones in their place."""
        with ThreadPoolExecutor(4) as pool:
            for number, data in zip(numbers, pool.map(lambda n: self._picture(n, version), numbers), strict=True):
                self._write(number, data)

    def tear(self, number: int) -> None:
        """Leave the first third of a picture, as of a copy that broke off."""
        data = self._picture(number, 0)
        self._write(number, data[: len(data) // 3])

    def delete(self, numbers: range) -> None:
        for number in numbers:
            self.client.delete_object(Bucket=self.bucket, Key=self._key(number))
            self.uris.remove(f"s3://{self.bucket}/{self._key(number)}")

    def _write(self, number: int, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self._key(number), Body=data)
        self.uris.add(f"s3://{self.bucket}/{self._key(number)}")

    def _key(self, number: int) -> str:
        return f"{self.prefix}{number % 5}/picture {number:04d}.jpg"

    def _picture(self, number: int, version: int) -> bytes:
        random = np.random.default_rng([number, version])
        name = FACELESS if number % FACELESS_EVERY == 0 else FACES[number % len(FACES)]
        image = self._photographs[name]
        image = image.rotate(random.uniform(-12, 12), resample=Image.Resampling.BILINEAR)
        image = ImageOps.mirror(image) if random.integers(2) else image
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)))
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.7, 1.3))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=90)
        return data.getvalue()


def client_of(variables: dict[str, str]) -> Any:
    """An S3 client by boto3's variables, without setting them here."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region_name=variables["AWS_DEFAULT_REGION"],
    )
