"""Hold a manifest against what it is to run: our versions, our settings, and a cluster large enough for the job."""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from jobs.cluster import share
from jobs.manifests.findings import Finding, Manifest, at, integer, listed
from jobs.manifests.kuberay import groups, ray_cluster_spec, ray_job_spec
from jobs.manifests.pods import OBJECT_STORE_SHARE, pod_specs, quantity_bytes
from jobs.settings import Settings, load
from mgmtn.errors import ConfigError

# The program, or its first argument, and the settings that read the rest.
PROGRAMS: Final = {
    "label": "LabelSettings",
    "prepare": "PrepareSettings",
    "train masks": "TrainMasksSettings",
    "train attributes": "TrainAttributesSettings",
    "evaluate": "EvaluateSettings",
    "compact": "CompactSettings",
    "vacuum": "VacuumSettings",
}
PROCESS_BYTES: Final = 1.3e9  # resident, of a process of the label job; measured by `make bench` on two cores
_UNITS: Final = {"m": 1e-3, "": 1.0}


def check_versions(manifest: Manifest, *, ray: str, mgmtn: str) -> Iterator[Finding]:
    """Findings of a Ray version other than the lock's, and of our image in another version or none the same."""
    cluster = ray_cluster_spec(manifest)
    if cluster is None:
        return
    if cluster.get("rayVersion") != ray:
        yield manifest.finding("version", f"rayVersion is {cluster.get('rayVersion')}, the lock has ray {ray}")
    images = {str(at(spec, "containers", 0, "image")) for _, spec in pod_specs(manifest)}
    if len(images) > 1:
        yield manifest.finding("version", f"the nodes of one cluster run {' and '.join(sorted(images))}")
    for image in sorted(images):
        name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
        if name == "mgmtn" and tag.split("-")[0] != mgmtn:
            yield manifest.finding("version", f"the image is {image}, the project is {mgmtn}")


