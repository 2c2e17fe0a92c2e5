"""Rules for the pods of every kind: the `restricted` pod security standard, pinned images, bounded resources."""

from collections.abc import Iterator
from typing import Any, Final

from jobs.manifests.findings import Finding, Manifest, at, fields, listed
from jobs.manifests.kuberay import groups, ray_cluster_spec

RAY_TEMPORARY: Final = "/tmp/ray"


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
            said += _temporary(spec)
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
