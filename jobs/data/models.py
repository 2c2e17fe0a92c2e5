"""Checkpoints by name, path or URI."""

from jobs.data.object_store import is_s3, join, local_copy
from jobs.data.scratch import scratch_folder
from mgmtn.checkpoint import CARD_FILE, WEIGHTS_FILE, Checkpoint
from mgmtn.errors import CheckpointError, ConfigError, FetchError


def resolve_model(model: str, *, field: str = "model") -> Checkpoint:
    """Load a checkpoint.

    Args:
        model: the name of a model that ships, a local folder, or the URI of a folder in S3.
        field: the setting that names it, for the error.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        return _load(model)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error


def _load(model: str) -> Checkpoint:
    if not is_s3(model):
        return Checkpoint.load(model)
    with scratch_folder("model") as folder:
        for name in (WEIGHTS_FILE, CARD_FILE):
            try:
                copy = local_copy(join(model, name))
            except (ConfigError, FetchError) as error:
                raise CheckpointError(f"no checkpoint at {model!r}: {error}") from error
            (folder / name).symlink_to(copy)
        return Checkpoint.load(folder)
