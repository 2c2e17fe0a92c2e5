"""Check Kubernetes manifests without a cluster: `mgmtn lint k8s/ --crds CRDS`.

Every kustomization of the folder is built, and every manifest held against its schema, the rules of the KubeRay
operator, and what it is to run. Findings go to stdout, one a line, `file: kind/name: rule: message`; with any, the exit
code is 2.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.manifests.building import build_folder
from jobs.manifests.findings import Finding, Manifest
from jobs.manifests.kuberay import check_kuberay
from jobs.manifests.pods import check_pods
from jobs.manifests.programs import check_program, check_versions, locked_version
from jobs.manifests.references import check_references
from jobs.manifests.schedules import check_schedules
from jobs.manifests.schemas import (
    Schemas,
    check_built_in,
    check_schema,
    has_kubernetes_schemas,
    is_built_in,
    load_crds,
)
from jobs.outcomes import EXIT_USAGE, Refused
from jobs.settings import Settings, run_program
from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]


class LintSettings(Settings):
    """Settings of `mgmtn lint`."""

    manifests: CliPositionalArg[Path] = Field(description="folder of manifests and kustomizations")
    crds: Path | None = Field(None, description="folder of KubeRay's CRDs, whose schemas to hold its kinds against")
    lock: Path = Field(ROOT / "deploy" / "requirements.lock", description="lock file, whose Ray rayVersion must be")


class FindingsFound(Refused):
    """The manifests are not as they should be."""

    exit_code = EXIT_USAGE


def run(settings: LintSettings) -> None:
    """Print the findings.

    Raises:
        ConfigError: there is nothing to check, or nothing to check it against.
        FindingsFound: there are findings.
    """
    if not settings.manifests.is_dir():
        raise ConfigError(f"MANIFESTS {str(settings.manifests)!r}: there is no such folder")
    schemas = load_crds(settings.crds) if settings.crds else {}
    manifests, problems = build_folder(settings.manifests)
    if not manifests and not problems:
        raise ConfigError(f"MANIFESTS {str(settings.manifests)!r}: there is no manifest")
    _say_what_is_unchecked(manifests, schemas)
    ray = locked_version(settings.lock, "ray")
    found = sorted({*problems, *check(manifests, schemas=schemas, ray=ray)})
    sys.stdout.writelines(f"{finding}\n" for finding in found)
    if found:
        raise FindingsFound(f"{len(found)} findings in {len(manifests)} manifests")
    log.info("event=clean manifests=%d", len(manifests))


def check(manifests: list[Manifest], *, schemas: Schemas, ray: str) -> Iterator[Finding]:
    """Everything that is wrong with the manifests."""
    for manifest in manifests:
        yield from check_schema(manifest, schemas)
        if is_built_in(manifest) and has_kubernetes_schemas():
            yield from check_built_in(manifest)
        yield from check_kuberay(manifest)
        yield from check_pods(manifest)
        yield from check_versions(manifest, ray=ray, mgmtn=version("mgmtn"))
        yield from check_program(manifest)
    yield from check_schedules(manifests)
    yield from check_references(manifests)


def _say_what_is_unchecked(manifests: Iterable[Manifest], schemas: Schemas) -> None:
    """A clean result must not be taken for more than it is."""
    rest = sorted(
        {manifest.kind for manifest in manifests if not is_built_in(manifest)} - {kind for _, kind in schemas}
    )
    if rest:
        log.warning("unchecked=%s reason=%r", ",".join(rest), "no schema is given (--crds); our own rules only")
    if not has_kubernetes_schemas():
        log.warning("unchecked=built_in_kinds reason=%r", "kubernetes-validate is not installed; our own rules only")


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(LintSettings, run, argv, prog="mgmtn lint", description=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
