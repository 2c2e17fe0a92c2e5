"""This process's boto3 client: how it is made, how fast it asks, when it asks again.

Endpoint, region, profile, role and keys are boto3's own settings; none of them is kept, printed or sent along. Botocore
repeats nothing here. Its `standard` and `adaptive` modes stop repeating once a quota of failures is spent, which a
store that throttles spends in seconds, and both take AccessDenied at its word.
"""

import os
import random
import threading
from typing import Any, Final
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as botocore_errors
from botocore.config import Config

from jobs.data.request_rate import RequestRate, RetryReason, count_retry
from mgmtn.errors import ConfigError

CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 30
MAX_ATTEMPTS: Final = 8  # of one request, where AWS_MAX_ATTEMPTS says nothing: at most about a minute of waiting
FIRST_PAUSE: Final = 0.2  # seconds, doubled each time
LONGEST_PAUSE: Final = 20.0
# A refusal under load passes at once; a real one does not. `DENIALS` may be doubted in a row before a process believes
# that it is forbidden: a folder of a million forbidden pictures must not take a million pauses.
DENIED_ATTEMPTS: Final = 3
DENIALS: Final = 64
# Attempts to connect before there was any answer: more likely a typing error than an outage.
UNREACHED_ATTEMPTS: Final = 3

# 498 is Swift's.
_THROTTLING_STATUS: Final = frozenset({429, 498, 503})
_THROTTLING: Final = frozenset(
    {
        "SlowDown",
        "ServiceUnavailable",
        "Throttling",
        "ThrottlingException",
        "RequestThrottled",
        "RequestLimitExceeded",
        "TooManyRequests",
        "TooManyRequestsException",
        "BandwidthLimitExceeded",
    }
)
_DENIED: Final = frozenset({"403", "AccessDenied", "Forbidden", ""})
_CONFLICT: Final = frozenset({"409", "ConditionalRequestConflict", "OperationAborted"})
_SERVER_ERRORS: Final = frozenset({500, 502, 504, 520, 521, 522, 523, 524})

_clients: dict[int, Any] = {}
_lock: Final = threading.Lock()


def client() -> Any:
    """This process's boto3 client, for all its threads; made anew after a fork or new boto3 variables.

    Raises:
        ConfigError: if boto3's settings make no client.
    """
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    key = hash((os.getpid(), tuple(settings)))
    with _lock:
        if key not in _clients:
            _clients[key] = _make_client()
        return _clients[key]


def code_of(error: botocore_errors.ClientError) -> str:
    """S3's code of an error, such as `NoSuchKey`; of an answer without a body its HTTP status, such as `404`."""
    return str(error.response.get("Error", {}).get("Code", ""))


def named(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, botocore_errors.ClientError):
        details = error.response.get("Error", {})
        return f"{details.get('Code', '')}: {details.get('Message', '')}".rstrip(": ")
    return f"{type(error).__name__}: {error}"


def _make_client() -> Any:
    made = _connect()
    host = urlsplit(made.meta.endpoint_url).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return made
    options: dict[str, Any] = {}
    if not (made.meta.config.s3 or {}).get("addressing_style"):
        # Servers other than Amazon's seldom have a DNS name for every bucket.
        options["s3"] = {"addressing_style": "path"}
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        # Nor do all of them know the checksums that boto3 sends unasked since 1.36.
        if f"AWS_{name.upper()}" not in os.environ:
            options[name] = "when_required"
    return _connect(**options)


def _connect(**options: Any) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=64,
        **options,
    )
    try:
        made = boto3.session.Session().client("s3", config=config)
        attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", MAX_ATTEMPTS))
    except (botocore_errors.BotoCoreError, ValueError) as error:
        raise ConfigError(f"S3 settings: {named(error)}") from error
    policy = RetryPolicy(attempts)
    made.meta.events.register("before-send.s3", policy.wait)
    made.meta.events.register("needs-retry.s3", policy.pause_before_retry)
    return made


class RetryPolicy:
    """One client's: paces its requests and says, after each answer, whether to ask again. A handler of its events."""

    def __init__(self, max_attempts: int) -> None:
        self.rate = RequestRate()
        self.max_attempts = max_attempts
        self._reached = False
        self._denials = DENIALS

    def wait(self, **_: Any) -> None:
        self.rate.wait()

    def pause_before_retry(
        self,
        attempts: int,
        response: tuple[Any, dict[str, Any]] | None = None,
        caught_exception: Exception | None = None,
        **_: Any,
    ) -> float | None:
        """Seconds to wait before the request is repeated; None lets the answer stand.

        Args:
            attempts: how often the request was sent so far.
            response: HTTP response and what it was parsed to, if there was one.
            caught_exception: why there was none.
        """
        reason = retry_reason(response, caught_exception)
        self._reached = self._reached or response is not None
        if reason is RetryReason.THROTTLED:
            self.rate.throttled()
        elif response is not None:
            self.rate.answered()
        if reason is None:
            if attempts > 1 and response is not None and response[0].status_code < 400:
                self._denials = DENIALS
            return None
        if attempts >= self._allowed(reason):
            return None
        self._denials -= reason is RetryReason.ACCESS_DENIED
        count_retry(reason)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempts)
        # Spread over half the pause: processes that failed together must not come back together.
        return random.uniform(pause / 2, pause)

    def _allowed(self, reason: RetryReason) -> int:
        """How often a request may be sent that failed for this reason."""
        if reason is RetryReason.ACCESS_DENIED:
            return min(DENIED_ATTEMPTS, self.max_attempts) if self._denials > 0 else 1
        if reason is RetryReason.CONNECTION and not self._reached:
            return min(UNREACHED_ATTEMPTS, self.max_attempts)
        return self.max_attempts


def retry_reason(
    response: tuple[Any, dict[str, Any]] | None = None, exception: Exception | None = None
) -> RetryReason | None:
    """Why a request should be repeated; None if that would change nothing."""
    if response is not None:
        return _reason_of_answer(response[0].status_code, str(response[1].get("Error", {}).get("Code", "")))
    if isinstance(exception, botocore_errors.ReadTimeoutError | botocore_errors.ConnectTimeoutError):
        return RetryReason.TIMEOUT
    # A certificate that is not trusted, or a proxy that is not there, will be so the next time.
    if isinstance(exception, botocore_errors.SSLError | botocore_errors.ProxyConnectionError):
        return None
    if isinstance(exception, botocore_errors.HTTPClientError | botocore_errors.ConnectionError):
        return RetryReason.CONNECTION
    return None


def _reason_of_answer(status: int, code: str) -> RetryReason | None:
    if status in _THROTTLING_STATUS or code in _THROTTLING:
        return RetryReason.THROTTLED
    if status == 408 or code == "RequestTimeout":
        return RetryReason.TIMEOUT
    if status in _SERVER_ERRORS or code == "InternalError":
        return RetryReason.SERVER_ERROR
    if status == 403 and code in _DENIED:
        return RetryReason.ACCESS_DENIED
    if status == 409 and code in _CONFLICT:
        return RetryReason.CONFLICT
    return None
