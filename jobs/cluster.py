"""Join a Ray cluster, or start one on this machine, and refuse a job that cannot fit instead of letting it hang.

Ray queues what does not fit and shows no error: three one-CPU actor pools on two CPUs wait for ever.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import ray
import ray.data
from pydantic import BaseModel, ConfigDict, Field
from ray.autoscaler.sdk import request_resources

from mgmtn.errors import ConfigError

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 5.0


class ClusterSettings(BaseModel):
    """Which cluster, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, description="Ray cluster to join (RAY_ADDRESS); none: one on this machine")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a cluster on this machine; none: all of them")
    object_store_gb: float = Field(1.0, gt=0.08, description="shared memory of a cluster on this machine, GB")
    wait_cpus: int = Field(0, ge=0, description="CPUs to ask an autoscaling cluster for, and to wait for, before work")
    wait_gpus: int = Field(0, ge=0, description="GPUs to ask an autoscaling cluster for, and to wait for, before work")
    wait_seconds: float = Field(1800, ge=0, description="how long nodes may take to come before the job gives up")


@contextmanager
def joined(settings: ClusterSettings, *, dashboard: bool = False) -> Iterator[None]:
    """Be a driver of the cluster; a cluster that was started for this ends with it.

    Args:
        settings: which cluster.
        dashboard: start one with a cluster on this machine; Ray Train asks it whether its controller lives.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    if ray.is_initialized():  # a test's or a notebook's cluster
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    _quieten()
    if address is None:
        _secure_private_cluster()
    try:
        ray.init(
            address=address,
            num_cpus=settings.num_cpus if address is None else None,
            object_store_memory=int(settings.object_store_gb * 1e9) if address is None else None,
            include_dashboard=dashboard if address is None else None,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"address: no Ray cluster at {address!r}: {error}") from error
    try:
        log.info("event=joined address=%s resources=%s", address or "this_machine", totals())
        with nodes_awaited(settings):
            yield
    finally:
        ray.shutdown()


@contextmanager
def nodes_awaited(settings: ClusterSettings) -> Iterator[None]:
    """Have an autoscaling cluster grow to what the settings want, and let it shrink again in the end.

    A job divides what it finds at its start, and Ray Data's own pools stay small on a cluster that could grow.

    Raises:
        ConfigError: the nodes did not come in time.
    """
    wanted = {"CPU": settings.wait_cpus, "GPU": settings.wait_gpus}
    if not any(wanted.values()):
        yield
        return
    request_resources(bundles=[{name: 1} for name, count in wanted.items() for _ in range(count)])
    try:
        deadline = time.monotonic() + settings.wait_seconds
        while any(totals()[name] < count for name, count in wanted.items()):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"cluster.wait_cpus, cluster.wait_gpus: {wanted} wanted, the cluster has {totals()} "
                    f"after {settings.wait_seconds:g} s"
                )
            log.info("event=waiting_for_nodes wanted=%s resources=%s", wanted, totals())
            time.sleep(POLL_SECONDS)
        yield
    finally:
        request_resources(num_cpus=0)


def _secure_private_cluster() -> None:
    """Give a cluster that lives as long as one command a token of its own, kept in memory.

    Ray 2.60 turns token authentication on for it, and without this would leave the token in the home directory, where
    it changes how a later `ray start` and `ray job submit` behave.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _quieten() -> None:
    """Progress is ours to show, and Ray Data's account of its operators is for debugging."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if log.isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # What they warn of is what we chose: our own progress, and a private cluster's token.
    for name in ("ray.data._internal.progress", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)


def totals() -> dict[str, float]:
    """CPUs and GPUs of the whole cluster."""
    resources = ray.cluster_resources()
    return {name: float(resources.get(name, 0.0)) for name in ("CPU", "GPU")}


# Without a GPU a face worker and a model worker share a core, and the system balances them by what each face costs.
# A model worker that holds a core for itself idles while faces are sought: measured at half the speed (make bench).
FACE_CPUS, MODEL_CPUS = 0.75, 0.25


@dataclass(frozen=True)
class Pools:
    """How a labelling job shares the cluster between its two pools of actors."""

    face_workers: int
    model_workers: int
    cpus_per_face: float
    cpus_per_model: float
    gpus_per_model: float


def share(*, cpus: float, gpus: float, face_workers: int | None, model_workers: int | None) -> Pools:
    """Divide the cluster between the processes that find faces and those that run the model.

    Without wishes: a face worker on every CPU, and a model worker on every GPU, or beside every face worker where there
    is no GPU.

    Raises:
        ConfigError: the pools do not fit the cluster.
    """
    on_gpu = gpus >= 1
    if model_workers is None:
        model_workers = int(gpus) if on_gpu else max(1, int(cpus))
    if face_workers is None:
        face_workers = max(1, int(cpus))
    pools = Pools(
        face_workers=face_workers,
        model_workers=model_workers,
        cpus_per_face=1.0 if on_gpu else FACE_CPUS,
        cpus_per_model=0.0 if on_gpu else MODEL_CPUS,  # a CPU held beside a GPU is one face worker fewer
        gpus_per_model=1.0 if on_gpu else 0.0,
    )
    if on_gpu and model_workers > gpus:
        raise ConfigError(f"model_workers: {model_workers} need a GPU each, the cluster has {gpus:g}")
    needed = face_workers * pools.cpus_per_face + model_workers * pools.cpus_per_model
    if needed > cpus:
        raise ConfigError(
            f"face_workers, model_workers: {face_workers} + {model_workers} processes need {needed:g} CPUs "
            f"({pools.cpus_per_face:g} and {pools.cpus_per_model:g} each), the cluster has {cpus:g}; "
            "ask for fewer, or give the cluster more (on this machine: --cluster.num-cpus)"
        )
    return pools
