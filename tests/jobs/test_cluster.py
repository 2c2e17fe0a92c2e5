import pytest
from pydantic import ValidationError

from jobs import cluster
from jobs.cluster import ClusterSettings, Pools, nodes_awaited, share
from mgmtn.errors import ConfigError

CPU, GPU = (0.75, 0.25, 0.0), (1.0, 0.0, 1.0)  # CPUs of a face worker and of a model worker, GPUs of a model worker


@pytest.mark.parametrize(
    ("cpus", "gpus", "wishes", "workers", "each"),
    [
        (1, 0, (None, None), (1, 1), CPU),
        (2, 0, (None, None), (2, 2), CPU),
        (64, 0, (None, None), (64, 64), CPU),
        (4, 0, (1, None), (1, 4), CPU),
        (4, 0, (None, 1), (4, 1), CPU),
        (4, 0, (5, 1), (5, 1), CPU),  # 4 CPUs exactly
        (2, 0.5, (None, None), (2, 2), CPU),  # half a GPU is none
        (8, 1, (None, None), (8, 1), GPU),
        (16, 4, (None, None), (16, 4), GPU),
        (16, 4, (10, 2), (10, 2), GPU),
    ],
)
def test_a_cluster_is_shared_between_the_pools(cpus, gpus, wishes, workers, each):
    pools = share(cpus=cpus, gpus=gpus, face_workers=wishes[0], model_workers=wishes[1])
    assert pools == Pools(*workers, *each)
    assert pools.face_workers * pools.cpus_per_face + pools.model_workers * pools.cpus_per_model <= cpus
    assert pools.model_workers * pools.gpus_per_model <= gpus


@pytest.mark.parametrize(
    ("cpus", "gpus", "wishes", "problem"),
    [
        (2, 0, (3, None), r"3 \+ 2 processes need 2\.75 CPUs \(0\.75 and 0\.25 each\), the cluster has 2;"),
        (2, 0, (None, 50), r"2 \+ 50 processes need 14 CPUs .* the cluster has 2;"),
        (8, 2, (9, None), r"9 \+ 2 processes need 9 CPUs \(1 and 0 each\), the cluster has 8;"),
        (8, 2, (None, 3), r"model_workers: 3 need a GPU each, the cluster has 2"),
        (0, 1, (None, None), r"1 \+ 1 processes need 1 CPUs .* the cluster has 0;"),
    ],
)
def test_what_cannot_fit_is_refused_with_its_numbers(cpus, gpus, wishes, problem):
    with pytest.raises(ConfigError, match=problem):
        share(cpus=cpus, gpus=gpus, face_workers=wishes[0], model_workers=wishes[1])


@pytest.mark.parametrize("wrong", [{"num_cpus": 0}, {"object_store_gb": 0.05}, {"nodes": 2}])
def test_a_cluster_that_cannot_start_is_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ClusterSettings(**wrong)


@pytest.fixture
def autoscaler(monkeypatch):
    """A cluster that grows by four CPUs and a GPU each time it is looked at; what it was asked for."""
    asked, nodes = [], iter(range(1000))
    monkeypatch.setattr(cluster, "request_resources", lambda **wanted: asked.append(wanted))
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.001)

    def totals():
        number = next(nodes)
        return {"CPU": 4.0 * number, "GPU": float(number)}

    monkeypatch.setattr(cluster, "totals", totals)
    return asked


def test_a_cluster_that_scales_is_asked_for_nodes_waited_for_and_let_go(autoscaler):
    with nodes_awaited(ClusterSettings(wait_cpus=8, wait_gpus=2)):
        assert autoscaler == [{"bundles": [{"CPU": 1}] * 8 + [{"GPU": 1}] * 2}]
        assert cluster.totals()["CPU"] > 8
    assert autoscaler[1:] == [{"num_cpus": 0}]


def test_nodes_that_do_not_come_end_the_job(autoscaler, monkeypatch):
    monkeypatch.setattr(cluster, "totals", lambda: {"CPU": 4.0, "GPU": 0.0})
    with (
        pytest.raises(ConfigError, match=r"'GPU': 1.* wanted, the cluster has .* after 0.01 s"),
        nodes_awaited(ClusterSettings(wait_gpus=1, wait_seconds=0.01)),
    ):
        raise AssertionError
    assert autoscaler[-1] == {"num_cpus": 0}


def test_a_job_that_waits_for_no_nodes_asks_for_none(autoscaler):
    with nodes_awaited(ClusterSettings()):
        pass
    assert autoscaler == []
