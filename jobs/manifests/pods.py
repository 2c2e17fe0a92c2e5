"""Rules for the pods of every kind: the `restricted` pod security standard, pinned images, bounded resources."""

import re
from collections.abc import Iterator
from typing import Any, Final

from jobs.manifests.findings import Finding, Manifest, at, fields, listed
from jobs.manifests.kuberay import groups, ray_cluster_spec

RAY_TEMPORARY: Final = "/tmp/ray"
SHARED_MEMORY: Final = "/dev/shm"
OBJECT_STORE_SHARE: Final = 0.3  # of a node's memory, by Ray's default
_BYTES: Final = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{p}i": 2.0**e for p, e in zip("KMGT", (10, 20, 30, 40), strict=True)
}


def quantity_bytes(value: Any) -> float:
    """`32Gi` in bytes; 0 where it is missing or no such quantity, which the schema reports."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT]?)", str(value))
    return float(match[1]) * _BYTES[match[2]] if match else 0.0


def pod_specs(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's spec in a manifest, each with the name of its place."""
    places: list[tuple[str, Any]] = []
    cluster = ray_cluster_spec(manifest)
    if cluster is not None:
        places = [(f"group {name}", at(group, "template", "spec")) for name, group in groups(cluster)]
    elif manifest.kind == "CronJob":
        places = [("pod", at(manifest.body, "spec", "jobTemplate", "spec", "template", "spec"))]
    elif manifest.kind in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
        places = [("pod", at(manifest.body, "spec", "template", "spec"))]
    elif manifest.kind == "Pod":
        places = [("pod", manifest.body.get("spec"))]
    return ((name, spec) for name, spec in places if isinstance(spec, dict))


def check_pods(manifest: Manifest) -> Iterator[Finding]:
    for place, spec in pod_specs(manifest):
        containers = [*listed(spec.get("initContainers")), *listed(spec.get("containers"))]
        said = [*_security(spec, containers), *_containers(containers)]
        if ray_cluster_spec(manifest) is not None:
            said += [*_temporary(spec), *_shared_memory(spec)]
        for rule, message in said:
            yield manifest.finding(rule, f"{place}: {message}")


def _security(spec: dict[str, Any], containers: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The parts of `restricted` that a manifest must say itself."""
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield "security", f"{field} is not for us"
    for volume in listed(spec.get("volumes")):
        if "hostPath" in volume:
            yield "security", f"volume {volume.get('name')}: hostPath is not for us"
    for container in containers:
        name, own = container.get("name"), fields(container.get("securityContext"))
        both = fields(spec.get("securityContext")) | own
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            yield "security", f"container {name}: runAsNonRoot: true is missing"
        if at(both, "seccompProfile", "type") not in ("RuntimeDefault", "Localhost"):
            yield "security", f"container {name}: seccompProfile.type: RuntimeDefault is missing"
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield "security", f"container {name}: allowPrivilegeEscalation: false is missing"
        if at(own, "capabilities", "drop") != ["ALL"] or at(own, "capabilities", "add"):
            yield "security", f"container {name}: capabilities.drop: [ALL] is missing, or some are added"


def _containers(containers: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for container in containers:
        name, image = container.get("name"), str(container.get("image", ""))
        tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
        if "@" not in image and tag in ("", "latest"):
            yield "image", f"container {name}: {image or 'no image'} is not pinned to a version"
        for resource in ("cpu", "memory"):
            if at(container, "resources", "limits", resource) is None:
                yield "resources", f"container {name}: no limit on {resource}, from which Ray takes what a node has"


def _temporary(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Ray's sessions, logs and spilled objects belong on a volume: the image's layer is small and slow."""
    volumes = {str(volume.get("name")) for volume in listed(spec.get("volumes")) if "emptyDir" in volume}
    mounts = listed(at(spec, "containers", 0, "volumeMounts"))
    if not any(mount.get("mountPath") == RAY_TEMPORARY and str(mount.get("name")) in volumes for mount in mounts):
        yield "ray-temp", f"no emptyDir is mounted at {RAY_TEMPORARY}"


def _shared_memory(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Ray's object store lies in /dev/shm; where that is too small, Ray takes a disk instead, and only warns."""
    volumes = {str(volume.get("name")): fields(volume.get("emptyDir")) for volume in listed(spec.get("volumes"))}
    mounts = {m.get("mountPath"): str(m.get("name")) for m in listed(at(spec, "containers", 0, "volumeMounts"))}
    volume = volumes.get(mounts.get(SHARED_MEMORY, ""), {})
    if volume.get("medium") != "Memory":
        yield "shared-memory", f"no emptyDir of medium Memory is mounted at {SHARED_MEMORY}"
        return
    memory = quantity_bytes(at(spec, "containers", 0, "resources", "limits", "memory"))
    limit = quantity_bytes(volume.get("sizeLimit"))
    if not OBJECT_STORE_SHARE * memory <= limit <= memory:
        yield (
            "shared-memory",
            f"sizeLimit {volume.get('sizeLimit')} of {SHARED_MEMORY} must hold Ray's object store, "
            f"{OBJECT_STORE_SHARE:.0%} of the memory, and be less than all of it",
        )
