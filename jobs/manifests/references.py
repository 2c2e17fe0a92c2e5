"""Rules between manifests: what one names must be there, and what selects pods must select ours.

They hold for the whole folder that is linted, whatever namespaces its manifests are for.
"""

from collections.abc import Iterator
from typing import Any, Final

from jobs.manifests.findings import Finding, Manifest, at, fields, integer, listed
from jobs.manifests.kuberay import groups, ray_cluster_spec
from jobs.manifests.pods import pod_specs

Labels = dict[str, str]
# What every cluster has; the others must be among the manifests.
GIVEN: Final = {("ServiceAccount", "default"), ("PriorityClass", "system-cluster-critical")}


def check_references(manifests: list[Manifest]) -> Iterator[Finding]:
    """Findings of names that lead nowhere, of selectors that miss, and of pods that nothing selects."""
    known = {(manifest.kind, manifest.name) for manifest in manifests} | GIVEN
    for manifest in manifests:
        for place, spec in pod_specs(manifest):
            for kind, name in _named(spec):
                if (kind, name) not in known:
                    yield manifest.finding("reference", f"{place}: there is no {kind} {name!r} in the folder")
    pods = [pod for manifest in manifests for pod in ray_pods(manifest)]
    for manifest in manifests:
        if manifest.kind == "PodDisruptionBudget":
            yield from _disruption(manifest, pods)
    yield from _network(manifests, pods)
    yield from _monitoring(manifests, pods)


def _named(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The objects that a pod's spec names, which must be there for the pod to start."""
    for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
        if spec.get(field):
            yield kind, str(spec[field])
    for volume in listed(spec.get("volumes")):
        for field, key, kind in (
            ("configMap", "name", "ConfigMap"),
            ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
        ):
            if at(volume, field, key):
                yield kind, str(at(volume, field, key))


def ray_pods(manifest: Manifest) -> Iterator[tuple[Manifest, str, Labels, dict[str, Any]]]:
    """Every group of Ray nodes: its manifest, its name, its pods' labels with KubeRay's own, its first container."""
    for name, group in groups(ray_cluster_spec(manifest) or {}):
        role = "head" if name == "head" else "worker"
        labels = fields(at(group, "template", "metadata", "labels"))
        container = fields(at(group, "template", "spec", "containers", 0))
        yield manifest, name, {**labels, "ray.io/node-type": role}, container


def _selects(selector: Any, labels: Labels) -> bool:
    """Whether a selector's matchLabels fit; an empty selector fits every pod, matchExpressions are not judged."""
    return fields(at(selector, "matchLabels")).items() <= labels.items()


def _disruption(manifest: Manifest, pods: list[tuple[Manifest, str, Labels, dict[str, Any]]]) -> Iterator[Finding]:
    spec = fields(manifest.body.get("spec"))
    if integer(spec.get("minAvailable")) < 1 or "maxUnavailable" in spec:
        # KubeRay's kinds have no scale subresource, from which the other forms are computed.
        yield manifest.finding("disruption", "for Ray's pods only minAvailable works, as a whole number")
    if not any(_selects(spec.get("selector"), labels) for _, _, labels, _ in pods):
        yield manifest.finding("disruption", "its selector fits no Ray node of the folder")


def _network(manifests: list[Manifest], pods: list[tuple[Manifest, str, Labels, dict[str, Any]]]) -> Iterator[Finding]:
    selectors = [at(m.body, "spec", "podSelector") for m in manifests if m.kind == "NetworkPolicy"]
    if not selectors:
        return  # a folder without any; their absence is a decision, one forgotten group is not
    for manifest, name, labels, _ in pods:
        if not any(_selects(selector, labels) for selector in selectors):
            yield manifest.finding("network", f"group {name}: no NetworkPolicy selects its pods")


def _monitoring(
    manifests: list[Manifest], pods: list[tuple[Manifest, str, Labels, dict[str, Any]]]
) -> Iterator[Finding]:
    """Each port of metrics is scraped, and each scraped port is there and let through."""
    monitors = [m for m in manifests if m.kind == "PodMonitor"]
    if not monitors or not pods:
        return  # a base has none yet
    scraped: set[tuple[int, str]] = set()
    for monitor in monitors:
        chosen = [n for n, pod in enumerate(pods) if _selects(at(monitor.body, "spec", "selector"), pod[2])]
        for endpoint in listed(at(monitor.body, "spec", "podMetricsEndpoints")):
            port = str(endpoint.get("port"))
            scraped |= {(n, port) for n in chosen}
            if not any(port in _ports(pods[n][3]) for n in chosen):
                yield monitor.finding("monitor", f"no pod that it selects has a port named {port}")
    policies = [m for m in manifests if m.kind == "NetworkPolicy"]
    for number, (manifest, name, labels, container) in enumerate(pods):
        for port, value in _ports(container).items():
            if not port.endswith("metrics"):
                continue
            if (number, port) not in scraped:
                yield manifest.finding("monitor", f"group {name}: no PodMonitor scrapes its port {port}")
            own = [m for m in policies if _selects(at(m.body, "spec", "podSelector"), labels)]
            if own and not any(_lets_in(policy, value) for policy in own):
                yield manifest.finding("network", f"group {name}: no NetworkPolicy lets anybody in at {port}, {value}")


def _ports(container: dict[str, Any]) -> dict[str, int]:
    return {str(port.get("name")): integer(port.get("containerPort")) for port in listed(container.get("ports"))}


def _lets_in(policy: Manifest, port: int) -> bool:
    """Whether a rule for ingress names the port; a rule without ports is for our own pods."""
    rules = listed(at(policy.body, "spec", "ingress"))
    return any(integer(entry.get("port")) == port for rule in rules for entry in listed(rule.get("ports")))
