"""Whether what a run has made may be published: the error budget, and what the quality gate found."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.data.gate import Finding
from jobs.data.schema import FAILED
from jobs.outcomes import ErrorBudgetExceeded, GateRefused

log = logging.getLogger(__name__)


def pass_gate(findings: Sequence[Finding], summary: dict[str, Any], *, accept: bool) -> None:
    """Stop at what the gate found, unless it is accepted.

    Raises:
        GateRefused: naming each finding; the summary has them under `refused`.
    """
    for finding in findings:
        log.warning("event=gate accepted=%s finding=%r", accept, str(finding))
    if findings and not accept:
        raise GateRefused(
            f"the gate refuses: {'; '.join(map(str, findings))}; nothing was published. Finished files are kept: the "
            "same command with --accept publishes them",
            summary=summary | {"refused": [asdict(finding) for finding in findings]},
        )


def check_budget(
    outcomes: Counter[str], max_failed_fraction: float, summary: dict[str, Any], *, retried: int = 0
) -> None:
    """Refuse to publish a run in which more images failed than allowed.

    Args:
        outcomes: the run's images by status.
        max_failed_fraction: what is allowed.
        summary: goes with the refusal.
        retried: how many of the run's images have failed before: of these it is no surprise, and they do not count.

    Raises:
        ErrorBudgetExceeded: naming the share, the limit and the outcomes.
    """
    failed = sum(outcomes[status] for status in FAILED)
    expected = min(failed, retried)
    images, failed = outcomes.total() - expected, failed - expected
    if images and failed / images > max_failed_fraction:
        besides = f", besides {expected} that had failed before" if expected else ""
        raise ErrorBudgetExceeded(
            f"{failed} of {images} images failed ({failed / images:.1%}){besides}, more than --max-failed-fraction "
            f"{max_failed_fraction:g} allows; nothing was published. {counts_text(dict(outcomes))}",
            summary=summary,
        )


def counts_text(counts: Mapping[str, int]) -> str:
    """`ok=3 no_face=1`: what there is any of."""
    return " ".join(f"{name}={count}" for name, count in counts.items() if count)
