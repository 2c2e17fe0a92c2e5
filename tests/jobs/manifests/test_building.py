"""What a folder of manifests gives, without kubectl as with it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.manifests.building import KUSTOMIZATION, CannotBuild, build, build_folder

KUSTOMIZATIONS = sorted(path.parent for path in (Path(__file__).parents[3] / "k8s").rglob(KUSTOMIZATION))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_a_kustomization_is_built_as_kubectl_builds_it(folder):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl on this machine")
    ended = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True)
    theirs = {(body["kind"], body["metadata"]["name"]): body for body in yaml.safe_load_all(ended.stdout)}
    ours = {(manifest.kind, manifest.name): manifest.body for manifest in build(folder, set())}
    if folder.name == "nightly":
        del ours[("RayJob", "mgmtn-nightly")]  # to kubectl only a ConfigMap's text
    assert ours == theirs


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_key_that_is_there_twice_is_a_finding(tmp_path):
    _, [problem] = build_folder(write(tmp_path, pod="kind: Pod\nmetadata:\n  name: a\n  name: b\n"))
    assert "name is there twice" in str(problem)


@pytest.mark.parametrize(
    "text",
    [
        "resources: [missing.yaml]",
        "resources: [pod.yaml]\npatches: [{target: {kind: Job}, patch: '[]'}]",
        "resources: [pod.yaml]\npatches: [{target: {kind: Pod}, patch: '[{op: replace, path: /spec/a, value: 1}]'}]",
        "resources: [pod.yaml]\npatches: [{target: {kind: Pod}, patch: '[{op: jump, path: /kind}]'}]",
        "resources: [pod.yaml]\npatches: [{target: {kind: Pod}, patch: '[{'}]",
    ],
)
def test_a_kustomization_that_cannot_be_built_is_a_finding(tmp_path, text):
    write(tmp_path, pod="kind: Pod\nmetadata: {name: a}\n", kustomization=text)
    with pytest.raises(CannotBuild):
        build(tmp_path, set())


def test_what_we_cannot_build_needs_kubectl(tmp_path, monkeypatch):
    write(tmp_path, pod="kind: Pod\nmetadata: {name: a}\n", kustomization="resources: [pod.yaml]\nnamePrefix: x-")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    _, [problem] = build_folder(tmp_path)
    assert "namePrefix: needs kubectl" in problem.message