def locked_version(lock: Path, package: str) -> str:
    """The version that a lock file pins a package to.

    Raises:
        ConfigError: the file or the pin is not there.
    """
    if not lock.is_file():
        raise ConfigError(f"lock: there is no file {str(lock)!r}")
    pin = re.search(rf"^{re.escape(package)}==(\S+)$", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if pin is None:
        raise ConfigError(f"lock: {str(lock)!r} does not pin {package}")
    return pin[1]


def check_program(manifest: Manifest) -> Iterator[Finding]:
    """Findings of an entrypoint that our settings refuse, or whose processes its cluster cannot hold."""
    job = ray_job_spec(manifest)
    if job is None:
        yield from _check_containers(manifest)
        return
    try:
        settings = _settings_of(str(job.get("entrypoint") or ""), tuple(_environment(job).items()))
    except ValueError as error:
        yield manifest.finding("entrypoint", str(error))
        return
    cluster = job.get("rayClusterSpec")
    if not isinstance(cluster, dict):
        return  # a cluster that is elsewhere
    try:
        _check_fit(settings, cluster)
    except ValueError as error:
        yield manifest.finding("fit", str(error))


def _check_containers(manifest: Manifest) -> Iterator[Finding]:
    """Findings of the arguments of containers that run our image outside Ray, whose command is `mgmtn`."""
    for place, spec in () if ray_cluster_spec(manifest) is not None else pod_specs(manifest):
        for container in [*listed(spec.get("initContainers")), *listed(spec.get("containers"))]:
            if str(container.get("image", "")).rpartition("/")[2].partition(":")[0] != "mgmtn":
                continue
            words = container.get("args")
            entrypoint = shlex.join(
                ["python", "-m", *(f"jobs.{w}" if n == 0 else str(w) for n, w in enumerate(words or ()))]
            )
            variables = {
                str(e["name"]): str(e["value"]) for e in listed(container.get("env")) if {"name", "value"} <= set(e)
            }
            try:
                _settings_of(entrypoint, tuple(variables.items()))
            except ValueError as error:
                yield manifest.finding("entrypoint", f"{place}: container {container.get('name')}: {error}")


@functools.cache  # several overlays run one and the same command
def _settings_of(entrypoint: str, environment: tuple[tuple[str, str], ...]) -> Settings:
    """Parse an entrypoint as its program would, without running it.

    Raises:
        ValueError: it is not one of ours, or its settings are wrong; with all that is wrong with them.
    """
    if "\n" in entrypoint.strip():
        raise ValueError("it has several lines, which the shell runs as commands of their own")
    words = shlex.split(entrypoint)
    known = words[:2] == ["python", "-m"] and len(words) > 2 and words[2].startswith("jobs.")
    name, rest = (words[2].removeprefix("jobs."), words[3:]) if known else ("", [])
    if name == "train" and rest:
        name, rest = f"train {rest[0]}", rest[1:]
    if name not in PROGRAMS:
        raise ValueError(f"{entrypoint!r} is not python -m jobs.{{{', '.join(PROGRAMS)}}} ...")
    module = importlib.import_module(f"jobs.{name.split()[0]}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), _only(dict(environment)):
            settings: Settings = load(getattr(module, PROGRAMS[name]), rest, prog=f"mgmtn {name}")
    except SystemExit as ending:
        raise ValueError(said.getvalue().strip()) from ending
    return settings


@contextlib.contextmanager
def _only(environment: dict[str, str]) -> Iterator[None]:
    """Our settings' variables as the pod has them, not as this machine has them."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("MGMTN_")}
    for name in ours:
        del os.environ[name]
    added = {name: value for name, value in environment.items() if name.startswith("MGMTN_")}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        os.environ.update(ours)


def _environment(job: dict[str, Any]) -> dict[str, str]:
    """The head's variables, in whose container the entrypoint runs; those from secrets and the like are unknown."""
    entries = listed(at(job, "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "env"))
    return {str(entry["name"]): str(entry["value"]) for entry in entries if "name" in entry and "value" in entry}


def _totals(cluster: dict[str, Any], count: str) -> tuple[float, float]:
    """CPUs and GPUs of the cluster with as many nodes as the field `count` of each group says."""
    cpus = gpus = 0.0
    for name, group in groups(cluster):
        nodes = 1 if name == "head" else integer(group.get(count, group.get("minReplicas")))
        nodes *= integer(group.get("numOfHosts", 1))
        cpus += nodes * _of_node(group, "num-cpus", "cpu")
        gpus += nodes * _of_node(group, "num-gpus", "nvidia.com/gpu")
    return cpus, gpus


def _of_node(group: dict[str, Any], parameter: str, resource: str) -> float:
    """What Ray offers on a node of a group: what rayStartParams say, else the container's limit, CPUs rounded up."""
    said = at(group, "rayStartParams", parameter)
    if said is not None:
        return float(str(said))
    limit = re.fullmatch(
        r"(\d+(?:\.\d+)?)(m?)", str(at(group, "template", "spec", "containers", 0, "resources", "limits", resource))
    )
    return float(-(-float(limit[1]) * _UNITS[limit[2]] // 1)) if limit else 0.0


def _check_fit(settings: Any, cluster: dict[str, Any]) -> None:
    """Refuse what the program itself would refuse on a cluster of this size, and what the cluster's memory cannot hold.

    A cluster that autoscales has at first its smallest size, and later what the job waits for.

    Raises:
        ValueError: what does not fit.
    """
    cpus, gpus = _totals(cluster, "replicas")
    if cluster.get("enableInTreeAutoscaling"):
        cpus, gpus = _grown(settings, cluster)
    kind = type(settings).__name__
    if kind == "LabelSettings":
        try:
            pools = share(
                cpus=cpus, gpus=gpus, face_workers=settings.face_workers, model_workers=settings.model_workers
            )
        except ConfigError as error:
            raise ValueError(str(error)) from error
        _check_memory(cluster, (pools.face_workers + pools.model_workers) / cpus)
    elif kind.startswith("Train"):
        wanted = settings.workers * settings.threads
        if wanted > cpus:
            raise ValueError(f"workers, threads: {wanted} CPUs are more than the cluster's {cpus:g}")
        if settings.gpu and settings.workers > gpus:
            raise ValueError(f"workers: {settings.workers} need a GPU each, the cluster has {gpus:g}")


def _grown(settings: Any, cluster: dict[str, Any]) -> tuple[float, float]:
    """CPUs and GPUs of an autoscaling cluster when the job starts its work.

    Raises:
        ValueError: the job waits for more than there can be.
    """
    asked = getattr(settings, "cluster", None)
    wanted = (float(asked.wait_cpus), float(asked.wait_gpus)) if asked is not None else (0.0, 0.0)
    most = _totals(cluster, "maxReplicas")
    for name, want, limit in zip(("wait_cpus", "wait_gpus"), wanted, most, strict=True):
        if want > limit:
            raise ValueError(f"cluster.{name}: {want:g} never come, the groups have {limit:g} at most")
    least = _totals(cluster, "minReplicas")
    return max(wanted[0], least[0]), max(wanted[1], least[1])


def _check_memory(cluster: dict[str, Any], processes_per_cpu: float) -> None:
    """Refuse nodes whose memory the job's processes and Ray's object store overfill."""
    for name, group in groups(cluster):
        cpus = _of_node(group, "num-cpus", "cpu")
        memory = quantity_bytes(at(group, "template", "spec", "containers", 0, "resources", "limits", "memory"))
        needed = cpus * processes_per_cpu * PROCESS_BYTES + OBJECT_STORE_SHARE * memory
        if cpus and needed > memory:
            raise ValueError(
                f"group {name}: about {cpus * processes_per_cpu:.0f} processes of {PROCESS_BYTES / 1e9:g} GB and the "
                f"object store need {needed / 1e9:.1f} GB of a node, which has {memory / 1e9:.1f} GB"
            )
