"""Keys stay in the process that uses them: what is sent to workers, written down or logged has none."""

import logging

import pytest
from ray import cloudpickle

from jobs.data.object_store import open_store
from jobs.data.s3_client import client
from jobs.data.sink import LabelSink
from jobs.data.snapshots import LabelTable
from jobs.data.stages import FaceWork, FindFaces, PredictAttributes
from jobs.label import LabelSettings
from jobs.settings import configure_logging
from mgmtn.errors import ConfigError, FetchError
from mgmtn.images import ImageLimits

SECRETS = ("AKIAVERYVISIBLE", "never-print-this", "session-token-to-hide")


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), SECRETS, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def told(text: str | bytes) -> list[str]:
    data = text if isinstance(text, bytes) else text.encode()
    return [secret for secret in SECRETS if secret.encode() in data]


def test_what_is_sent_to_workers_holds_no_key():
    settings = LabelSettings(inputs=("s3://photos",), output="s3://labels")
    assert client()._request_signer._credentials.secret_key == SECRETS[1]
    work = FaceWork(
        detector=settings.detector_settings(),
        limits=ImageLimits(),
        mode="detect",
        image_size=64,
        draw_masks=False,
        model_id="m1",
        run_id="r1",
    )
    sent = (
        LabelSink("s3://labels/faces", model_id="m1", run_id="r1"),
        LabelTable("s3://labels/faces"),
        open_store("s3://photos"),
        work,
        FindFaces,
        PredictAttributes,
        settings,
    )
    for thing in sent:
        assert told(cloudpickle.dumps(thing)) == []
        assert told(repr(thing)) == []
    assert told(settings.model_dump_json()) == []


def test_a_store_that_does_not_answer_is_told_of_without_keys(capsys):
    configure_logging(verbose=True)
    try:
        for use in (open_store("s3://photos").get, lambda uri: list(open_store("s3://photos").list(uri))):
            with pytest.raises((ConfigError, FetchError)) as caught:
                use("s3://photos/a.jpg")
            assert told(str(caught.value)) == []
        logging.getLogger("jobs.data").debug("done")
    finally:
        root = logging.getLogger()
        root.handlers = [handler for handler in root.handlers if handler.get_name() != "mgmtn"]
        for name in ("jobs", "mgmtn", "__main__"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    stderr = capsys.readouterr().err
    assert "done" in stderr
    assert told(stderr) == []
