"""When a request is repeated, and when its answer stands. No server: `tests/integration/test_s3_suite.py` has those."""

from types import SimpleNamespace
from typing import Any

import pytest
from botocore import exceptions

from jobs.data import request_rate, s3_client
from jobs.data.request_rate import RetryReason
from jobs.data.s3_client import DENIALS, RetryPolicy, client, retry_reason
from mgmtn.errors import ConfigError

URL = {"endpoint_url": "http://127.0.0.1:9"}


def answer(status: int, code: str | None = None) -> tuple[Any, dict[str, Any]]:
    return SimpleNamespace(status_code=status), {} if code is None else {"Error": {"Code": code}}


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (200, None, None),
        (404, "NoSuchKey", None),
        (404, "NoSuchBucket", None),
        (412, "PreconditionFailed", None),
        (403, "InvalidAccessKeyId", None),
        (403, "SignatureDoesNotMatch", None),
        (400, "ExpiredToken", None),
        (501, "NotImplemented", None),
        (503, "SlowDown", RetryReason.THROTTLED),
        (503, "503", RetryReason.THROTTLED),
        (429, "TooManyRequests", RetryReason.THROTTLED),
        (400, "RequestLimitExceeded", RetryReason.THROTTLED),
        (500, "InternalError", RetryReason.SERVER_ERROR),
        (502, "502", RetryReason.SERVER_ERROR),
        (400, "RequestTimeout", RetryReason.TIMEOUT),
        (403, "AccessDenied", RetryReason.ACCESS_DENIED),
        (403, "403", RetryReason.ACCESS_DENIED),
        (409, "ConditionalRequestConflict", RetryReason.CONFLICT),
        (409, "BucketNotEmpty", None),
    ],
)
def test_an_answer_says_whether_to_ask_again(status, code, reason):
    assert retry_reason(answer(status, code)) is reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exceptions.ReadTimeoutError(**URL), RetryReason.TIMEOUT),
        (exceptions.ConnectTimeoutError(**URL), RetryReason.TIMEOUT),
        (exceptions.EndpointConnectionError(**URL, error="refused"), RetryReason.CONNECTION),
        (exceptions.ConnectionClosedError(**URL), RetryReason.CONNECTION),
        (exceptions.SSLError(**URL, error="not trusted"), None),
        (exceptions.NoCredentialsError(), None),
        (ValueError("a bug"), None),
    ],
)
def test_no_answer_says_whether_to_ask_again(error, reason):
    assert retry_reason(exception=error) is reason


def attempts_of(policy: RetryPolicy, *outcomes: Any) -> int:
    """How often a request is sent that ends so, the last outcome for ever."""
    for attempt in range(1, 100):
        outcome = outcomes[min(attempt, len(outcomes)) - 1]
        said = {"caught_exception": outcome} if isinstance(outcome, Exception) else {"response": outcome}
        if policy.pause_before_retry(attempt, **said) is None:
            return attempt
    raise AssertionError("asked for ever")


def test_trouble_that_does_not_pass_is_given_up():
    assert attempts_of(RetryPolicy(8), answer(503, "SlowDown")) == 8
    assert attempts_of(RetryPolicy(8), answer(503, "SlowDown"), answer(200)) == 2
    assert attempts_of(RetryPolicy(1), answer(500)) == 1


def test_an_address_where_nobody_is_is_given_up_sooner():
    policy = RetryPolicy(8)
    nobody = exceptions.EndpointConnectionError(**URL, error="refused")
    assert attempts_of(policy, nobody) == s3_client.UNREACHED_ATTEMPTS
    attempts_of(policy, answer(200))
    assert attempts_of(policy, nobody) == 8


def test_a_refusal_is_doubted_until_refusals_prove_real():
    policy = RetryPolicy(8)
    denied = answer(403, "AccessDenied")
    requests = sum(attempts_of(policy, denied) for _ in range(1000))
    assert requests == 1000 + DENIALS
    assert attempts_of(policy, denied, answer(200)) == 1


def test_a_refusal_that_passed_lets_the_next_ones_be_doubted():
    policy = RetryPolicy(8)
    denied = answer(403, "AccessDenied")
    for _ in range(10 * DENIALS):
        assert attempts_of(policy, denied, answer(200)) == 2


def test_only_throttling_slows_the_process_down():
    policy = RetryPolicy(8)
    for outcome in (answer(500), answer(403, "AccessDenied"), answer(404)):
        attempts_of(policy, outcome)
    assert policy.rate.limit is None
    attempts_of(policy, answer(503, "SlowDown"), answer(200))
    assert policy.rate.limit is not None


def test_pauses_grow_and_have_an_end():
    policy = RetryPolicy(100)
    pauses = [policy.pause_before_retry(attempt, answer(500)) for attempt in range(1, 30)]
    for attempt, pause in enumerate(pauses, start=1):
        longest = min(s3_client.LONGEST_PAUSE, s3_client.FIRST_PAUSE * 2**attempt)
        assert longest / 2 <= pause <= longest


def test_what_is_repeated_is_counted_by_its_reason():
    before = request_rate.retries.copy()
    attempts_of(RetryPolicy(4), answer(503, "SlowDown"), answer(500), exceptions.ReadTimeoutError(**URL), answer(200))
    counted = request_rate.retries - before
    assert counted == {RetryReason.THROTTLED: 1, RetryReason.SERVER_ERROR: 1, RetryReason.TIMEOUT: 1}


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")


def test_other_servers_are_asked_by_path_and_without_checksums_of_their_own(keys, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example:9000")
    config = client().meta.config
    assert config.s3 == {"addressing_style": "path"}
    assert config.request_checksum_calculation == "when_required"
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert client().meta.config.request_checksum_calculation == "when_supported"


def test_amazon_is_asked_as_boto3_does(keys, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    config = client().meta.config
    assert not (config.s3 or {}).get("addressing_style")
    assert config.request_checksum_calculation == "when_supported"


def test_addressing_that_the_user_chose_is_kept(keys, monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example:9000")
    assert client().meta.config.s3["addressing_style"] == "virtual"


@pytest.mark.parametrize(("name", "value"), [("AWS_MAX_ATTEMPTS", "many"), ("AWS_PROFILE", "typo")])
def test_settings_that_make_no_client_are_named(keys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"S3 settings: .*{value}"):
        client()
