"""Each rule has a manifest that breaks it, made from those that ship; those that ship break none."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import yaml

from jobs import lint
from jobs.cluster import share
from jobs.manifests.building import build_folder
from jobs.manifests.findings import Manifest
from jobs.manifests.programs import locked_version
from jobs.manifests.schemas import load_crds
from mgmtn.errors import ConfigError

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
RAY = locked_version(ROOT / "deploy" / "requirements.lock", "ray")

HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
POD = f"{WORKERS}.template.spec"
CONTAINER = f"{POD}.containers.0"
RULE = "spec.deletionStrategy.deletionRules"
GONE = object()


@pytest.fixture(scope="module")
def crds():
    folder = ROOT / ".." / "shared" / "crds"
    if not folder.is_dir():
        pytest.skip("KubeRay's CRDs, ../shared/crds, are not on this machine")
    return load_crds(folder)


@pytest.fixture(scope="module")
def shipped():
    manifests, problems = build_folder(K8S)
    assert not problems
    return manifests


def broken(manifests, name, changes):
    """The manifests with changes made to one: `{"spec.a.0.b": value}`; `GONE` removes."""
    made = []
    for manifest in manifests:
        body = copy.deepcopy(manifest.body)
        if f"{manifest.kind}/{manifest.name}" == name:
            for path, value in changes.items():
                change(body, path.replace("\\.", "\0").split("."), value)
        made.append(Manifest(manifest.file, body))
    return made


def change(body, path, value):
    *way, last = [int(part) if part.isdigit() else part.replace("\0", ".") for part in path]
    for part in way:
        body = body[part] if isinstance(body, list) else body.setdefault(part, {})
    if value is GONE:
        del body[last]
    else:
        body[last] = value


def rules(manifests, schemas=None):
    return {(finding.subject, finding.rule) for finding in lint.check(manifests, schemas=schemas or {}, ray=RAY)}


def env(name, value):
    return [{"name": name, "value": value}]


QUEUED = {"metadata.labels": {"kueue.x-k8s.io/queue-name": "mgmtn"}}
LABEL, NIGHTLY, TRAIN = "RayJob/mgmtn-label", "RayJob/mgmtn-nightly", "RayJob/mgmtn-train"
DEV, CRON, RAY_CRON = "RayCluster/mgmtn-dev", "CronJob/mgmtn-nightly", "RayCronJob/mgmtn-nightly"
UPKEEP, BUDGET, POLICY = "CronJob/mgmtn-upkeep", "PodDisruptionBudget/mgmtn-train-head", "NetworkPolicy/mgmtn"
MONITOR = "PodMonitor/mgmtn"
# What other manifests name, or what selects them.
SUPPORT = {"ServiceAccount", "PriorityClass", "PersistentVolumeClaim", "ConfigMap", "CronJob", "NetworkPolicy"}

BREAKS = [
    ("name", NIGHTLY, {"metadata.name": "n" * 48}),
    ("name", NIGHTLY, {"metadata.name": "4-nights"}),
    ("name", DEV, {"metadata.name": "n" * 54}),
    ("name", RAY_CRON, {"metadata.name": "n" * 37}),
    ("feature-gate", RAY_CRON, {"metadata.annotations": {}}),
    ("feature-gate", DEV, {"spec.networkPolicy": {}}),
    ("feature-gate", LABEL, {"spec.rayClusterSpec.tlsOptions": {}}),
    ("cluster", LABEL, {"spec.rayClusterSpec": GONE}),
    ("cluster", LABEL, {"spec.clusterSelector": {"app": "x"}}),
    ("suspend", NIGHTLY, {"spec.suspend": True}),
    ("deadline", LABEL, {"spec.activeDeadlineSeconds": GONE}),
    ("deadline", LABEL, {"spec.activeDeadlineSeconds": 0}),
    ("backoff", LABEL, {"spec.backoffLimit": -1}),
    ("runtime-env", LABEL, {"spec.runtimeEnvYAML": "a: [1"}),
    ("runtime-env", LABEL, {"spec.runtimeEnvYAML": "pip"}),
    ("submission", LABEL, {"spec.submissionMode": "Telnet"}),
    ("submission", LABEL, {"spec.submissionMode": GONE}),
    ("submission", LABEL, {"spec.submissionMode": "InteractiveMode"}),
    ("submission", LABEL, {"spec.submissionMode": "SidecarMode", "spec.submitterConfig": {"backoffLimit": 1}}),
    ("submission", LABEL, {"spec.submissionMode": "SidecarMode", f"{HEAD}.template.spec.restartPolicy": "Always"}),
    ("submission", LABEL, {"spec.entrypointNumCpus": 1}),
    ("deletion", LABEL, {"spec.shutdownAfterJobFinishes": False}),
    ("deletion", LABEL, {"spec.shutdownAfterJobFinishes": False, "spec.ttlSecondsAfterFinished": 0}),
    ("deletion", LABEL, {"spec.ttlSecondsAfterFinished": -1}),
    ("deletion", LABEL, {"spec.deletionStrategy": {}}),
    ("deletion", LABEL, {"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}),
    ("deletion", LABEL, {"spec.deletionStrategy": {"onSuccess": {}, "onFailure": {"policy": "DeleteSelf"}}}),
    ("deletion", LABEL, {f"spec.deletionStrategy.{x}.policy": "DeleteNone" for x in ("onSuccess", "onFailure")}),
    ("deletion", NIGHTLY, {"spec.shutdownAfterJobFinishes": True}),
    ("deletion", NIGHTLY, {"spec.deletionStrategy.onSuccess": {"policy": "DeleteSelf"}}),
    ("deletion", NIGHTLY, {f"{RULE}.0.condition": {"ttlSeconds": 1}}),
    ("deletion", NIGHTLY, {f"{RULE}.0.condition.jobDeploymentStatus": "Failed"}),
    ("deletion", NIGHTLY, {f"{RULE}.1.policy": "DeleteSelf"}),
    ("deletion", NIGHTLY, {f"{RULE}.1.condition.ttlSeconds": 14401}),
    ("deletion", NIGHTLY, {f"{RULE}.1.policy": "DeleteWorkers", "spec.rayClusterSpec.enableInTreeAutoscaling": True}),
    ("deletion", NIGHTLY, {"spec.clusterSelector": {"ray.io/cluster": "x"}}),
    ("deletion", NIGHTLY, {f"{RULE}.0": GONE}),
    ("deadline", NIGHTLY, {"spec.activeDeadlineSeconds": 43200}),
    ("deadline", RAY_CRON, {"spec.jobTemplate.backoffLimit": 2}),
    ("containers", LABEL, {f"{POD}.containers": []}),
    ("resources", LABEL, {f"{HEAD}.resources": {"CPU": "0"}}),
    ("labels", LABEL, {f"{WORKERS}.rayStartParams.labels": "a=b"}),
    ("fault-tolerance", LABEL, {f"{HEAD}.template.spec.containers.0.env": env("RAY_REDIS_ADDRESS", "redis:6379")}),
    ("fault-tolerance", LABEL, {f"{HEAD}.rayStartParams.redis-username": "me"}),
    ("autoscaling", LABEL, {f"{HEAD}.template.spec.containers.0.env": env("RAY_enable_autoscaler_v2", "1")}),
    ("autoscaling", LABEL, {f"{WORKERS}.idleTimeoutSeconds": 60}),
    (
        "autoscaling",
        DEV,
        {
            "spec.enableInTreeAutoscaling": True,
            "spec.autoscalerOptions": {"version": "v2"},
            "spec.workerGroupSpecs.0.template.spec.restartPolicy": "Always",
        },
    ),
    ("autoscaling", DEV, {"spec.enableInTreeAutoscaling": True, "spec.workerGroupSpecs.0.suspend": True}),
    ("auth-mode", LABEL, {"spec.rayClusterSpec.authOptions": GONE}),
    ("auth-mode", LABEL, {"spec.rayClusterSpec.rayVersion": "2.51.0"}),
    ("autoscaling", DEV, {"spec.workerGroupSpecs.0.maxReplicas": GONE}),
    ("autoscaling", DEV, {"spec.workerGroupSpecs.0.minReplicas": 5}),
    ("autoscaling", DEV, {"spec.headGroupSpec.template.spec.automountServiceAccountToken": False}),
    ("autoscaling", DEV, {"spec.autoscalerOptions.version": GONE}),
    ("security", DEV, {"spec.autoscalerOptions.securityContext": GONE}),
    ("managed-by", LABEL, {"spec.managedBy": "me"}),
    ("managed-by", DEV, {"spec.managedBy": "me"}),
    ("kueue", NIGHTLY, QUEUED),
    ("kueue", LABEL, QUEUED | {"spec.rayClusterSpec.enableInTreeAutoscaling": True}),
    ("kueue", LABEL, QUEUED | {"spec.clusterSelector": {"ray.io/cluster": "x"}}),
    ("kueue", LABEL, QUEUED | {"spec.rayClusterSpec.workerGroupSpecs": [{"groupName": f"g{n}"} for n in range(8)]}),
    ("version", LABEL, {"spec.rayClusterSpec.rayVersion": "2.59.0"}),
    ("version", LABEL, {f"{CONTAINER}.image": "registry/mgmtn:0.0.9"}),
    ("version", DEV, {"spec.workerGroupSpecs.0.template.spec.containers.0.image": "mgmtn:0.1.0"}),
    ("image", LABEL, {f"{CONTAINER}.image": "registry:5000/mgmtn"}),
    ("image", CRON, {"spec.jobTemplate.spec.template.spec.containers.0.image": "kubectl:latest"}),
    ("resources", LABEL, {f"{CONTAINER}.resources.limits.memory": GONE}),
    ("ray-temp", LABEL, {f"{CONTAINER}.volumeMounts": []}),
    ("shared-memory", LABEL, {f"{CONTAINER}.volumeMounts.1": GONE}),
    ("shared-memory", LABEL, {f"{POD}.volumes.1.emptyDir.medium": GONE}),
    ("shared-memory", LABEL, {f"{POD}.volumes.1.emptyDir.sizeLimit": "9Gi"}),
    ("shared-memory", LABEL, {f"{POD}.volumes.1.emptyDir.sizeLimit": "33Gi"}),
    ("reference", LABEL, {f"{POD}.serviceAccountName": "mgmtm"}),
    ("reference", LABEL, {f"{POD}.priorityClassName": "urgent"}),
    ("reference", TRAIN, {f"{POD}.volumes.2.persistentVolumeClaim.claimName": "share"}),
    ("reference", CRON, {"spec.jobTemplate.spec.template.spec.volumes.0.configMap.name": "nights"}),
    ("network", LABEL, {f"{WORKERS}.template.metadata.labels": {"app": "x"}}),
    ("network", LABEL, {f"{HEAD}.template.spec.containers.0.ports.5.containerPort": 8091}),
    ("monitor", LABEL, {f"{HEAD}.template.spec.containers.0.ports.5.name": "more-metrics"}),
    ("monitor", MONITOR, {"spec.podMetricsEndpoints.1.port": "driver"}),
    ("disruption", BUDGET, {"spec.minAvailable": "50%"}),
    ("disruption", BUDGET, {"spec.minAvailable": GONE, "spec.maxUnavailable": 0}),
    ("disruption", BUDGET, {"spec.selector.matchLabels.ray\\.io/node-type": "leader"}),
    ("security", LABEL, {f"{POD}.hostNetwork": True}),
    ("security", LABEL, {f"{POD}.volumes.0": {"name": "ray-temp", "hostPath": {"path": "/tmp"}}}),
    ("security", LABEL, {f"{POD}.securityContext.runAsNonRoot": GONE}),
    ("security", LABEL, {f"{CONTAINER}.securityContext.runAsUser": 0}),
    ("security", LABEL, {f"{POD}.securityContext.seccompProfile": GONE}),
    ("security", LABEL, {f"{CONTAINER}.securityContext.allowPrivilegeEscalation": True}),
    ("security", LABEL, {f"{CONTAINER}.securityContext.capabilities.add": ["SYS_PTRACE"]}),
    ("security", CRON, {"spec.jobTemplate.spec.template.spec.containers.0.securityContext": GONE}),
    ("schedule", CRON, {"spec.schedule": "0 25 * * *"}),
    ("schedule", RAY_CRON, {"spec.timeZone": GONE}),
    ("schedule", CRON, {"spec.startingDeadlineSeconds": GONE}),
    ("concurrency", CRON, {"spec.concurrencyPolicy": "Allow"}),
    ("deadline", CRON, {"spec.jobTemplate.spec.activeDeadlineSeconds": 90000}),
    ("backoff", CRON, {"spec.jobTemplate.spec.backoffLimit": GONE}),
    ("entrypoint", LABEL, {"spec.entrypoint": "sleep 60"}),
    ("entrypoint", LABEL, {"spec.entrypoint": "python -m jobs.label s3://a/b"}),
    ("entrypoint", LABEL, {"spec.entrypoint": "python -m jobs.label s3://a/b\n  --output s3://a/c"}),
    ("entrypoint", LABEL, {"spec.entrypoint": "python -m jobs.label s3://a/b --output s3://a/c --batchsize 3"}),
    ("entrypoint", LABEL, {f"{HEAD}.template.spec.containers.0.env": env("MGMTN_BATCH_SIZE", "many")}),
    ("entrypoint", UPKEEP, {"spec.jobTemplate.spec.template.spec.containers.0.args": ["vacuum", "--older-than", "7"]}),
    ("entrypoint", UPKEEP, {"spec.jobTemplate.spec.template.spec.containers.0.args": GONE}),
    ("fit", LABEL, {"spec.entrypoint": "python -m jobs.label s3://a/b --output s3://a/c --face-workers 64"}),
    ("fit", LABEL, {f"{CONTAINER}.resources.limits.memory": "24Gi"}),
    ("fit", LABEL, {"spec.rayClusterSpec.enableInTreeAutoscaling": True, f"{WORKERS}.minReplicas": 0}),
    (
        "fit",
        LABEL,
        {
            "spec.rayClusterSpec.enableInTreeAutoscaling": True,
            "spec.entrypoint": "python -m jobs.label s3://a/b --output s3://a/c --cluster.wait-cpus 33",
        },
    ),
    ("fit", LABEL, {f"{WORKERS}.replicas": 0}),
    ("fit", LABEL, {f"{CONTAINER}.resources.limits.cpu": "0"}),
    ("fit", TRAIN, {f"{WORKERS}.replicas": 3}),
    ("fit", TRAIN, {f"{CONTAINER}.resources.limits.cpu": "2"}),
    ("fit", TRAIN, {f"{CONTAINER}.resources.limits.nvidia\\.com/gpu": GONE}),
]


def test_what_ships_is_clean(shipped):
    assert list(lint.check(shipped, schemas={}, ray=RAY)) == []
    kinds = {"RayCluster", "RayJob", "RayCronJob", "CronJob", "NetworkPolicy", "PodMonitor", "PrometheusRule"}
    assert kinds | {"PodDisruptionBudget", "PriorityClass", "ServiceAccount"} <= {m.kind for m in shipped}


def test_what_ships_is_clean_by_kuberays_schemas(shipped, crds):
    assert list(lint.check(shipped, schemas=crds, ray=RAY)) == []


@pytest.mark.parametrize(
    ("rule", "name", "changes"), BREAKS, ids=[f"{rule}-{n}" for n, (rule, _, _) in enumerate(BREAKS)]
)
def test_a_rule_finds_what_breaks_it(shipped, rule, name, changes):
    kind = name.partition("/")[0]
    ray = {"RayJob", "RayCluster"} if rule in ("disruption", "monitor") else set()
    relevant = [
        m
        for m in shipped
        if m.kind in {kind, *SUPPORT, *ray} or (rule in ("monitor", "network") and m.kind == "PodMonitor")
    ]
    found = {(subject.partition("/")[0], found) for subject, found in rules(broken(relevant, name, changes))}
    assert (kind, rule) in found


def test_every_rule_has_a_manifest_that_breaks_it():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "jobs" / "manifests").glob("*.py"))
    said = set(re.findall(r'(?:yield |finding\()"([a-z-]+)", f?"', source))
    assert len(said) > 15
    assert said <= {rule for rule, _, _ in BREAKS} | {"schema"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec.backofLimit": 1}, "backofLimit"),
        ({f"{CONTAINER}.imagePullPolice": "Always"}, "imagePullPolice"),
        ({"spec.activeDeadlineSeconds": "3600"}, "activeDeadlineSeconds"),
        ({f"{WORKERS}.groupName": GONE}, "groupName"),
        ({"spec.rayClusterSpec.authOptions.mode": "kerberos"}, "kerberos"),
    ],
)
def test_kuberays_schema_finds_what_it_does_not_know(shipped, crds, changes, words):
    [manifest] = [m for m in broken(shipped, TRAIN, changes) if m.name == "mgmtn-train"]
    messages = [f.message for f in lint.check([manifest], schemas=crds, ray=RAY) if f.rule == "schema"]
    assert any(words in message for message in messages)


def test_a_null_and_a_default_are_what_the_server_makes_of_them(shipped, crds):
    changes = {"spec.suspend": None, f"{WORKERS}.minReplicas": GONE, f"{WORKERS}.maxReplicas": None}
    [manifest] = [m for m in broken(shipped, TRAIN, changes) if m.name == "mgmtn-train"]
    assert not [f for f in lint.check([manifest], schemas=crds, ray=RAY) if f.rule == "schema"]


def test_built_in_kinds_are_held_against_kubernetes_own_schemas(shipped):
    assert (CRON, "schema") in rules(broken(shipped, CRON, {"spec.succesfulJobsHistoryLimit": 3}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{WORKERS}.rayStartParams.num-cpus", ["8"]),
        (f"{POD}.volumes.0.name", {"a": 1}),
        (f"{CONTAINER}.volumeMounts.0.name", {}),
        (f"{CONTAINER}.securityContext.capabilities.drop", True),
        (f"{CONTAINER}.securityContext", ["ALL"]),
        ("spec.rayClusterSpec.workerGroupSpecs", 4),
    ],
)
def test_a_value_of_another_type_is_a_finding_and_no_accident(shipped, path, value):
    support = [m for m in shipped if m.kind in SUPPORT - {"CronJob"}]
    [manifest] = [m for m in broken(shipped, TRAIN, {path: value}) if m.name == "mgmtn-train"]
    assert TRAIN in {subject for subject, _ in rules([manifest, *support])}


def test_the_three_ways_to_label_run_one_job(shipped):
    jobs = {
        f"{m.kind}/{m.name}": m.body["spec"] for m in shipped if m.file.endswith(("rayjob.yaml", "raycronjob.yaml"))
    }
    night, once = jobs[NIGHTLY], jobs[LABEL]
    assert jobs[RAY_CRON]["jobTemplate"] == night
    endings = {"deletionStrategy", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"}
    assert {k: v for k, v in night.items() if k not in endings} == {k: v for k, v in once.items() if k not in endings}


def test_the_gpu_job_finds_a_gpu_for_each_model_process(shipped):
    [gpu] = [m for m in shipped if m.kind == "RayJob" and "label-gpu" in m.file]
    group = gpu.body["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = group["replicas"] * float(limits["cpu"]), group["replicas"] * float(limits["nvidia.com/gpu"])
    pools = share(cpus=cpus, gpus=gpus, face_workers=None, model_workers=None)
    assert (pools.model_workers, pools.gpus_per_model) == (2, 1.0)


def test_every_cel_rule_of_the_crds_is_restated_here():
    """A new rule of a new KubeRay must not go unnoticed: none is evaluated, all are written down in kuberay.py."""
    folder = ROOT / ".." / "shared" / "crds"
    if not folder.is_dir():
        pytest.skip("KubeRay's CRDs, ../shared/crds, are not on this machine")
    rules = {
        match
        for file in folder.glob("*.yaml")
        for match in re.findall(r"^ +rule: (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    about = ("onSuccess", "jobStatus", "managedBy", "kuberay-operator", "oldSelf")  # the last: changes, not manifests
    assert rules
    assert [rule for rule in rules if not any(word in rule for word in about)] == []


def test_the_alerts_of_the_cluster_are_those_that_are_tested(shipped):
    [rule] = [m for m in shipped if m.kind == "PrometheusRule"]
    tested = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text(encoding="utf-8"))
    assert rule.body["spec"]["groups"] == tested["groups"]


def test_a_job_that_autoscales_is_judged_by_the_nodes_that_it_waits_for(shipped):
    [manifest] = [m for m in shipped if m.kind == "RayJob" and "autoscaling" in m.file]
    groups = manifest.body["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(group["minReplicas"], group["maxReplicas"]) for group in groups] == [(0, 8), (0, 2)]
    assert not {rule for _, rule in rules([manifest])} - {"reference"}


def test_findings_are_lines_on_stdout_and_exit_with_2(tmp_path, capsys):
    pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {hostNetwork: true, containers: []}\n"
    (tmp_path / "pod.yaml").write_text(pod, encoding="utf-8")
    assert lint.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path}/pod.yaml: Pod/a: security: pod: hostNetwork is not for us" in said.out.splitlines()
    assert "findings in 1 manifests" in said.err


def test_what_is_clean_prints_nothing_and_says_what_was_not_checked(tmp_path, capsys):
    shutil.copytree(K8S / "base", tmp_path / "k8s")
    assert lint.main([str(tmp_path / "k8s")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "unchecked=PodMonitor,PrometheusRule" in said.err


def test_a_folder_without_manifests_is_a_wrong_setting(tmp_path):
    assert lint.main([str(tmp_path)]) == 2
    assert lint.main([str(tmp_path / "nowhere")]) == 2


def test_a_lock_without_ray_is_a_wrong_setting(tmp_path):
    (tmp_path / "lock").write_text("raylib==1\n")
    with pytest.raises(ConfigError, match="does not pin ray"):
        locked_version(tmp_path / "lock", "ray")
