"""What the KubeRay 1.7 operator refuses beyond its CRDs, and what it accepts and should not be asked.

Names, deletion, ways of submission and autoscaling are its own validation and the CRDs' CEL rules, restated here, since
neither runs without a cluster.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from jobs.manifests.findings import Finding, Manifest, at, fields, integer, listed

MAX_NAME: Final = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
GATED: Final = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
# A RayCronJob is gated as a whole; choosing it is a decision, which an annotation makes visible.
OPT_IN: Final = "mgmtn/needs-feature-gate"
QUEUE: Final = "kueue.x-k8s.io/queue-name"
MAX_QUEUED_GROUPS: Final = 7  # of the eight pod sets of a workload, one is the head
CONTROLLERS: Final = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_DNS_1035: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DELETION_ORDER: Final = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_MODES: Final = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")

Said = Iterator[tuple[str, str]]  # rule, message


def ray_job_spec(manifest: Manifest) -> dict[str, Any] | None:
    """The RayJob's spec in a RayJob or RayCronJob; None in other kinds."""
    path = {"RayJob": ("spec",), "RayCronJob": ("spec", "jobTemplate")}.get(manifest.kind)
    spec = at(manifest.body, *path) if path else None
    return spec if isinstance(spec, dict) else None


def ray_cluster_spec(manifest: Manifest) -> dict[str, Any] | None:
    """The RayCluster's spec in any of KubeRay's kinds; None where there is none."""
    job = ray_job_spec(manifest)
    spec = job.get("rayClusterSpec") if job is not None else at(manifest.body, "spec")
    return spec if manifest.kind in MAX_NAME and isinstance(spec, dict) else None


def check_kuberay(manifest: Manifest) -> Iterator[Finding]:
    """Findings of the operator's rules for a RayCluster, RayJob or RayCronJob; none for other kinds."""
    if manifest.kind not in MAX_NAME:
        return
    said = [*_name(manifest), *_gates(manifest), *_managed_by(manifest)]
    job, cluster = ray_job_spec(manifest), ray_cluster_spec(manifest)
    if job is not None:
        said += [*_job(job), *_submission(job), *_deletion(job), *_kueue(manifest, job)]
    if cluster is not None:
        said += [*_cluster(cluster), *_autoscaling(cluster), *_authentication(cluster)]
    for rule, message in said:
        yield manifest.finding(rule, message)


def _name(manifest: Manifest) -> Said:
    longest = MAX_NAME[manifest.kind]
    if len(manifest.name) > longest:
        yield "name", f"{len(manifest.name)} characters, the operator takes {longest}"
    if not _DNS_1035.fullmatch(manifest.name):
        yield "name", "not a DNS-1035 label: a-z first, then a-z, 0-9 and -, no - at the end"


def _gates(manifest: Manifest) -> Said:
    if manifest.kind == "RayCronJob" and at(manifest.body, "metadata", "annotations", OPT_IN) != "RayCronJob":
        yield "feature-gate", f"a RayCronJob needs the gate RayCronJob, alpha and off; annotate {OPT_IN}: RayCronJob"
    cluster = ray_cluster_spec(manifest) or {}
    for field, gate in GATED.items():
        if field in cluster:
            yield "feature-gate", f"{field} needs the operator's feature gate {gate}, alpha and off"


def _managed_by(manifest: Manifest) -> Said:
    for spec in (ray_job_spec(manifest), ray_cluster_spec(manifest)):
        if spec is not None and spec.get("managedBy", CONTROLLERS[0]) not in CONTROLLERS:
            yield "managed-by", f"managedBy {spec['managedBy']!r} is none of {', '.join(CONTROLLERS)}"


def _kueue(manifest: Manifest, job: dict[str, Any]) -> Said:
    """What Kueue refuses of a job that waits in one of its queues."""
    if at(manifest.body, "metadata", "labels", QUEUE) is None:
        return
    if not job.get("shutdownAfterJobFinishes"):
        yield "kueue", "a queued job needs shutdownAfterJobFinishes: Kueue suspends it until there is room"
    if job.get("clusterSelector"):
        yield "kueue", "a queued job needs a cluster of its own, not a clusterSelector"
    if at(job, "rayClusterSpec", "enableInTreeAutoscaling"):
        yield "kueue", "a queued job cannot autoscale: room is held for the size that it declares"
    if len(listed(at(job, "rayClusterSpec", "workerGroupSpecs"))) > MAX_QUEUED_GROUPS:
        yield "kueue", f"Kueue takes {MAX_QUEUED_GROUPS} groups of workers"


