"""The smoke command tells an installation that works from one that does not."""

import json
import shutil

import pytest

from jobs import smoke
from mgmtn import checkpoint


def test_every_model_that_ships_is_asked(capsys):
    assert smoke.main([]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["smiling"]) == set(checkpoint.shipped_models())
    assert any(value is not None and value > 0.5 for value in summary["smiling"].values())


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A copy of the model that ships, to damage."""
    shutil.copytree(checkpoint.MODELS / checkpoint.DEFAULT_MODEL, tmp_path / checkpoint.DEFAULT_MODEL)
    monkeypatch.setattr(checkpoint, "MODELS", tmp_path)
    return tmp_path / checkpoint.DEFAULT_MODEL


def test_damaged_weights_are_found(models, capsys):
    weights = models / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert smoke.main([]) == 2
    assert "sha256" in capsys.readouterr().err


def test_a_model_that_answers_nonsense_is_found(models, capsys, monkeypatch):
    monkeypatch.setattr(smoke, "smile", lambda *args, **more: 0.01)
    assert smoke.main([]) == 1
    said = capsys.readouterr()
    assert "no smile" in said.err
    assert json.loads(said.out)["smiling"] == {checkpoint.DEFAULT_MODEL: 0.01}


def test_a_gpu_that_is_not_there_is_a_wrong_setting(capsys, monkeypatch):
    monkeypatch.setattr(smoke.torch.cuda, "is_available", lambda: False)
    assert smoke.main(["--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
