"""Rules for what runs by the clock: nothing overlaps, nothing piles up."""

import re
from collections.abc import Iterator
from typing import Any, Final

from jobs.manifests.findings import Finding, Manifest, at, fields, integer, listed

DAY: Final = 24 * 60
_NAMED: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_RANGES: Final = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
_NAMES: Final = {
    name: str(number)
    for names, first in (("jan feb mar apr may jun jul aug sep oct nov dec", 1), ("sun mon tue wed thu fri sat", 0))
    for number, name in enumerate(names.split(), first)
}


def shortest_interval(schedule: str) -> int:
    """Seconds between the two ticks of a cron schedule that are closest, as if it ticked on every day.

    Raises:
        ValueError: what is wrong with the schedule.
    """
    fields = _NAMED.get(schedule.strip(), schedule).split()
    if len(fields) != len(_RANGES):
        raise ValueError(f"{schedule!r} has {len(fields)} fields, cron has {len(_RANGES)}")
    minutes, hours, *_ = [_numbers(field, *limits) for field, limits in zip(fields, _RANGES, strict=True)]
    ticks = sorted(hour * 60 + minute for hour in hours for minute in minutes)
    return 60 * min(later - tick for tick, later in zip(ticks, [*ticks[1:], ticks[0] + DAY], strict=True))


def _numbers(field: str, low: int, high: int) -> set[int]:
    """`1-5`, `*/15`, `mon,wed` -> the numbers that it stands for."""
    chosen: set[int] = set()
    for part in field.lower().split(","):
        for name, number in _NAMES.items():
            part = part.replace(name, number)
        match = re.fullmatch(r"(?:(\*|\?)|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
        if match is None:
            raise ValueError(f"{field!r} is no cron field")
        every, first, last, step = match.groups()
        start = low if every else int(first)
        end = high if every or (step and not last) else int(last or first)
        if not low <= start <= end <= high or step == "0":
            raise ValueError(f"{field!r} is not within {low} to {high}")
        chosen |= set(range(start, end + 1, int(step or 1)))
    return chosen


def check_schedules(manifests: list[Manifest]) -> Iterator[Finding]:
    """Findings of CronJobs and RayCronJobs, and of the RayJobs that a CronJob's ConfigMap holds."""
    intervals: dict[tuple[str, str], int] = {}
    for manifest in manifests:
        if manifest.kind not in ("CronJob", "RayCronJob"):
            continue
        schedule = str(at(manifest.body, "spec", "schedule"))
        try:
            interval = shortest_interval(schedule)
        except ValueError as error:
            yield manifest.finding("schedule", str(error))
            continue
        if "TZ=" in schedule or not at(manifest.body, "spec", "timeZone"):
            yield manifest.finding("schedule", "timeZone is missing: the controller's own is anybody's guess")
        if manifest.kind == "RayCronJob":
            job = fields(at(manifest.body, "spec", "jobTemplate"))
            yield from (manifest.finding(rule, message) for rule, message in _fits(job, interval))
            continue
        yield from (manifest.finding(rule, message) for rule, message in _cron_job(manifest.body["spec"], interval))
        intervals |= {(name, manifest.name): interval for name in _config_maps(manifest)}
    for (name, cron_job), interval in intervals.items():
        for manifest in _jobs_in(name, manifests):
            for rule, message in _fits(fields(manifest.body.get("spec")), interval):
                yield manifest.finding(rule, f"{message} (CronJob {cron_job})")


def _cron_job(spec: dict[str, Any], interval: int) -> Iterator[tuple[str, str]]:
    job = fields(at(spec, "jobTemplate", "spec"))
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "concurrency", f"concurrencyPolicy is {spec.get('concurrencyPolicy', 'Allow')}, not Forbid"
    for field in ("startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        if field not in spec:
            yield "schedule", f"{field} is missing"
    if not 0 < integer(job.get("activeDeadlineSeconds")) < interval:
        yield "deadline", f"activeDeadlineSeconds must be positive and less than the {interval} s between two ticks"
    if "backoffLimit" not in job:
        yield "backoff", "backoffLimit is missing: six attempts by default"


def _config_maps(manifest: Manifest) -> list[str]:
    volumes = listed(at(manifest.body, "spec", "jobTemplate", "spec", "template", "spec", "volumes"))
    return [str(at(volume, "configMap", "name")) for volume in volumes if at(volume, "configMap", "name")]


def _jobs_in(config_map: str, manifests: list[Manifest]) -> list[Manifest]:
    """The RayJobs whose text a ConfigMap holds: `building` gives them beside it, by the names of their files."""
    held = [fields(m.body.get("data")) for m in manifests if (m.kind, m.name) == ("ConfigMap", config_map)]
    files = {name for data in held for name in data}
    folders = {m.file.rpartition("/")[0] for m in manifests if (m.kind, m.name) == ("ConfigMap", config_map)}
    return [m for m in manifests if m.kind == "RayJob" and m.file in {f"{d}/{f}" for d in folders for f in files}]


def _fits(job: dict[str, Any], interval: int) -> Iterator[tuple[str, str]]:
    """All attempts and the time that the finished job is kept must end before the next tick."""
    rules = listed(at(job, "deletionStrategy", "deletionRules"))
    kept = max(
        [integer(job.get("ttlSecondsAfterFinished")), *(integer(at(rule, "condition", "ttlSeconds")) for rule in rules)]
    )
    attempts = integer(job.get("backoffLimit")) + 1
    longest = attempts * integer(job.get("activeDeadlineSeconds")) + kept
    if longest >= interval:
        yield (
            "deadline",
            f"{attempts} attempts of activeDeadlineSeconds and {kept} s kept make {longest} s, the schedule's interval "
            f"is {interval} s",
        )
    removed = {
        str(at(rule, "condition", name)) for rule in rules if rule.get("policy") == "DeleteSelf" for name in _ENDINGS
    }
    missing = {"SUCCEEDED", "FAILED", "Failed"} - removed
    if missing:
        yield (
            "deletion",
            f"no DeleteSelf after {', '.join(sorted(missing))}: finished jobs pile up, a fixed name blocks",
        )


_ENDINGS: Final = ("jobStatus", "jobDeploymentStatus")
