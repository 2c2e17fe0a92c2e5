"""Build the manifests of a folder as `kubectl kustomize` would, without it.

Understood: `resources`, `namespace`, `patches` of JSON 6902 with a target, and `configMapGenerator` of files without a
name suffix. A kustomization that uses more is built by kubectl where there is one.
"""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from jobs.manifests.findings import Finding, Manifest, at, fields, listed

KUSTOMIZATION: Final = "kustomization.yaml"
_UNDERSTOOD: Final = frozenset(
    ("apiVersion", "kind", "resources", "namespace", "patches", "configMapGenerator", "generatorOptions")
)


class CannotBuild(Exception):
    """A file that cannot be read or built; its message says which and why."""

    def __init__(self, file: Path, message: str) -> None:
        super().__init__(message)
        self.finding = Finding(str(file), "-", "build", message)


def build_folder(folder: Path) -> tuple[list[Manifest], list[Finding]]:
    """Everything in a folder: each kustomization built, and each file of manifests that none of them uses.

    A manifest that several kustomizations give alike comes once; one that a ConfigMap holds as text comes too.
    """
    manifests: dict[str, Manifest] = {}
    problems: list[Finding] = []
    used: set[Path] = set()
    for file in sorted(folder.rglob(KUSTOMIZATION)):
        try:
            built = build(file.parent, used)
        except CannotBuild as error:
            problems.append(error.finding)
            continue
        manifests |= {repr((manifest.file, manifest.body)): manifest for manifest in built}
    for file in sorted({*folder.rglob("*.yaml"), *folder.rglob("*.yml")} - used):
        try:
            manifests |= {repr((str(file), body)): Manifest(str(file), body) for body in _documents(file)}
        except CannotBuild as error:
            problems.append(error.finding)
    return list(manifests.values()), list(dict.fromkeys(problems))


def build(folder: Path, used: set[Path]) -> list[Manifest]:
    """The manifests of one kustomization; the files that it read are added to `used`.

    Raises:
        CannotBuild: naming the file.
    """
    file = folder / KUSTOMIZATION
    used.add(file)
    documents = _documents(file)
    kustomization = documents[0] if documents else {}
    manifests: list[Manifest] = []
    for name in kustomization.get("resources") or []:
        path = _resolved(folder / str(name))
        if path.is_dir():
            manifests += build(path, used)
        else:
            used.add(path)
            manifests += [Manifest(str(path), body) for body in _documents(path)]
    more = sorted(set(kustomization) - _UNDERSTOOD)
    if more:
        return _built_by_kubectl(file, more)
    for entry in listed(kustomization.get("configMapGenerator")):
        manifests += _config_map(file, entry, kustomization, used)
    for patch in listed(kustomization.get("patches")):
        manifests = _patched(file, manifests, patch)
    namespace = kustomization.get("namespace")
    return [_in_namespace(manifest, str(namespace)) for manifest in manifests] if namespace else manifests


def _resolved(path: Path) -> Path:
    """Without `..`, but not absolute where the folder was not, so that findings read as the command line does."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)


def _documents(file: Path) -> list[dict[str, Any]]:
    try:
        return list(documents(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise CannotBuild(file, str(error)) from error


def documents(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a YAML text.

    Raises:
        yaml.YAMLError, ValueError: the text is not YAML, or a document is not an object, or says a key twice.
    """
    for document in yaml.load_all(text, _StrictLoader):
        if document is None:
            continue
        if not isinstance(document, dict):
            raise ValueError(f"an object was expected, not {type(document).__name__}")
        yield document


class _StrictLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win; Kubernetes refuses them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is there twice")
        return super().construct_mapping(node, deep)


def _config_map(file: Path, entry: dict[str, Any], kustomization: dict[str, Any], used: set[Path]) -> list[Manifest]:
    """The ConfigMap, then the manifests in its files, which somebody applies later."""
    if not at(kustomization, "generatorOptions", "disableNameSuffixHash") or set(entry) - {"name", "files"}:
        return _built_by_kubectl(file, ["configMapGenerator"])
    paths = [_resolved(file.parent / str(name)) for name in entry.get("files") or []]
    used.update(paths)
    inner = [
        Manifest(str(path), body) for path in paths if path.suffix in (".yaml", ".yml") for body in _documents(path)
    ]
    data = {path.name: path.read_text(encoding="utf-8") for path in paths}
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry.get("name")}, "data": data}
    return [Manifest(str(file), body), *inner]


def _patched(file: Path, manifests: list[Manifest], patch: dict[str, Any]) -> list[Manifest]:
    target = patch.get("target")
    try:
        operations = yaml.safe_load(str(patch.get("patch", "")))
    except yaml.YAMLError as error:
        raise CannotBuild(file, f"a patch is not YAML: {error}") from error
    if not isinstance(target, dict) or set(target) - {"kind", "name"} or not isinstance(operations, list):
        return _built_by_kubectl(file, ["patches other than JSON 6902 with a target's kind and name"])
    chosen = [m for m in manifests if (m.kind, m.name) == (target.get("kind", m.kind), target.get("name", m.name))]
    if not chosen:
        raise CannotBuild(file, f"no manifest is the patch's target {target}")
    return [Manifest(str(file), _with(file, m.body, operations)) if m in chosen else m for m in manifests]


def _with(file: Path, body: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of a body after JSON 6902's add, replace and remove."""
    changed = copy.deepcopy(body)
    for operation in operations:
        try:
            *way, last = (part.replace("~1", "/").replace("~0", "~") for part in str(operation["path"]).split("/")[1:])
            parent: Any = changed
            for part in way:
                parent = parent[int(part)] if isinstance(parent, list) else parent[part]
            _apply(parent, last, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise CannotBuild(file, f"a patch cannot be applied: {operation}: {error!r}") from error
    return changed


def _apply(parent: Any, last: str, operation: dict[str, Any]) -> None:
    key: Any = last if isinstance(parent, dict) else len(parent) if last == "-" else int(last)
    if operation["op"] == "remove":
        del parent[key]
    elif operation["op"] == "add" and isinstance(parent, list):
        parent.insert(key, operation["value"])
    elif operation["op"] in ("add", "replace"):
        if operation["op"] == "replace":
            parent[key]  # there must be something to replace
        parent[key] = operation["value"]
    else:
        raise ValueError(f"op {operation['op']}")


CLUSTER_WIDE: Final = frozenset(("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding"))


def _in_namespace(manifest: Manifest, namespace: str) -> Manifest:
    if manifest.kind in CLUSTER_WIDE:
        return manifest
    return Manifest(
        manifest.file, manifest.body | {"metadata": fields(manifest.body.get("metadata")) | {"namespace": namespace}}
    )


def _built_by_kubectl(file: Path, why: list[str]) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise CannotBuild(file, f"{', '.join(why)}: needs kubectl to be built, and there is none on this machine")
    ended = subprocess.run([kubectl, "kustomize", str(file.parent)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CannotBuild(file, ended.stderr.strip())
    return [Manifest(str(file), body) for body in documents(ended.stdout)]
