"""Train and measure one network in several arms and seeds at the same budget, and compare them.

  mgmtn ablation --config jobs/configs/ablation-lfwa.toml

Each arm is `common` with its own settings on top (those of `mgmtn train attributes`); each run has a folder of its own,
with its training's log and its evaluation. A run that is finished is not made again.
"""

import json
import logging
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tomli_w
from pydantic import Field, PositiveInt, field_validator

from jobs.settings import Place, Settings, run_program
from jobs.telemetry import progress_bar
from mgmtn.attributes import GROUPS
from mgmtn.errors import ConfigError, MgmtnError

log = logging.getLogger(__name__)

TRAIN_FILE, LOG_FILE = "train.toml", "log.txt"
METRICS_FILE: Final = "report/metrics.json"
TABLE_FILE: Final = "ablation.md"


class RunFailed(MgmtnError):
    """A training or an evaluation ended with an error."""


class AblationSettings(Settings):
    """Settings of an ablation."""

    output: Path = Field(description="local folder of all runs and of the table, ablation.md")
    data: tuple[Place, ...] = Field(description="folders of training tables; their train rows are learned from")
    test: tuple[Place, ...] = Field(description="folders of training tables; their test rows are measured on")
    common: dict[str, Any] = Field(default_factory=dict, description="settings of mgmtn train attributes")
    arms: dict[str, dict[str, Any]] = Field(description="what each arm changes; the first is the reference")
    seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="each arm is trained once with each")
    parallel: PositiveInt = Field(1, description="runs at the same time, each with its workers' CPUs")

    @field_validator("output")
    @classmethod
    def _is_local(cls, folder: Path) -> Path:
        if str(folder).startswith("s3:/"):  # a path has one slash where a URI has two
            raise ValueError("the runs are compared in a local folder; data and test may be s3:// URIs")
        return folder


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    arm: str
    seed: int
    folder: Path
    settings: dict[str, Any]

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS_FILE


def run(settings: AblationSettings) -> dict[str, Any]:
    """Make what is missing, compare all.

    Raises:
        ConfigError: a run's folder is of a run with other settings.
        RunFailed: a run failed; the others are finished first.
    """
    runs = planned_runs(settings)
    for job in runs:
        check_same(job)
    todo = [job for job in runs if not is_measured(job, test=settings.test)]
    with progress_bar("ablation", total=len(todo), unit="runs") as bar, ThreadPoolExecutor(settings.parallel) as pool:
        failures = []
        for job, failure in zip(todo, pool.map(lambda job: make(job, test=settings.test), todo), strict=True):
            failures += [f"{job.folder}: {failure}"] if failure else []
            bar.advance(1)
    if failures:
        raise RunFailed("; ".join(failures))
    results = {arm: [_metrics(job) for job in runs if job.arm == arm] for arm in settings.arms}
    text = as_markdown(results, command=f"mgmtn ablation --config {settings.config}")
    (settings.output / TABLE_FILE).write_text(text, encoding="utf-8")
    accuracy = {arm: [found["mean_accuracy"] for found in founds] for arm, founds in results.items()}
    return {"accuracy": accuracy, "output": str(settings.output / TABLE_FILE)}


def planned_runs(settings: AblationSettings) -> list[Run]:
    """Every arm with every seed, a seed at a time, so that a comparison exists early."""
    data = {"data": list(settings.data)}
    return [
        Run(
            arm,
            seed,
            settings.output / arm / f"seed-{seed}",
            merged(merged(data | settings.common, changes), {"optimisation": {"seed": seed}}),
        )
        for seed in settings.seeds
        for arm, changes in settings.arms.items()
    ]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `above` in place of the same ones of `below`."""
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def check_same(job: Run) -> None:
    """Make sure that what is in a run's folder was made with its settings.

    Raises:
        ConfigError: it was not.
    """
    made = job.folder / TRAIN_FILE
    if made.exists() and tomllib.loads(made.read_text(encoding="utf-8")) != job.settings:
        raise ConfigError(f"output: {str(job.folder)!r} was made with other settings; remove it, or use another folder")


def is_measured(job: Run, *, test: Sequence[str]) -> bool:
    """True if a run has been measured, on these test tables and no others."""
    if not job.metrics.exists():
        return False
    words = shlex.split(_metrics(job)["command"])
    return words[words.index("--data") + 1] == ",".join(test)


def make(job: Run, *, test: Sequence[str]) -> str:
    """Train and evaluate in processes of their own; what went wrong, or nothing."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = job.folder / TRAIN_FILE
    config.write_text(tomli_w.dumps(job.settings), encoding="utf-8")
    train = ["jobs.train", "attributes", "--config", str(config), "--output", str(job.folder)]
    model, report = str(job.folder / "checkpoint"), str(job.metrics.parent)
    tests = ",".join(test)
    evaluate = ["jobs.evaluate", "--model", model, "--data", tests, "--split", "test", "--output", report]
    if job.settings.get("network", {}).get("masks") == "landmarks":
        evaluate += ["--masks", "landmarks"]
    with (job.folder / LOG_FILE).open("a", encoding="utf-8") as file:
        for command in (train, evaluate):
            ended = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, check=False)
            if ended.returncode:
                return f"{command[0]} ended with {ended.returncode}, see {file.name}"
    return ""


def _metrics(job: Run) -> dict[str, Any]:
    return dict(json.loads(job.metrics.read_text(encoding="utf-8")))


def as_markdown(results: Mapping[str, Sequence[Mapping[str, Any]]], *, command: str) -> str:
    """The comparison: each arm's mean accuracy over 40 attributes, its spread over seeds, and its groups' accuracy."""
    first = next(iter(results))
    reference = np.mean([found["mean_accuracy"] for found in results[first]])
    lines = [
        f"| arm | seeds | mean accuracy, % | lowest to highest | against {first} | " + " | ".join(GROUPS) + " |",
        "|---" * (5 + len(GROUPS)) + "|",
    ]
    for arm, founds in results.items():
        accuracy = np.array([found["mean_accuracy"] for found in founds])
        groups = [100 * np.mean([found["groups"]["accuracy"][group] for found in founds]) for group in GROUPS]
        lines.append(
            f"| {arm} | {len(founds)} | {accuracy.mean():.2f} | {accuracy.min():.2f} to {accuracy.max():.2f} | "
            f"{accuracy.mean() - reference:+.2f} | " + " | ".join(f"{value:.2f}" for value in groups) + " |"
        )
    return "\n".join([*lines, "", f"`{command}`", ""])


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(AblationSettings, run, argv, prog="mgmtn ablation", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