def _job(job: dict[str, Any]) -> Said:
    if not job.get("clusterSelector") and not job.get("rayClusterSpec"):
        yield "cluster", "neither rayClusterSpec nor clusterSelector is there"
    if job.get("clusterSelector") and not at(job, "clusterSelector", "ray.io/cluster"):
        yield "cluster", "clusterSelector names no ray.io/cluster"
    if job.get("suspend") and (job.get("clusterSelector") or not job.get("shutdownAfterJobFinishes")):
        yield "suspend", "a suspended job needs a cluster of its own and shutdownAfterJobFinishes"
    if "activeDeadlineSeconds" not in job or integer(job["activeDeadlineSeconds"]) <= 0:
        yield "deadline", "activeDeadlineSeconds must be a positive number: without it a job that hangs holds its nodes"
    if integer(job.get("backoffLimit")) < 0:
        yield "backoff", "backoffLimit is negative"
    try:
        environment = yaml.safe_load(str(job.get("runtimeEnvYAML") or "{}"))
    except yaml.YAMLError as error:
        yield "runtime-env", f"runtimeEnvYAML is not YAML: {error}"
    else:
        if not isinstance(environment, dict):
            yield "runtime-env", "runtimeEnvYAML is not an object"


def _submission(job: dict[str, Any]) -> Said:
    mode = job.get("submissionMode", "K8sJobMode")
    if mode not in _MODES:
        yield "submission", f"submissionMode {mode!r} is none of {', '.join(_MODES)}"
    if mode == "K8sJobMode":
        yield "submission", "in K8sJobMode a dropped log stream can fail a running job; HTTPMode or SidecarMode"
    if mode == "InteractiveMode" and integer(job.get("backoffLimit")) > 0:
        yield "submission", "InteractiveMode knows no backoffLimit"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if job.get(field):
                yield "submission", f"SidecarMode knows no {field}"
        head = at(job, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if head not in (None, "", "Never"):
            yield "submission", f"SidecarMode needs the head's restartPolicy Never, not {head}"
    cpus = at(job, "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus")
    if cpus == "0" and (job.get("entrypointNumCpus") or job.get("entrypointNumGpus")):
        yield "submission", "the head offers no CPUs (num-cpus 0): the entrypoint must ask for none"


def _deletion(job: dict[str, Any]) -> Said:
    shutdown, ttl = bool(job.get("shutdownAfterJobFinishes")), integer(job.get("ttlSecondsAfterFinished"))
    strategy = job.get("deletionStrategy")
    if ttl < 0:
        yield "deletion", "ttlSecondsAfterFinished is negative"
    if ttl > 0 and not shutdown:
        yield "deletion", "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if not isinstance(strategy, dict):
        if not shutdown and not job.get("clusterSelector"):
            yield "deletion", "nothing ends the cluster: shutdownAfterJobFinishes or deletionStrategy.deletionRules"
        return
    rules, legacy = (
        listed(strategy.get("deletionRules")),
        [name for name in ("onSuccess", "onFailure") if name in strategy],
    )
    if rules and shutdown:
        yield "deletion", "deletionRules and shutdownAfterJobFinishes exclude each other"
    if rules and legacy:
        yield "deletion", f"deletionRules and {', '.join(legacy)} exclude each other"
    if not rules and len(legacy) < 2:
        yield "deletion", "deletionStrategy needs deletionRules, or both onSuccess and onFailure"
    for name in legacy:
        policy = at(strategy, name, "policy")
        if policy is None:
            yield "deletion", f"{name} has no policy"
        if policy == "DeleteNone" and shutdown:
            yield "deletion", f"{name}: DeleteNone and shutdownAfterJobFinishes exclude each other"
        yield from _policy(job, name, policy)
    yield from _deletion_rules(job, rules)


def _policy(job: dict[str, Any], where: str, policy: Any) -> Said:
    if job.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
        yield "deletion", f"{where}: {policy} does not go with clusterSelector"
    if at(job, "rayClusterSpec", "enableInTreeAutoscaling") and policy == "DeleteWorkers":
        yield "deletion", f"{where}: DeleteWorkers does not go with autoscaling"


def _deletion_rules(job: dict[str, Any], rules: list[dict[str, Any]]) -> Said:
    by_ending: dict[str, dict[str, int]] = {}
    for number, rule in enumerate(rules):
        where, condition, policy = f"deletionRules[{number}]", rule.get("condition"), str(rule.get("policy"))
        condition = fields(condition)
        endings = [name for name in ("jobStatus", "jobDeploymentStatus") if name in condition]
        if len(endings) != 1:
            yield "deletion", f"{where}: the condition needs jobStatus or jobDeploymentStatus, and not both"
            continue
        yield from _policy(job, where, policy)
        times = by_ending.setdefault(f"{endings[0]} {condition[endings[0]]}", {})
        if policy in times:
            yield "deletion", f"{where}: a second {policy} for {endings[0]} {condition[endings[0]]}"
        times[policy] = integer(condition.get("ttlSeconds"))
    for ending, times in by_ending.items():
        ordered = [times[policy] for policy in _DELETION_ORDER if policy in times]
        if ordered != sorted(ordered):
            yield "deletion", f"{ending}: ttlSeconds must not fall from {' to '.join(_DELETION_ORDER)}"


def groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The head's group, then the workers', each with its name."""
    if isinstance(cluster.get("headGroupSpec"), dict):
        yield "head", cluster["headGroupSpec"]
    for group in listed(cluster.get("workerGroupSpecs")):
        yield str(group.get("groupName")), group


def _cluster(cluster: dict[str, Any]) -> Said:
    for name, group in groups(cluster):
        parameters = fields(group.get("rayStartParams"))
        if not listed(at(group, "template", "spec", "containers")):
            yield "containers", f"group {name} has no container"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
            yield "resources", f"group {name} says its resources both in rayStartParams and in resources"
        if "labels" in parameters:
            yield "labels", f"group {name}: labels belong in the group's labels, not in rayStartParams"
    environment = {entry.get("name") for entry in _head_environment(cluster)}
    if "RAY_REDIS_ADDRESS" in environment:
        yield "fault-tolerance", "RAY_REDIS_ADDRESS: the address belongs in gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in environment or at(cluster, "headGroupSpec", "rayStartParams", "redis-username"):
        yield "fault-tolerance", "the redis user belongs in gcsFaultToleranceOptions"


def _head_environment(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return listed(at(cluster, "headGroupSpec", "template", "spec", "containers", 0, "env"))


def _autoscaling(cluster: dict[str, Any]) -> Said:
    on = bool(cluster.get("enableInTreeAutoscaling"))
    version = at(cluster, "autoscalerOptions", "version")
    asked = {entry.get("name"): entry.get("value") for entry in _head_environment(cluster)}.get(
        "RAY_enable_autoscaler_v2"
    )
    if not on and asked in ("1", "true"):
        yield "autoscaling", "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling"
    if on and version is not None and asked is not None:
        yield "autoscaling", "both autoscalerOptions.version and RAY_enable_autoscaler_v2"
    if on:
        yield from _autoscaler_pod(cluster)
    for name, group in groups(cluster):
        low, high = integer(group.get("minReplicas")), group.get("maxReplicas")
        if name != "head" and on and (high is None or not low <= integer(group.get("replicas", low)) <= integer(high)):
            yield (
                "autoscaling",
                f"group {name}: replicas must lie between minReplicas and maxReplicas, and both be said",
            )
        policy = at(group, "template", "spec", "restartPolicy")
        if on and version == "v2" and policy not in (None, "", "Never"):
            yield "autoscaling", f"group {name}: restartPolicy {policy}, autoscaler v2 needs Never"
        if "idleTimeoutSeconds" in group and not (on and version == "v2"):
            yield "autoscaling", f"group {name}: idleTimeoutSeconds is for autoscaler v2"
        if on and group.get("suspend"):
            yield "autoscaling", f"group {name}: a suspended group does not go with autoscaling"


def _autoscaler_pod(cluster: dict[str, Any]) -> Said:
    """The autoscaler is a container that the operator adds to the head's pod."""
    head, options = at(cluster, "headGroupSpec", "template", "spec"), fields(cluster.get("autoscalerOptions"))
    if at(head, "automountServiceAccountToken") is False:
        yield "autoscaling", "the head's automountServiceAccountToken is false: the autoscaler cannot ask for pods"
    security = fields(options.get("securityContext"))
    if security.get("allowPrivilegeEscalation") is not False or at(security, "capabilities", "drop") != ["ALL"]:
        yield "security", "autoscalerOptions.securityContext: a restricted namespace refuses the autoscaler's container"
    if not options.get("version"):
        yield "autoscaling", "say autoscalerOptions.version: the default differs between releases of Ray"


def _authentication(cluster: dict[str, Any]) -> Said:
    mode = at(cluster, "authOptions", "mode")
    if mode == "token" and _numbers(cluster.get("rayVersion")) < (2, 52):
        yield "auth-mode", f"token authentication needs rayVersion 2.52, not {cluster.get('rayVersion')}"
    for name, group in groups(cluster):
        environment = listed(at(group, "template", "spec", "containers", 0, "env"))
        if mode is None and "RAY_AUTH_MODE" not in {entry.get("name") for entry in environment}:
            yield "auth-mode", f"group {name}: say it, by authOptions.mode or RAY_AUTH_MODE; Ray's default has changed"


def _numbers(version: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(version).split(".") if part.isdigit())
