"""What must hold after the nights. Each check is a sentence, and yields what it finds wrong."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from deploy.rehearsal.monitoring import Prometheus
from deploy.rehearsal.nights import Night, NodeLoss
from mgmtn.attributes import ATTRIBUTES

FAILED_NIGHT_ALERT: Final = "MgmtnRunFailed"
WORKER_SERIES: Final = (
    "ray_mgmtn_images_total",
    "ray_mgmtn_faces_total",
    "ray_mgmtn_bytes_read_total",
    "ray_mgmtn_stage_seconds_bucket",
    "ray_mgmtn_s3_retries_total",
)
RUN_SERIES: Final = (
    "mgmtn_run_images",
    "mgmtn_run_planned",
    "mgmtn_run_seconds",
    "mgmtn_last_success_timestamp_seconds",
    "mgmtn_snapshot_number",
    "mgmtn_snapshot_lag_seconds",
    "mgmtn_attribute_prevalence",
    "mgmtn_attribute_drift",
)
# Another batch, or another order of them, moves the last digits.
TOLERANCES: Final = dict.fromkeys(ATTRIBUTES, 1e-5) | dict.fromkeys(
    ("box_x1", "box_y1", "box_x2", "box_y2", "detection_score", "sharpness", "face_size"), 1e-3
)
OF_THE_RUN: Final = ("run_id", "labelled_at")


@dataclass(frozen=True)
class Evidence:
    """What was seen.

    Attributes:
        first, second: the two nights; `third` was meant to fail.
        fresh: a run on one machine over the pictures of the second night.
        planned_first, planned_second: what was done to the pictures before the nights, by reason.
        loss: of a node, in the second night.
        uris: the pictures that there are.
        gone: those that were deleted between the nights.
        history: the table's snapshots in the end, as `mgmtn snapshots --format json` tells them.
        parents: of each snapshot, by its number.
        rows, fresh_rows: of the table in the end, and of the fresh one, by DuckDB.
        prometheus: runs still.
    """

    first: Night
    second: Night
    third: Night
    fresh: Night
    planned_first: dict[str, int]
    planned_second: dict[str, int]
    loss: NodeLoss
    uris: frozenset[str]
    gone: frozenset[str]
    history: list[dict[str, Any]]
    parents: dict[int, int | None]
    rows: pa.Table
    fresh_rows: pa.Table
    prometheus: Prometheus


@dataclass(frozen=True)
class Check:
    """One sentence, and what speaks against it: nothing if it holds."""

    name: str
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        return f"FAILED  {self.name}: {'; '.join(self.wrong)}" if self.wrong else f"ok      {self.name}"


def nonzero(counts: dict[str, Any]) -> dict[str, int]:
    return {name: int(count) for name, count in counts.items() if count}


def both_nights_ended_well(seen: Evidence) -> Iterator[str]:
    for name, each, planned in (("1", seen.first, seen.planned_first), ("2", seen.second, seen.planned_second)):
        if each.exit_code != 0 or not each.summary:
            yield f"night {name}: exit code {each.exit_code}, summary {each.summary}"
            continue
        due = sum(count for reason, count in planned.items() if reason != "deleted")
        if sum(each.summary["images"].values()) != due:
            yield f"night {name}: {each.summary['images']} where {due} images were due"


def each_night_planned_what_had_changed_and_nothing_else(seen: Evidence) -> Iterator[str]:
    for name, each, planned in (("1", seen.first, seen.planned_first), ("2", seen.second, seen.planned_second)):
        found = nonzero(each.summary["planned"])
        if found != planned:
            yield f"night {name}: {found}, not {planned}"


def a_node_was_lost_with_work_in_the_midst_of_night_2(seen: Evidence) -> Iterator[str]:
    due = sum(count for reason, count in seen.planned_second.items() if reason != "deleted")
    if not seen.loss.workers:
        yield "the night ended before, or none of its processes was on the node"
    elif not 0 < seen.loss.done < due:
        yield f"{seen.loss.done} of {due} images were done"


def the_table_has_a_snapshot_of_each_good_night(seen: Evidence) -> Iterator[str]:
    found = [(row["number"], row["run_id"], row["planned"]) for row in seen.history]
    nights = ((1, seen.first, seen.planned_first), (2, seen.second, seen.planned_second))
    expected = [(number, each.summary["run_id"], planned) for number, each, planned in nights]
    if found != expected:
        yield f"{found}, not {expected}"
    if seen.parents != {1: None, 2: 1}:
        yield f"parents {seen.parents}"
    if [seen.first.summary["snapshot"], seen.second.summary["snapshot"]] != [1, 2]:
        yield "the summaries name other snapshots"


def nobody_is_missing_and_the_deleted_are_gone(seen: Evidence) -> Iterator[str]:
    found = set(seen.rows["uri"].to_pylist())
    if missing := seen.uris - found:
        yield f"missing: {sorted(missing)}"
    if still := found & seen.gone:
        yield f"deleted, and still there: {sorted(still)}"
    if unknown := found - seen.uris - seen.gone:
        yield f"never there: {sorted(unknown)}"


def nobody_is_there_twice(seen: Evidence) -> Iterator[str]:
    faces = seen.rows.group_by(["uri", "face_index"]).aggregate([([], "count_all")])
    if twice := [row for row in faces.to_pylist() if row["count_all"] > 1]:
        yield str(twice)
    images = seen.rows.group_by("uri").aggregate([("face_count", "max"), ([], "count_all")])
    if wrong := [row for row in images.to_pylist() if row["count_all"] != max(1, row["face_count_max"])]:
        yield f"more or fewer rows than faces: {wrong}"


def the_rows_are_those_of_a_fresh_run_on_one_machine(seen: Evidence) -> Iterator[str]:
    if seen.fresh.exit_code != 0:
        yield f"the fresh run: exit code {seen.fresh.exit_code}"
    if seen.rows.num_rows != seen.fresh_rows.num_rows or seen.rows.schema != seen.fresh_rows.schema:
        yield f"{seen.rows.num_rows} rows, not {seen.fresh_rows.num_rows}, or other columns"
        return
    for name in seen.rows.column_names:
        found, expected = seen.rows[name].to_pylist(), seen.fresh_rows[name].to_pylist()
        if name in OF_THE_RUN:
            continue
        if name in TOLERANCES or name == "landmarks":
            apart = max(map(_apart, found, expected), default=0.0)
            if apart > TOLERANCES.get(name, 1e-2):
                yield f"{name}: up to {apart:g} apart"
        elif found != expected:
            yield f"{name}: {sum(a != b for a, b in zip(found, expected, strict=True))} rows differ"


def _apart(one: Any, other: Any) -> float:
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    gap = float(np.abs(np.subtract(one, other)).max())
    return math.inf if math.isnan(gap) else gap


def plain_duckdb_counts_what_the_snapshot_says(seen: Evidence) -> Iterator[str]:
    last = seen.history[-1]
    counts = (seen.rows.num_rows, sum(index >= 0 for index in seen.rows["face_index"].to_pylist()))
    if counts != (last["rows"], last["faces"]):
        yield f"{counts} rows and faces, not {(last['rows'], last['faces'])}"


def no_metric_is_empty_in_prometheus(seen: Evidence) -> Iterator[str]:
    for name in (*WORKER_SERIES, *RUN_SERIES):
        if not seen.prometheus.values(f"count(last_over_time({name}[WINDOW]))"):
            yield f"no series {name}"


def the_runs_metrics_are_those_of_the_summaries(seen: Evidence) -> Iterator[str]:
    for name, each in (("1", seen.first), ("2", seen.second)):

        def last(metric: str, label: str = "", at: float = each.ended) -> dict[str, int]:
            expression = f"max by ({label}) (last_over_time({metric}[WINDOW]))"
            return nonzero(seen.prometheus.values(expression, label=label, at=at))

        for metric, label, key in (("run_images", "status", "images"), ("run_planned", "reason", "planned")):
            found, expected = last(f"mgmtn_{metric}", label), nonzero(each.summary[key])
            if found != expected:
                yield f"night {name}: mgmtn_{metric} {found}, not {expected}"
        if (found := last("mgmtn_snapshot_number")) != {"": each.summary["snapshot"]}:
            yield f"night {name}: mgmtn_snapshot_number {found}"


def the_workers_metrics_are_those_of_the_summaries(seen: Evidence) -> Iterator[str]:
    counted = "sum by (status) (max_over_time(ray_mgmtn_images_total[WINDOW]))"
    first = nonzero(seen.prometheus.values(counted, label="status", at=seen.second.started))
    if first != nonzero(seen.first.summary["images"]):
        yield f"night 1: {first}, not {seen.first.summary['images']}"
    # Of the second, the lost node takes what it counted in its last second along, and what it had at work is repeated.
    both = sum(seen.prometheus.values(counted, label="status", at=seen.third.started).values())
    if both <= sum(first.values()):
        yield f"night 2: nothing beside the {sum(first.values())} images of night 1"
    faces = seen.prometheus.values("sum(max_over_time(ray_mgmtn_faces_total[WINDOW]))", at=seen.second.started)
    if nonzero(faces) != {"": seen.first.summary["faces"]}:
        yield f"night 1: faces {faces}, not {seen.first.summary['faces']}"


def every_rule_is_evaluated(seen: Evidence) -> Iterator[str]:
    rules = [rule for group in seen.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    if not rules:
        yield "there are none"
    yield from (f"{rule['name']}: {rule.get('lastError')}" for rule in rules if rule["health"] != "ok")


def no_alert_fires_for_the_good_nights(seen: Evidence) -> Iterator[str]:
    fired = seen.prometheus.fired(since=seen.prometheus.started, until=seen.third.started)
    yield from sorted(fired)


def the_failed_night_says_so_and_publishes_nothing(seen: Evidence) -> Iterator[str]:
    if seen.third.exit_code != 3:
        yield f"exit code {seen.third.exit_code}, not the gate's 3"
    if (said := seen.prometheus.values("max by () (last_over_time(mgmtn_run_exit_code[WINDOW]))")) != {"": 3}:
        yield f"mgmtn_run_exit_code {said}"
    if len(seen.history) != 2:
        yield f"{len(seen.history)} snapshots"


def the_failed_night_and_nothing_else_raises_its_alert(seen: Evidence) -> Iterator[str]:
    now = seen.prometheus.values('ALERTS{alertstate="firing"}', label="alertname")
    if set(now) != {FAILED_NIGHT_ALERT}:
        yield f"firing: {sorted(now) or 'none'}"


CHECKS: Final[tuple[Callable[[Evidence], Iterator[str]], ...]] = (
    both_nights_ended_well,
    each_night_planned_what_had_changed_and_nothing_else,
    a_node_was_lost_with_work_in_the_midst_of_night_2,
    the_table_has_a_snapshot_of_each_good_night,
    nobody_is_missing_and_the_deleted_are_gone,
    nobody_is_there_twice,
    the_rows_are_those_of_a_fresh_run_on_one_machine,
    plain_duckdb_counts_what_the_snapshot_says,
    no_metric_is_empty_in_prometheus,
    the_runs_metrics_are_those_of_the_summaries,
    the_workers_metrics_are_those_of_the_summaries,
    every_rule_is_evaluated,
    no_alert_fires_for_the_good_nights,
    the_failed_night_says_so_and_publishes_nothing,
    the_failed_night_and_nothing_else_raises_its_alert,
)


def checked(seen: Evidence) -> list[Check]:
    """Every check."""
    return [Check(check.__name__.replace("_", " "), tuple(check(seen))) for check in CHECKS]
