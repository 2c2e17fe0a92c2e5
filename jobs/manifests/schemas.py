"""Hold KubeRay's kinds against the schemas of its CRDs, and built-in kinds against kubernetes-validate's, if installed.

A CRD's schema accepts unknown fields, which the API server drops; here they are findings, as with
`kubectl apply --validate=strict`. The CEL rules of a CRD are not evaluated: `jobs.manifests.kuberay` restates them.
"""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from jobs.manifests.findings import Finding, Manifest, at, listed
from mgmtn.errors import ConfigError

Schemas = dict[tuple[str, str], dict[str, Any]]  # (apiVersion, kind) -> strict JSON schema

KUBERNETES: Final = "1.33"  # whose schemas built-in kinds are held against
_BUILT_IN_GROUPS: Final = (
    "apps",
    "batch",
    "rbac.authorization.k8s.io",
    "networking.k8s.io",
    "policy",
    "autoscaling",
    "scheduling.k8s.io",
)
_PRESERVE: Final = "x-kubernetes-preserve-unknown-fields"


def load_crds(folder: Path) -> Schemas:
    """The schemas of every served version of every CRD in a folder.

    Raises:
        ConfigError: the folder holds no CRD.
    """
    schemas: Schemas = {}
    for file in sorted(folder.glob("*.yaml")):
        # The C parser where it is there: the three CRDs are 3 MB.
        for body in yaml.load_all(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if not isinstance(body, dict) or body.get("kind") != "CustomResourceDefinition":
                continue
            for version in listed(at(body, "spec", "versions")):
                key = (f"{body['spec']['group']}/{version['name']}", body["spec"]["names"]["kind"])
                schemas[key] = _of_root(version["schema"]["openAPIV3Schema"])
    if not schemas:
        raise ConfigError(f"crds: there is no CustomResourceDefinition in {str(folder)!r}")
    return schemas


def _of_root(schema: dict[str, Any]) -> dict[str, Any]:
    root = copy.deepcopy(schema)
    # The API server checks metadata by rules of its own; a CRD says no more than that it is an object.
    root["properties"]["metadata"] = {"type": "object"}
    _close(root)
    root["properties"]["metadata"] = {"type": "object", _PRESERVE: True}
    return root


def _close(schema: Any) -> None:
    """Forbid what an object does not list, throughout, and translate what JSON Schema says otherwise."""
    if not isinstance(schema, dict):
        return
    if "properties" in schema and "additionalProperties" not in schema and not schema.get(_PRESERVE):
        schema["additionalProperties"] = False
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["type"] = ["integer", "string"]
    for child in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        _close(child)


def check_schema(manifest: Manifest, schemas: Schemas) -> Iterator[Finding]:
    """Findings of a kind whose CRD is known."""
    schema = schemas.get((manifest.version, manifest.kind))
    if schema is None:
        return
    body = with_defaults(manifest.body, schema)
    for error in sorted(Draft202012Validator(schema).iter_errors(body), key=lambda error: list(map(str, error.path))):
        where = ".".join(map(str, error.path)) or "the object"
        yield manifest.finding("schema", f"{where}: {error.message[:300]}")


def with_defaults(value: Any, schema: Any) -> Any:
    """A value as the API server would see it: nulls of fields with a default or without a need gone, defaults set."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    filled = {key: item for key, item in value.items() if item is not None or at(properties, key, "nullable")}
    for key, property_schema in properties.items():
        if key not in filled and "default" in property_schema:
            filled[key] = copy.deepcopy(property_schema["default"])
    return {
        key: with_defaults(item, properties.get(key, schema.get("additionalProperties")))
        for key, item in filled.items()
    }


def is_built_in(manifest: Manifest) -> bool:
    group, _, version = manifest.version.rpartition("/")
    return (not group and version == "v1") or group in _BUILT_IN_GROUPS


def has_kubernetes_schemas() -> bool:
    return importlib.util.find_spec("kubernetes_validate") is not None


def check_built_in(manifest: Manifest) -> Iterator[Finding]:
    """Findings of a built-in kind by kubernetes-validate, which must be installed."""
    validate: Any = importlib.import_module("kubernetes_validate")
    try:
        validate.validate(manifest.body, KUBERNETES, strict=True)
    except validate.ValidationError as error:
        where = ".".join(map(str, getattr(error, "path", ()))) or "the object"
        yield manifest.finding("schema", f"{where}: {error.message[:300]}")
    except validate.SchemaNotFoundError as error:
        yield manifest.finding("schema", str(error))
