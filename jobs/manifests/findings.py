"""What a check has to say about a manifest, and the manifest as the checks see it."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One thing to correct: `file: kind/name: rule: message`."""

    file: str
    subject: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.subject}: {self.rule}: {' '.join(self.message.split())}"


@dataclass(frozen=True)
class Manifest:
    """One Kubernetes object, as it would be applied.

    `file` is where to correct it: its own file, or the kustomization that patched it last.
    """

    file: str
    body: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.body.get("kind", "?"))

    @property
    def name(self) -> str:
        metadata = self.body.get("metadata")
        return str(metadata.get("name", "?")) if isinstance(metadata, dict) else "?"

    @property
    def version(self) -> str:
        return str(self.body.get("apiVersion", "?"))

    def finding(self, rule: str, message: str) -> Finding:
        return Finding(self.file, f"{self.kind}/{self.name}", rule, message)


def at(value: Any, *path: str | int) -> Any:
    """The value at a path of keys and indices; None where any part of the way is missing."""
    for part in path:
        if isinstance(value, dict) and isinstance(part, str):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def integer(value: Any) -> int:
    """A count or a duration; 0 where it is missing or something else, which the schema reports."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def fields(value: Any) -> dict[str, Any]:
    """The fields of an object; none where it is missing or something else, which the schema reports."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none where it is missing or holds something else, which the schema reports."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
