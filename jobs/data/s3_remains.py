"""What a bucket keeps besides its objects: parts of uploads that broke off, older versions of what was deleted."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from botocore import exceptions as botocore_errors

from jobs.data.s3_client import client, code_of, named
from jobs.data.s3_store import split
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TornUpload:
    """An upload in parts that was begun and neither ended nor given up."""

    bucket: str
    key: str
    upload_id: str
    begun_at: datetime

    def give_up(self) -> None:
        """Delete its parts; nothing happens if it has ended.

        Raises:
            ConfigError: that is forbidden.
        """
        uri = f"s3://{self.bucket}/{self.key}"
        try:
            client().abort_multipart_upload(Bucket=self.bucket, Key=self.key, UploadId=self.upload_id)
        except botocore_errors.ClientError as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise ConfigError(f"cannot delete parts of {uri!r}: {named(error)}") from error
        except botocore_errors.BotoCoreError as error:
            raise ConfigError(f"cannot delete parts of {uri!r}: {named(error)}") from error


def torn_uploads(uri: str) -> Iterator[TornUpload]:
    """The uploads under a prefix that have not ended; none where the server cannot list them.

    Raises:
        ConfigError: the bucket does not answer.
    """
    bucket, key = split(uri)
    try:
        for page in client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key):
            for entry in page.get("Uploads", ()):
                yield TornUpload(bucket, entry["Key"], entry["UploadId"], entry["Initiated"])
    except botocore_errors.ClientError as error:
        # Neither every server nor every role can; a lifecycle rule of the bucket then has to do it.
        log.warning("torn_uploads=unknown uri=%r error=%r", uri, named(error))
    except botocore_errors.BotoCoreError as error:
        raise ConfigError(f"cannot use the store of {uri!r}: {named(error)}") from error


def keeps_versions(uri: str) -> bool:
    """Whether the bucket keeps what is deleted as an older version; False where it does not say."""
    bucket, _ = split(uri)
    try:
        # A bucket whose versions were suspended still has those from before.
        return client().get_bucket_versioning(Bucket=bucket).get("Status") in ("Enabled", "Suspended")
    except (botocore_errors.ClientError, botocore_errors.BotoCoreError):
        return False
