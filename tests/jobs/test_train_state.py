import pytest
import torch
from torch import nn

from jobs.optimisation import averaged
from jobs.train_state import PROGRESS_FILE, Progress, load_tensors, save_tensors
from mgmtn.errors import ConfigError


def ended(scores: list[float]) -> Progress:
    """A run after an epoch of each score; the weights of epoch i are i."""
    progress = Progress(samples=100)
    for epoch, score in enumerate(scores):
        progress.seen, progress.loss_sum = 96, 3.5
        weights = {"weight": torch.full((2,), float(epoch))}
        progress.end_epoch({"score": score, "epoch": epoch}, weights=weights, results=torch.full((1, 2), float(epoch)))
    return progress


@pytest.mark.parametrize(
    ("scores", "best"), [([0.5], 0), ([0.5, 0.7, 0.6], 1), ([0.5, 0.5], 0), ([float("nan"), 0.1], 0)]
)
def test_the_best_epochs_weights_and_results_are_kept(scores, best):
    progress = ended(scores)
    assert progress.best is not None
    assert progress.best.epoch == best
    assert progress.best.weights["weight"].tolist() == [best, best]
    assert progress.best.results.tolist() == [[best, best]]
    assert (progress.epoch, progress.seen, progress.loss_sum) == (len(scores), 0, 0.0)


def test_weights_that_go_on_changing_are_not_the_kept_ones():
    progress, weights = Progress(samples=4), {"weight": torch.zeros(2)}
    progress.end_epoch({"score": 0.5}, weights=weights, results=torch.zeros(1))
    weights["weight"] += 1
    assert progress.best is not None
    assert progress.best.weights["weight"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("scores", "patience", "out"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.4], 1, True),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.6, 0.5], 2, False),
        ([0.5, 0.4, 0.3, 0.2], 0, False),
    ],
)
def test_patience_is_the_number_of_epochs_without_a_better_score(scores, patience, out):
    assert ended(scores).out_of_patience(patience) == out


@pytest.mark.parametrize("scores", [[], [0.5, 0.7, 0.6]])
def test_progress_is_read_back_as_it_was(tmp_path, scores):
    progress = ended(scores)
    progress.seen, progress.loss_sum = 32, 0.1 + 0.2
    progress.steps.append({"step": 3, "loss": 1 / 3, "time": 1.5})
    progress.save(tmp_path)
    read = Progress.load(tmp_path)
    assert (read.samples, read.epoch, read.seen, read.loss_sum) == (100, len(scores), 32, 0.1 + 0.2)
    assert (read.epochs, read.steps) == (progress.epochs, progress.steps)
    if progress.best is None:
        assert read.best is None
    else:
        assert read.best is not None
        assert read.best.epoch == progress.best.epoch
        assert torch.equal(read.best.weights["weight"], progress.best.weights["weight"])
        assert torch.equal(read.best.results, progress.best.results)


def test_an_earlier_versions_run_is_refused(tmp_path):
    (tmp_path / PROGRESS_FILE).write_text('{"epoch": 3, "score": 0.5}')
    with pytest.raises(ConfigError, match="output: holds the state of an earlier version's run"):
        Progress.load(tmp_path)


TRAINED = {"network": {"fusion": "concat", "levels": [3, 4]}, "init": None}


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (
            {"network": {"fusion": "gate", "levels": [3, 4]}, "init": None},
            "network.fusion was 'concat' there, and is 'gat",
        ),
        (
            {"network": {"fusion": "concat", "levels": [4]}, "init": None},
            r"network.levels was \[3, 4\] there, and is \[4",
        ),
        ({"network": {"fusion": "concat", "levels": [3, 4]}, "init": "a-1"}, "init was None there, and is 'a-1'"),
        ({"network": {"fusion": "concat", "levels": [3, 4]}}, None),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(tmp_path, now, problem):
    Progress(samples=100, trained=TRAINED).save(tmp_path)
    progress = Progress.load(tmp_path)
    progress.check(samples=100, trained=TRAINED)
    with pytest.raises(ConfigError, match="output: holds a run on 100 training samples, and there are 99 now"):
        progress.check(samples=99, trained=TRAINED)
    if problem is None:
        progress.check(samples=100, trained=now)
        return
    with pytest.raises(ConfigError, match=problem):
        progress.check(samples=100, trained=now)


def trained(module: nn.Module, *, steps: int) -> tuple[nn.Module, torch.optim.AdamW, nn.Module]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    average = averaged(module, 0.9)
    for step in range(steps):
        module(torch.full((3, 2), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(module)
    return module, optimizer, average


def test_a_step_after_reading_back_is_the_step_that_would_have_come(tmp_path):
    torch.manual_seed(0)
    module, optimizer, average = trained(nn.Linear(2, 2), steps=3)
    save_tensors(tmp_path, module=module, average=average, optimizer=optimizer)
    other, other_optimizer, other_average = trained(nn.Linear(2, 2), steps=0)
    load_tensors(tmp_path, module=other, average=other_average, optimizer=other_optimizer)
    for net, mover, mean in ((module, optimizer, average), (other, other_optimizer, other_average)):
        net(torch.ones(1, 2)).sum().backward()
        mover.step()
        mean.update_parameters(net)
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(average.module.weight, other_average.module.weight)
    assert other_average.n_averaged == 4


def test_another_networks_state_is_refused(tmp_path):
    module, optimizer, average = trained(nn.Linear(2, 2), steps=1)
    save_tensors(tmp_path, module=module, average=average, optimizer=optimizer)
    frozen = nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    for other in (nn.Linear(2, 3), frozen):
        net, mover, mean = trained(other, steps=0)
        with pytest.raises(ConfigError, match="output: holds the state of a run with other settings"):
            load_tensors(tmp_path, module=net, average=mean, optimizer=mover)
